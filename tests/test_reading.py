import pytest
import torch
from helpers import DENSE, IMAGE, SHORT, answer, attach, chat, logits, question_inputs
from tiny_world.tiny_janus import make_processor
from transformers import DynamicCache

QUESTIONS = ["What digit is at the top left?", "How many digits are there?", "What colour is the 3?", "Describe the image."]


def placeholders(model, inputs) -> int:
    return int((inputs["input_ids"] == model.family.image_token_id).sum())


@pytest.mark.parametrize(("stride", "count", "tokens"), [(2, 4, SHORT), (2, 0, 17), (4, 4, 9), (1, 1, 66), (8, 0, 2)])
def test_an_image_takes_fewer_placeholders(base, images, stride, count, tokens):
    model = attach(base, stride=stride, num_global_tokens=count)
    assert model.num_image_tokens == tokens
    with model.disable_adapter():
        assert model.num_image_tokens == DENSE
    inputs = question_inputs(make_processor(tokens), QUESTIONS[:1], images[:1])
    assert placeholders(model, inputs) == tokens
    assert answer(model, inputs).shape == (1, 6)


def test_the_language_model_sees_the_short_sequence(base, short_question):
    model = attach(base)
    lengths = []
    base.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    logits(model, short_question)
    assert lengths == [short_question["input_ids"].shape[1]]


def test_what_the_image_shows_counts(base, short_processor, images):
    model = attach(base)
    ours, theirs = (logits(model, question_inputs(short_processor, QUESTIONS[:1], [image])) for image in images[:2])
    assert not torch.allclose(ours, theirs)


def test_several_images_in_one_prompt(base, short_processor, images):
    model = attach(base)
    text = [chat(short_processor, IMAGE, "What digit is at the top left?", IMAGE, "and at the top right?")]
    one, other = (short_processor(text=text, images=pair, return_tensors="pt") for pair in (images[:2], images[1::-1]))
    assert placeholders(model, one) == 2 * SHORT
    assert answer(model, one).shape == (1, 6)
    assert not torch.allclose(logits(model, one), logits(model, other))  # their order counts


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_question_in_a_batch_is_answered_as_alone(base, short_processor, images, side):
    model = attach(base)
    batch = question_inputs(short_processor, QUESTIONS, images, padding_side=side)
    assert not batch["attention_mask"].all()
    alone = [answer(model, question_inputs(short_processor, [q], [i])) for q, i in zip(QUESTIONS, images, strict=True)]
    assert torch.equal(answer(model, batch), torch.cat(alone))


def test_rows_with_two_one_and_no_images_are_answered_as_alone(base, short_processor, images):
    model = attach(base)
    texts = [
        chat(short_processor, IMAGE, "What digit is at the top left?", IMAGE),
        chat(short_processor, "How many digits are there?"),
        chat(short_processor, IMAGE, "Describe the image."),
    ]
    parts = [images[:2], [], images[2:3]]
    batch = short_processor(text=texts, images=images[:3], padding=True, return_tensors="pt")
    alone = [
        answer(model, short_processor(text=[text], images=part or None, return_tensors="pt"))
        for text, part in zip(texts, parts, strict=True)
    ]
    assert torch.equal(answer(model, batch), torch.cat(alone))


def test_the_prompt_comes_back_in_front_as_on_the_base(base, short_question):
    tokens = attach(base).generate(**short_question, do_sample=False, max_new_tokens=3)
    length = short_question["input_ids"].shape[1]
    assert torch.equal(tokens[:, :length], short_question["input_ids"])


def test_text_without_an_image_is_answered(base, short_processor):
    inputs = short_processor(text=[chat(short_processor, "Describe the image.")], return_tensors="pt")
    assert answer(attach(base), inputs).shape == (1, 6)


def test_inputs_may_be_given_by_position(base, short_question):
    model = attach(base)
    inputs = dict(short_question)
    tokens = model.generate(inputs.pop("input_ids"), **inputs, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(tokens[:, -4:], answer(model, short_question, 4))


def test_text_may_be_generated_from_embeddings_as_on_the_base(base, short_processor):
    model = attach(base)
    inputs = short_processor(text=[chat(short_processor, "Describe the image.")], return_tensors="pt")
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    tokens = model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(tokens, answer(model, inputs))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2}])
def test_text_takes_the_bases_options(base, short_question, options):
    tokens = attach(base).generate(**short_question, max_new_tokens=3, **options)
    assert len(tokens) == options.get("num_return_sequences", 1)


def test_at_stride_one_without_global_tokens_the_features_pass_unchanged(base):
    attach(base, stride=1, num_global_tokens=0)
    aligner, features = base.model.aligner, torch.randn(1, DENSE, 128)
    behind_a_separator = torch.nn.functional.pad(features, (0, 0, 1, 0))
    assert torch.equal(aligner(features)[:, 1:], aligner.base_layer(behind_a_separator)[:, 1:])


def test_a_second_turn_of_a_batch_continues_its_cache(base, short_processor, images):
    """Rows of other lengths, whose padding stands between the first answer and the second question."""
    model = attach(base)
    first = question_inputs(short_processor, QUESTIONS[:2], images[:2])
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True}
    told = model.generate(**first, **options)
    pad = short_processor.tokenizer.pad_token_id
    assert (first["input_ids"] == pad).any()  # the rows have other lengths
    mask = torch.cat([first["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    mask[0, -2:] = 0  # the first answer was shorter
    ids = told.sequences.masked_fill(mask == 0, pad)
    asked = short_processor.tokenizer(["How many digits are there?"] * 2, return_tensors="pt", add_special_tokens=False)
    ids, mask = torch.cat([ids, asked["input_ids"]], 1), torch.cat([mask, asked["attention_mask"]], 1)
    options |= {"attention_mask": mask, "output_logits": True}
    cached = model.generate(ids, past_key_values=told.past_key_values, **options)
    afresh = model.generate(ids, pixel_values=first["pixel_values"], **options)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(afresh.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 4])
def test_an_empty_cache_does_not_hide_the_stride(base, processor, images, stride):
    model = attach(base, stride=[1, 2, 4])
    inputs = question_inputs(model.compact_processor(processor, stride=stride), QUESTIONS[:1], images[:1])
    expected = answer(model, inputs)
    assert torch.equal(
        answer(model, {**inputs, "past_key_values": DynamicCache(config=base.config.get_text_config())}), expected
    )
