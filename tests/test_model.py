"""Saving, loading and switching adapters."""

import json
import warnings

import pytest
import torch
from helpers import (
    CAPTIONS,
    answer,
    assert_same,
    attach,
    base_weights,
    draw,
    drawing_inputs,
    logits,
    lora_weights,
    question_inputs,
    randomise,
    small_config,
)
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from tiny_world.tiny_janus import make_processor
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from uc_adapters import UniCompressCollator, UniCompressConfig, UniCompressModel, __version__, get_uc_model
from uc_adapters.errors import AdapterFileError, BaseModelError, InputError, UnsupportedError

under_both_names = pytest.mark.parametrize("name", ["default", "zap"])


class Saved:
    """An adapter on disk, beside its processor, and what its model said and drew before it was saved."""

    def __init__(self, folder, base_folder, processor, question, prompts, **fields):
        base = AutoModelForImageTextToText.from_pretrained(base_folder)
        self.folder, self.question, self.prompts = folder, question, prompts
        self.model = attach(base, **fields)
        self.model.save_pretrained(folder)
        processor.save_pretrained(folder)
        self.logits, self.drawn = logits(self.model, question), draw(self.model, prompts)

    def assert_reads_alike(self, model) -> None:
        assert torch.equal(logits(model, self.question), self.logits)

    def assert_draws_alike(self, model) -> None:
        assert torch.equal(draw(model, self.prompts), self.drawn)


@pytest.fixture(scope="module", params=["strip", "phase"])  # of each head one; the files of "raster" are those of "phase"
def saved(request, tmp_path_factory, base_folder, short_processor, short_question):
    folder = tmp_path_factory.mktemp(request.param)
    prompts = drawing_inputs(short_processor, CAPTIONS)
    return Saved(folder, base_folder, short_processor, short_question, prompts, decompressor=request.param)


@under_both_names
def test_loading_on_a_loaded_base(saved, base, name):
    model = UniCompressModel.from_pretrained(base, saved.folder, adapter_name=name)
    assert model.active_adapters == [name]
    saved.assert_reads_alike(model)
    saved.assert_draws_alike(model)


@pytest.mark.parametrize("kind", ["model", "folder", "path"])
def test_loading_with_base_model(saved, base, base_folder, kind):
    given = {"model": base, "folder": str(base_folder), "path": base_folder}[kind]
    model = UniCompressModel.from_pretrained(saved.folder, base_model=given)
    saved.assert_reads_alike(model)
    saved.assert_draws_alike(model)


def test_loading_from_the_adapter_alone(saved):
    model = UniCompressModel.from_pretrained(str(saved.folder))
    saved.assert_reads_alike(model)
    saved.assert_draws_alike(model)


def test_the_base_given_twice_is_refused(saved, base):
    with pytest.raises(InputError, match="twice"):
        UniCompressModel.from_pretrained(base, saved.folder, base_model=base)


def test_a_base_without_an_adapter_is_refused(base):
    with pytest.raises(InputError, match="without an adapter"):
        UniCompressModel.from_pretrained(base)


def test_a_base_that_cannot_be_loaded_is_named(saved, tmp_path):
    with pytest.raises(BaseModelError, match=r"no-such-base.*base_model="):
        UniCompressModel.from_pretrained(saved.folder, base_model=tmp_path / "no-such-base")


def test_an_adapter_that_names_no_base_is_refused(base, tmp_path):
    attach(base).save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"names no base.*base_model="):
        UniCompressModel.from_pretrained(tmp_path)


@under_both_names
def test_peft_model_reads_alike_and_refuses_to_draw(saved, base, name):
    model = PeftModel.from_pretrained(base, saved.folder, adapter_name=name)
    saved.assert_reads_alike(model)
    with pytest.raises(UnsupportedError, match="UniCompressModel"):
        draw(model, saved.prompts)


@under_both_names
def test_auto_peft_model_reads_alike_and_refuses_to_draw(saved, name):
    model = AutoPeftModel.from_pretrained(str(saved.folder), adapter_name=name)
    saved.assert_reads_alike(model)
    with pytest.raises(UnsupportedError, match="UniCompressModel"):
        draw(model, saved.prompts)


@under_both_names
def test_transformers_load_adapter_reads_alike_and_refuses_to_draw(saved, base, name):
    base.load_adapter(str(saved.folder), name)
    saved.assert_reads_alike(base)
    assert_same(lora_weights(base, name), renamed(lora_weights(saved.model), name))
    with pytest.raises(UnsupportedError, match="UniCompressModel"):
        draw(base, saved.prompts)


def test_dora_through_transformers_load_adapter_reads_alike(base, fresh, tmp_path, short_question):
    model = attach(fresh(), use_dora=True)
    model.save_pretrained(tmp_path)
    expected = logits(model, short_question)
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, short_question), expected)
    assert torch.equal(logits(UniCompressModel.from_pretrained(model.unload(), tmp_path), short_question), expected)


def renamed(weights: dict, name: str) -> dict:
    return {key.removeprefix("base_model.model.").replace(".default.", f".{name}."): value for key, value in weights.items()}


def test_transformers_from_pretrained_of_the_adapter_reads_alike(saved):
    saved.assert_reads_alike(AutoModelForImageTextToText.from_pretrained(saved.folder))


def test_the_processor_beside_the_adapter_has_the_short_count(saved, processor):
    assert AutoProcessor.from_pretrained(saved.folder).num_image_tokens == saved.model.num_image_tokens == 21
    assert processor.num_image_tokens == 64


@pytest.mark.parametrize("load", [UniCompressModel.from_pretrained, PeftModel.from_pretrained])
def test_low_cpu_mem_usage(saved, base, load):
    model = load(base, saved.folder, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    saved.assert_reads_alike(model)


def test_loading_a_second_time_into_the_same_model(saved, base):
    model = attach(base, seed=1, decompressor=saved.model.active_peft_config.decompressor)
    model.load_adapter(saved.folder, "again")
    model.set_adapter("again")
    saved.assert_reads_alike(model)
    saved.assert_draws_alike(model)


def test_loading_trainable(saved, base):
    model = UniCompressModel.from_pretrained(base, saved.folder, is_trainable=True)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    frozen = UniCompressModel.from_pretrained(model.unload(), saved.folder)
    assert not any(parameter.requires_grad for name, parameter in frozen.named_parameters() if "lora_" in name)


def test_the_file_holds_every_adapter_weight_and_no_base_weight(saved, pristine):
    stored = load_file(saved.folder / SAFETENSORS_WEIGHTS_NAME)
    expected = {name.replace(".default.", "."): value for name, value in lora_weights(saved.model).items()}
    assert_same(stored, expected)
    assert not any(name.removeprefix("base_model.model.") in pristine.state_dict() for name in stored)


def test_get_and_set_peft_model_state_dict(saved, base):
    state = get_peft_model_state_dict(saved.model)
    assert_same(state, load_file(saved.folder / SAFETENSORS_WEIGHTS_NAME))
    model = attach(base, "zap", seed=1, decompressor=saved.model.active_peft_config.decompressor)
    set_peft_model_state_dict(model, state, adapter_name="zap")
    saved.assert_reads_alike(model)
    saved.assert_draws_alike(model)


def test_peft_config_from_pretrained(saved, base_folder):
    config = PeftConfig.from_pretrained(saved.folder)
    assert type(config) is UniCompressConfig
    assert config.base_model_name_or_path == str(base_folder)
    assert config.uc_adapters_version == __version__


def test_the_config_file_names_the_base_class(saved):
    config = json.loads((saved.folder / CONFIG_NAME).read_text())
    assert config["auto_mapping"]["base_model_class"] == "JanusForConditionalGeneration"


def test_saving_what_was_loaded_gives_the_same_file(saved, base, tmp_path):
    UniCompressModel.from_pretrained(base, saved.folder, adapter_name="zap").save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / "zap" / SAFETENSORS_WEIGHTS_NAME), load_file(saved.folder / SAFETENSORS_WEIGHTS_NAME))


@pytest.mark.parametrize("targets", [[], ["q_proj"], "all-linear"])
def test_other_targets_survive_a_reload(base, tmp_path, short_question, targets):
    model = attach(base, target_modules=targets)
    model.save_pretrained(tmp_path)
    expected = logits(model, short_question)
    assert torch.equal(logits(UniCompressModel.from_pretrained(model.unload(), tmp_path), short_question), expected)


WIDE = {"stride": 4, "num_global_tokens": 0}


@pytest.fixture
def two(base, short_processor, images):
    """A model with two adapters of different geometry, and a way to ask the chosen one."""
    model = attach(base, "fine", seed=1, stride=2, num_global_tokens=4)
    model.add_adapter("wide", small_config(**WIDE, decompressor="phase"))
    randomise(model, "wide", 2)
    processors = {"fine": short_processor, "wide": make_processor(5)}

    def ask(name, model=model):
        model.set_adapter(name)
        inputs = question_inputs(processors[name], ["How many digits are there?"], images[:1])
        return logits(model, inputs), answer(model, inputs), draw(model, drawing_inputs(processors[name], CAPTIONS))

    return model, ask


def assert_all_equal(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_two_adapters_of_different_geometry_switch_back_and_forth(two):
    model, ask = two
    fine, wide = ask("fine"), ask("wide")
    assert model.num_image_tokens == 5
    assert_all_equal(ask("fine"), fine)
    assert model.num_image_tokens == 21
    assert_all_equal(ask("wide"), wide)


def test_an_adapter_behaves_as_if_it_were_alone(two, fresh):
    _, ask = two
    alone = attach(fresh(), "fine", seed=1)
    assert_all_equal(ask("fine"), ask("fine", alone))


def test_two_adapters_save_to_and_load_from_their_own_folders(two, fresh, tmp_path):
    model, ask = two
    model.save_pretrained(tmp_path)
    again = UniCompressModel.from_pretrained(fresh(), tmp_path / "wide", "wide")
    again.load_adapter(tmp_path, "fine", subfolder="fine")
    for name in ("fine", "wide"):
        assert_all_equal(ask(name, again), ask(name))


def test_a_subfolder_of_a_repo_is_loaded(two, fresh, tmp_path):
    model, ask = two
    model.save_pretrained(tmp_path)
    again = UniCompressModel.from_pretrained(fresh(), tmp_path, "wide", subfolder="wide")
    assert_all_equal(ask("wide", again), ask("wide"))


def test_get_uc_model_names_the_base(base_folder):
    base = AutoModelForImageTextToText.from_pretrained(base_folder)
    assert get_uc_model(base, small_config()).peft_config["default"].base_model_name_or_path == str(base_folder)


@pytest.fixture
def half(base):
    return attach(base.to(torch.bfloat16))


def test_a_bfloat16_base_reads_and_draws(half, short_processor, short_question):
    assert all(parameter.dtype == torch.float32 for name, parameter in half.named_parameters() if "lora_" in name)
    assert logits(half, short_question).dtype == torch.bfloat16
    assert answer(half, short_question).shape == (1, 6)
    tokens = draw(half, drawing_inputs(short_processor, CAPTIONS))
    assert tokens.shape == (3, 64)
    assert half.decode_image_tokens(tokens).dtype == torch.bfloat16


def test_a_bfloat16_base_reloads_bit_for_bit(half, tmp_path, short_question, short_processor):
    prompts = drawing_inputs(short_processor, CAPTIONS)
    expected, drawn = logits(half, short_question), draw(half, prompts)
    half.save_pretrained(tmp_path)
    again = UniCompressModel.from_pretrained(half.unload(), tmp_path)
    assert torch.equal(logits(again, short_question), expected)
    assert torch.equal(draw(again, prompts), drawn)


def test_an_adapter_in_bfloat16_reads_and_draws(saved, base):
    model = UniCompressModel.from_pretrained(base.to(torch.bfloat16), saved.folder, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model, saved.question).isfinite().all()
    assert draw(model, saved.prompts).shape == (3, 64)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": "bfloat16", "device_map": "cpu"}])
def test_the_base_is_loaded_as_asked(saved, options):
    model = UniCompressModel.from_pretrained(saved.folder, **options)
    assert model.get_base_model().dtype == torch.bfloat16
    assert draw(model, saved.prompts).shape == (3, 64)


def test_pefts_own_get_peft_model_attaches_too(fresh, short_question):
    torch.manual_seed(0)
    ours = get_uc_model(fresh(), small_config())
    torch.manual_seed(0)
    assert torch.equal(
        logits(get_peft_model(fresh(), small_config()), short_question),
        logits(ours, short_question),
    )


def test_a_batch_over_several_adapters_is_refused(two, images):
    """PEFT's `adapter_names=` reaches LoRA alone: every row would be read through the active adapter's extractor."""
    model, _ = two
    model.set_adapter("fine")
    inputs = question_inputs(make_processor(21), ["How many digits are there?"] * 2, images[:2])
    with pytest.raises(UnsupportedError, match="adapter_names"):
        model(**inputs, adapter_names=["fine", "wide"])
    with pytest.raises(UnsupportedError, match="adapter_names"):
        model.generate(**inputs, adapter_names=["fine", "wide"], max_new_tokens=2)


def test_loading_does_not_touch_the_base(saved, base, pristine):
    assert_same(base_weights(UniCompressModel.from_pretrained(base, saved.folder)), base_weights(pristine))


def test_weights_of_another_form_do_not_take_the_place_of_an_adapters(fresh, tmp_path):
    attach(fresh(), lora_alpha=64, seed=1).save_pretrained(tmp_path)
    model = attach(fresh(), lora_alpha=8, seed=2)
    before = lora_weights(model)
    with pytest.raises(AdapterFileError, match=r"not of the form of 'default': lora_alpha 8 here, 64 there.*another name"):
        model.load_adapter(tmp_path, "default")
    assert_same(lora_weights(model), before)
    model.load_adapter(tmp_path, "other")


def test_no_weight_of_the_base_is_saved(base, tmp_path):
    with pytest.raises(UnsupportedError, match="save_embedding_layers=True"):
        attach(base).save_pretrained(tmp_path, save_embedding_layers=True)


def test_a_plain_peft_model_refuses_to_learn_drawing(saved, base, short_processor, images):
    model = PeftModel.from_pretrained(base, saved.folder)
    asked, drawn = [{"type": "text", "text": CAPTIONS[0]}], [{"type": "image"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": drawn}]
    collator = UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0)
    batch = collator([{"messages": turns, "images": images[:1]}])
    with pytest.raises(UnsupportedError, match=r"gen_pixel_values, gen_mask were passed to the base.*UniCompressModel"):
        model(**batch)
    plain = model.unload()
    assert not plain._forward_pre_hooks
    assert UniCompressModel.from_pretrained(plain, saved.folder)(**batch).loss.isfinite()


def test_a_base_quantised_whole_draws(base_folder, saved, short_processor):
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForImageTextToText.from_pretrained(base_folder, quantization_config=config, device_map={"": "cpu"})
    tokens = draw(UniCompressModel.from_pretrained(base, saved.folder), drawing_inputs(short_processor, CAPTIONS[:1]))
    assert tokens.shape == (1, 64)


def test_no_use_of_an_adapter_prints_that_a_name_is_deprecated(base, fresh, short_processor, short_question, tmp_path):
    """PEFT and transformers rename arguments and attributes; a user of this package shall not have to hear of it."""
    prompts = drawing_inputs(short_processor, ["a red 3"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = attach(base)
        model.save_pretrained(tmp_path)
        loaded = UniCompressModel.from_pretrained(fresh(), tmp_path)
        assert torch.equal(draw(loaded, prompts, do_sample=False), draw(model, prompts, do_sample=False))
        assert torch.equal(answer(loaded, short_question), answer(model, short_question))
