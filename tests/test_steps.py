"""The same drawing whatever holds the keys and values, compiled or not, and nothing in the loop that waits for the device."""

import copy

import pytest
import torch
from finetuning.base import quantisation
from helpers import CAPTIONS, attach, chat, draw, drawing_inputs
from shallow import shallow
from tiny_world import tiny_emu3
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, CompileConfig, LogitsProcessor, LogitsProcessorList

from uc_adapters import UniCompressModel
from uc_adapters.errors import UnsupportedError

guided_and_not = pytest.mark.parametrize("guidance_scale", [1.0, 3.0])


@pytest.fixture(scope="module")
def emu3():
    """An Emu3 with an adapter, and prompts of three sizes for it: each image is drawn with the ends of its rows."""
    processor = tiny_emu3.make_processor(32 * 32, 64 * 64)
    torch.manual_seed(0)
    base = shallow(tiny_emu3.make_model(processor), layers=1).eval()  # a compiler takes long over each
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.text_model"):
                parameter.mul_(2.5)  # livelier than at its default start
    model = attach(base)
    options = {"return_for_image_generation": True, "ratio": "2:1", "image_area": 64 * 64, "return_tensors": "pt"}
    texts = [chat(processor, caption) for caption in CAPTIONS]
    return model, model.compact_processor(processor)(text=texts, padding=True, padding_side="left", **options)


class Graphs:
    """A backend that compiles nothing and counts what it was given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo):
        return self  # configs are copied on their way

    def options(self) -> dict:
        """Keywords of `generate` that compile with it on a CPU."""
        config = CompileConfig(backend=self, mode=None, dynamic=False)
        config._compile_all_devices = True
        return {"cache_implementation": "static", "compile_config": config}


class Waits(TorchDispatchMode):
    """Names whatever brings a value to the host, or a shape that depends on one, between two steps of the language model."""

    def __init__(self, model: UniCompressModel):
        super().__init__()
        self.steps, self.since, self.between = 0, [], []
        language_model = model.get_base_model().get_submodule(model.family.module_names["language model"])
        language_model.register_forward_hook(self._count)

    def _count(self, *_) -> None:
        self.between += self.since if self.steps else []  # what came before the first step is no part of the loop
        self.steps, self.since = self.steps + 1, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "multinomial"):
            self.since.append(name)
        return function(*args, **(kwargs or {}))


class Forbid(LogitsProcessor):
    """A user's own: forbids the upper half of the codes."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, torch.arange(scores.shape[1] // 2, scores.shape[1]), -torch.inf)


class Follow(LogitsProcessor):
    """Draws given codes (B, T), and keeps where they would have been chosen: one that is not changes none behind it."""

    def __init__(self, codes: torch.Tensor):
        self.codes, self.agreed = codes, []

    def __call__(self, input_ids, scores):
        given = self.codes[:, len(self.agreed)]
        self.agreed.append(scores.argmax(-1) == given)
        return torch.full_like(scores, -torch.inf).scatter(1, given.unsqueeze(1), 0.0)


@pytest.mark.parametrize("decompressor", ["strip", "phase"])
@pytest.mark.parametrize(("guidance_scale", "count"), [(1.0, 1), (3.0, 3)])
def test_a_static_cache_draws_the_same(shared, short_processor, decompressor, guidance_scale, count):
    model = shared(decompressor=decompressor)
    inputs = drawing_inputs(short_processor, CAPTIONS[:count])
    dynamic = draw(model, inputs, guidance_scale=guidance_scale)
    assert torch.equal(draw(model, inputs, guidance_scale=guidance_scale, cache_implementation="static"), dynamic)
    assert torch.equal(draw(model, inputs, guidance_scale=guidance_scale, cache_implementation="dynamic"), dynamic)


@guided_and_not
def test_a_static_cache_draws_the_same_with_has_eol(emu3, guidance_scale):
    model, inputs = emu3
    assert not inputs["attention_mask"].all()
    dynamic = draw(model, inputs, guidance_scale=guidance_scale)
    assert torch.equal(draw(model, inputs, guidance_scale=guidance_scale, cache_implementation="static"), dynamic)


def test_without_global_tokens_a_static_cache_draws_the_same(base, short_processor):
    model, inputs = attach(base, num_global_tokens=0), drawing_inputs(short_processor, CAPTIONS)
    assert torch.equal(draw(model, inputs, cache_implementation="static"), draw(model, inputs))


def test_compiled_it_draws_the_same_and_compiles_only_what_is_new(base, short_processor):
    base.config.text_config.num_hidden_layers = 1  # a compiler takes long over each
    base.model.language_model.layers = base.model.language_model.layers[:1]
    model, graphs = attach(base), Graphs()
    calls = [
        (0, [], None, 2),  # a step of one token, and a strip's codes
        (2, [], None, 0),  # another length of prompt
        (0, [Forbid()], 5, 0),  # with a generator, the language model alone is compiled
        (0, [Forbid()], None, 1),  # a user's processor is part of a strip's codes
    ]
    for caption, processors, seed, new in calls:
        inputs, before = drawing_inputs(short_processor, CAPTIONS[caption : caption + 1]), graphs.count

        def drawn(inputs=inputs, processors=processors, seed=seed, **chosen) -> torch.Tensor:
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            options = {"logits_processor": LogitsProcessorList(processors), "do_sample": seed is not None}
            return draw(model, inputs, generator=generator, **options, **chosen)

        compiled = drawn(**graphs.options())
        assert graphs.count - before == new
        assert torch.equal(compiled, drawn())
        assert compiled.max() < (256 if processors else 512)


def test_compiled_it_draws_the_same_with_has_eol(emu3):
    model, inputs = emu3
    graphs = Graphs()
    compiled = draw(model, inputs, guidance_scale=3.0, **graphs.options())
    assert graphs.count == 3
    assert torch.equal(compiled, draw(model, inputs, guidance_scale=3.0))


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_no_step_waits_for_the_device(base, short_processor, emu3, cache_implementation, do_sample):
    for model, inputs in ((attach(base), drawing_inputs(short_processor, CAPTIONS)), emu3):
        with Waits(model) as waits:
            draw(model, inputs, do_sample=do_sample, cache_implementation=cache_implementation, guidance_scale=3.0)
        assert waits.steps > 8
        assert waits.between == []


def test_what_waits_is_seen(base, short_processor):
    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert scores.max() > 0
            return scores

    model = attach(base)
    with Waits(model) as waits:
        draw(model, drawing_inputs(short_processor, CAPTIONS[:1]), logits_processor=LogitsProcessorList([Look()]))
    assert len(waits.between) > 19


def test_caches_that_cannot_hold_a_drawing_are_refused(base, short_processor):
    with pytest.raises(UnsupportedError, match=r"'offloaded'.*dynamic or static"):
        draw(attach(base), drawing_inputs(short_processor, CAPTIONS[:1]), cache_implementation="offloaded")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_base_draws(base, base_folder, short_processor, tmp_path, bits):
    attach(copy.deepcopy(base)).save_pretrained(tmp_path)
    quantised = AutoModelForImageTextToText.from_pretrained(
        base_folder, quantization_config=quantisation(str(base_folder), bits)
    )
    model = UniCompressModel.from_pretrained(quantised.eval(), tmp_path)
    inputs, graphs = drawing_inputs(short_processor, CAPTIONS), Graphs()
    tokens = draw(model, inputs)
    assert tokens.shape == (3, 64)
    assert len(tokens.unique(dim=0)) == 3
    follow = Follow(tokens)
    draw(model, inputs, logits_processor=LogitsProcessorList([follow]), **graphs.options())
    agreed = torch.stack(follow.agreed)
    assert agreed.shape == (64, 3)
    assert agreed.float().mean() > 0.95  # quantised layers round what a static cache adds up in another order
    assert graphs.count == 0  # transformers does not compile bitsandbytes' layers, and says so
