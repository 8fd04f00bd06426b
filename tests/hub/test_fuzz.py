"""Random damage to an adapter's files: it is refused with an error of ours, or what is loaded is what the files say."""

import copy
import io
import json
import pickle
import resource
import struct
from collections import Counter
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_same, attach, lora_weights
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load
from tiny_world.tiny_janus import make_model
from transformers import JanusForConditionalGeneration

from uc_adapters import UniCompressConfig, UniCompressModel, errors
from uc_adapters.files.folder import UNSEALED

pytestmark = pytest.mark.no_cover  # thousands of loads, which the other tests cover: watched, they take half as long again
OURS = tuple(error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception))
TALLY = Counter()
MEMORY = 4 * 2**30  # bytes more than now: a config may ask for any size, and must not get it from this machine
DEFAULTS = vars(UniCompressConfig())
FIELDS = sorted(field.name for field in fields(UniCompressConfig))
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I16", "U8", "BOOL", "C64", "F4", "X", ""]
WRITTEN_ON_LOADING = {"auto_mapping", "inference_mode", "peft_type", "peft_version", "seal"}
WRITTEN_WHERE_UNSET = {"base_geometry", "base_fingerprint", "base_model_name_or_path", "revision", "target_modules"}
# PEFT sets the first by the layers that it meets, and makes objects of the others, for training or for ways to start that are
# refused: none of them changes an adapter that is loaded
LEFT_TO_PEFT = {"fan_in_fan_out", "corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"}


class Target:
    """The smallest base, an adapter's files on it, and a model to load their damaged copies into."""

    def __init__(self, processor, folder):
        torch.manual_seed(0)
        base = JanusForConditionalGeneration(smallest(make_model(processor).config)).eval().requires_grad_(False)
        self.folder, self.plain, self.model = folder, copy.deepcopy(base), attach(base, r=1, decompressor_width=8, seed=1)
        self.model.save_pretrained(folder)
        self.config, self.weights = (folder / CONFIG_NAME).read_bytes(), (folder / SAFETENSORS_WEIGHTS_NAME).read_bytes()
        self.before = self.state()
        self.intact = self.load()

    def state(self) -> dict[str, bool]:
        """The names of all weights, and which of them train."""
        return {name: weight.requires_grad for base in (self.model, self.plain) for name, weight in base.named_parameters()}

    def load(self, alone: bool = False) -> tuple[dict, dict]:
        """What the folder's files load as: fields and weights, on a plain base or beside another adapter.

        The base, or the other adapter, is as before, however the loading ends.
        """
        try:
            if alone:
                model = UniCompressModel.from_pretrained(self.plain, self.folder, "loaded")
            else:
                model = self.model
                model.load_adapter(self.folder, "loaded")
            loaded = vars(model.peft_config["loaded"]), lora_weights(model, "loaded")
            model.unload() if alone else model.delete_adapter("loaded")
        finally:
            assert (list(self.model.peft_config), self.model.active_adapters) == (["default"], ["default"])
            assert self.state() == self.before
        return loaded

    def check(self, config: bytes, weights: bytes, sealed: bool, alone: bool = False) -> None:
        """The oracle."""
        (self.folder / CONFIG_NAME).write_bytes(config)
        (self.folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(weights)
        try:
            fields, tensors = self.load(alone)
        except OURS:
            TALLY["refused"] += 1
            return
        (intact_fields, intact_tensors), written = self.intact, json.loads(config)
        if sealed:
            TALLY["loaded as it was saved"] += 1
            expected = {name: value for name, value in intact_fields.items() if name not in UNSEALED}
            assert_same(tensors, intact_tensors)
        else:
            TALLY["loaded as the unsealed files say"] += 1
            unset = {name for name in WRITTEN_WHERE_UNSET if written.get(name) in (None, "all-linear")}
            names = set(FIELDS) - unset - WRITTEN_ON_LOADING - LEFT_TO_PEFT
            expected = {name: as_held(name, written.get(name, DEFAULTS[name])) for name in names}
            stored = {name.replace(".loaded.", "."): value for name, value in tensors.items()}
            assert_same(stored, {name: value.to(stored[name].dtype) for name, value in load(weights).items()})
        assert {name: fields[name] for name in expected} == expected


def smallest(config):
    """A base's config, cut down."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    text.hidden_size = text.intermediate_size = vision.hidden_size = vision.projection_dim = 16
    vq.projection_dim = vq.image_token_embed_dim = vq.num_embeddings = vision.image_size = 16
    text.num_attention_heads = text.num_key_value_heads = vision.num_attention_heads = 2
    text.num_hidden_layers = vision.num_hidden_layers = 1
    text.head_dim, vision.num_image_tokens, vq.num_patches = 8, 4, 2
    return config


def as_held(name: str, value):
    """A field of a file, as the config holds it."""
    return set(value) if name in ("target_modules", "exclude_modules") and isinstance(value, list) else value


@pytest.fixture(scope="module")
def target(processor, tmp_path_factory):
    target = Target(processor, tmp_path_factory.mktemp("fuzz"))
    before, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    yield target
    resource.setrlimit(resource.RLIMIT_AS, before)


places = st.floats(0, 1, exclude_max=True)
byte_edits = st.tuples(
    st.sampled_from(["flip", "insert", "delete", "truncate", "double", "append", "replace"]),
    places,
    st.binary(min_size=1, max_size=9),
)
integers = st.integers(-2, 20) | st.integers(10**4, 10**20)
words = st.sampled_from(
    ["q_proj", "phase", "raster", "all-linear", "gaussian", "none", "(", "*", ".*", "model", "lora_", "1", ""]
)
leaves = st.none() | st.booleans() | integers | st.floats() | words | st.text(max_size=5)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=5
)
field_edits = st.tuples(st.sampled_from(["set", "delete", "inside", "add"]), st.sampled_from(FIELDS), places, values)
header_edits = st.tuples(
    st.sampled_from(["dtype", "shape", "data_offsets", "name", "drop", "extra"]),
    places,
    values | st.sampled_from(DTYPES),
)


def edit_bytes(data: bytes, what: str, place: float, payload: bytes) -> bytes:
    at = int(place * len(data))
    return {
        "flip": data[:at]
        + bytes(byte ^ flip for byte, flip in zip(data[at:], payload, strict=False))
        + data[at + len(payload) :],
        "insert": data[:at] + payload + data[at:],
        "delete": data[:at] + data[at + len(payload) :],
        "truncate": data[:at],
        "double": data[:at] + data[at : at + 64] + data[at:],
        "append": data + payload,
        "replace": payload,
    }[what]


def edit_config(config: bytes, what: str, name: str, place: float, value) -> bytes:
    edited = json.loads(config)
    old = edited.get(name)
    if what == "inside" and isinstance(old, dict) and old:
        old[sorted(old)[int(place * len(old))]] = value
    elif what == "inside" and isinstance(old, list):
        old.append(value)
    elif what == "delete":
        edited.pop(name, None)
    else:
        edited[f"more_{name}" if what == "add" else name] = value
    return json.dumps(edited).encode()


def edit_header(weights: bytes, what: str, place: float, value) -> bytes:
    """The same data behind a header of safetensors that is well formed, and says something else."""
    end = 8 + struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8:end])
    name = sorted(header)[int(place * len(header))]
    entry = header[name]
    if what == "drop":
        del header[name]
    elif what == "name":
        header[str(value)] = header.pop(name)
    elif what == "extra":
        header[str(value)] = entry
    else:
        entry[what] = value
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + weights[end:]


def unseal(config: bytes) -> bytes:
    return edit_config(config, "set", "seal", 0, None)


def cases(count: int):
    # A load that fails wrongly may spoil the model for all that follow, so the example is told as it was found
    return settings(max_examples=count, phases=[Phase.reuse, Phase.generate], suppress_health_check=list(HealthCheck))


@cases(250)
@given(edits=st.lists(field_edits, min_size=1, max_size=2), sealed=st.booleans(), alone=st.booleans())
def test_damaged_fields(target, edits, sealed, alone):
    config = target.config if sealed else unseal(target.config)
    for edit in edits:
        config = edit_config(config, *edit)
    target.check(config, target.weights, is_sealed(config), alone)


@cases(160)
@given(edits=st.lists(byte_edits, min_size=1, max_size=3), sealed=st.booleans())
def test_damaged_bytes_of_the_config(target, edits, sealed):
    config = target.config if sealed else unseal(target.config)
    for edit in edits:
        config = edit_bytes(config, *edit)
    target.check(config, target.weights, is_sealed(config))


@cases(160)
@given(edits=st.lists(byte_edits, min_size=1, max_size=3), sealed=st.booleans())
def test_damaged_bytes_of_the_weights(target, edits, sealed):
    weights = target.weights
    for edit in edits:
        weights = edit_bytes(weights, *edit)
    target.check(target.config if sealed else unseal(target.config), weights, sealed)


@cases(160)
@given(edits=st.lists(header_edits, min_size=1, max_size=2), sealed=st.booleans())
def test_a_damaged_header_of_the_weights(target, edits, sealed):
    weights = target.weights
    for edit in edits:
        weights = edit_header(weights, *edit)
    target.check(target.config if sealed else unseal(target.config), weights, sealed)


@cases(40)
@given(length=st.integers(0, 30_000) | st.integers(0, 2**64 - 1), sealed=st.booleans())
def test_a_wrong_length_of_the_header(target, length, sealed):
    weights = struct.pack("<Q", length) + target.weights[8:]
    target.check(target.config if sealed else unseal(target.config), weights, sealed)


def is_sealed(config: bytes) -> bool:
    """Whether a damaged config still has a seal; where it is no JSON object, it does not matter."""
    try:
        return json.loads(config)["seal"] is not None
    except (ValueError, KeyError, TypeError, IndexError):
        return False


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "crater")))
    assert (tmp_path / "crater").exists()


def as_torch(bomb) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": bomb}, stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, CONFIG_NAME])
@pytest.mark.parametrize("write", [as_torch, *(partial(pickle.dumps, protocol=protocol) for protocol in (0, 5))])
def test_no_pickle_is_ever_executed(target, tmp_path, write, name):
    files = {CONFIG_NAME: unseal(target.config), name: write(Bomb(tmp_path / "crater"))}
    for file in target.folder.iterdir():
        file.unlink()
    for file, content in files.items():
        (target.folder / file).write_bytes(content)
    with pytest.raises(errors.AdapterFileError):
        target.load()
    TALLY["refused"] += 1
    assert not (tmp_path / "crater").exists()


def test_enough_cases_were_run(capsys):
    with capsys.disabled():
        print(f"\n{TALLY.total()} damaged adapters: {', '.join(f'{count} {what}' for what, count in TALLY.items())}")
    assert TALLY.total() >= 700
