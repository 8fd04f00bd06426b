"""The seal of a saved adapter: its weights file and its config belong together, and neither has changed since."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from copies import copied
from helpers import attach, logits, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from uc_adapters import UniCompressConfig, UniCompressModel
from uc_adapters.errors import AdapterFileError, InputError


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(folder) -> dict:
    return json.loads((folder / CONFIG_NAME).read_text())


def rewrite(folder, config: dict) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(pristine):
    return attach(copied(pristine), seed=7)


@pytest.fixture(scope="module")
def intact(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    """A copy of an adapter's folder, to be changed."""
    return shutil.copytree(intact, tmp_path / "adapter")


@pytest.fixture(scope="module")
def other(pristine, tmp_path_factory) -> Path:
    """Another adapter of the same shapes."""
    folder = tmp_path_factory.mktemp("other")
    attach(copied(pristine), seed=8, lora_alpha=3).save_pretrained(folder)
    return folder


# transformers' own load_adapter reads the files by itself, past every hook of a config: it cannot see a seal
every_loader = pytest.mark.parametrize(
    "load", [UniCompressModel.from_pretrained, PeftModel.from_pretrained], ids=["ours", "peft"]
)


@every_loader
@pytest.mark.parametrize("place", [20, -1], ids=["header", "last value"])
def test_a_flipped_bit_in_the_weights_is_refused(folder, base, load, place):
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    expected, data = sha256(weights), bytearray(weights.read_bytes())
    data[place] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterFileError, match=f"expected sha256 {expected}, got (sha256 )?{sha256(weights)}"):
        load(base, folder)


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_anywhere_in_the_weights_is_refused(intact, tmp_path_factory, place, flip):
    folder = shutil.copytree(intact, tmp_path_factory.getbasetemp() / "changed byte", dirs_exist_ok=True)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    data = bytearray(weights.read_bytes())
    data[int(place * len(data))] ^= flip
    weights.write_bytes(data)
    with pytest.raises(AdapterFileError, match="expected sha256"):  # every loader reads the config by this
        UniCompressConfig.from_pretrained(folder)


def test_the_weights_of_another_adapter_are_refused(folder, other, base):
    expected = sha256(folder / SAFETENSORS_WEIGHTS_NAME)
    shutil.copy(other / SAFETENSORS_WEIGHTS_NAME, folder)
    actual = sha256(folder / SAFETENSORS_WEIGHTS_NAME)
    with pytest.raises(AdapterFileError, match=f"not the file that was saved.*expected sha256 {expected}, got {actual}"):
        UniCompressModel.from_pretrained(base, folder)


def test_the_config_of_another_adapter_is_refused(folder, other, base):
    shutil.copy(other / CONFIG_NAME, folder)
    with pytest.raises(AdapterFileError, match="not the file that was saved with its config"):
        UniCompressModel.from_pretrained(base, folder)


# None of these shows in the shapes of the weights, so nothing but the seal can tell
CHANGES = {
    "lora_alpha": 9,
    "lora_dropout": 0.5,
    "use_rslora": True,
    "alpha_pattern": {"q_proj": 100},
    "init_lora_weights": False,
    "codebook_weight": 2.0,
    "base_fingerprint": None,
    "base_geometry": None,
    "new": None,
}


@pytest.mark.parametrize(("name", "value"), CHANGES.items(), ids=CHANGES)
def test_a_changed_field_is_refused(folder, name, value):
    config = read(folder)
    rewrite(folder, config | {name: value})
    with pytest.raises(
        AdapterFileError, match=f"was changed after.*sha256 {seal(config)} of its fields, got [0-9a-f]{{64}}.*on purpose"
    ):
        UniCompressConfig.from_pretrained(folder)


@every_loader
def test_every_loader_refuses_a_changed_field(folder, base, load):
    rewrite(folder, read(folder) | {"lora_alpha": 9})
    with pytest.raises(AdapterFileError, match="was changed after"):
        load(base, folder)


def seal(config: dict) -> str:
    return config["seal"]["config_sha256"]


def test_a_field_taken_out_is_refused(folder):
    config = read(folder)
    del config["lora_alpha"]  # PEFT would take its default
    rewrite(folder, config)
    with pytest.raises(AdapterFileError, match=f"was changed after.*expected sha256 {seal(config)}"):
        UniCompressConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    "seal",
    [{}, [], "", 0, False, True, "0" * 64, {"weights_sha256": "0" * 64}, {"weights_sha256": 1, "config_sha256": 1, "more": 1}],
    ids=repr,
)
def test_a_broken_seal_is_refused(folder, seal):
    rewrite(folder, read(folder) | {"seal": seal})
    with pytest.raises(AdapterFileError, match=r"broken seal.*expected weights_sha256 and config_sha256"):
        UniCompressConfig.from_pretrained(folder)


def test_where_the_base_lies_who_wrote_the_file_and_the_order_may_change(folder, base, model, short_question):
    fields = {"base_model_name_or_path": "org/moved", "revision": "0" * 40, "inference_mode": False, "auto_mapping": None}
    fields |= {"peft_version": "0.99", "uc_adapters_version": "9.9"}
    rewrite(folder, dict(reversed((read(folder) | fields).items())))
    assert torch.equal(logits(UniCompressModel.from_pretrained(base, folder), short_question), logits(model, short_question))


@every_loader
def test_plain_peft_saves_an_unsealed_folder_that_loads(base, model, short_question, tmp_path, load):
    PeftModel.save_pretrained(model, tmp_path)
    assert read(tmp_path)["seal"] is None
    assert torch.equal(logits(load(base, tmp_path), short_question), logits(model, short_question))


def test_plain_peft_breaks_the_seal_of_what_it_saves_over(folder, base, intact):
    loaded = UniCompressModel.from_pretrained(base, intact)
    randomise(loaded, seed=9)
    PeftModel.save_pretrained(loaded, folder)
    assert read(folder)["seal"] is None
    assert sha256(folder / SAFETENSORS_WEIGHTS_NAME) != sha256(intact / SAFETENSORS_WEIGHTS_NAME)


def test_saving_after_training_seals_anew(folder, base, fresh, short_question):
    before = read(folder)["seal"]
    loaded = UniCompressModel.from_pretrained(base, folder, is_trainable=True)
    randomise(loaded, seed=9)
    loaded.save_pretrained(folder)
    after = read(folder)["seal"]
    assert after["weights_sha256"] == sha256(folder / SAFETENSORS_WEIGHTS_NAME) != before["weights_sha256"]
    assert after["config_sha256"] == before["config_sha256"]
    again = UniCompressModel.from_pretrained(fresh(), folder)
    assert torch.equal(logits(again, short_question), logits(loaded, short_question))


def test_a_repeated_save_is_the_same_byte_for_byte(model, processor, base, tmp_path):
    folder = tmp_path / "adapter"
    model.save_pretrained(folder, processor=processor)
    first = contents(folder)
    model.save_pretrained(folder, processor=processor)
    assert contents(folder) == first
    UniCompressModel.from_pretrained(base, folder).save_pretrained(folder, processor=processor)
    assert contents(folder) == first


def test_a_set_is_saved_in_order(base, tmp_path):
    """PEFT holds these as sets, whose order differs between processes."""
    names = {"target_modules": ["v_proj", "q_proj", "up_proj", "k_proj"], "exclude_modules": ["v_proj", "up_proj"]}
    attach(base, **names).save_pretrained(tmp_path)
    for name, values in names.items():
        assert read(tmp_path)[name] == sorted(values)


def test_only_safetensors_are_loaded_where_a_pickle_lies_beside_them(folder, base, model, short_question):
    (folder / "adapter_model.bin").write_bytes(b"no pickle at all: whoever reads it stumbles")
    assert torch.equal(logits(UniCompressModel.from_pretrained(base, folder), short_question), logits(model, short_question))


@pytest.mark.parametrize("target", ["step-900.safetensors", "0" * 64, "blobs/" + "0" * 64])
def test_a_file_that_a_person_linked_is_read_and_stays(folder, pristine, tmp_path, target):
    """A link is not the Hub's cache, and what it leads to is not ours to remove."""
    weights, store = folder / SAFETENSORS_WEIGHTS_NAME, tmp_path / "store" / target
    store.parent.mkdir(parents=True)
    weights.rename(store)
    weights.symlink_to(store)
    before = sha256(store)
    UniCompressModel.from_pretrained(copied(pristine), folder)
    store.write_bytes(store.read_bytes()[:-1])
    with pytest.raises(AdapterFileError, match=r"not a safetensors file|not the file that was saved"):
        UniCompressModel.from_pretrained(copied(pristine), folder)
    assert weights.is_symlink()
    assert store.is_file()
    assert sha256(store) != before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"torch_dtype": torch.bfloat16}, "torch_dtype=.* is unknown; expected .*dtype"),
        ({"revison": "v2"}, "revison='v2' is unknown; expected revision"),
        ({"is_trainble": True}, "is_trainble=True is unknown; expected is_trainable"),
        ({"load_in_8bit": True}, "load_in_8bit=True is unknown"),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16 is for the loading of the base, and the base is loaded already"),
        ({"attn_implementation": "eager"}, "attn_implementation='eager' is for the loading of the base"),
    ],
)
def test_an_argument_without_effect_is_refused(intact, pristine, options, told):
    with pytest.raises(InputError, match=told):
        UniCompressModel.from_pretrained(copied(pristine), intact, **options)
    loaded = UniCompressModel.from_pretrained(copied(pristine), intact)
    with pytest.raises(InputError, match=f"{next(iter(options))}=.* is unknown"):
        loaded.load_adapter(intact, "second", **options)
    assert list(loaded.peft_config) == ["default"]


def test_options_of_the_base_reach_it(intact, base_folder):
    model = UniCompressModel.from_pretrained(intact, base_model=base_folder, attn_implementation="eager")
    assert model.get_base_model().config.get_text_config()._attn_implementation == "eager"
