import copy

import pytest
import torch
from helpers import CAPTIONS, DECOMPRESSORS, DENSE, IMAGE, Record, attach, chat, draw, drawing_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from uc_adapters import UniCompressCollator
from uc_adapters.code_head import CompactCodes
from uc_adapters.errors import BaseModelError, InputError
from uc_adapters.joint_loss import CODES

each_decompressor = pytest.mark.parametrize("decompressor", DECOMPRESSORS)
# What the loop does with a head does not depend on the decompressor behind it: "raster" has the head of "phase"
each_head = pytest.mark.parametrize("decompressor", ["strip", "phase"])
with_and_without_globals = pytest.mark.parametrize("num_global_tokens", [0, 4])


@pytest.fixture
def prompts(short_processor):
    """Three captions of unequal length."""
    inputs = drawing_inputs(short_processor, CAPTIONS)
    assert not inputs["attention_mask"].all()
    return inputs


@pytest.fixture
def drawing_model(shared):
    """An adapter that no test changes."""
    return shared()


@pytest.fixture
def plainly_drawn(drawing_model, short_processor):
    """What it draws in the captions' order."""
    return draw(drawing_model, drawing_inputs(short_processor, CAPTIONS))


@pytest.fixture
def singles(short_processor):
    """The same captions, each alone."""
    return [drawing_inputs(short_processor, [caption]) for caption in CAPTIONS]


class Forbid(LogitsProcessor):
    """Forbids the upper half of the codes."""

    def __call__(self, input_ids, scores):
        scores[:, scores.shape[1] // 2 :] = -torch.inf
        return scores


def batch_sizes(base) -> list[int]:
    """Filled with the batch size of every call of the language model."""
    calls = []
    base.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    return calls


@each_decompressor
@with_and_without_globals
@pytest.mark.parametrize("stride", [2, 4])
def test_drawing_takes_a_step_a_compact_token_and_returns_dense_tokens_that_the_base_decodes(
    base, prompts, decompressor, num_global_tokens, stride
):
    calls = batch_sizes(base)
    model = attach(base, decompressor=decompressor, num_global_tokens=num_global_tokens, stride=stride)
    tokens = draw(model, prompts)
    drawn_globals = 0 if decompressor == "strip" else num_global_tokens
    assert len(calls) == drawn_globals + DENSE // stride**2
    assert tokens.shape == (3, DENSE)
    assert tokens.dtype == torch.long
    assert tokens.min() >= 0
    assert tokens.max() < 512
    assert len(tokens[0].unique()) > 1
    with torch.no_grad():
        assert model.decode_image_tokens(tokens).shape == (3, 64, 64, 3)


@each_decompressor
@with_and_without_globals
@pytest.mark.parametrize(("guidance_scale", "side"), [(1.0, "right"), (3.0, "left")])
def test_a_prompt_in_a_batch_is_drawn_as_alone(
    shared, short_processor, singles, decompressor, num_global_tokens, guidance_scale, side
):
    """The other two pairs, for every family, are in families/test_matrix.py."""
    model = shared(decompressor=decompressor, num_global_tokens=num_global_tokens)
    batch = drawing_inputs(short_processor, CAPTIONS, padding_side=side)
    together = draw(model, batch, guidance_scale=guidance_scale, do_sample=False)
    alone = [draw(model, single, guidance_scale=guidance_scale, do_sample=False) for single in singles]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique(dim=0)) == len(CAPTIONS)


@given(order=st.permutations(range(len(CAPTIONS))), padding=st.integers(0, 5))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_a_batch_and_more_padding_change_nothing(drawing_model, plainly_drawn, short_processor, order, padding):
    model = drawing_model
    inputs = drawing_inputs(short_processor, [CAPTIONS[i] for i in order])
    padded = {name: torch.nn.functional.pad(value, (padding, 0)) for name, value in inputs.items()}
    assert torch.equal(draw(model, padded), plainly_drawn[list(order)])


def test_guidance_doubles_the_batch_and_no_guidance_does_not(base, prompts):
    model, calls = attach(base), batch_sizes(base)
    draw(model, prompts, guidance_scale=1.0)
    assert set(calls) == {3}
    calls.clear()
    draw(model, prompts, guidance_scale=3.0)
    assert set(calls) == {6}


def test_guidance_defaults_to_the_bases_generation_config(base, prompts):
    model = attach(base)
    base.generation_config.guidance_scale = 4.0
    assert torch.equal(draw(model, prompts), draw(model, prompts, guidance_scale=4.0))
    assert not torch.equal(draw(model, prompts), draw(model, prompts, guidance_scale=9.0))


@each_head
def test_sampling_among_one_code_is_greedy(shared, prompts, decompressor):
    model = shared(decompressor=decompressor)
    greedy = draw(model, prompts, do_sample=False)
    assert torch.equal(draw(model, prompts, do_sample=True, top_k=1), greedy)
    assert torch.equal(draw(model, prompts, do_sample=True, top_p=1e-6), greedy)


@each_head
def test_the_same_seed_draws_the_same(shared, prompts, decompressor):
    model = shared(decompressor=decompressor)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append(draw(model, prompts, do_sample=True))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@each_head
def test_a_generator_is_the_only_source_of_randomness(shared, prompts, decompressor):
    model = shared(decompressor=decompressor)
    before = torch.get_rng_state()
    drawn = [draw(model, prompts, do_sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def seeds(*of_prompts: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in of_prompts]


@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    first=st.integers(0, 9),
    count=st.integers(1, 2),
    guidance_scale=st.sampled_from([1.0, 3.0]),
    side=st.sampled_from(["left", "right"]),
)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_with_a_seed_a_prompt_a_batch_draws_what_each_draws_alone(
    drawing_model, short_processor, rows, first, count, guidance_scale, side
):
    """Bit for bit, whatever else is in the batch: matrix products of another batch size round differently."""
    options = {"do_sample": True, "guidance_scale": guidance_scale, "num_return_sequences": count}
    texts, own = [CAPTIONS[row] for row in rows], range(first, first + len(rows))
    before = torch.get_rng_state()
    batch = drawing_inputs(short_processor, texts, padding_side=side)
    together = draw(drawing_model, batch, generator=seeds(*own), **options)
    alone = [
        draw(drawing_model, drawing_inputs(short_processor, [text]), generator=seeds(seed)[0], **options)
        for text, seed in zip(texts, own, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique(dim=0)) == len(rows) * count
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_with_images_and_negative_prompts(drawing_model, short_processor, images):
    def asked(texts, pictures, negative):
        prompt = {"padding": True, "return_tensors": "pt"}
        inputs = short_processor(text=texts, images=pictures or None, generation_mode="image", **prompt)
        away = short_processor.tokenizer(negative, **prompt)
        return {
            **inputs,
            "negative_prompt_ids": away["input_ids"],
            "negative_prompt_attention_mask": away["attention_mask"],
        }

    texts = [
        chat(short_processor, IMAGE, IMAGE, "a red 3"),
        chat(short_processor, "a blue 7 at the top left"),
        chat(short_processor, IMAGE, "a cyan 9"),
    ]
    parts, negative = [images[:2], [], images[2:3]], ["a green 1", "blue", "a 5 at the bottom"]
    options = {"do_sample": True, "guidance_scale": 3.0}
    together = draw(drawing_model, asked(texts, images[:3], negative), generator=seeds(0, 1, 2), **options)
    for row in range(3):
        inputs = asked(texts[row : row + 1], parts[row], negative[row : row + 1])
        assert torch.equal(draw(drawing_model, inputs, generator=seeds(row)[0], **options), together[row : row + 1])


@pytest.mark.parametrize(
    "generator", [seeds(0), seeds(0, 1, 2, 3), [], 3, "seed", [3, 4, 5], [seeds(0)[0]] * 3, [*seeds(0, 1), None]], ids=range(8)
)
def test_generators_that_are_not_one_a_prompt_are_refused(drawing_model, prompts, generator):
    with pytest.raises(InputError, match=r"generator=.*for 3 prompt\(s\); expected a torch.Generator, or a list"):
        draw(drawing_model, prompts, do_sample=True, generator=generator)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.3, "top_k": 9}])
def test_sampling_options_take_effect(shared, prompts, options):
    model = shared()
    plain, warped = (
        draw(model, prompts, do_sample=True, generator=torch.Generator().manual_seed(0), **chosen) for chosen in ({}, options)
    )
    assert warped.shape == (3, DENSE)
    assert not torch.equal(plain, warped)


@each_head
def test_several_drawings_of_a_prompt_stand_together(shared, prompts, decompressor):
    model = shared(decompressor=decompressor)
    greedy = draw(model, prompts)
    copies = draw(model, prompts, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(copies, greedy.repeat_interleave(2, 0))
    several = draw(model, prompts, do_sample=True, num_return_sequences=4, generator=torch.Generator().manual_seed(0))
    assert several.shape == (12, DENSE)
    assert len(several.unique(dim=0)) == 12


def test_a_generation_config_works_as_keywords_do_and_is_left_as_it_was(base, prompts):
    model = attach(base)
    config = copy.deepcopy(base.generation_config)
    config.update(do_sample=True, top_k=1, guidance_scale=2.0)
    before = config.to_dict()
    drawn = [draw(model, prompts, generation_config=config) for _ in range(2)]
    assert config.to_dict() == before
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], draw(model, prompts, do_sample=False, guidance_scale=2.0))


def test_drawing_leaves_the_bases_generation_config_as_it_was(base, prompts):
    before = base.generation_config.to_dict()
    draw(attach(base), prompts, do_sample=True, top_k=3, guidance_scale=1.5)
    assert base.generation_config.to_dict() == before
    assert isinstance(base.generation_config, GenerationConfig)


def test_drawing_leaves_its_inputs_as_they_were(shared, short_processor):
    inputs = drawing_inputs(short_processor, CAPTIONS, padding_side="right")
    before = {name: value.clone() for name, value in inputs.items()}
    draw(shared(), inputs)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


@each_head
def test_a_logits_processor_binds_every_code(shared, prompts, decompressor):
    tokens = draw(shared(decompressor=decompressor), prompts, logits_processor=LogitsProcessorList([Forbid()]))
    assert tokens.max() < 256


def test_without_a_mask_nothing_is_padding(shared, singles):
    model = shared()
    inputs = {"input_ids": singles[0]["input_ids"]}
    assert torch.equal(draw(model, inputs), draw(model, singles[0]))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_an_image_in_the_prompt_is_read(shared, short_processor, images, guidance_scale):
    model = shared()

    def conditioned(texts, pictures):
        inputs = short_processor(
            text=texts, images=pictures or None, padding=True, return_tensors="pt", generation_mode="image"
        )
        return draw(model, inputs, guidance_scale=guidance_scale)

    texts = [chat(short_processor, IMAGE, "a red 3"), chat(short_processor, "a blue 7 at the top left")]
    one, other = (conditioned(texts[:1], [image]) for image in images[:2])
    assert not torch.equal(one, other)
    assert torch.equal(conditioned(texts, images[:1]), torch.cat([one, conditioned(texts[1:], [])]))


@each_decompressor
@with_and_without_globals
def test_training_scores_what_drawing_saw(base, short_processor, decompressor, num_global_tokens):
    """Greedily drawn codes, fed back by teacher forcing: each the most probable, with the same probability."""
    model = attach(base, decompressor=decompressor, num_global_tokens=num_global_tokens)
    inputs, record = drawing_inputs(short_processor, CAPTIONS[:1]), Record()
    dense = draw(model, inputs, guidance_scale=1.0, logits_processor=LogitsProcessorList([record]))
    head, count = model.code_head, model.active_peft_config.num_global_codes
    drawn = 16 * head.codes_per_step  # codes that the language model's loop drew behind the global ones
    codes, log_probs = (torch.cat(x[: count + drawn]) for x in (record.codes, record.log_probs))
    steps = codes[count:].view(1, 16, -1)
    if decompressor == "strip":
        assert torch.equal(steps, dense.view(1, 16, 4))
    compact = CompactCodes(codes[None, :count], steps, dense, (8, 8))
    with torch.no_grad():
        prompt = base.get_input_embeddings()(inputs["input_ids"])
        embeddings = torch.cat([prompt, head.embed(compact)], 1)
        deltas = torch.cat([torch.ones(prompt.shape[1], dtype=torch.long), head.position_deltas((8, 8))[:-1]])
        hidden = head.family.language_model(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2]),
            position_ids=deltas.cumsum(0)[None] - 1,
        ).last_hidden_state
        scores = head.score(hidden[:, prompt.shape[1] - 1 : -1], compact)
    expected = torch.cat([log_probs[:count], torch.zeros(1), log_probs[count:].view(16, -1).sum(1)])
    torch.testing.assert_close(scores.log_probs[0], expected, atol=1e-4, rtol=1e-5)
    assert scores.accuracy[0].tolist() == [1.0] * count + [0.0] + [1.0] * 16


def test_a_batch_of_training_scores_drawn_strips_as_drawing_saw_them(shared, short_processor, prompts, images):
    """Through the collator and the joint loss; the prompts were padded on their left where they were drawn."""
    model, record = shared(), Record()
    dense = draw(model, prompts, guidance_scale=1.0, logits_processor=LogitsProcessorList([record]))
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": caption}]},
                {"role": "assistant", "content": [{"type": "image"}]},
            ],
            "images": images[:1],
            "latents": [{"size": [64, 64], "values": model.family.codebook[codes].numpy().tobytes()}],
        }
        for caption, codes in zip(CAPTIONS, dense, strict=True)
    ]
    batch = UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0)(rows)
    with torch.no_grad():
        scores = model(**batch)
    steps = scores.kinds == CODES
    drawn = torch.stack(record.log_probs).view(16, 4, 3).sum(1).T  # of each prompt's strips
    torch.testing.assert_close(scores.log_probs[steps].view(3, 16), drawn, atol=1e-4, rtol=1e-5)
    assert (scores.is_top1[steps] == 1).all()


def test_strips_are_drawn_at_the_bases_own_positions(base, prompts):
    model, seen = attach(base), []
    base.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    draw(model, prompts, guidance_scale=1.0)
    lengths = prompts["attention_mask"].sum(1, keepdim=True)
    assert len(set(lengths.flatten().tolist())) == 3
    last_codes = torch.arange(3, 63, 4)  # of each strip that is fed; the image's first code follows its prompt
    behind = torch.cat([lengths, lengths + last_codes], 1)  # the separator stands where the first code does
    padded = prompts["input_ids"].shape[1]
    assert torch.equal(torch.cat(seen, 1)[:, padded:], behind)


class InTurn(LogitsProcessor):
    """Leaves nothing to choose from but code 0, 1, 2, ..."""

    def __init__(self):
        self.next = 0

    def __call__(self, input_ids, scores):
        only = torch.full_like(scores, -torch.inf)
        only[:, self.next] = 0
        self.next += 1
        return only


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_strips_draw_the_raster_code_by_code(shared, prompts, stride, guidance_scale):
    processors = LogitsProcessorList([InTurn()])
    tokens = draw(shared(stride=stride), prompts, guidance_scale=guidance_scale, logits_processor=processors)
    assert torch.equal(tokens, torch.arange(DENSE).expand(3, -1))


@pytest.mark.parametrize("decompressor", ["phase", "raster"])
def test_the_decompressor_after_the_loop_scores_what_it_drew(shared, short_processor, decompressor):
    model = shared(decompressor=decompressor)
    inputs, record = drawing_inputs(short_processor, CAPTIONS[:1]), Record()
    dense = draw(model, inputs, guidance_scale=1.0, logits_processor=LogitsProcessorList([record]))
    head = model.code_head
    globals_, steps = torch.cat(record.codes[:4])[None], torch.cat(record.codes[4:20])[None]
    with torch.no_grad():
        compact = CompactCodes(globals_, steps.unsqueeze(-1), dense, (8, 8))
        scores = head.dense_logits(compact)
    assert torch.equal(scores.argmax(-1), dense)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_language_model_whose_states_are_no_numbers_is_told_of(base, prompts, do_sample):
    model = attach(base)
    with torch.no_grad():
        base.model.language_model.layers[0].input_layernorm.weight[0] = float("nan")
    with pytest.raises(BaseModelError, match=r"not finite numbers in torch.float32.*bfloat16"):
        draw(model, prompts, do_sample=do_sample)


def test_progress_shows_a_bar(shared, prompts, capsys):
    draw(shared(), prompts, progress=True)
    assert "16/16" in capsys.readouterr().err
