"""Questions about images: what a dataset asks, a contender's answers, and their scores: exact match, and VQA's accuracy."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from reporting.intervals import Estimate, mean, share
from rows.conversations import DatasetError, decoded
from scoring.contenders import Contender, reply
from tqdm.auto import tqdm

ENOUGH_AGREE = 3  # people who gave an answer, for it to count whole
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # others stay: 50% is not 50
# Those whose letters alone are another word (we're, she'll, I'd) stay away: an apostrophe there would be a guess.
CONTRACTIONS = """
    ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he's how'd how's
    i'd've isn't it'd it'd've it'll i've ma'am mightn't mightn't've might've mustn't must've needn't o'clock oughtn't
    shan't shouldn't shouldn't've should've she's somebody's someone's something's that'd that'll that's there'd there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've weren't we've what'll what're what's what've when's
    where'd where's where've who'd who'll who's who've why'd why's won't would've wouldn't wouldn't've y'all you'd you'd've
    you'll you're you've
"""
_BY_LETTERS = {word.replace("'", ""): word for word in CONTRACTIONS.split()}


@dataclass(frozen=True)
class Question:
    """The turns up to an answer, and the answers that count as right."""

    row: int  # of the dataset, which has the images
    images: int  # how many of them, from the first
    messages: list[dict]
    references: list[str]


def questions_of(rows: Dataset) -> list[Question]:
    """Every turn in which the assistant answers in words, behind an image to read; what was said before stays before it.

    An answer right behind another one is one more reference for it. A caption that an image is also drawn from is none, and so
    is an answer in TRL's `prompt`, which is only context.

    Args:
        rows: Of `conversations`.

    Raises:
        DatasetError: A question or an answer without words.
    """
    questions = []
    columns = (rows[name] for name in ("messages", "origin", "first", "given"))
    for index, (messages, origin, first, given) in enumerate(zip(*columns, strict=True)):
        images, before = 0, None
        for place, turn in enumerate(messages if first else []):
            parts = [part["type"] for part in turn["content"]]
            if turn["role"] == "assistant" and "image" in parts:  # what follows would be asked about the dataset's drawing
                break
            if turn["role"] == "assistant" and images and place >= given:
                if not (_words(turn) and _words(messages[place - 1])):
                    raise DatasetError(f"{origin}: a question or an answer without words; expected both.")
                if before == "assistant":
                    questions[-1].references.append(_words(turn))
                else:
                    questions.append(Question(index, images, messages[:place], [_words(turn)]))
            images, before = images + parts.count("image"), turn["role"]
    return questions


def _words(turn: dict) -> str:
    return " ".join(part["text"] or "" for part in turn["content"] if part["type"] == "text").strip()


def answer_questions(
    contender: Contender, rows: Dataset, questions: list[Question], batch_size: int, max_new_tokens: int
) -> list[str]:
    """Answers, greedily."""
    answers = []
    for first in tqdm(range(0, len(questions), batch_size), desc=f"{contender.name} answers", leave=False):
        batch = questions[first : first + batch_size]
        chats = [decoded({"messages": question.messages})["messages"] for question in batch]
        images = [image for question in batch for image in decoded(rows[question.row])["images"][: question.images]]
        answers += reply(contender, chats, images, max_new_tokens)
    return answers


def vqa_scores(answers: list[str], references: list[list[str]]) -> dict[str, Estimate]:
    """Exact match, and VQA accuracy, of at least two answers. A question is a trial.

    Args:
        references: The right answers to each: one, or those of several people.
    """
    pairs = list(zip(answers, references, strict=True))
    return {
        "exact_match": share([answer in told for answer, told in pairs]),
        "vqa_accuracy": mean(np.array([vqa_accuracy(answer, told) for answer, told in pairs])),
    }


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """VQA's accuracy of an answer, in [0, 1]: min(people who agree / 3, 1), the mean over all of them but one at a time.

    VQA has ten people a question. Of fewer than four, all who are left have to agree; a single one is compared with.
    """
    said, told = normalised(answer), Counter(map(normalised, references))
    if len(references) == 1:
        return float(told[said])
    enough = min(ENOUGH_AGREE, len(references) - 1)
    scores = [min((told[said] - (reference == said)) / enough, 1) for reference in told.elements()]
    return sum(scores) / len(scores)


def normalised(text: str) -> str:
    """An answer as the VQA evaluation compares it (https://visualqa.org/evaluation.html).

    In small letters; without articles; numbers up to ten as digits; contractions with their apostrophe; punctuation as spaces,
    or as nothing where it stands beside a space anywhere, or where a comma stands between digits anywhere. Periods go, but
    for those of decimals.
    """
    said = text = text.lower().replace("\u2019", "'")
    grouped = re.search(r"\d,\d", said)
    for mark in PUNCTUATION:
        joins = grouped or f"{mark} " in said or f" {mark}" in said
        text = text.replace(mark, "" if joins else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.split() if word not in ARTICLES]
    return " ".join(_BY_LETTERS.get(word.replace("'", ""), word) for word in words)
