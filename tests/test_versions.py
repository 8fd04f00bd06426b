"""What older versions saved loads for ever; what newer ones save is refused, by name, where its mathematics may differ.

The fixtures are one small adapter of random weights on model_cards/tiny-janus, each written by the first version that wrote its
format, 0.1.0 being commit c826d03. With `tests/` and `recipes/` on the path:

    config = {"r": 1, "lora_alpha": 3, "use_rslora": True, "num_global_tokens": 2, "decompressor_width": 8}
    model = helpers.attach(base, **config, target_modules=["q_proj", "v_proj"], seed=3)
    model.save_pretrained("format-1", processor=processor, base_model="uc-adapters/tiny-janus")

`expected.safetensors` holds what 0.1.0 computed: {"logits": read(model, processor), "drawn": drawn(model, processor)}.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import IMAGE, chat, draw, drawing_inputs, logits
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from uc_adapters import UniCompressConfig, UniCompressModel
from uc_adapters.config import FORMAT_VERSION
from uc_adapters.errors import AdapterFileError, ConfigError

FIXTURES, BASE = Path(__file__).parent / "fixtures", Path(__file__).parents[1] / "model_cards" / "tiny-janus"
FORMATS = [f"format-{version}" for version in range(1, FORMAT_VERSION + 1)]
every_fixture = pytest.mark.parametrize("name", ["uc-adapters-0.1.0", *FORMATS])
NEW_IN_FORMAT_1 = {"format_version", "base_fingerprint", "seal"}


def read(model, processor) -> torch.Tensor:
    """Logits of a question about an image that no library draws or resizes."""
    text = chat(processor, IMAGE, "What digit is at the top left?").replace(IMAGE, IMAGE * model.num_image_tokens)
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    return logits(model, {**processor.tokenizer(text, return_tensors="pt"), "pixel_values": pixels})


def drawn(model, processor) -> torch.Tensor:
    inputs = drawing_inputs(processor, ["a red 3 at the top left", "a cyan 9"])
    return draw(model, inputs, do_sample=False, guidance_scale=2.0)


@pytest.fixture
def base():
    """The committed base: a seeded one would change with torch's random numbers."""
    return AutoModelForImageTextToText.from_pretrained(BASE)


@pytest.fixture(scope="module")
def expected():
    return load_file(FIXTURES / "expected.safetensors")


def fields(folder) -> dict:
    return json.loads((folder / CONFIG_NAME).read_text())


def assert_as_expected(model, processor, expected) -> None:
    # Matrix products differ between machines in the last digits; the drawn codes were chosen clear of any tie
    torch.testing.assert_close(read(model, processor), expected["logits"], rtol=1e-4, atol=1e-4)
    assert torch.equal(drawn(model, processor), expected["drawn"])


@every_fixture
def test_an_adapter_loads_for_ever(base, expected, name):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter was trained on")
        model = UniCompressModel.from_pretrained(base, FIXTURES / name)
    assert_as_expected(model, AutoProcessor.from_pretrained(FIXTURES / name), expected)


@every_fixture
def test_peft_loads_it_too(base, expected, name):
    model = PeftModel.from_pretrained(base, FIXTURES / name)
    model.num_image_tokens = 2 + 1 + 16  # which `read` asks for, and only our own model knows
    torch.testing.assert_close(
        read(model, AutoProcessor.from_pretrained(FIXTURES / name)), expected["logits"], rtol=1e-4, atol=1e-4
    )


@every_fixture
def test_saved_anew_it_is_of_the_newest_format(base, expected, name, tmp_path):
    processor = AutoProcessor.from_pretrained(FIXTURES / name)
    model = UniCompressModel.from_pretrained(base, FIXTURES / name)
    model.save_pretrained(tmp_path, processor=processor)
    assert fields(tmp_path)["format_version"] == FORMAT_VERSION
    assert fields(tmp_path)["seal"] is not None
    assert_as_expected(UniCompressModel.from_pretrained(model.unload(), tmp_path), processor, expected)


@every_fixture
def test_a_fixture_is_small(name):
    assert sum(path.stat().st_size for path in (FIXTURES / name).iterdir()) < 400_000


def test_the_fixtures_are_as_those_versions_wrote_them():
    old, new = fields(FIXTURES / "uc-adapters-0.1.0"), fields(FIXTURES / "format-1")
    assert new.keys() - old.keys() >= NEW_IN_FORMAT_1
    assert new["base_geometry"].keys() - old["base_geometry"].keys() == {"num_heads", "read_layers"}
    assert (old["uc_adapters_version"], new["format_version"]) == ("0.1.0", 1)
    assert new["seal"] is not None
    assert new["base_fingerprint"] is not None


@pytest.fixture
def change(tmp_path):
    """Makes a copy of the newest fixture with other fields, as another program would write them: without a seal."""

    def write(**changes) -> Path:
        folder = shutil.copytree(FIXTURES / FORMATS[-1], tmp_path / "changed")
        (folder / CONFIG_NAME).write_text(json.dumps(fields(folder) | {"seal": None} | changes))
        return folder

    return write


LOADERS = {
    "config": lambda base, folder: UniCompressConfig.from_pretrained(folder),
    "ours": UniCompressModel.from_pretrained,
    "peft": PeftModel.from_pretrained,
}
every_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
not_by_peft = pytest.mark.parametrize("load", [LOADERS["config"], LOADERS["ours"]], ids=["config", "ours"])


@every_loader
@pytest.mark.parametrize("more", [{}, {"spiral": 3}, {"stride": {"read": 2, "draw": 4}}], ids=["same", "new", "changed"])
def test_a_newer_format_is_refused_with_the_version_to_install(base, change, load, more):
    folder = change(format_version=FORMAT_VERSION + 1, uc_adapters_version="9.9", **more)
    with pytest.raises(
        ConfigError,
        match=rf"format {FORMAT_VERSION + 1} by uc-adapters 9\.9.*uc-adapters 9\.9 or newer reads it",
    ):
        load(base, folder)


@every_loader
@pytest.mark.parametrize("value", [1, 0.5, True, "on", ["q_proj"], {"angle": 0}], ids=repr)
def test_an_unknown_field_that_is_set_is_refused(base, change, load, value):
    with pytest.raises(ConfigError, match=r"'spiral'.*uc-adapters 9\.9.*uc-adapters 9\.9 or newer reads it"):
        load(base, change(spiral=value, uc_adapters_version="9.9"))


@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=repr)
def test_an_unknown_field_that_is_unset_changes_nothing(base, change, expected, value):
    folder = change(spiral=value)
    assert_as_expected(UniCompressModel.from_pretrained(base, folder), AutoProcessor.from_pretrained(folder), expected)


# PEFT itself looks the method up before it asks us
@not_by_peft
@pytest.mark.parametrize("method", ["MAGIC", "unicompress", "", None, 3, ["UNICOMPRESS"], {}], ids=repr)
def test_an_unknown_method_is_refused_with_what_to_upgrade(base, change, load, method):
    with pytest.raises(
        AdapterFileError, match=r"of peft_type .*not known here; expected UNICOMPRESS.*upgrade uc-adapters and peft"
    ):
        load(base, change(peft_type=method))


@not_by_peft
def test_another_method_is_sent_to_peft(base, change, load):
    with pytest.raises(AdapterFileError, match=r"describes a LORA adapter; expected UNICOMPRESS.*with peft itself"):
        load(base, change(peft_type="LORA"))


@every_loader
@pytest.mark.parametrize("version", ["1", 1.0, None, True, [1], {}, -1, "newest"], ids=repr)
def test_a_format_that_is_no_number_is_refused(base, change, load, version):
    with pytest.raises(ConfigError, match=r"format_version=.*expected an integer"):
        load(base, change(format_version=version))


@pytest.mark.parametrize("name", ["base_model_name_or_path", "revision", "uc_adapters_version"])
@pytest.mark.parametrize("value", [3, True, ["org/base"], {}], ids=repr)
def test_a_name_that_is_no_text_is_refused(change, name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*expected a string or None"):
        UniCompressConfig.from_pretrained(change(**{name: value}))
