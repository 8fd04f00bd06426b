"""Bases as people hold them: offloaded, compiled, quantised."""

import pytest
import torch
from accelerate import cpu_offload
from helpers import CAPTIONS, assert_same, attach, base_weights, draw, drawing_inputs, logits, lora_weights, small_config
from peft import PeftModel
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from uc_adapters import UniCompressModel, get_uc_model
from uc_adapters.errors import BaseModelError, UnsupportedError
from uc_adapters.images import pack_latents

PARTS = ["vision_model", "aligner", "vqmodel", "generation_embeddings", "generation_aligner", "generation_head"]


class Known:
    """An adapter on disk, and what it reads and draws on the base as it is."""

    def __init__(self, folder, base_folder, processor, question):
        model = attach(AutoModelForImageTextToText.from_pretrained(base_folder))
        model.save_pretrained(folder)
        self.folder, self.question, self.prompts = folder, question, drawing_inputs(processor, CAPTIONS[:1])
        self.logits, self.drawn = logits(model, question), draw(model, self.prompts)

    def assert_alike(self, model) -> None:
        assert torch.equal(logits(model, self.question), self.logits)
        assert torch.equal(draw(model, self.prompts), self.drawn)


@pytest.fixture(scope="module")
def known(base_folder, short_processor, short_question, tmp_path_factory):
    return Known(tmp_path_factory.mktemp("adapter"), base_folder, short_processor, short_question)


def on_disk(base_folder, disk, part: str):
    """The base, loaded with one part on disk."""
    places = {f"model.{name}": "cpu" for name in [*PARTS, "language_model"]} | {"lm_head": "cpu", f"model.{part}": "disk"}
    return AutoModelForImageTextToText.from_pretrained(base_folder, device_map=places, offload_folder=disk)


def offloaded(base, part: str):
    """The base with one part brought to the device only while it computes."""
    cpu_offload(base.get_submodule(part), execution_device=torch.device("cpu"))
    return base


@pytest.mark.parametrize("part", ["language_model", "vqmodel", "aligner", "generation_head", "vision_model"])
def test_a_part_on_disk(known, base_folder, tmp_path, part):
    files = {path: path.read_bytes() for path in base_folder.iterdir()}
    base = on_disk(base_folder, tmp_path / "disk", part)
    device_map = dict(base.hf_device_map)
    model = UniCompressModel.from_pretrained(base, known.folder)
    known.assert_alike(model)
    model.save_pretrained(tmp_path / "again")
    known.assert_alike(UniCompressModel.from_pretrained(tmp_path / "again", base_model=base_folder))
    assert base.hf_device_map == device_map
    assert {path: path.read_bytes() for path in base_folder.iterdir()} == files


@pytest.mark.parametrize(
    "part", ["model.vqmodel", "model.language_model", "model.aligner", "model.generation_head", "model", ""]
)
def test_an_offloaded_part(known, base, dense_question, pristine, part):
    model = UniCompressModel.from_pretrained(offloaded(base, part), known.folder)
    known.assert_alike(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, dense_question), logits(pristine, dense_question))


@pytest.mark.parametrize("part", ["model.vqmodel", "model.generation_head.base_layer"])
def test_a_part_offloaded_under_an_adapter(known, base, part):
    model = UniCompressModel.from_pretrained(base, known.folder)
    offloaded(model.get_base_model(), part)
    known.assert_alike(model)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_new_adapter_of_an_offloaded_language_model_has_weights(base, fresh, options):
    torch.manual_seed(0)
    expected = lora_weights(get_uc_model(fresh(), small_config(**options)))
    torch.manual_seed(0)
    model = get_uc_model(offloaded(base, "model.language_model"), small_config(**options))
    assert_same(lora_weights(model), expected)


def test_an_offloaded_language_model_is_not_merged(known, base):
    model = UniCompressModel.from_pretrained(offloaded(base, "model.language_model"), known.folder)
    with pytest.raises(UnsupportedError, match=r"offloaded; expected all of the language model in memory"):
        model.merge_adapter()
    known.assert_alike(model)


def test_latents_are_packed_where_the_base_is_offloaded(base, fresh, short_processor, images):
    expected = pack_latents(attach(fresh()).family, short_processor, images[:1])
    found = pack_latents(attach(offloaded(base, "")).family, short_processor, images[:1])
    assert found == expected


def compile_whole(base):
    return torch.compile(base, backend="eager")


def compile_language_model(base):
    base.model.language_model = torch.compile(base.model.language_model, backend="eager")
    return base


def compile_a_layer(base):
    base.model.language_model.layers[1] = torch.compile(base.model.language_model.layers[1], backend="eager")
    return base


def compile_core(base):
    base.model = torch.compile(base.model, backend="eager")
    return base


@pytest.mark.parametrize("wrap", [compile_whole, compile_language_model, compile_a_layer, compile_core])
@pytest.mark.parametrize("load", [UniCompressModel.from_pretrained, PeftModel.from_pretrained, None])
def test_a_base_wrapped_by_compile_is_refused_with_the_way(known, base, wrap, load):
    wrapped = wrap(base)
    with pytest.raises(BaseModelError, match=r"wrapped by torch.compile.*Attach the adapter first.*module.compile\(\)"):
        get_uc_model(wrapped, small_config()) if load is None else load(wrapped, known.folder)
    assert not any("lora" in name for name, _ in wrapped.named_parameters())


def test_a_base_compiled_in_place_carries_an_adapter(known, base, tmp_path):
    base.model.language_model.layers[1].mlp.compile(backend="eager")
    model = UniCompressModel.from_pretrained(base, known.folder)
    assert torch.equal(logits(model, known.question), known.logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(UniCompressModel.from_pretrained(model.unload(), tmp_path), known.question), known.logits)


class Packed(torch.Tensor):
    """A quantised weight, to those who look at its class."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.flatten:
            raise NotImplementedError
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_another_class_are_not_fingerprinted(base):
    layer = base.model.language_model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.Tensor._make_subclass(Packed, layer.weight.data), requires_grad=False)
    fingerprint = attach(base, target_modules=["q_proj"]).active_peft_config.base_fingerprint
    assert fingerprint["weights"] is None
    assert fingerprint["codebook"] is not None


def test_weights_that_are_buffers_are_not_fingerprinted(base):
    """GPTQ and AWQ keep packed weights as buffers, and so the rest would look like another base."""
    base.is_quantized = True
    assert attach(base).active_peft_config.base_fingerprint["weights"] is None


def test_a_torchao_base(known, base, base_folder, dense_question):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(base.model.language_model, quantization.Int8WeightOnlyConfig())
    expected = logits(base, dense_question)
    model = UniCompressModel.from_pretrained(base, known.folder)
    assert draw(model, known.prompts).shape == known.drawn.shape
    torch.testing.assert_close(logits(model, known.question), known.logits, atol=0.2, rtol=0.1)
    with model.disable_adapter():
        assert torch.equal(logits(model, dense_question), expected)
    with pytest.raises(UnsupportedError, match=r"Linear holds Int8Tensor.*not quantised"):
        model.merge_adapter()


def test_a_bitsandbytes_base_is_not_merged(known, base_folder):
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForImageTextToText.from_pretrained(base_folder, quantization_config=config, device_map={"": "cpu"})
    model = UniCompressModel.from_pretrained(base, known.folder)
    before = base_weights(model)
    with pytest.raises(UnsupportedError, match=r"no exact merged form.*not quantised"):
        model.merge_adapter()
    assert_same(base_weights(model), before)
