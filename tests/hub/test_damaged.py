"""Adapter files that are broken, and bases that they were not made for."""

import json
import shutil

import pytest
import torch
from copies import copied
from helpers import CAPTIONS, assert_same, attach, base_weights, draw, drawing_inputs, logits
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from tiny_world.tiny_janus import make_model
from transformers import JanusForConditionalGeneration

from uc_adapters import UniCompressModel
from uc_adapters.errors import AdapterFileError, BaseModelError, ConfigError, HubError

KEY = "base_model.model.model.generation_head.lora_uc.separator"


@pytest.fixture(scope="module")
def intact(pristine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    attach(copied(pristine), seed=7).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact, tmp_path):
    """A copy of an adapter's folder, to be damaged."""
    return shutil.copytree(intact, tmp_path / "adapter")


def change_config(folder, **fields) -> None:
    """As plain PEFT would write it: without a seal, which would refuse the change before the deeper checks are reached."""
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seal": None} | fields))


def change_weights(folder, change) -> None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    change_config(folder)


def change_geometry(folder, **fields) -> None:
    change_config(folder, base_geometry=json.loads((folder / CONFIG_NAME).read_text())["base_geometry"] | fields)


def as_bin(folder) -> None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    torch.save(load_file(file), folder / WEIGHTS_NAME)
    file.unlink()


def lfs_pointer(folder) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 3012345\n"
    (folder / SAFETENSORS_WEIGHTS_NAME).write_text(text)


def truncate(folder) -> None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGED_WEIGHTS = {
    "a weight is missing": (lambda weights: weights.pop(KEY), r"1 missing.*generation_head\.lora_uc\.\w+\.separator"),
    "every weight is missing": (lambda weights: [weights.pop(key) for key in list(weights)[1:]], r"\d+ missing.*and \d+ more"),
    "a weight is surplus": (lambda weights: weights.update({"more.lora_A.weight": torch.zeros(2)}), r"1 surplus.*more\.lora_A"),
    "a base weight is in the file": (
        lambda weights: weights.update({"base_model.model.lm_head.weight": torch.zeros(52, 192)}),
        r"1 surplus.*lm_head",
    ),
    "a weight has the wrong shape": (
        lambda weights: weights.update({KEY: torch.zeros(7)}),
        r"1 of the wrong shape.*separator is \(7,\), expected \(192,\)",
    ),
    "a weight is NaN": (lambda weights: weights[KEY].fill_(torch.nan), r"1 not finite.*separator"),
    "a weight is infinite": (lambda weights: weights[KEY][:1].fill_(torch.inf), r"1 not finite.*separator"),
}

BROKEN = {
    "the weights are random bytes": (
        lambda folder: (folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(bytes(range(256)) * 9),
        AdapterFileError,
        r"adapter_model\.safetensors is not a safetensors file.*LFS pointer",
    ),
    "the weights are an LFS pointer": (lfs_pointer, AdapterFileError, r"not a safetensors file.*LFS pointer"),
    "the weights are truncated": (truncate, AdapterFileError, r"not a safetensors file.*truncated"),
    "the weights are empty": (
        lambda folder: (folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(b""),
        AdapterFileError,
        "not a safetensors file",
    ),
    "the weights are a pickle": (as_bin, AdapterFileError, r"adapter_model\.safetensors is missing.*save_pretrained"),
    "the weights are missing": (
        lambda folder: (folder / SAFETENSORS_WEIGHTS_NAME).unlink(),
        AdapterFileError,
        r"adapter_model\.safetensors is missing",
    ),
    "the config is missing": (
        lambda folder: (folder / CONFIG_NAME).unlink(),
        AdapterFileError,
        r"adapter_config\.json is missing",
    ),
    "the folder is empty": (lambda folder: [file.unlink() for file in folder.iterdir()], AdapterFileError, "is missing in"),
    "the config is no JSON": (
        lambda folder: (folder / CONFIG_NAME).write_text("<html>"),
        AdapterFileError,
        r"adapter_config\.json is no UniCompress config",
    ),
    "the config is of another method": (
        lambda folder: LoraConfig().save_pretrained(folder),
        AdapterFileError,
        "LORA.*expected UNICOMPRESS",
    ),
    "the config has an unknown field": (lambda folder: change_config(folder, spiral=1), ConfigError, "'spiral'"),
    "the config has a bad value": (lambda folder: change_config(folder, stride=-2), ConfigError, "stride=-2"),
    "the config would change the base's weights": (
        lambda folder: change_config(folder, kasa_config={}),
        ConfigError,
        "kasa_config=",
    ),
    "the config names a module to import": (
        lambda folder: change_config(folder, megatron_config={"a": 1}, megatron_core="antigravity"),
        ConfigError,
        "megatron_config=",
    ),
    "PEFT cannot take a value, and notices half way": (
        lambda folder: change_config(folder, alpha_pattern={"up_proj": "x"}),
        AdapterFileError,
        r"could not be attached: TypeError.*fetch or save it again",
    ),
    "PEFT puts a layer where there was none, and then cannot go on": (
        lambda folder: change_config(folder, target_modules=".*q_proj|.*norm"),
        AdapterFileError,
        r"(?s)could not be attached: ValueError.*fetch or save it again",
    ),
    "PEFT refuses a value half way": (
        lambda folder: change_config(folder, rank_pattern={"up_proj": 0}),
        AdapterFileError,
        r"could not be attached: ValueError.*fetch or save it again",
    ),
    "the base is deeper": (lambda folder: change_geometry(folder, num_layers=24), BaseModelError, "num_layers was 24, is 2"),
    "the base is wider": (lambda folder: change_geometry(folder, hidden_size=8), BaseModelError, "hidden_size was 8, is 192"),
    "the base has other codes": (
        lambda folder: change_geometry(folder, num_codes=9),
        BaseModelError,
        "num_codes was 9, is 512",
    ),
}
DAMAGES = {
    **{
        what: (lambda folder, change=change: change_weights(folder, change), AdapterFileError, match)
        for what, (change, match) in DAMAGED_WEIGHTS.items()
    },
    **BROKEN,
}


@pytest.mark.parametrize(("damage", "error", "match"), DAMAGES.values(), ids=DAMAGES.keys())
def test_from_pretrained_names_what_is_wrong(folder, base, damage, error, match):
    damage(folder)
    with pytest.raises(error, match=match):
        UniCompressModel.from_pretrained(base, folder)


# Each way in which loading into a model may fail: before anything is attached, half way, and with all attached
FAILED_LOADS = (
    "a weight is NaN",
    "a weight is surplus",
    "the weights are truncated",
    "the config has a bad value",
    "PEFT cannot take a value, and notices half way",
    "PEFT puts a layer where there was none, and then cannot go on",
    "PEFT refuses a value half way",
    "the base is deeper",
)


@pytest.mark.parametrize("what", FAILED_LOADS)
def test_a_failed_load_adapter_leaves_nothing_behind(folder, base, short_question, short_processor, what):
    damage, error, match = DAMAGES[what]
    model, prompts = attach(base), drawing_inputs(short_processor, CAPTIONS)
    before, weights = (logits(model, short_question), draw(model, prompts)), dict(model.named_parameters())
    trainable = {name for name, parameter in weights.items() if parameter.requires_grad}
    damage(folder)
    with pytest.raises(error, match=match):
        model.load_adapter(folder, "second")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert torch.equal(logits(model, short_question), before[0])
    assert torch.equal(draw(model, prompts), before[1])


@pytest.mark.parametrize("what", ["a weight is NaN", "the weights are random bytes", "the base is deeper"])
def test_a_failed_from_pretrained_leaves_a_base_to_load_a_good_adapter_on(folder, intact, base, pristine, what):
    damage, error, _ = DAMAGES[what]
    damage(folder)
    with pytest.raises(error):
        UniCompressModel.from_pretrained(base, folder)
    model = UniCompressModel.from_pretrained(base, intact)
    assert_same(base_weights(model), base_weights(pristine))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(("change", "match"), DAMAGED_WEIGHTS.values(), ids=DAMAGED_WEIGHTS.keys())
def test_peft_model_names_what_is_wrong_with_the_weights(folder, base, change, match):
    change_weights(folder, change)
    with pytest.raises(AdapterFileError, match=match):
        PeftModel.from_pretrained(base, folder)


def test_with_low_cpu_mem_usage_too(folder, base):
    change, match = DAMAGED_WEIGHTS["a weight is missing"]
    change_weights(folder, change)
    with pytest.raises(AdapterFileError, match=match):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


@pytest.mark.parametrize(
    "fields", [{"stride": 4}, {"num_global_tokens": 2}, {"decompressor": "phase"}, {"decompressor_width": 32}, {"r": 3}]
)
def test_weights_of_another_config_are_refused(folder, base, fields):
    change_config(folder, **fields)
    with pytest.raises(AdapterFileError, match="do not fit its config"):
        UniCompressModel.from_pretrained(base, folder)


def test_reloading_damaged_weights_into_a_present_adapter_leaves_it_as_it_was(folder, base, short_question):
    model = attach(base)
    before = logits(model, short_question)
    change_weights(folder, DAMAGED_WEIGHTS["a weight is NaN"][0])
    with pytest.raises(AdapterFileError, match="not finite"):
        model.load_adapter(folder, "default")
    assert torch.equal(logits(model, short_question), before)


def test_a_base_of_another_size_is_refused(folder, processor):
    config = make_model(processor).config
    config.text_config.num_hidden_layers = 3
    config.text_config.intermediate_size = 64
    other = JanusForConditionalGeneration(config)
    with pytest.raises(BaseModelError, match=r"intermediate_size was 512, is 64.*num_layers was 2, is 3"):
        UniCompressModel.from_pretrained(other, folder)


@pytest.mark.parametrize("name", ["no/such/place", "spaces in it"])
def test_neither_a_folder_nor_a_hub_id(base, name):
    with pytest.raises(HubError, match=f"{name}' is no folder here.*'org/name'"):
        UniCompressModel.from_pretrained(base, name)


def test_an_empty_name_is_the_current_folder_as_everywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json is missing"):
        UniCompressModel.from_pretrained(base, "")


def test_a_bad_name_for_a_good_file_leaves_nothing_behind(intact, base, short_question):
    model = attach(base)
    before = logits(model, short_question)
    with pytest.raises(ValueError, match="'attention'"):
        model.load_adapter(intact, "attention")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, short_question), before)
