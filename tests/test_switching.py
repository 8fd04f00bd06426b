"""What trains, and what is compiled, through switching, disabling, loading and hot-swapping adapters."""

import json
import warnings

import pytest
import torch
from copies import copied
from helpers import (
    CAPTIONS,
    assert_same,
    attach,
    draw,
    drawing_inputs,
    logits,
    lora_weights,
    randomise,
    small_config,
)
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from test_steps import Graphs
from torch import nn

from uc_adapters import UniCompressModel
from uc_adapters.errors import AdapterFileError, AdapterNameError, BaseModelError

PARTS = ["tokenizer", "language model", "all", "nothing", "a few"]


def trains(model) -> set[str]:
    """Names of the weights that train."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def choose(model, part: str) -> None:
    """Makes a part of the active adapter train."""
    if part in ("tokenizer", "language model"):
        model.train_only(part)
    elif part == "nothing":
        model.set_requires_grad(model.active_adapter, False)
    elif part == "a few":
        for index, (name, weight) in enumerate(model.named_parameters()):
            weight.requires_grad_(name in lora_weights(model) and index % 3 == 0)


@pytest.fixture(scope="module")
def folder(pristine, tmp_path_factory):
    """Two adapters of one form, with other weights."""
    folder = tmp_path_factory.mktemp("two")
    model = attach(copied(pristine), "one", seed=1)
    model.add_adapter("two", small_config())
    randomise(model, "two", 2)
    model.save_pretrained(folder)
    return folder


def elsewhere_and_back(model) -> None:
    model.add_adapter("b", small_config())
    model.set_adapter("b")
    model.set_adapter("default")


def through_deletion(model) -> None:
    model.add_adapter("b", small_config())
    model.set_adapter("b")
    model.delete_adapter("b")


def off_and_on(model) -> None:
    model.disable_adapter_layers()
    model.enable_adapter_layers()


def off_for_a_while(model) -> None:
    with model.disable_adapter(), model.disable_adapter():
        pass


def off_elsewhere_and_back(model) -> None:
    model.add_adapter("b", small_config())
    with model.disable_adapter():
        model.set_adapter("b")
    model.set_adapter("default")


def merged_and_back(model) -> None:
    with model.merged_adapter():
        pass


WAYS = [
    elsewhere_and_back,
    through_deletion,
    off_and_on,
    off_for_a_while,
    off_elsewhere_and_back,
    merged_and_back,
    lambda model: model.set_adapter("default"),
    lambda model: model.enable_adapter_layers(),
    lambda model: model.add_adapter("b", small_config()),
]


@pytest.mark.filterwarnings("ignore:Adapter b was active")
@pytest.mark.parametrize("part", PARTS)
def test_the_same_weights_train_after_any_of_them(base, part):
    model = attach(base)
    choose(model, part)
    before = trains(model)
    for way in WAYS:
        way(model)
        assert trains(model) == before, way
        if "b" in model.peft_config:
            model.delete_adapter("b")


@pytest.mark.parametrize("load", [UniCompressModel.from_pretrained, PeftModel.from_pretrained])
def test_an_adapter_loaded_for_inference_stays_frozen(base, folder, load):
    model = load(base, folder / "one", "one")
    model.load_adapter(folder / "two", "two")
    for change in (
        lambda: model.set_adapter("two"),
        model.base_model.disable_adapter_layers,
        model.base_model.enable_adapter_layers,
        lambda: model.set_adapter("one"),
        lambda: model.delete_adapter("one"),
    ):
        change()
        assert trains(model) == set()


def test_each_adapter_trains_as_it_was_loaded(base, folder):
    model = UniCompressModel.from_pretrained(base, folder / "one", "one")
    model.load_adapter(folder / "two", "two", is_trainable=True)
    model.add_adapter("new", small_config())
    for name in ("two", "one", "new", "two"):
        model.set_adapter(name)
        assert trains(model) == (set() if name == "one" else lora_weights(model, name).keys()), name


def test_a_part_is_each_adapters_own(base):
    model = attach(base)
    model.add_adapter("b", small_config())
    model.train_only("tokenizer")
    of_default = trains(model)
    model.set_adapter("b")
    model.train_only("language model")
    of_b = trains(model)
    model.set_adapter("default")
    assert trains(model) == of_default
    model.set_adapter("b")
    assert trains(model) == of_b


def test_an_adapter_that_is_not_active_can_be_frozen_and_thawed(base, folder):
    model = attach(base)
    model.load_adapter(folder / "two", "two")
    model.set_requires_grad("two")
    model.set_requires_grad("default", False)
    model.set_adapter("two")
    assert trains(model) == lora_weights(model, "two").keys()
    model.set_adapter("default")
    assert trains(model) == set()


def test_set_adapter_for_inference_freezes(base):
    model = attach(base)
    model.set_adapter("default", inference_mode=True)
    assert trains(model) == set()


def test_a_name_that_is_taken_again_starts_anew(base, folder):
    model = attach(base)
    model.load_adapter(folder / "two", "two", is_trainable=True)
    model.set_adapter("two")
    model.set_adapter("default")
    model.delete_adapter("two")
    model.load_adapter(folder / "two", "two")
    model.set_adapter("two")
    assert trains(model) == set()


def test_behind_the_last_adapter_comes_another(base, short_question):
    model = attach(base)
    model.merge_adapter()
    model.delete_adapter("default")
    model.add_adapter("default", small_config())
    model.set_adapter("default")
    assert trains(model) == lora_weights(model).keys()
    assert logits(model, short_question).isfinite().all()
    with model.merged_adapter():
        assert logits(model, short_question).isfinite().all()


def test_training_a_frozen_adapter_is_warned_of(base, folder, short_question):
    model = UniCompressModel.from_pretrained(base, folder / "one", "one").train()
    ids = short_question["input_ids"]
    batch = {**short_question, "labels": ids.masked_fill(ids == model.family.image_token_id, -100)}
    with pytest.warns(UserWarning, match=r"No weight trains: adapter 'one'.*is_trainable=True.*train_only"):
        model(**batch)
    model.set_requires_grad("one")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No weight trains")
        model(**batch)
        model.requires_grad_(False)
        model.eval()(**batch)
        with torch.no_grad():
            model.train()(**batch)


# Hot-swap


@pytest.fixture
def prompts(short_processor):
    return drawing_inputs(short_processor, CAPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hot_swap_computes_what_a_fresh_load_does(base, fresh, folder, short_question, prompts, dtype):
    model = UniCompressModel.from_pretrained(base.to(dtype), folder / "one", "one")
    parameters = dict(model.named_parameters())
    model.load_adapter(folder / "two", "one", hotswap=True)
    assert all(weight is parameters[name] for name, weight in model.named_parameters())
    loaded = UniCompressModel.from_pretrained(fresh().to(dtype), folder / "two", "two")
    assert torch.equal(logits(model, short_question), logits(loaded, short_question))
    assert torch.equal(draw(model, prompts), draw(loaded, prompts))


def test_a_hot_swap_keeps_the_dtype_of_the_weights(base, folder):
    model = UniCompressModel.from_pretrained(base.to(torch.bfloat16), folder / "one", "one", autocast_adapter_dtype=False)
    parameters = dict(model.named_parameters())
    model.load_adapter(folder / "two", "one", hotswap=True, low_cpu_mem_usage=True)
    assert all(weight is parameters[name] and weight.dtype == torch.bfloat16 for name, weight in model.named_parameters())


def test_a_compiled_model_swaps_without_compiling_again(base, fresh, folder, prompts):
    model = UniCompressModel.from_pretrained(base, folder / "one", "one")
    backend = Graphs()
    draw(model, prompts, **backend.options())
    before = backend.count
    model.load_adapter(folder / "two", "one", hotswap=True)
    loaded = UniCompressModel.from_pretrained(fresh(), folder / "two", "two")
    assert torch.equal(draw(model, prompts, **backend.options()), draw(loaded, prompts))
    assert backend.count == before > 0


def test_a_hot_swap_leaves_what_trains_and_the_others(base, folder):
    model = UniCompressModel.from_pretrained(base, folder / "one", "one", is_trainable=True)
    model.load_adapter(folder / "two", "two")
    model.train_only("tokenizer")
    before, others = trains(model), lora_weights(model, "two")
    model.load_adapter(folder / "two", "one", hotswap=True, is_trainable=True)
    assert trains(model) == before
    assert_same(lora_weights(model, "two"), others)


def test_a_model_prepared_for_hot_swapping_swaps(base, fresh, folder, short_question):
    model = UniCompressModel.from_pretrained(base, folder / "one", "one")
    prepare_model_for_compiled_hotswap(model)
    model.load_adapter(folder / "two", "one", hotswap=True)
    expected = logits(UniCompressModel.from_pretrained(fresh(), folder / "two", "two"), short_question)
    torch.testing.assert_close(logits(model, short_question), expected)


OTHER_FORMS = [
    ({"stride": 4}, "stride 2 here, 4 there"),
    ({"r": 4}, "r 2 here, 4 there"),
    ({"lora_alpha": 3}, "lora_alpha 8 here, 3 there"),
    ({"target_modules": ["q_proj"]}, "target_modules"),
    ({"use_dora": True}, "use_dora False here, True there"),
    ({"decompressor": "phase"}, "decompressor strip here, phase there"),
    ({"num_global_tokens": 2}, "num_global_tokens 4 here, 2 there"),
]


@pytest.mark.parametrize(("fields", "told"), OTHER_FORMS, ids=lambda value: value if isinstance(value, str) else "")
def test_another_form_is_refused_and_changes_nothing(base, fresh, folder, tmp_path, fields, told):
    attach(fresh(), **fields).save_pretrained(tmp_path)
    model = UniCompressModel.from_pretrained(base, folder / "one", "one")
    before = lora_weights(model, "one")
    with pytest.raises(AdapterFileError, match=rf"not of the form of 'one': .*{told}"):
        model.load_adapter(tmp_path, "one", hotswap=True)
    assert_same(lora_weights(model, "one"), before)


def test_an_adapter_of_another_codebook_is_not_swapped_in(base, fresh, folder, tmp_path):
    other = fresh()
    with torch.no_grad():
        nn.init.normal_(other.model.vqmodel.quantize.embedding.weight)
    attach(other).save_pretrained(tmp_path)
    model = UniCompressModel.from_pretrained(base, folder / "one", "one")
    before = lora_weights(model, "one")
    with pytest.raises(BaseModelError, match="another codebook"):
        model.load_adapter(tmp_path, "one", hotswap=True)
    assert_same(lora_weights(model, "one"), before)


def test_damaged_weights_are_not_swapped_in(base, folder, tmp_path):
    model = UniCompressModel.from_pretrained(base, folder / "one", "one")
    before = lora_weights(model, "one")
    broken = UniCompressModel.from_pretrained(model.unload(), folder / "two", "two")
    broken.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "two" / CONFIG_NAME).read_text())
    (tmp_path / "two" / CONFIG_NAME).write_text(json.dumps(config | {"seal": None}))
    weights = tmp_path / "two" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4000])
    model = UniCompressModel.from_pretrained(broken.unload(), folder / "one", "one")
    with pytest.raises(AdapterFileError):
        model.load_adapter(tmp_path / "two", "one", hotswap=True)
    assert_same(lora_weights(model, "one"), before)


def test_a_name_that_is_not_there_is_not_swapped(base, folder):
    model = UniCompressModel.from_pretrained(base, folder / "one", "one")
    with pytest.raises(AdapterNameError, match=r"hotswap=True with adapter_name='two'; expected one of \['one'\]"):
        model.load_adapter(folder / "two", "two", hotswap=True)
    assert list(model.peft_config) == ["one"]
