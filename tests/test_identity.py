"""Which base an adapter was trained on: recorded, and compared with the one it meets."""

import json
import shutil
import warnings

import pytest
import torch
from helpers import attach, logits, small_config
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import CONFIG_NAME
from shallow import shallow
from tiny_world.tiny_janus import make_model
from transformers import AutoModelForImageTextToText, JanusForConditionalGeneration

from uc_adapters import UniCompressModel, get_uc_model
from uc_adapters.errors import BaseModelError
from uc_adapters.identity import SIZE, TOLERANCE, _sketch, name_and_commit, remember_commit

COMMITS = ["a" * 40, "b" * 40]


@pytest.fixture(scope="module")
def folder(base_folder, tmp_path_factory):
    """An adapter, trained on the base in `base_folder`."""
    folder = tmp_path_factory.mktemp("adapter")
    attach(AutoModelForImageTextToText.from_pretrained(base_folder), seed=7).save_pretrained(folder)
    return folder


@pytest.fixture
def silent():
    """Turns a warning of ours into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter was trained on")
        yield


def perturb(weight: torch.Tensor) -> None:
    """Adds noise as large as the weight."""
    torch.manual_seed(0)
    with torch.no_grad():
        weight.add_(torch.randn_like(weight) * weight.std())


def test_the_base_is_recorded(folder, base_folder):
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base_folder), None)
    assert config["base_geometry"]["hidden_size"] == 192
    assert config["base_geometry"].keys() >= {"model_type", "num_heads", "read_layers", "num_codes", "code_width"}
    assert {part: len(numbers) for part, numbers in config["base_fingerprint"].items()} == {"codebook": SIZE, "weights": SIZE}


def test_a_base_without_a_name_has_no_commit(base):
    assert name_and_commit(base) == (None, None)


def test_the_commit_of_a_base_from_the_hub_is_recorded(base):
    base.name_or_path = "org/janus"
    remember_commit(base, COMMITS[0])
    config = attach(base).active_peft_config
    assert (config.base_model_name_or_path, config.revision) == ("org/janus", COMMITS[0])


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_same_base(folder, base, dtype):
    UniCompressModel.from_pretrained(base.to(dtype), folder)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_of_a_rounded_base_loads_on_the_exact_one(base, fresh, tmp_path, dtype):
    attach(base.to(dtype)).save_pretrained(tmp_path)
    UniCompressModel.from_pretrained(fresh(), tmp_path)


@pytest.mark.usefixtures("silent")
def test_the_same_weights_in_another_folder_are_the_same_base(folder, base, processor, tmp_path):
    base.save_pretrained(tmp_path / "moved")
    UniCompressModel.from_pretrained(folder, base_model=tmp_path / "moved")


@pytest.mark.usefixtures("silent")
def test_a_second_adapter_meets_the_base_below_the_first(folder, base):
    model = attach(base)
    model.load_adapter(folder, "second")
    model.add_adapter("third", small_config())
    fingerprints = [model.peft_config[name].base_fingerprint for name in ("default", "second", "third")]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]


@pytest.mark.usefixtures("silent")
def test_training_the_adapter_leaves_the_fingerprint(folder, base):
    model = UniCompressModel.from_pretrained(base, folder, is_trainable=True)
    before = model.active_peft_config.base_fingerprint
    for parameter in model.parameters():
        if parameter.requires_grad:
            perturb(parameter)
    assert attach(model.unload()).active_peft_config.base_fingerprint == before


def load_alone(base, folder):
    return UniCompressModel.from_pretrained(base, folder)


def load_beside(base, folder):
    model = attach(base)
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


either_way = pytest.mark.parametrize("load", [load_alone, load_beside])


@either_way
def test_another_codebook_is_refused(folder, base, base_folder, load):
    perturb(base.model.vqmodel.quantize.embedding.weight)
    with pytest.raises(BaseModelError, match=rf"trained on {base_folder}@unknown, got .*@unknown.*another codebook"):
        load(base, folder)


@either_way
def test_codes_in_another_order_are_another_codebook(folder, base, load):
    codes = base.model.vqmodel.quantize.embedding.weight
    with torch.no_grad():
        codes.copy_(codes.flip(0))
    with pytest.raises(BaseModelError, match="another codebook"):
        load(base, folder)


@either_way
def test_another_width_is_refused(folder, processor, base_folder, load):
    config = make_model(processor).config
    config.text_config.hidden_size = config.vision_config.projection_dim = config.vq_config.projection_dim = 96
    config.vq_config.image_token_embed_dim = 96
    config.text_config.head_dim = 16
    with pytest.raises(BaseModelError, match=rf"trained on {base_folder}@unknown, got .*hidden_size was 192, is 96"):
        load(JanusForConditionalGeneration(config), folder)


def test_the_commit_met_is_named(folder, base):
    base.name_or_path = "org/other"
    remember_commit(base, COMMITS[1])
    perturb(base.model.vqmodel.quantize.embedding.weight)
    with pytest.raises(BaseModelError, match=r"got org/other@bbbbbbbb, which has another codebook"):
        UniCompressModel.from_pretrained(base, folder)


WEIGHTS = ["model.language_model.layers.1.mlp.up_proj", "model.vision_model.encoder.layers.0.mlp.fc1", "lm_head"]


@either_way
@pytest.mark.parametrize("name", WEIGHTS)
def test_other_weights_are_warned_of(folder, base, base_folder, short_question, load, name):
    perturb(base.get_submodule(name).weight)
    with pytest.warns(UserWarning, match=rf"trained on {base_folder}@unknown, got .*the weights differ.*worse than"):
        model = load(base, folder)
    assert logits(model, short_question).isfinite().all()


@pytest.mark.parametrize("commit", COMMITS)
def test_another_commit_is_warned_of(base, fresh, tmp_path, commit):
    base.name_or_path = "org/janus"
    remember_commit(base, COMMITS[0])
    attach(base).save_pretrained(tmp_path)
    other = fresh()
    other.name_or_path = "org/janus"
    remember_commit(other, commit)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        UniCompressModel.from_pretrained(other, tmp_path)
    told = [str(warning.message) for warning in caught if "The adapter was trained on" in str(warning.message)]
    expected = "trained on org/janus@aaaaaaaa, got org/janus@bbbbbbbb: shapes and codebook agree, the commit differs"
    assert [expected in message for message in told] == ([] if commit == COMMITS[0] else [True])


@pytest.mark.usefixtures("silent")
def test_a_base_on_the_meta_device_is_not_judged(folder, processor):
    with torch.device("meta"):
        base = shallow(make_model(processor))
    model = get_uc_model(base, small_config(), low_cpu_mem_usage=True)
    assert model.active_peft_config.base_fingerprint == {"codebook": None, "weights": None}
    model.load_adapter(folder, "second", low_cpu_mem_usage=True)


@pytest.mark.usefixtures("silent")
def test_quantised_weights_are_not_judged_but_the_codebook_is(folder, base):
    """As bitsandbytes leaves a layer: packed into bytes."""
    layer = base.model.language_model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    fingerprint = attach(base, target_modules=["q_proj"]).active_peft_config.base_fingerprint
    assert fingerprint["weights"] is None
    assert len(fingerprint["codebook"]) == SIZE


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("fingerprint", [None, {}, {"codebook": None, "weights": None}])
def test_an_adapter_without_a_fingerprint_loads_on_any_base_of_its_shapes(folder, base, tmp_path, fingerprint):
    shutil.copytree(folder, tmp_path / "old")
    config = json.loads((folder / CONFIG_NAME).read_text()) | {"base_fingerprint": fingerprint, "seal": None}
    (tmp_path / "old" / CONFIG_NAME).write_text(json.dumps(config))
    perturb(base.lm_head.weight)
    UniCompressModel.from_pretrained(base, tmp_path / "old")


shapes = st.tuples(st.sampled_from([1, 2, 16, 37, 512, 4096]), st.sampled_from([2, 8, 32]))
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-3, 0.02, 1.0, 30.0])


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return max(abs(a - b) for a, b in zip(_sketch(ours), _sketch(theirs), strict=True))


def rows(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(shape=shapes, seed=seeds, scale=scales, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_rounding_stays_within_the_tolerance(shape, seed, scale, dtype):
    exact = rows(shape, seed) * scale
    assert distance(exact, exact.to(dtype).float()) <= TOLERANCE


@given(shape=shapes, seed=seeds, other=seeds)
def test_another_codebook_never_does(shape, seed, other):
    if shape[0] > 2 and seed != other:
        assert distance(rows(shape, seed), rows(shape, other)) > TOLERANCE


@given(shape=shapes, seed=seeds, scale=st.floats(1e-3, 1e3))
def test_a_scale_does_not_matter(shape, seed, scale):
    assert distance(rows(shape, seed), rows(shape, seed) * scale) < TOLERANCE / 10  # a sum is kept to four digits
