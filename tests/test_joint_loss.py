"""The joint forward: scores of words and of drawn codes, as TRL's trainers read them."""

import re
from dataclasses import replace

import pytest
import torch
from helpers import DECOMPRESSORS, attach, logits
from tiny_world.tiny_janus import make_processor

from uc_adapters import UniCompressCollator
from uc_adapters.errors import InputError, UnsupportedError
from uc_adapters.joint_loss import CODES

each_decompressor = pytest.mark.parametrize("decompressor", DECOMPRESSORS)
# "raster" is learned by the head of "phase"
each_head = pytest.mark.parametrize("decompressor", ["strip", "phase"])
FIELDS = ("log_probs", "entropy", "is_top1", "label_mask")


def say(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


@pytest.fixture
def rows(images):
    """A reading row, a drawing row, one that does both, one with two drawings, and one of words alone."""
    image = {"type": "image"}
    question = say("What digit is at the top left?")
    return [
        {"messages": turns([image, *question], say("3")), "images": [images[0]]},
        {"messages": turns(say("a red 3 at the top left"), [image]), "images": [images[1]]},
        {"messages": turns([image, *say("a blue 7")], [image]), "images": [images[2], images[3]]},
        {"messages": turns(say("a green 1"), [image, image]), "images": images[:2]},
        {"messages": turns(question, say("3"), say("How many digits are there?"), say("4")), "images": []},
    ]


def turns(*contents) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def collate(short_processor):
    """Rows -> a batch for a default adapter, no caption dropped."""
    return lambda model, rows: UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0)(rows)


@each_decompressor
def test_every_labelled_position_is_scored_and_no_other(shared, rows, collate, decompressor):
    model = shared(decompressor=decompressor)
    batch = collate(model, rows)
    output = model(**batch)
    labelled = batch["labels"][:, 1:] != -100
    assert torch.equal(output.label_mask, labelled)
    assert [getattr(output, name).shape for name in FIELDS] == [labelled.shape] * 4
    for name in ("log_probs", "entropy", "is_top1"):
        field = getattr(output, name)
        assert field.dtype == torch.float32
        assert (field[~labelled] == 0).all()
    assert (output.log_probs[labelled] < 0).all()
    assert (output.entropy[labelled] > 0).all()
    assert ((output.is_top1 >= 0) & (output.is_top1 <= 1)).all()
    places = model.active_peft_config.num_gen_tokens((8, 8))
    assert labelled[1].sum() == places - 1 + 1  # the image's places but the separator, and the turn's end


def test_the_loss_is_the_mean_over_labelled_positions(shared, rows, collate):
    model = shared()
    batch = collate(model, rows)
    output = model(**batch)
    torch.testing.assert_close(output.loss, -output.log_probs.sum() / output.label_mask.sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=10).loss, -output.log_probs.sum() / 10)


@pytest.mark.parametrize("row", [0, 4])
def test_words_score_as_the_plain_forward_says(shared, rows, collate, row):
    model = shared()
    batch = collate(model, rows[row : row + 1])
    output = model(**batch, fused_lm_head=True)
    labels = batch.pop("labels")[:, 1:]
    plain = logits(model, batch)[:, :-1].log_softmax(-1)
    expected = plain.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != -100)
    torch.testing.assert_close(output.log_probs, expected, atol=1e-5, rtol=1e-5)
    hits = (plain.argmax(-1) == labels).float()
    assert torch.equal(output.is_top1, hits * (labels != -100))


def test_without_images_to_draw_or_trl_the_forward_is_pefts(shared, rows, collate):
    model = shared()
    batch = collate(model, rows[:1])
    plain, fused = model(**batch), model(**batch, fused_lm_head=True)
    assert plain.logits.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(plain.loss, fused.loss, atol=1e-5, rtol=1e-5)


@each_decompressor
def test_rows_of_a_batch_score_as_they_do_alone(shared, rows, collate, decompressor):
    model = shared(decompressor=decompressor)
    with torch.no_grad():
        together = iter(model(**collate(model, rows)).log_probs)
        for row in rows:
            for alone in model(**collate(model, [row]), fused_lm_head=True).log_probs:
                sequence = next(together)
                torch.testing.assert_close(sequence[: len(alone)], alone, atol=1e-5, rtol=1e-5)
                assert (sequence[len(alone) :] == 0).all()


@each_decompressor
def test_a_places_score_is_the_sum_over_its_codes(shared, rows, collate, decompressor):
    model = shared(decompressor=decompressor)
    head, batch = model.code_head, collate(model, rows[1:2])
    codes = head.compress(batch["gen_pixel_values"])
    first = codes.globals.shape[1] + 1  # of the steps, behind the separator
    hidden = torch.randn(1, first + 16, head.family.geometry.hidden_size)
    with torch.no_grad():
        scores = head.score(hidden, codes)
        features = hidden[0, first:]  # (16, D)
        if decompressor == "strip":
            globals_ = head.entries(codes.globals).expand(16, -1, -1)
            features = head.module.decompressor(head.entries(codes.steps[0]), features, globals_)
        all_log_probs = head.family.code_logits(features).log_softmax(-1).view(16, -1, 512)
    of_codes = all_log_probs.gather(2, codes.steps[0].unsqueeze(2)).squeeze(2)  # (16, codes of a place)
    assert of_codes.shape[1] == head.codes_per_step
    torch.testing.assert_close(scores.log_probs[0, first:], of_codes.sum(1), atol=1e-5, rtol=1e-5)
    assert scores.log_probs[0, first - 1] == 0  # the separator


def test_images_of_a_batch_go_to_their_own_rows(shared, rows, collate):
    model = shared()
    drawn = [rows[1], rows[2]]
    with torch.no_grad():
        forward, backward = (model(**collate(model, order)).log_probs for order in (drawn, drawn[::-1]))
    torch.testing.assert_close(forward.flip(0), backward, atol=1e-5, rtol=1e-5)


@each_decompressor
@pytest.mark.parametrize("num_global_tokens", [0, 4])
def test_the_loss_trains_the_adapter_and_nothing_of_the_base(base, rows, decompressor, num_global_tokens):
    model = attach(base, decompressor=decompressor, num_global_tokens=num_global_tokens)
    processor = make_processor(num_global_tokens + 17)
    batch = UniCompressCollator(processor, model.active_peft_config, caption_dropout=0.0)(rows)
    model(**batch).loss.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert all("lora_" in name for name in gradients)
    lora = {name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    assert lora <= gradients
    assert any("aligner.lora_uc.default.separator" in name for name in gradients)
    assert any("generation_head.lora_uc.default.separator" in name for name in gradients)
    assert any("decompressor" in name for name in gradients) == (decompressor == "strip")
    assert any("aligner.lora_uc.default.extractor" in name for name in gradients) == (num_global_tokens > 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(base, rows, collate, reentrant):
    model = attach(base).train()
    batch, runs = collate(model, rows), []
    base.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        runs.clear()
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(runs) == 1
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    checkpointed = gradients()
    assert len(runs) == 2  # once more on the way back
    assert plain.keys() == checkpointed.keys()
    assert [name for name in plain if not torch.equal(plain[name], checkpointed[name])] == []


@each_head
def test_a_bfloat16_base_scores_and_trains(base, rows, collate, decompressor):
    model = attach(base.to(torch.bfloat16), decompressor=decompressor)
    output = model(**collate(model, rows))
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.log_probs.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_head
def test_an_adapter_in_bfloat16_scores_and_trains(base, rows, collate, decompressor):
    """As FSDP1 and ZeRO-3 want it, with autocast_adapter_dtype=False."""
    model = attach(base, decompressor=decompressor).to(torch.bfloat16)
    output = model(**collate(model, rows))
    output.loss.backward()
    assert output.loss.isfinite()


def positions_seen(model, batch) -> torch.Tensor | None:
    """Those that the language model is given."""
    seen = []
    hook = model.get_base_model().model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


def answer_and_drawing(images) -> dict:
    """Words, and a drawing behind them."""
    contents = say("How many digits are there?"), say("4"), say("a red 3"), [{"type": "image"}]
    return {"messages": turns(*contents), "images": images[:1]}


def test_text_behind_drawn_strips_stands_where_it_stands_in_the_bases_own_sequence(shared, images, collate, processor):
    model, row = shared(), answer_and_drawing(images)
    batch = collate(model, [row])
    config = replace(model.active_peft_config, stride=1, num_global_tokens=0)
    dense = UniCompressCollator(processor, config, caption_dropout=0.0)([row])
    assert dense["gen_mask"].sum() == 64
    words, of_base = (one["input_ids"][~one["gen_mask"]] for one in (batch, dense))
    assert torch.equal(words, of_base)
    assert torch.equal(positions_seen(model, batch)[~batch["gen_mask"]], (~dense["gen_mask"]).nonzero()[:, 1])
    codes = torch.arange(3, 64, 4)  # the last of each strip
    of_image = torch.cat([torch.zeros(1, dtype=torch.long), codes])  # the separator where the first one stands
    first = dense["gen_mask"].nonzero()[0, 1]
    assert torch.equal(positions_seen(model, batch)[batch["gen_mask"]], first + of_image)


@pytest.mark.parametrize("decompressor", ["phase", "raster"])
def test_other_decompressors_count_compact_tokens(shared, images, collate, decompressor):
    model = shared(decompressor=decompressor)
    batch = collate(model, [answer_and_drawing(images)])
    assert torch.equal(positions_seen(model, batch)[0], torch.arange(batch["input_ids"].shape[1]))


def test_positions_of_the_callers_are_kept(shared, rows, collate):
    model = shared()
    batch = collate(model, rows[1:2])
    told = torch.arange(batch["input_ids"].shape[1])[None] + 5
    assert torch.equal(positions_seen(model, batch | {"position_ids": told}), told)


@each_head
def test_without_a_mask_nothing_is_padding(shared, rows, collate, decompressor):
    """Uneven positions alone would be taken for those of several sequences that are packed into one."""
    model = shared(decompressor=decompressor)
    batch = collate(model, rows[1:2])
    assert batch["attention_mask"].all()
    with torch.no_grad():
        expected = model(**batch)
        del batch["attention_mask"]
        assert torch.equal(model(**batch).log_probs, expected.log_probs)


def test_a_teachers_states_are_learned_code_by_code(base, rows, collate):
    """Less the divergence from the teacher's codes, and the distance from its state before each strip."""
    model = attach(base)
    batch, seen = collate(model, rows[1:3]), []
    torch.manual_seed(0)
    states = torch.randn(2, 64, base.config.text_config.hidden_size)
    base.model.language_model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    with torch.no_grad():
        plain, taught = model(**batch), model(**batch, teacher_states=states)
        steps = plain.kinds == CODES
        hidden = seen[0][:, :-1][steps]  # (32, D)
        codes = model.family.dense_codes(batch["gen_pixel_values"]).view(32, 4)
        head = model.code_head
        features = head.module.decompressor(head.entries(codes), hidden, head.entries(codes[:, :0]))
        ours, theirs = (base.model.generation_head.base_layer(x).log_softmax(-1) for x in (features, states.view(32, 4, -1)))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)  # (32, 4)
    before = states.view(32, 4, -1)[:, 0]
    distance = (hidden - before).square().mean(1) / before.square().mean(1)
    expected = -divergence.sum(1) - 4 * distance
    torch.testing.assert_close(taught.log_probs[steps], expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(taught.log_probs[~steps], plain.log_probs[~steps])
    assert torch.equal(taught.entropy, plain.entropy)
    assert torch.equal(taught.is_top1, plain.is_top1)
    with torch.no_grad():
        alone = model(**collate(model, rows[1:2]), teacher_states=states[:1]).log_probs[0]
    torch.testing.assert_close(alone, taught.log_probs[0, : len(alone)], atol=1e-3, rtol=1e-4)  # whatever is in its batch


def test_a_pupil_that_is_its_teacher_has_nothing_to_learn(base):
    head = attach(base).code_head
    states = torch.randn(5, 4, base.config.text_config.hidden_size)
    logits = head.family.code_logits(states)
    assert torch.equal(head.divergence(logits, states[:, 0], states), torch.zeros(5, 4))
    other = head.divergence(logits.roll(1, 0), states[:, 0], states)
    assert (other > 0).all()


@pytest.mark.parametrize("shape", [(1, 64, 192), (2, 63, 192), (2, 64, 191), (128, 192)])
def test_a_teachers_states_of_another_shape_are_refused(shared, rows, collate, shape):
    model = shared()
    with pytest.raises(InputError, match=rf"teacher_states of shape {re.escape(str(shape))}; expected \(2, 64, 192\)"):
        model(**collate(model, rows[1:3]), teacher_states=torch.zeros(shape))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_of_the_teacher_out_of_range_is_refused(shared, rows, collate, share):
    model = shared()
    with pytest.raises(InputError, match=rf"teacher_states_weight={share}; expected a number from 0 to 1"):
        model(**collate(model, rows[1:3]), teacher_states=torch.zeros(2, 64, 192), teacher_states_weight=share)


@pytest.mark.parametrize("change", [lambda probs: probs[:1], lambda probs: probs[1:], lambda probs: probs[:, :1]])
def test_a_teachers_words_of_another_shape_are_refused(shared, rows, collate, change):
    model = shared()
    batch = collate(model, rows[:1])
    words = int((batch["labels"][:, 1:] != -100).sum())
    probs = torch.full((words, model.config.text_config.vocab_size), 1 / model.config.text_config.vocab_size)
    assert model(**batch, teacher_probs=probs).loss.isfinite()
    with pytest.raises(InputError, match=rf"teacher_probs of shape .*; expected \({words}, {probs.shape[1]}\)"):
        model(**batch, teacher_probs=change(probs))


def test_a_teachers_states_without_an_image_to_draw_are_refused(shared, rows, collate):
    model = shared()
    with pytest.raises(InputError, match=r"teacher_states of shape \(1, 64, 192\); expected \(0, 0, 192\)"):
        model(**collate(model, rows[:1]), teacher_states=torch.zeros(1, 64, 192))


@pytest.mark.parametrize("decompressor", ["phase", "raster"])
def test_decompressors_of_another_order_cannot_have_the_teachers_states(shared, rows, collate, decompressor):
    model = shared(decompressor=decompressor)
    with pytest.raises(UnsupportedError, match=rf"teacher_states with the '{decompressor}' decompressor; expected 'strip'"):
        model(**collate(model, rows[1:3]), teacher_states=torch.zeros(2, 64, 192))


def test_the_disabled_model_refuses_images_to_draw(shared, rows, processor):
    model = shared()
    batch = UniCompressCollator(processor, model.active_peft_config, caption_dropout=0.0)(rows[1:2])
    with pytest.raises(ValueError, match=r"gen_pixel_values.*disabled"), model.disable_adapter():
        model(**batch)


def test_images_to_draw_need_labels(shared, rows, collate):
    model = shared()
    batch = collate(model, rows)
    batch.pop("labels")
    with pytest.raises(ValueError, match=r"labels=None.*UniCompressCollator"):
        model(**batch)
