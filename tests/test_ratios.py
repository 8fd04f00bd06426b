"""Codes in a step of the language model, apart from the window that is read."""

import math

import pytest
import torch
from helpers import CAPTIONS, DENSE, IMAGE, Record, answer, attach, draw, drawing_inputs, logits, question_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList

from uc_adapters import UniCompressCollator, UniCompressConfig, UniCompressModel
from uc_adapters.command import main
from uc_adapters.errors import BaseModelError, ConfigError, InputError
from uc_adapters.hub.card import token_counts
from uc_adapters.images import pack_latents
from uc_adapters.joint_loss import CODES

DIAL, STRIDES = (1, 3, 8), (1, 2, 4)
each_length = pytest.mark.parametrize("codes_per_step", [1, 2, 3, 5, 8, 12, 63, 64])


class InTurn(LogitsProcessor):
    """Leaves nothing to choose from but code 0, 1, 2, ..., and any code for what fills up the last step."""

    def __init__(self):
        self.next = 0

    def __call__(self, input_ids, scores):
        if self.next == DENSE:
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self.next] = 0
        self.next += 1
        return only


def calls_of(model, name: str) -> list[torch.Tensor]:
    """Filled with an argument of every call of the language model."""
    calls = []
    language_model = model.get_base_model().model.language_model
    language_model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs[name]), with_kwargs=True)
    return calls


def drawing_row(caption: str, image, codes: torch.Tensor | None = None, model=None) -> dict:
    """A row that draws an image, or the given codes (T,) in its place."""
    latents = None if codes is None else model.family.codebook[codes].numpy().tobytes()
    return {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": caption}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": [image],
        **({} if codes is None else {"latents": [{"size": [64, 64], "values": latents}]}),
    }


@each_length
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_step_draws_the_next_codes_of_the_raster(base, short_processor, codes_per_step, guidance_scale):
    model = attach(base, codes_per_step=codes_per_step)
    prompts, calls = drawing_inputs(short_processor, CAPTIONS), calls_of(model, "inputs_embeds")
    places = LogitsProcessorList([InTurn()])
    tokens = draw(model, prompts, guidance_scale=guidance_scale, logits_processor=places)
    assert torch.equal(tokens, torch.arange(DENSE).expand(3, -1))
    assert len(calls) == math.ceil(DENSE / codes_per_step)
    assert [call.shape[1] for call in calls[1:]] == [1] * (len(calls) - 1)


@given(codes_per_step=st.integers(1, DENSE), stride=st.sampled_from([1, 2, 4]), globals_=st.booleans())
@settings(max_examples=15)
def test_the_likelihood_by_forward_is_that_step_by_step(shared, processor, images, codes_per_step, stride, globals_):
    model = shared(codes_per_step=codes_per_step, stride=stride, drawing_global_tokens=globals_)
    record = Record()
    compact = model.compact_processor(processor)
    dense = draw(model, drawing_inputs(compact, CAPTIONS), guidance_scale=1.0, logits_processor=LogitsProcessorList([record]))
    rows = [drawing_row(caption, images[0], codes, model) for caption, codes in zip(CAPTIONS, dense, strict=True)]
    with torch.no_grad():
        scores = model(**UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)(rows))
    steps = scores.kinds == CODES
    drawn = [codes.sum(0) for codes in torch.stack(record.log_probs)[:DENSE].split(codes_per_step)]  # of each step
    torch.testing.assert_close(scores.log_probs[steps].view(3, -1), torch.stack(drawn, 1), atol=1e-3, rtol=1e-4)
    assert (scores.is_top1[steps] == 1).all()


@each_length
@pytest.mark.parametrize("num_global_tokens", [0, 3])
def test_a_step_stands_where_its_last_code_stands_in_the_bases_own_sequence(base, processor, codes_per_step, num_global_tokens):
    """Learned global tokens share the position id of the image's begin, so they take no place of the base's."""
    options = {"num_global_tokens": num_global_tokens, "drawing_global_tokens": num_global_tokens > 0}
    model = attach(base, codes_per_step=codes_per_step, **options)
    prompts, seen = drawing_inputs(processor, CAPTIONS[:1]), calls_of(model, "position_ids")
    draw(model, prompts, guidance_scale=1.0)
    length = prompts["input_ids"].shape[1]
    last_codes = [*range(codes_per_step - 1, DENSE - 1, codes_per_step)][: len(seen) - 1]  # of each step that is fed
    expected = [*[length - 1] * num_global_tokens, length, *(length + code for code in last_codes)]
    assert torch.cat(seen, 1)[0, length:].tolist() == expected


@pytest.mark.parametrize(("stride", "read"), [(1, 69), (2, 21), (4, 9)])
@each_length
def test_what_is_read_does_not_depend_on_it(shared, processor, images, stride, read, codes_per_step):
    model = shared(stride=stride, codes_per_step=codes_per_step)
    compact = model.compact_processor(processor)
    assert (compact.num_image_tokens, model.num_image_tokens) == (read, read)
    batch = UniCompressCollator(compact, model.active_peft_config)([drawing_row("a red 3", images[0])])
    steps = math.ceil(DENSE / codes_per_step)
    assert batch["gen_mask"].sum() == 1 + steps == model.active_peft_config.num_gen_tokens((8, 8))
    assert (batch["labels"][batch["gen_mask"]] == -100).tolist() == [True] + [False] * steps  # the separator is not learned


def test_the_default_is_a_windows_codes(fresh, short_processor):
    """So an adapter that was saved without the field means what it meant."""
    plain, named = attach(fresh()), attach(fresh(), codes_per_step=4)
    prompts = drawing_inputs(short_processor, CAPTIONS)
    assert torch.equal(draw(plain, prompts), draw(named, prompts))


def test_an_adapter_keeps_its_ratio(fresh, short_processor, tmp_path):
    model, prompts = attach(fresh(), codes_per_step=5, drawing_global_tokens=True), drawing_inputs(short_processor, CAPTIONS)
    model.save_pretrained(tmp_path, processor=short_processor)
    loaded = UniCompressModel.from_pretrained(fresh(), tmp_path)
    assert loaded.active_peft_config.codes_per_step == 5
    assert torch.equal(draw(loaded, prompts), draw(model, prompts))
    assert "in front of drawings, too, decompressor `strip`, codes in a step 5," in (tmp_path / "README.md").read_text()


def test_learned_global_tokens_take_no_step(fresh, processor, images):
    """They are read in the prefill, and every step attends to the states there."""
    plain, guided = attach(fresh(), codes_per_step=8), attach(fresh(), codes_per_step=8, drawing_global_tokens=True)
    counts = {}
    for name, model in {"plain": plain, "guided": guided}.items():
        compact, calls = model.compact_processor(processor), calls_of(model, "inputs_embeds")
        prompts = drawing_inputs(compact, CAPTIONS)
        draw(model, prompts, guidance_scale=1.0)
        counts[name] = [call.shape[1] - prompts["input_ids"].shape[1] for call in calls[:1]] + [
            call.shape[1] for call in calls[1:]
        ]
        assert compact.num_image_tokens == 21
    assert counts == {"plain": [1, *[1] * 7], "guided": [4 + 1, *[1] * 7]}
    assert guided.active_peft_config.num_gen_steps((8, 8)) == 8
    batch = UniCompressCollator(compact, guided.active_peft_config)([drawing_row("a red 3", images[0])])
    assert (batch["labels"][batch["gen_mask"]] == -100).tolist() == [True] * 5 + [False] * 8


def test_learned_global_tokens_guide_every_step(fresh, processor, images):
    """The states reach the codes beside the language model's own attention: without them, another likelihood."""
    model = attach(fresh(), codes_per_step=8, drawing_global_tokens=True)
    compact = model.compact_processor(processor)
    batch = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)([drawing_row("a red 3", images[0])])
    before = model(**batch)
    with torch.no_grad():
        model.code_head.module.decompressor.global_in.weight.mul_(2)
    after = model(**batch)
    steps = before.kinds == CODES
    assert (before.log_probs[steps] != after.log_probs[steps]).all()
    after.loss.backward()
    module = model.code_head.module
    assert all(weight.grad.abs().sum() > 0 for weight in (module.global_tokens, module.decompressor.global_in.weight))


def test_the_command_shows_and_takes_the_ratios(fresh, base_folder, short_processor, tmp_path, capsys):
    model = attach(fresh(), codes_per_step=DIAL, stride=STRIDES)
    model.save_pretrained(tmp_path / "dial", processor=short_processor)
    adapter = str(tmp_path / "dial")
    assert main(["info", adapter]) == 0
    told = capsys.readouterr().out
    assert "1, 2, 4 (default 2)" in told
    assert "1, 3, 8 (default 3)" in told
    assert "22, the base 64" in told
    options = ["--base_model", str(base_folder), "--device", "cpu", "--output", str(tmp_path / "d.png")]
    assert main(["draw", adapter, "a red 3", "--codes_per_step", "8", *options]) == 0
    assert (tmp_path / "d.png").is_file()
    capsys.readouterr()
    assert main(["draw", adapter, "a red 3", "--codes_per_step", "5", *options]) == 1
    assert "codes_per_step=5, for which the adapter is not trained; expected 1 or 3 or 8" in capsys.readouterr().err


def test_a_teacher_teaches_every_ratio(shared, processor, short_processor, images):
    """The collator of the teacher writes the base's own sequence, whatever the adapter's is."""
    pytest.importorskip("trl")
    from uc_adapters.training import teacher_collator, teacher_targets

    model = shared(codes_per_step=5)
    collator = UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0)
    rows = [drawing_row(CAPTIONS[0], images[0])]
    dense = teacher_collator(collator, processor)(rows)
    assert dense["gen_mask"].sum() == DENSE
    targets = teacher_targets(model, dense | {"taught": torch.zeros(1, dtype=torch.bool)}, 1.0)
    assert targets["teacher_states"].shape[1] == DENSE
    taught, alone = model(**collator(rows), **targets), model(**collator(rows))
    assert taught.loss.isfinite()
    assert taught.loss != alone.loss


@pytest.mark.parametrize("codes_per_step", DIAL)
@given(globals_=st.booleans())
@settings(max_examples=2)
def test_one_adapter_draws_and_scores_every_ratio(shared, short_processor, images, codes_per_step, globals_):
    model, record = shared(codes_per_step=DIAL, drawing_global_tokens=globals_), Record()
    calls = calls_of(model, "inputs_embeds")
    options = {"guidance_scale": 1.0, "logits_processor": LogitsProcessorList([record])}
    dense = draw(model, drawing_inputs(short_processor, CAPTIONS), codes_per_step=codes_per_step, **options)
    assert len(calls) == math.ceil(DENSE / codes_per_step) == model.active_peft_config.num_gen_steps((8, 8), codes_per_step)
    rows = [drawing_row(caption, images[0], codes, model) for caption, codes in zip(CAPTIONS, dense, strict=True)]
    collate = UniCompressCollator(short_processor, model.active_peft_config, 0.0, codes_per_step=codes_per_step)
    batch = collate(rows)
    assert batch["gen_codes_per_step"].tolist() == [codes_per_step] * 3
    with torch.no_grad():
        scores = model(**batch)
    steps = scores.kinds == CODES
    drawn = [codes.sum(0) for codes in torch.stack(record.log_probs)[:DENSE].split(codes_per_step)]
    torch.testing.assert_close(scores.log_probs[steps].view(3, -1), torch.stack(drawn, 1), atol=1e-3, rtol=1e-4)


def test_without_a_choice_the_ratio_in_the_middle_counts(shared, short_processor):
    prompts = drawing_inputs(short_processor, CAPTIONS)
    model = shared(codes_per_step=DIAL)
    assert torch.equal(draw(model, prompts), draw(model, prompts, codes_per_step=3))
    assert UniCompressConfig(codes_per_step=[8, 1, 4, 2]).strip_length() == 4  # the larger of both in the middle
    assert UniCompressConfig(codes_per_step=[8]) == UniCompressConfig(codes_per_step=8)


def test_the_ratio_is_told(fresh, short_processor, images):
    """To the language model and to the decompressor: each of the learned embeddings changes what is scored."""
    model = attach(fresh(), codes_per_step=DIAL)
    collate = UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0, codes_per_step=8)
    batch, decompressor = collate([drawing_row(CAPTIONS[0], images[0])]), model.code_head.module.decompressor
    losses = [model(**batch).loss.item()]
    for embedding in (decompressor.input_lengths, decompressor.decoder_lengths):
        for place, changes in ((0, False), (2, True)):  # of 1 code, and of 8
            with torch.no_grad():
                embedding[place] += torch.randn(embedding.shape[1])
            losses.append(model(**batch).loss.item())
            assert (losses[-1] != losses[-2]) is changes


def test_drawings_of_several_ratios_in_one_batch_score_as_each_alone(shared, short_processor, images):
    """Whatever the others of the batch have, and from pixels or from latents."""
    model = shared(codes_per_step=DIAL, drawing_global_tokens=True)
    rows = [drawing_row(caption, image) for caption, image in zip([*CAPTIONS, "a red 3"], images, strict=True)]
    packed = pack_latents(model.family, short_processor, images)
    rows_of_latents = [{**row, "latents": [latents]} for row, latents in zip(rows, packed, strict=True)]
    for of_form in (rows, rows_of_latents):
        collate = UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0)
        for epoch in range(100):  # until an epoch has three ratios
            collate.epoch = epoch
            batch = collate(of_form)
            if len(batch["gen_codes_per_step"].unique()) == 3:
                break
        assert len(batch["gen_codes_per_step"].unique()) == 3
        with torch.no_grad():
            together = model(**batch)
            for index, row in enumerate(of_form):
                one = collate([row])
                assert one["gen_codes_per_step"] == batch["gen_codes_per_step"][index]
                alone = model(**one).log_probs[0]
                torch.testing.assert_close(together.log_probs[index, : len(alone)], alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"gen_codes_per_step of 3 image\(s\) for 4 to draw"):
        model(**batch | {"gen_codes_per_step": batch["gen_codes_per_step"][:3]})


def test_batches_get_all_ratios_and_the_larger_ones_more_often(short_processor, shared, images):
    """By their images and the epoch alone, so that a resumed run and several workers see the same."""
    config = shared(codes_per_step=(1, 2, 4, 8, 16)).active_peft_config
    collate = UniCompressCollator(short_processor, config, caption_dropout=0.0)
    rows, drawn = [drawing_row("a red 3", image) for image in images], []
    for epoch in range(60):
        collate.epoch = epoch
        batches = [collate([row]) for row in rows]
        drawn += [int(batch["gen_codes_per_step"]) for batch in batches]
        for length, batch in zip(drawn[-4:], batches, strict=True):
            assert batch["gen_mask"].sum() == config.num_gen_tokens((8, 8), length)
    counts = [drawn.count(length) for length in config.strip_lengths]
    assert counts[4] > counts[3] > counts[2] > counts[1] > counts[0] > 0
    again = UniCompressCollator(short_processor, config, caption_dropout=0.0)
    again.epoch = 7
    assert [int(again([row])["gen_codes_per_step"]) for row in rows] == drawn[28:32]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_in_your_own_trainer_an_image_has_another_ratio_in_another_pass(short_processor, shared, images, share):
    collate = UniCompressCollator(short_processor, shared(codes_per_step=(4, 8)).active_peft_config, caption_dropout=share)
    rows = [drawing_row("a red 3", image) for image in images]
    passes = [[int(collate([row])["gen_codes_per_step"]) for row in rows] for _ in range(30)]
    assert all(len(set(of_row)) == 2 for of_row in zip(*passes, strict=True))


def test_in_your_own_trainer_an_image_is_read_at_another_stride_in_another_pass(shared, processor, images):
    config, compact = shared(stride=STRIDES).active_peft_config, shared(stride=STRIDES).compact_processor(processor)
    collate = UniCompressCollator(compact, config)
    passes = [[collate([reading_row(image)])["input_ids"].shape[1] for image in images] for _ in range(30)]
    assert all(len(set(of_row)) == 3 for of_row in zip(*passes, strict=True))


@pytest.mark.parametrize("value", [2, 0, 3.0, "3", True, -3])
def test_a_ratio_that_was_not_trained_is_refused_with_the_legal_ones(shared, short_processor, value):
    model, prompts = shared(codes_per_step=DIAL), drawing_inputs(short_processor, CAPTIONS)
    with pytest.raises(InputError, match=r"codes_per_step=.* not trained; expected 1 or 3 or 8"):
        draw(model, prompts, codes_per_step=value)
    with pytest.raises(InputError, match=r"codes_per_step=.* not trained; expected 1 or 3 or 8"):
        UniCompressCollator(short_processor, model.active_peft_config, codes_per_step=value)


def test_a_ratio_is_refused_where_nothing_is_drawn_in_strips(fresh, short_processor, short_question):
    prompts, model = drawing_inputs(short_processor, CAPTIONS), attach(fresh(), codes_per_step=DIAL)
    with pytest.raises(InputError, match=r"codes_per_step=8 .*generation_mode='image'"):
        model.generate(**short_question, codes_per_step=8)
    with model.disable_adapter(), pytest.raises(InputError, match=r"codes_per_step=8 .*enabled adapter"):
        draw(model, prompts, codes_per_step=8)
    with pytest.raises(InputError, match=r"codes_per_step=4 with the 'phase' decompressor"):
        draw(attach(fresh(), decompressor="phase"), prompts, codes_per_step=4)


def reading_row(image, question: str = "What digit is at the top left?") -> dict:
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    said = {"role": "assistant", "content": [{"type": "text", "text": "3"}]}
    return {"messages": [{"role": "user", "content": parts}, said], "images": [image]}


@pytest.mark.parametrize(("stride", "tokens"), [(1, 69), (2, 21), (4, 9), (None, 21)])
def test_one_adapter_reads_at_every_stride(shared, processor, images, stride, tokens):
    """The placeholders tell the stride: in a forward, in generation, and in a batch of training."""
    model = shared(stride=STRIDES)
    compact, calls = model.compact_processor(processor, stride=stride), calls_of(model, "inputs_embeds")
    inputs = question_inputs(compact, ["What digit is at the top left?"] * 2, images[:2])
    assert (inputs["input_ids"] == compact.tokenizer.convert_tokens_to_ids(IMAGE)).sum() == 2 * tokens
    prefill = inputs["input_ids"].shape[1]
    logits_ = logits(model, inputs)
    answered = answer(model, inputs, count=1)
    assert [call.shape[1] for call in calls] == [prefill, prefill]
    assert torch.equal(logits_[:, -1].argmax(-1), answered[:, 0])
    reader = model.read_layer.active_module()
    features = model.family.read_features(inputs["pixel_values"])
    with torch.no_grad():
        read = model.family.base.model.aligner.base_layer(reader(features, (8, 8), stride))
        start = (inputs["input_ids"][0] == compact.tokenizer.convert_tokens_to_ids(IMAGE)).nonzero()[0]
    assert torch.equal(calls[0][:, start : start + tokens], read)


@pytest.mark.parametrize("processors_stride", STRIDES)
def test_batches_read_at_all_strides_whatever_the_processor_writes(shared, processor, images, processors_stride):
    model = shared(stride=STRIDES, codes_per_step=(4, 8))
    config, compact = model.active_peft_config, model.compact_processor(processor, stride=processors_stride)
    image_id, seen = compact.tokenizer.convert_tokens_to_ids(IMAGE), set()
    for epoch in range(12):
        collate = UniCompressCollator(compact, config, caption_dropout=0.0)
        collate.epoch = epoch
        batch = collate([reading_row(images[0]), drawing_row("a red 3", images[1])])
        read = (batch["input_ids"] == image_id) & ~batch["gen_mask"]
        seen.add((int(read.sum()), int(batch["gen_mask"].sum())))
        with torch.no_grad():
            assert model(**batch).loss.isfinite()
    assert {count for count, _ in seen} == {69, 21, 9}
    assert {count for _, count in seen} == {17, 9}
    fixed = UniCompressCollator(compact, config, caption_dropout=0.0, stride=4, codes_per_step=8)
    assert (fixed([reading_row(images[0])])["input_ids"] == image_id).sum() == 9


def test_evaluation_is_at_the_ratios_in_the_middle(shared, processor, images):
    model = shared(stride=STRIDES, codes_per_step=(4, 8))
    config, compact = model.active_peft_config, model.compact_processor(processor, stride=4)
    collate = UniCompressCollator(compact, config).without_chance()
    assert (collate.caption_dropout, collate.codes_per_step, collate.stride) == (0.0, 8, 2)
    fixed = UniCompressCollator(compact, config, codes_per_step=4, stride=1).without_chance()
    assert (fixed.codes_per_step, fixed.stride) == (4, 1)
    phase = UniCompressCollator(compact, UniCompressConfig(decompressor="phase")).without_chance()
    assert (phase.codes_per_step, phase.stride) == (None, 2)


def test_a_processor_of_no_trained_stride_is_refused(shared, processor, images):
    config = shared(stride=STRIDES).active_peft_config
    with pytest.raises(InputError, match=r"64 placeholders for an image; expected 69 or 21 or 9\. .*compact_processor"):
        UniCompressCollator(processor, config)([reading_row(images[0])])


def test_a_stride_that_was_not_trained_is_refused_with_the_legal_ones(fresh, processor, images):
    model = attach(fresh(), stride=(2, 4))
    with pytest.raises(InputError, match=r"stride=1, for which .* not trained; expected 2 or 4"):
        model.compact_processor(processor, stride=1)
    of_another = attach(fresh(), stride=1).compact_processor(processor)
    with pytest.raises(InputError, match=r"69 image placeholders .*expected 21, 9 an image"):
        logits(model, question_inputs(of_another, ["What digit is at the top left?"], images[:1]))
    for decompressor in ("phase", "raster"):
        with pytest.raises(ConfigError, match=r"stride=\[2, 4\] .*one integer"):
            UniCompressConfig(stride=[4, 2], decompressor=decompressor)
    with pytest.raises(BaseModelError, match=r"stride=3 does not divide .* one of \[1, 2, 4, 8\]"):
        attach(fresh(), stride=(2, 3))


def test_each_stride_has_a_separator_of_its_own(fresh, processor, images):
    model, answers = attach(fresh(), stride=STRIDES), {}
    with torch.no_grad():
        for changed in (None, 2):  # that of stride 4
            if changed is not None:
                model.read_layer.active_module().separator[changed] += 1
            for stride in STRIDES:
                compact = model.compact_processor(processor, stride=stride)
                inputs = question_inputs(compact, ["What digit is at the top left?"], images[:1])
                answers.setdefault(stride, []).append(logits(model, inputs))
    assert {stride: torch.equal(*both) for stride, both in answers.items()} == {1: True, 2: True, 4: False}


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, [], [4, 4], [2, 4.0], [0, 2]])
def test_no_number_of_codes_is_refused(value):
    with pytest.raises(ConfigError, match=r"codes_per_step=.*integer >= 1"):
        UniCompressConfig(codes_per_step=value)


@pytest.mark.parametrize("decompressor", ["raster", "phase"])
def test_only_strip_has_it(decompressor):
    with pytest.raises(ConfigError, match=rf"codes_per_step=8 .*None with decompressor='{decompressor}'"):
        UniCompressConfig(codes_per_step=8, decompressor=decompressor)


@pytest.mark.parametrize("fields", [{"decompressor": "phase"}, {"num_global_tokens": 0}])
def test_only_strip_with_global_tokens_has_them_in_front_of_drawings(fields):
    with pytest.raises(ConfigError, match=r"drawing_global_tokens=True .*'strip' with num_global_tokens >= 1"):
        UniCompressConfig(drawing_global_tokens=True, **fields)


def test_more_codes_than_a_picture_has_are_refused(base):
    with pytest.raises(BaseModelError, match=r"codes_per_step=65 .* 64 codes; expected 1 to 64"):
        attach(base, codes_per_step=65)


def test_counts_that_cards_and_the_command_show(shared):
    config = shared(codes_per_step=12).active_peft_config.to_dict()
    assert token_counts(config) == [("tokens to read an image", 64, 21), ("steps of the language model to draw one", 64, 6)]
    del config["codes_per_step"]  # as an older adapter
    assert token_counts(config)[1][2] == 16
