import re

import pytest
import torch
from helpers import assert_same, attach, base_weights, drawing_inputs, logits, lora_weights, small_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from uc_adapters import UniCompressModel, get_uc_model
from uc_adapters.errors import AdapterNameError, BaseModelError, ConfigError, UnsupportedError

LANGUAGE_MODEL = "model.language_model.layers."
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def lora_targets(model) -> set[str]:
    """Names of the base's modules that carry LoRA."""
    names = (name.removeprefix("base_model.model.") for name, _ in model.named_parameters())
    return {name.split(".lora_")[0] for name in names if ".lora_A." in name}


def linear_layers(base, prefix: str) -> set[str]:
    return {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefix)}


def host_parameters(model) -> int:
    return sum(".lora_uc." in name for name, _ in model.named_parameters())


def test_by_default_lora_takes_exactly_the_language_models_linear_layers(pristine, base):
    targets = lora_targets(attach(base))
    assert targets == linear_layers(pristine, LANGUAGE_MODEL)
    assert {name.split(".")[-1] for name in targets} == PROJECTIONS


def test_all_linear_stays_in_the_language_model(pristine, base):
    assert lora_targets(attach(base, target_modules="all-linear")) == linear_layers(pristine, LANGUAGE_MODEL)


@pytest.mark.parametrize("targets", [["q_proj"], r".*\.q_proj"])
def test_a_name_that_the_vision_tower_has_too_stays_in_the_language_model(pristine, base, targets):
    assert any("vision_model" in name for name in linear_layers(pristine, "") if name.endswith("q_proj"))
    expected = {name for name in linear_layers(pristine, LANGUAGE_MODEL) if name.endswith("q_proj")}
    assert lora_targets(attach(base, target_modules=targets)) == expected


def test_no_target_means_no_lora_but_both_hosts(base):
    model = attach(base, target_modules=[])
    assert lora_targets(model) == set()
    assert host_parameters(model) > 0


@pytest.mark.parametrize("targets", ["nothing.*", ["vision_proj"], ["aligner"], "q_proj"])
def test_a_target_that_matches_nothing_is_refused(base, targets):
    shown = re.escape(repr(targets if isinstance(targets, str) else set(targets)))
    with pytest.raises(ConfigError, match=rf"{shown} matches nothing.*None for all"):
        attach(base, target_modules=targets)


def test_layers_to_transform_narrows_the_default_targets(base):
    assert {name.split(".")[3] for name in lora_targets(attach(base, layers_to_transform=[0]))} == {"0"}


def test_layers_to_transform_narrows_named_targets_and_keeps_the_hosts(base):
    model = attach(base, target_modules=["q_proj"], layers_to_transform=[0])
    assert lora_targets(model) == {LANGUAGE_MODEL + "0.self_attn.q_proj"}
    assert host_parameters(model) == host_parameters(attach(model.unload()))


def test_attaching_leaves_the_base_weights_bit_for_bit(pristine, base):
    assert_same(base_weights(attach(base)), base_weights(pristine))


def test_only_the_adapter_is_trainable(base):
    model = attach(base)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())


def test_attaching_does_not_change_the_given_config(base):
    config = small_config()
    before = config.to_dict()
    get_uc_model(base, config)
    assert config.to_dict() == before


def test_the_config_records_the_geometry_of_its_base(base):
    config = attach(base).peft_config["default"]
    assert config.base_geometry["hidden_size"] == 192
    assert config.base_geometry["num_codes"] == 512


@pytest.mark.parametrize("stride", [3, 5, 16])
def test_a_stride_that_does_not_divide_the_grid_is_refused(base, stride):
    with pytest.raises(BaseModelError, match=rf"stride={stride}.*8 x 8.*\[1, 2, 4, 8\]"):
        attach(base, stride=stride)


def test_a_base_without_a_family_is_refused():
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(BaseModelError, match=r"'llama'.*supported: .*janus"):
        get_uc_model(llama, small_config())


def test_a_module_without_a_config_is_refused():
    with pytest.raises(BaseModelError, match=r"None.*Linear.*janus"):
        get_uc_model(nn.Linear(2, 2), small_config())


@pytest.mark.parametrize("layer", ["aligner", "generation_head", "language_model", "vqmodel"])
def test_a_base_that_lacks_a_layer_is_refused(base, layer):
    delattr(base.model, layer)
    with pytest.raises(BaseModelError, match=rf"lacks .*model\.{layer}.*JanusForConditionalGeneration"):
        get_uc_model(base, small_config())


def test_a_part_of_the_base_is_refused(base):
    with pytest.raises(BaseModelError, match=r"JanusModel lacks .*from_pretrained"):
        get_uc_model(base.model, small_config())


BAD_NAMES = ["", "a.b", "lora", "lora_", "lora_A", "lora_uc", "base_layer", "base_model", "model", "0", "weight"]
BAD_NAMES += ["/data/sketches", r"C:\sketches", "aligner", "extractor", "attention", "decoder", "self_attn", "layers", "q_proj"]


@pytest.mark.filterwarnings("ignore:Adapter name.*should not be contained:UserWarning")  # PEFT's own word on these names
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_peft_cannot_hold_is_refused(base, name):
    with pytest.raises(AdapterNameError, match=re.escape(f"adapter_name={name!r}") + ".*Choose another"):
        get_uc_model(base, small_config(), name)


def test_a_refused_name_leaves_the_present_adapter_alone(base):
    model = attach(base)
    with pytest.raises(AdapterNameError, match="'attention'"):
        model.add_adapter("attention", small_config())
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["default", "uc4x", "my-adapter", "adapter_2", "decode", "läufer"])
def test_an_ordinary_name_is_held(base, name):
    assert lora_weights(attach(base, name), name)


def test_an_adapter_whose_modules_bear_another_adapters_name_is_refused(base):
    """PEFT would drop keys of both on saving."""
    model = attach(base, "5")
    with pytest.raises(AdapterNameError, match="'5'"):
        model.add_adapter("deep", small_config(decompressor_layers=6))


def test_a_second_attachment_is_refused(base):
    attach(base)
    with pytest.raises(BaseModelError, match=r"add_adapter.*unload"):
        get_uc_model(base, small_config())


def test_merging_for_good_is_refused(base):
    model = attach(base)
    with pytest.raises(UnsupportedError, match=r"cannot be merged.*merge_adapter\(\).*unload"):
        model.merge_and_unload()


def test_combining_adapters_is_refused(base):
    """PEFT would combine the LoRA parts and leave the compression modules of the result untrained."""
    model = attach(base)
    model.add_adapter("b", small_config())
    with pytest.raises(UnsupportedError):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "both")


def test_unload_gives_the_base_back(pristine, base, dense_question):
    unloaded = attach(base).unload()
    assert unloaded is base
    assert [(name, type(module)) for name, module in unloaded.named_modules()] == [
        (name, type(module)) for name, module in pristine.named_modules()
    ]
    assert_same(unloaded.state_dict(), pristine.state_dict())
    assert torch.equal(logits(unloaded, dense_question), logits(pristine, dense_question))


def test_an_unloaded_base_takes_another_adapter(base, short_question):
    model = attach(base)
    before = logits(model, short_question)
    again = attach(model.unload(), "again")
    assert torch.equal(logits(again, short_question), before)


def test_two_active_adapters_are_refused(base, short_processor, short_question):
    model = attach(base)
    model.add_adapter("b", small_config())
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(UnsupportedError, match=r"'default', 'b' are active.*set_adapter"):
        logits(model, short_question)
    with pytest.raises(UnsupportedError, match=r"'default', 'b' are active.*set_adapter"):
        model.generate(**drawing_inputs(short_processor, ["a red 3"]), generation_mode="image")


def test_deleting_one_of_two_adapters_leaves_the_other(base, short_question):
    model = attach(base)
    model.add_adapter("b", small_config())
    before = logits(model, short_question)
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]
    assert lora_weights(model, "b") == {}
    assert torch.equal(logits(model, short_question), before)


def test_deleting_the_active_adapter_activates_the_other(base, short_question):
    model = attach(base)
    model.add_adapter("b", small_config())
    model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert logits(model, short_question).isfinite().all()


def test_an_added_adapter_is_frozen_until_it_is_chosen(base):
    model = attach(base)
    model.add_adapter("b", small_config())
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".b." in name)
    model.set_adapter("b")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".b." in name), name


def test_print_trainable_parameters(base, capsys):
    model = attach(base)
    model.print_trainable_parameters()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"trainable params: {count:,} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("tokenizer", {"aligner.extractor", "generation_head.extractor", "generation_head.decompressor"}),
        ("language model", {"aligner.separator", "generation_head.separator", "language_model"}),
    ],
)
@pytest.mark.parametrize("decompressor", ["strip", "phase"])
def test_train_only(base, part, expected, decompressor):
    model = attach(base, decompressor=decompressor)
    model.train_only(part)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {
        f"{found[1]}.{found[2]}" if (found := re.search(r"\.(\w+)\.lora_uc\.default\.(\w+)", name)) else "language_model"
        for name in trained
    }
    if decompressor == "strip":  # it learns from the language model's hidden states, and draws no global codes
        decoder = {"generation_head.decompressor"}
        expected = expected - decoder if part == "tokenizer" else expected | decoder
        expected = expected - {"generation_head.extractor"}
    assert parts == expected
    assert all("lora_" in name for name in trained)


def test_train_only_names_its_parts(base):
    with pytest.raises(ValueError, match=r"'decoder'.*'tokenizer' or 'language model'"):
        attach(base).train_only("decoder")


def test_the_model_is_a_peft_model(base):
    assert isinstance(attach(base), UniCompressModel)


def test_an_embedding_is_no_target(base):
    with pytest.raises(ConfigError, match=r"embed_tokens', an embedding; expected linear layers"):
        get_uc_model(base, small_config(target_modules=["embed_tokens", "q_proj"]))


@pytest.mark.parametrize("targets", [["q_proj", "input_layernorm"], ["nothing"]])
def test_a_base_that_could_not_be_attached_to_is_as_it_was(base, pristine, targets):
    with pytest.raises(ValueError, match=r"input_layernorm|nothing|LlamaRMSNorm"):
        get_uc_model(base, small_config(target_modules=targets))
    assert_same(base_weights(base), base_weights(pristine))
    attach(base)  # it carries none


def test_an_adapter_that_could_not_be_added_leaves_nothing_behind(base):
    model = attach(base)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match="LlamaRMSNorm"):
        model.add_adapter("second", small_config(target_modules=["q_proj", "input_layernorm"]))
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
    model.add_adapter("second", small_config())
    assert list(model.peft_config) == ["default", "second"]
