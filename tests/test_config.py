import json
from dataclasses import fields

import pytest
from helpers import DECOMPRESSORS, small_config
from peft import PeftConfig
from peft.tuners.lora import ArrowConfig
from peft.utils import CONFIG_NAME

from uc_adapters import UniCompressConfig
from uc_adapters.errors import ConfigError

INTEGER_0, INTEGER_1 = "integer >= 0", "integer >= 1"
BAD_INTEGERS = (-1, 1.5, 2.0, "2", None, True)
BAD = [
    *[("stride", value, INTEGER_1) for value in (0, *BAD_INTEGERS)],
    *[("num_global_tokens", value, INTEGER_0) for value in BAD_INTEGERS],
    *[("decompressor_layers", value, INTEGER_1) for value in (0, *BAD_INTEGERS)],
    *[("decompressor_width", value, INTEGER_1) for value in (0, *BAD_INTEGERS)],
    *[("r", value, INTEGER_1) for value in (0, *BAD_INTEGERS)],
    *[("decompressor", value, "strip, phase, raster") for value in ("Strip", "", "cell", None, 1, ["strip"])],
    *[("codebook_weight", value, ">= 0") for value in (-0.1, float("nan"), float("inf"), "1", None, True)],
    *[("lora_alpha", value, "") for value in (-1, "16", None)],
    *[("lora_dropout", value, "") for value in (-0.1, 1.5, "0.1", None)],
    *[("target_modules", value, "None") for value in ("", 3, {3})],
    ("task_type", "CAUSAL_LM", "None"),
    *[("bias", value, "none") for value in ("all", "lora_only")],
    ("modules_to_save", ["lm_head"], "None"),
    ("layer_replication", [[0, 1]], "None"),
    ("arrow_config", ArrowConfig(), "None: it mixes adapters"),
    ("target_parameters", ["model.vision_model.encoder.layers.0.self_attn.q_proj.weight"], "None: name modules"),
    *[("init_lora_weights", value, "gaussian") for value in ("pissa", "olora", None)],
    ("trainable_token_indices", [1], "None"),
    ("base_geometry", 3, ""),
]


@pytest.mark.parametrize(("name", "value", "legal"), BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD])
def test_a_bad_value_is_refused_with_the_field_the_value_and_the_legal_ones(name, value, legal):
    with pytest.raises(ConfigError) as error:
        UniCompressConfig(**{name: value})
    message = str(error.value)
    assert name in message
    assert repr(value) in message
    assert legal in message


@pytest.mark.parametrize("decompressor", DECOMPRESSORS)
@pytest.mark.parametrize("num_global_tokens", [0, 1, 4])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_good_values_are_accepted(stride, num_global_tokens, decompressor):
    config = UniCompressConfig(stride=stride, num_global_tokens=num_global_tokens, decompressor=decompressor)
    assert (config.stride, config.num_global_tokens, config.decompressor) == (stride, num_global_tokens, decompressor)


def test_defaults():
    config = UniCompressConfig()
    assert (config.stride, config.num_global_tokens, config.decompressor) == (2, 4, "strip")
    assert config.target_modules is None


@pytest.mark.parametrize(("decompressor", "drawn"), [("strip", 0), ("phase", 3), ("raster", 3)])
def test_strip_draws_no_global_tokens_and_all_read_them(decompressor, drawn):
    config = UniCompressConfig(stride=4, num_global_tokens=3, decompressor=decompressor)
    assert config.num_global_codes == drawn
    assert config.num_gen_tokens((8, 12)) == drawn + 1 + 6
    assert config.num_image_tokens((8, 12)) == 3 + 1 + 6


def test_loras_own_fields_keep_their_meaning():
    config = UniCompressConfig(r=3, lora_alpha=5, lora_dropout=0.1, use_rslora=True, target_modules=["q_proj"])
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5, 0.1, True)
    assert config.target_modules == {"q_proj"}


def test_every_field_of_ours_has_a_help_text():
    ours = UniCompressConfig.__annotations__
    assert [field.name for field in fields(UniCompressConfig) if field.name in ours and not field.metadata.get("help")] == []


@pytest.mark.parametrize("loader", [UniCompressConfig, PeftConfig])
def test_round_trip(tmp_path, loader):
    config = small_config(
        stride=4,
        num_global_tokens=0,
        decompressor="phase",
        codebook_weight=0.5,
        lora_alpha=7,
        target_modules=["q_proj", "v_proj"],
    )
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is UniCompressConfig
    assert loaded == config


def test_the_file_is_plain_json_with_the_methods_name(tmp_path):
    UniCompressConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["peft_type"] == "UNICOMPRESS"


def rewrite(folder, **changes) -> None:
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_unknown_field_in_a_file_is_refused(tmp_path):
    UniCompressConfig(uc_adapters_version="9.9").save_pretrained(tmp_path)
    rewrite(tmp_path, spiral=3)
    with pytest.raises(ConfigError, match=r"'spiral'.*9\.9.*Upgrade"):
        UniCompressConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [UniCompressConfig, PeftConfig])
def test_a_bad_value_in_a_file_is_refused(tmp_path, loader):
    UniCompressConfig().save_pretrained(tmp_path)
    rewrite(tmp_path, stride=0)
    with pytest.raises(ConfigError, match="stride=0"):
        loader.from_pretrained(tmp_path)


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="spiral"):
        UniCompressConfig(spiral=3)
