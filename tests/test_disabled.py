import copy

import pytest
import torch
from helpers import CAPTIONS, answer, attach, draw, drawing_inputs, logits, question_inputs, small_config

QUESTIONS = ["What digit is at the top left?", "How many digits are there?"]


@pytest.fixture(params=["strip", "phase"])  # of each head one
def model(request, shared):
    return shared(decompressor=request.param)


@pytest.fixture
def questions(processor, images):
    return question_inputs(processor, QUESTIONS, images[:2])


def test_logits_are_the_bases(model, pristine, questions):
    with model.disable_adapter():
        assert torch.equal(logits(model, questions), logits(pristine, questions))


def test_text_tokens_are_the_bases(model, pristine, questions):
    with model.disable_adapter():
        assert torch.equal(answer(model, questions), answer(pristine, questions))


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.8}])  # both guided by the base's default
def test_drawn_tokens_are_the_bases(shared, pristine, processor, options):
    inputs = drawing_inputs(processor, CAPTIONS)
    torch.manual_seed(3)
    expected = draw(pristine, inputs, **options)
    for model in (shared(), shared(decompressor="phase")):
        torch.manual_seed(3)
        with model.disable_adapter():
            assert torch.equal(draw(model, inputs, **options), expected)


def test_arguments_by_position_are_the_bases(model, pristine, dense_question):
    ids, pixels = dense_question["input_ids"], dense_question["pixel_values"]
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(ids, pixels).logits, pristine(ids, pixels).logits)


def test_the_loss_is_the_bases(model, pristine, questions):
    batch = {**questions, "labels": questions["input_ids"]}
    with model.disable_adapter():
        assert torch.equal(model(**batch).loss, pristine(**batch).loss)


def test_the_adapter_is_back_afterwards(model, short_question, dense_question):
    before = logits(model, short_question)
    with model.disable_adapter():
        logits(model, dense_question)
    assert torch.equal(logits(model, short_question), before)


def test_disabling_with_two_adapters_is_the_base_too(base, pristine, questions):
    model = attach(base)
    model.add_adapter("b", small_config(stride=4))
    model.set_adapter("b")
    with model.disable_adapter():
        assert torch.equal(logits(model, questions), logits(pristine, questions))


def test_enabled_differs_from_the_base(shared, pristine, processor, short_question, dense_question):
    model = shared()
    inputs = drawing_inputs(processor, CAPTIONS[:1])
    assert not torch.equal(draw(model, inputs), draw(pristine, inputs))
    assert not torch.equal(logits(model, short_question)[:, -1], logits(pristine, dense_question)[:, -1])


def test_a_copy_behaves_alike(model, short_question):
    assert torch.equal(logits(copy.deepcopy(model), short_question), logits(model, short_question))


@pytest.mark.parametrize("part", ["tokenizer", "language model", None])
def test_disabling_for_a_while_changes_nothing_of_what_trains(base, part):
    model = attach(base)
    if part is None:
        model.requires_grad_(False)
    else:
        model.train_only(part)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
