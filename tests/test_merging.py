"""LoRA merged into the language model, and every way back: the base's own weights, bit for bit."""

import copy
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier

import pytest
import torch
from copies import copied
from helpers import (
    CAPTIONS,
    assert_same,
    attach,
    base_weights,
    draw,
    drawing_inputs,
    logits,
    lora_weights,
    randomise,
    small_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from uc_adapters import UniCompressModel
from uc_adapters.errors import UnsupportedError
from uc_adapters.lora import free_memory

DTYPES = [torch.float32, torch.bfloat16]
FORMS = {
    "plain": {},
    "dora": {"use_dora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 2}},
    "rslora and dropout": {"use_rslora": True, "lora_dropout": 0.5},
    "one layer": {"layers_to_transform": [0]},
}


@pytest.fixture
def prompts(short_processor):
    return drawing_inputs(short_processor, CAPTIONS)


def merged(model) -> bool:
    return any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer))


@pytest.mark.parametrize("form", FORMS)
def test_merged_it_computes_the_same_without_lora(base, short_question, prompts, form):
    model = attach(base, **FORMS[form])
    expected, drawn = logits(model, short_question), draw(model, prompts)
    with model.merged_adapter():
        assert merged(model)
        found = logits(model, short_question)
        assert not torch.equal(found, expected)  # rounded elsewhere: LoRA's products are gone
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(draw(model, prompts), drawn)
    assert not merged(model)
    assert torch.equal(logits(model, short_question), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_unmerged_the_base_is_as_it_was(base, dtype, form):
    model = attach(base.to(dtype), **FORMS[form])
    before, parameters = base_weights(model), list(model.parameters())
    model.merge_adapter()
    assert base_weights(model).keys() == before.keys()
    model.unmerge_adapter()
    assert_same(base_weights(model), before)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


WAYS_BACK = {
    "unmerge": lambda model: model.unmerge_adapter(),
    "set_adapter": lambda model: model.set_adapter("b"),
    "delete": lambda model: model.delete_adapter("default"),
    "disable": lambda model: model.disable_adapter_layers(),
    "unload": lambda model: model.unload(),
}


@pytest.mark.parametrize("way", WAYS_BACK)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_back_gives_the_bases_weights(base, way, dtype):
    model = attach(base.to(dtype))
    model.add_adapter("b", small_config())
    before = base_weights(model)
    model.merge_adapter()
    WAYS_BACK[way](model)
    assert_same(base_weights(model), before)


def test_disabled_for_a_while_it_is_the_base_and_then_merged_again(base, pristine, short_question, dense_question):
    model = attach(base)
    with model.merged_adapter():
        expected = logits(model, short_question)
        with model.disable_adapter(), model.disable_adapter():
            assert torch.equal(logits(model, dense_question), logits(pristine, dense_question))
        assert torch.equal(logits(model, short_question), expected)


def test_an_exception_inside_leaves_it_unmerged(base):
    model = attach(base)
    before = base_weights(model)
    with pytest.raises(KeyError), model.merged_adapter(), model.disable_adapter():
        raise KeyError
    assert_same(base_weights(model), before)


def test_what_was_merged_before_stays_merged(base, short_question):
    model = attach(base)
    model.merge_adapter()
    expected = logits(model, short_question)
    with model.merged_adapter():
        pass
    assert torch.equal(logits(model, short_question), expected)
    model.merge_adapter()  # a second time changes nothing
    assert torch.equal(logits(model, short_question), expected)


def test_unmerging_what_is_not_merged_changes_nothing(base, short_question):
    model = attach(base)
    expected = logits(model, short_question)
    model.unmerge_adapter()
    assert torch.equal(logits(model, short_question), expected)


def test_training_unmerges_with_a_word(base):
    model = attach(base)
    before = base_weights(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"train\(\) unmerged the adapter.*no gradient"):
        model.train()
    assert_same(base_weights(model), before)
    with pytest.raises(UnsupportedError, match=r"training mode.*model.eval\(\)"):
        model.merge_adapter()


def test_a_weight_that_two_modules_share_is_merged_in_one(base, pristine, short_question):
    for model in (base, pristine := copied(pristine)):
        first, second = (layer.mlp.up_proj for layer in model.model.language_model.layers[:2])
        second.weight = first.weight
    model = attach(base, target_modules=["up_proj"], layers_to_transform=[0])
    expected = logits(model, short_question)
    with model.merged_adapter():
        torch.testing.assert_close(logits(model, short_question), expected, atol=1e-4, rtol=1e-4)
    layers = model.get_base_model().model.language_model.layers
    assert layers[0].mlp.up_proj.get_base_layer().weight is layers[1].mlp.up_proj.weight
    assert_same(model.unload().state_dict(), pristine.state_dict())


def test_saved_while_merged_it_is_the_adapter_alone(base, fresh, tmp_path, short_question):
    model = attach(base)
    expected = logits(model, short_question)
    with model.merged_adapter():
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(UniCompressModel.from_pretrained(fresh(), tmp_path), short_question), expected)


def test_an_adapter_added_while_one_is_merged_meets_the_base(base, tmp_path, short_question):
    model = attach(base)
    model.save_pretrained(tmp_path)
    with model.merged_adapter():
        expected = logits(model, short_question)
        model.add_adapter("dora", small_config(use_dora=True))
        model.load_adapter(tmp_path, "loaded")
        assert torch.equal(logits(model, short_question), expected)
    fingerprints = [config.base_fingerprint for config in model.peft_config.values()]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]


def test_magnitudes_of_a_dora_added_while_one_is_merged_are_the_bases(base, fresh):
    torch.manual_seed(0)
    alone = attach(fresh())
    alone.add_adapter("dora", small_config(use_dora=True))
    model = attach(base)
    with model.merged_adapter():
        model.add_adapter("dora", small_config(use_dora=True))
    ours, theirs = (
        {name: weight for name, weight in lora_weights(each, "dora").items() if "magnitude" in name} for each in (model, alone)
    )
    assert ours
    assert_same(ours, theirs)


def test_new_weights_under_a_merged_name_are_merged(base, fresh, tmp_path, short_question):
    other = attach(fresh(), seed=5)
    other.save_pretrained(tmp_path)
    expected = logits(other, short_question)
    model = attach(base)
    with model.merged_adapter():
        model.load_adapter(tmp_path, "default", hotswap=True)
        torch.testing.assert_close(logits(model, short_question), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model, short_question), expected)


def test_pefts_own_loading_into_a_merged_adapter_is_refused(base, fresh, tmp_path):
    model = attach(fresh())
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base, tmp_path)
    plain.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"'default' is merged.*unmerge_adapter\(\)"):
        plain.load_adapter(tmp_path, "default")


def test_a_plain_peft_model_merges_alike(base, fresh, tmp_path, short_question, pristine, dense_question):
    model = attach(fresh())
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base, tmp_path)
    expected = logits(plain, short_question)
    plain.merge_adapter()
    with plain.disable_adapter():
        assert torch.equal(logits(plain, dense_question), logits(pristine, dense_question))
    assert torch.equal(logits(plain, short_question), expected)


@pytest.mark.parametrize("names", [["b"], ["default", "b"], []])
def test_only_the_active_adapter_is_merged(base, names):
    model = attach(base)
    model.add_adapter("b", small_config())
    with pytest.raises(UnsupportedError, match=r"'default'.*expected one active adapter"):
        model.merge_adapter(names)
    assert not merged(model)


def test_a_disabled_adapter_is_not_merged(base):
    model = attach(base)
    with model.disable_adapter(), pytest.raises(UnsupportedError, match=r"disabled.*Enable it"):
        model.merge_adapter()


def test_a_weight_that_overflows_leaves_nothing_merged(base):
    model = attach(base)
    before = base_weights(model)
    last = [layer for layer in model.modules() if isinstance(layer, LoraLayer)][-1]
    with torch.no_grad():
        last.lora_B["default"].weight.fill_(1e38)
        last.lora_A["default"].weight.fill_(1e38)
    with pytest.raises(UnsupportedError, match=r"'default' cannot be merged.*NaNs.*unmerged"):
        model.merge_adapter()
    assert not merged(model)
    assert_same(base_weights(model), before)


class Packed(torch.Tensor):
    """A quantised weight, to those who look at its class."""


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, None])
def test_a_quantised_layer_leaves_nothing_merged(base, dtype):
    model = attach(base)
    last = [layer for layer in model.modules() if isinstance(layer, LoraLayer)][-1].get_base_layer()
    weight = torch.Tensor._make_subclass(Packed, last.weight.data) if dtype is None else last.weight.data.to(dtype)
    last.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(UnsupportedError, match=r"Linear holds .* no exact merged form.*not quantised"):
        model.merge_adapter()
    assert not merged(model)


def test_an_adapter_without_lora_has_nothing_to_merge(base, short_question):
    model = attach(base, target_modules=[])
    expected = logits(model, short_question)
    with model.merged_adapter():
        assert torch.equal(logits(model, short_question), expected)


def test_moved_while_merged_the_base_comes_along(base, fresh):
    model = attach(base)
    with model.merged_adapter():
        model.to(torch.bfloat16)
    assert_same(base_weights(model), base_weights(fresh().to(torch.bfloat16)))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_merged_copy_is_its_own(base, short_question, twin_of):
    model = attach(base)
    expected = logits(model, short_question)
    with model.merged_adapter():
        twin = twin_of(model)
    assert merged(twin)
    twin.unmerge_adapter()
    assert torch.equal(logits(twin, short_question), expected)


class Walk:
    """A model with two adapters, and what can be done to it."""

    STEPS = ("merge", "unmerge", "switch", "disable", "off", "on", "hotswap", "save", "train", "eval", "add", "delete")

    def __init__(self, base, folder):
        self.folder = folder
        self.model = attach(base, "one", seed=1)
        self.model.add_adapter("two", small_config())
        randomise(self.model, "two", 2)

    def step(self, name: str) -> None:
        model = self.model
        with suppress(UnsupportedError):  # what is refused has changed nothing
            if name == "merge":
                model.merge_adapter()
            elif name == "unmerge":
                model.unmerge_adapter()
            elif name == "switch":
                model.set_adapter("two" if model.active_adapter == "one" else "one")
            elif name == "disable":
                with model.disable_adapter():
                    pass
            elif name == "off":
                model.disable_adapter_layers()
            elif name == "on":
                model.enable_adapter_layers()
            elif name == "hotswap":
                model.load_adapter(self.folder / model.active_adapter, model.active_adapter, hotswap=True)
            elif name == "save":
                with tempfile.TemporaryDirectory() as folder:
                    model.save_pretrained(folder)
            elif name in ("train", "eval"):
                model.train(name == "train")
            elif name == "add" and "other" not in model.peft_config:
                model.add_adapter("other", small_config(use_dora=True))
            elif name == "delete" and "other" in model.peft_config:
                model.delete_adapter("other")


@pytest.fixture(scope="module")
def walked(pristine, short_question, dense_question, tmp_path_factory):
    """Both adapters' folders, and their logits."""
    folder = tmp_path_factory.mktemp("walk")
    walk = Walk(copied(pristine), folder)
    walk.model.save_pretrained(folder)
    expected = {}
    for name in ("one", "two"):
        walk.model.set_adapter(name)
        expected[name] = logits(walk.model, short_question)
    return folder, expected, logits(pristine, dense_question)


@pytest.mark.filterwarnings("ignore:train.. unmerged")
@settings(max_examples=8)
@given(steps=st.lists(st.sampled_from(Walk.STEPS), max_size=10))
def test_disabled_it_is_the_base_after_any_walk(pristine, walked, short_question, dense_question, steps):
    folder, expected, of_base = walked
    walk = Walk(copied(pristine), folder)
    model = walk.model
    for name in steps:
        walk.step(name)
    trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert {name for name in trains if trains[name]} == lora_weights(model, model.active_adapter).keys()
    model.eval()
    with model.disable_adapter():
        assert_same(base_weights(model), {name: value.detach() for name, value in pristine.named_parameters()})
        assert torch.equal(logits(model, dense_question), of_base)
    model.enable_adapter_layers()
    model.unmerge_adapter()
    assert torch.equal(logits(model, short_question), expected[model.active_adapter])
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == trains


@pytest.mark.parametrize("copies", [2, 4])
def test_it_merges_where_half_of_the_free_memory_is_enough(base, monkeypatch, recwarn, copies):
    model = attach(base)
    lora = [layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer)]
    needed = sum(weight.nbytes for layer in lora for weight in layer.parameters(recurse=False))
    monkeypatch.setattr("uc_adapters.lora.free_memory", lambda device: copies * needed)
    model.merge_if_room()
    model.merge_if_room()  # needs nothing more
    assert merged(model)
    assert not recwarn


def test_without_room_nothing_is_merged(base, monkeypatch):
    model = attach(base)
    monkeypatch.setattr("uc_adapters.lora.free_memory", lambda device: 1000)
    with pytest.warns(UserWarning, match=r"unmerged.*GB more.*cpu memory are free.*merge_adapter\(\)"):
        model.merge_if_room()
    assert not merged(model)


def test_this_machine_has_free_memory():
    assert 10**6 < free_memory(torch.device("cpu")) < 10**15


def test_in_training_mode_it_draws_unmerged(base):
    model = attach(base).train()
    with pytest.warns(UserWarning, match=r"unmerged.*training mode"):
        model.merge_if_room()
    assert not merged(model)


def test_two_threads_that_merge_at_once_leave_the_base_as_it_was(base):
    model, before = attach(base), base_weights(base)
    together = Barrier(4)

    def merge() -> None:
        together.wait()
        model.merge_if_room()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(merge) for _ in range(4)]:
            done.result()
    assert merged(model)
    model.unmerge_adapter()
    assert_same(base_weights(model), before)


def test_merged_in_inference_mode_it_can_be_differentiated_through(base, short_question):
    model = attach(base)
    model.set_requires_grad("default")
    with torch.inference_mode():
        model.merge_adapter()
    model(**short_question).logits.sum().backward()
    model.unmerge_adapter()
