"""A format, a method or a field that this version does not know is refused by name, since its mathematics may differ."""

import json
import shutil
from pathlib import Path

import pytest
from copies import copied
from helpers import attach
from peft import PeftModel
from peft.utils import CONFIG_NAME

from uc_adapters import UniCompressConfig, UniCompressModel
from uc_adapters.config import FORMAT_VERSION
from uc_adapters.errors import AdapterFileError, ConfigError


@pytest.fixture(scope="module")
def saved(pristine, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    attach(copied(pristine)).save_pretrained(folder)
    return folder


@pytest.fixture
def change(saved, tmp_path):
    """Makes a copy of the adapter with other fields, without a seal."""

    def write(without: tuple[str, ...] = (), **changes) -> Path:
        folder = shutil.copytree(saved, tmp_path / "changed")
        fields = json.loads((folder / CONFIG_NAME).read_text()) | {"seal": None} | changes
        (folder / CONFIG_NAME).write_text(json.dumps({name: fields[name] for name in fields if name not in without}))
        return folder

    return write


def test_a_saved_adapter_names_its_format(saved):
    fields = json.loads((saved / CONFIG_NAME).read_text())
    assert fields["format_version"] == FORMAT_VERSION
    assert fields["seal"] is not None


LOADERS = {
    "ours": UniCompressModel.from_pretrained,
    "ours, beside another": lambda base, folder: attach(base).load_adapter(folder, "second"),
    "peft": PeftModel.from_pretrained,
}
every_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@every_loader
def test_every_loader_refuses_a_newer_format(base, change, load):
    with pytest.raises(ConfigError, match=f"format {FORMAT_VERSION + 1}"):
        load(base, change(format_version=FORMAT_VERSION + 1))


@pytest.mark.parametrize("more", [{}, {"spiral": 3}, {"stride": {"read": 2, "draw": 4}}], ids=["same", "new", "changed"])
def test_a_newer_format_is_refused_with_the_version_to_install(change, more):
    folder = change(format_version=FORMAT_VERSION + 1, uc_adapters_version="9.9", **more)
    match = rf"format {FORMAT_VERSION + 1} by uc-adapters 9\.9.*uc-adapters 9\.9 or newer reads it"
    with pytest.raises(ConfigError, match=match):
        UniCompressConfig.from_pretrained(folder)


@every_loader
def test_every_loader_refuses_an_unknown_field(base, change, load):
    with pytest.raises(ConfigError, match="'spiral'"):
        load(base, change(spiral=1))


@pytest.mark.parametrize("value", [1, 0.5, True, "on", ["q_proj"], {"angle": 0}], ids=repr)
def test_an_unknown_field_that_is_set_is_refused(change, value):
    with pytest.raises(ConfigError, match=r"'spiral'.*uc-adapters 9\.9.*uc-adapters 9\.9 or newer reads it"):
        UniCompressConfig.from_pretrained(change(spiral=value, uc_adapters_version="9.9"))


@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=repr)
def test_an_unknown_field_that_is_unset_changes_nothing(saved, change, value):
    assert UniCompressConfig.from_pretrained(change(spiral=value)) == UniCompressConfig.from_pretrained(saved)


@every_loader
@pytest.mark.parametrize("without", [("seal",), ("seal", "format_version")], ids=" and ".join)
def test_a_seal_that_was_taken_out_is_refused(base, change, load, without):
    """The seal is broken on purpose by "seal": null alone."""
    with pytest.raises(AdapterFileError, match=r"broken seal 'missing'; expected.*on purpose"):
        load(base, change(without))


# PEFT itself looks the method up before it asks us
@pytest.mark.parametrize("method", ["MAGIC", "unicompress", "", None, 3, ["UNICOMPRESS"], {}], ids=repr)
def test_an_unknown_method_is_refused_with_what_to_upgrade(change, method):
    match = r"of peft_type .*not known here; expected UNICOMPRESS.*upgrade uc-adapters and peft"
    with pytest.raises(AdapterFileError, match=match):
        UniCompressConfig.from_pretrained(change(peft_type=method))


def test_another_method_is_sent_to_peft(base, change):
    with pytest.raises(AdapterFileError, match=r"describes a LORA adapter; expected UNICOMPRESS.*with peft itself"):
        UniCompressModel.from_pretrained(base, change(peft_type="LORA"))


@pytest.mark.parametrize("version", ["1", 1.0, None, True, [1], {}, 0, -1, "newest"], ids=repr)
def test_a_format_that_is_no_number_is_refused(change, version):
    with pytest.raises(ConfigError, match=r"format_version=.*expected an integer"):
        UniCompressConfig.from_pretrained(change(format_version=version))


@pytest.mark.parametrize("name", ["base_model_name_or_path", "revision", "uc_adapters_version"])
@pytest.mark.parametrize("value", [3, True, ["org/base"], {}], ids=repr)
def test_a_name_that_is_no_text_is_refused(change, name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*expected a string or None"):
        UniCompressConfig.from_pretrained(change(**{name: value}))
