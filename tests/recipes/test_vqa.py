import numpy as np
import pytest
from datasets import Dataset
from finetune_runs import say, turn, write_rows
from rows.conversations import FORMS, REFERENCED_FORMS, DatasetError, conversations
from scoring.vqa import normalised, questions_of, vqa_accuracy, vqa_scores

IMAGE = {"type": "image"}


def read(messages: list[list[dict]], images: int = 1) -> Dataset:
    """Rows of these conversations."""
    row = {"images": [{"path": "x.png", "bytes": None}] * images, "origin": "here", "first": True, "given": 0}
    return Dataset.from_list([{"messages": turns, **row} for turns in messages])


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The Dog.", "dog"),
        ("a  cat and an owl", "cat and owl"),
        ("two", "2"),
        ("None", "0"),
        ("ten of them", "10 of them"),
        ("isnt", "isn't"),
        ("couldntve", "couldn't've"),
        ("couldn\u2019t've", "couldn't've"),
        ("the girl's shell", "girl's shell"),  # a possessive is no contraction, and a shell is not "she'll"
        ("100,978", "100978"),
        ("red,green", "red green"),
        ("2:50 p.m.", "2:50 pm"),
        ("1.5 l.", "1.5 l"),
        ("yes/no?", "yes no"),
        ("black-white", "black white"),
        ("50%", "50%"),  # what the evaluation does not name stays
        ("$20 & #5", "$20 & #5"),
        ("well-known - yes", "wellknown yes"),  # beside a space once, so joined throughout
        ("hed", "he'd"),
        ("lets", "lets"),
        (" \n ", ""),
    ],
)
def test_answers_are_compared_as_the_vqa_evaluation_describes(said, compared):
    assert normalised(said) == compared
    assert normalised(compared) == compared


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_people_leaves_each_of_them_out_once(agree, accuracy):
    assert vqa_accuracy("Red.", ["red"] * agree + ["blue"] * (10 - agree)) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("references", "accuracy"), [(["red"], 1), (["blue"], 0), (["red", "red"], 1), (["red", "blue"], 0.5), (["red"] * 3, 1)]
)
def test_vqa_accuracy_of_fewer_people_is_whole_where_they_agree(references, accuracy):
    assert vqa_accuracy("red", references) == pytest.approx(accuracy)


def test_a_perfect_answerer_scores_one_and_a_random_one_near_chance():
    truth = [str(digit) for digit in np.random.default_rng(0).integers(0, 10, 1000)]
    references = [[told] for told in truth]
    perfect = vqa_scores(truth, references)
    assert all((score.value, score.high) == (1, 1) for score in perfect.values())
    assert perfect["exact_match"].low == pytest.approx(1 / (1 + 1.96**2 / 1000), abs=1e-4)  # Wilson's, where all are right
    chance = vqa_scores([str(digit) for digit in np.random.default_rng(1).integers(0, 10, 1000)], references)
    assert all(score.low < 0.1 < score.high and score.high - score.low < 0.05 for score in chance.values())


def test_exact_match_is_strict_where_vqa_accuracy_is_not():
    scores = vqa_scores(["Two", "2"], [["2"], ["2", "3"]])
    assert scores["exact_match"].value == 1 / 2
    assert scores["vqa_accuracy"].value == (1 + 0.5) / 2


def test_every_answer_in_words_behind_an_image_is_a_question_with_what_was_said_before():
    talk = [
        turn("user", IMAGE, say("What digit?")),
        turn("assistant", say("3")),
        turn("user", IMAGE, say("And here?")),
        turn("assistant", say("7")),
    ]
    first, second = questions_of(read([talk], images=2))
    assert [part["type"] for part in first.messages[0]["content"]] == ["image", "text"]
    assert (len(first.messages), first.images, first.references) == (1, 1, ["3"])
    assert (len(second.messages), second.images, second.references) == (3, 2, ["7"])


def test_what_is_drawn_and_what_is_only_said_is_no_question():
    drawn = [turn("user", say("a red 3")), turn("assistant", IMAGE), turn("user", say("Sure?")), turn("assistant", say("yes"))]
    said = [turn("user", say("Hello")), turn("assistant", say("Hello"))]
    assert questions_of(read([drawn, said])) == []


@pytest.mark.parametrize("form", [str, lambda told: {"answer": told, "answer_confidence": "yes"}], ids=["words", "VQA v2"])
def test_several_answers_are_references_of_one_question(tmp_path, form):
    answers = [form(told) for told in ("red", "crimson", "red")]
    source = write_rows(tmp_path / "rows.jsonl", [{"image": "0.png", "question": "What colour?", "answers": answers}])
    (question,) = questions_of(conversations(source, forms=REFERENCED_FORMS | FORMS))
    assert question.references == ["red", "crimson", "red"]
    assert len(question.messages) == 1


def test_answers_of_a_prompt_are_context(tmp_path):
    asked, told = {"role": "user", "content": "What digit?"}, {"role": "assistant", "content": "3"}
    row = {"prompt": [asked, told, {"role": "user", "content": "Sure?"}], "completion": "yes", "image": "0.png"}
    (question,) = questions_of(conversations(write_rows(tmp_path / "rows.jsonl", [row])))
    assert (len(question.messages), question.references) == (3, ["yes"])


@pytest.mark.parametrize(("asked", "told"), [(None, "3"), ("What digit?", None), ("What digit?", " ")])
def test_a_question_without_words_is_named(asked, told):
    with pytest.raises(DatasetError, match=r"here.*without words"):
        questions_of(read([[turn("user", IMAGE, say(asked)), turn("assistant", say(told))]]))
