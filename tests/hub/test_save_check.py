"""What is written is loaded before it takes its place: whatever `save_pretrained` leaves, `from_pretrained` accepts."""

import copy
import json

import pytest
import torch
from helpers import assert_same, attach, lora_weights, small_config
from hub_helpers import CONFIG, read_files
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from uc_adapters import UniCompressModel
from uc_adapters.errors import AdapterFileError, ConfigError, UnsupportedError


@pytest.fixture
def model(base):
    return attach(base)


def reloaded(fresh, folder, name: str = "default") -> dict[str, torch.Tensor]:
    return lora_weights(UniCompressModel.from_pretrained(fresh(), folder, name), name)


def plain(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the names that they have where nothing is compiled."""
    return {name.replace("_orig_mod.", ""): weight for name, weight in weights.items()}


# What can be saved, is


def test_the_state_of_a_compiled_model(model, fresh, tmp_path):
    compiled = torch.compile(model)
    model.save_pretrained(tmp_path / "given", state_dict=compiled.state_dict())
    compiled.save_pretrained(tmp_path / "own")
    for folder in ("given", "own"):
        assert_same(reloaded(fresh, tmp_path / folder), lora_weights(model))


@pytest.mark.parametrize("name", ["default", "zap"])
def test_a_model_with_compiled_parts(fresh, tmp_path, name):
    """Their names are longer by "_orig_mod": saved, they are the plain ones, and load into either."""
    models = [attach(fresh(), name, seed) for seed in (1, 2)]
    for model in models:
        for part in ("language_model", "aligner", "generation_head"):
            setattr(model.get_base_model().model, part, torch.compile(model.get_base_model().model.get_submodule(part)))
    saved, other = models
    saved.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert_same(reloaded(fresh, folder, name), plain(lora_weights(saved, name)))
    other.load_adapter(folder, name)
    assert_same(lora_weights(other, name), lora_weights(saved, name))


def test_scalings_as_tensors(model, fresh, tmp_path):
    """As `prepare_model_for_compiled_hotswap` leaves them."""
    prepare_model_for_compiled_hotswap(model)
    model.save_pretrained(tmp_path)
    assert_same(reloaded(fresh, tmp_path), lora_weights(model))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 3}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_kind_of_lora_that_a_config_takes(fresh, tmp_path, fields):
    model = attach(fresh(), **fields)
    model.save_pretrained(tmp_path)
    assert_same(reloaded(fresh, tmp_path), lora_weights(model))


# What cannot be loaded, is not saved


def halved(state: dict) -> dict:
    return {key: value for key, value in state.items() if "lora_A" not in key}


def prefixed(state: dict) -> dict:
    return {f"module.{key}": value for key, value in state.items()}


def spoilt(state: dict) -> dict:
    return {key: value * torch.nan if value.is_floating_point() else value for key, value in state.items()}


def widened(state: dict) -> dict:
    return {key: torch.cat([value, value]) if ".lora_A." in key else value for key, value in state.items()}


def test_a_state_that_is_not_the_adapters(model, fresh, tmp_path):
    model.save_pretrained(tmp_path)
    before, weights = read_files(tmp_path), lora_weights(model)
    for change in (halved, prefixed, spoilt, widened, lambda state: {}):
        with pytest.raises(AdapterFileError, match=r"'default' is not saved.*could not be loaded again.*Nothing was changed"):
            model.save_pretrained(tmp_path, state_dict=change(model.state_dict()))
        assert read_files(tmp_path) == before
    assert_same(lora_weights(model), weights)
    assert_same(reloaded(fresh, tmp_path), weights)


def test_weights_that_training_has_spoilt(model, tmp_path):
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)[0, 0] = torch.inf
    with pytest.raises(AdapterFileError, match=r"is not saved.*1 not finite \(base_model.*lora_B"):
        model.save_pretrained(tmp_path)
    assert read_files(tmp_path) == {}


def test_ranks_that_are_padded_for_hotswap(model, tmp_path):
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    with pytest.raises(AdapterFileError, match=r"is not saved.*of the wrong shape.*is \(8, .*expected \(2,"):
        model.save_pretrained(tmp_path)


def test_ranks_that_are_padded_with_their_config(model, tmp_path):
    """The shapes agree, and LoRA would be scaled by alpha over another rank."""
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    with pytest.raises(AdapterFileError, match=r"is not saved.*scaled by 4 in model\.language_model.*expected 1,"):
        model.save_pretrained(tmp_path)


def test_a_scale_that_no_config_holds(model, fresh, tmp_path):
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.set_scale("default", 0.5)
    with pytest.raises(AdapterFileError, match=r"is not saved.*scaled by 2 in model\.language_model.*and 0 more.*expected 4"):
        model.save_pretrained(tmp_path)
    layer.set_scale("default", 1.0)
    model.save_pretrained(tmp_path)
    assert_same(reloaded(fresh, tmp_path), lora_weights(model))


def test_a_conversion_writes_into_no_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "initial")
    before = read_files(tmp_path)
    with pytest.raises(UnsupportedError, match=r"path_initial_model_for_weight_conversion=.*nothing to convert; expected None"):
        model.save_pretrained(tmp_path / "new", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert read_files(tmp_path) == before


@pytest.mark.parametrize(("name", "value"), [("velora_config", VeloraConfig()), ("monteclora_config", MontecloraConfig())])
def test_a_lora_that_peft_cannot_load_again(adapter_folder, tmp_path, name, value):
    with pytest.raises(ConfigError, match=rf"{name}=.*expected None: PEFT saves such a LoRA with weights that it cannot load"):
        small_config(**{name: copy.deepcopy(value)})
    config = json.loads((adapter_folder / CONFIG).read_text())
    assert config[name] is None
