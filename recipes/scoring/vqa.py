"""Questions about images: those of a dataset, a contender's answers, and their scores, exact match and VQA accuracy."""

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

ENOUGH_AGREE = 3  # people who must give an answer for it to count fully
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # other marks stay: 50% is not 50
# Contractions whose letters spell another word (we're, she'll, I'd) are left out: an apostrophe there would be a guess.
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

    row: int  # the row of the dataset that has the images
    images: int  # how many of its images are in the turns, from the first
    messages: list[dict]
    references: list[str]


def questions_of(rows: Dataset) -> list[Question]:
    """Finds every turn in which the assistant answers in text, after an image to read; earlier turns are its context.

    An answer right after another one is one more reference for the same question. A caption that an image is also drawn from is
    not an answer. An answer in TRL's `prompt` is only context.

    Args:
        rows: Rows of `conversations`.

    Raises:
        DatasetError: A question or an answer has no words.
    """
    questions = []
    columns = (rows[name] for name in ("messages", "origin", "first", "given"))
    for index, (messages, origin, first, given) in enumerate(zip(*columns, strict=True)):
        images, before = 0, None
        for place, turn in enumerate(messages if first else []):
            parts = [part["type"] for part in turn["content"]]
            if turn["role"] == "assistant" and "image" in parts:  # later questions would be about the dataset's drawing
                break
            if turn["role"] == "assistant" and images and place >= given:
                if not (_words(turn) and _words(messages[place - 1])):
                    raise DatasetError(f"{origin}: a question or an answer is without words; expected a text in both.")
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
    """The contender's greedy answers to the questions."""
    answers = []
    for first in tqdm(range(0, len(questions), batch_size), desc=f"{contender.name} answers", leave=False):
        batch = questions[first : first + batch_size]
        chats = [decoded({"messages": question.messages})["messages"] for question in batch]
        images = [image for question in batch for image in decoded(rows[question.row])["images"][: question.images]]
        answers += reply(contender, chats, images, max_new_tokens)
    return answers


def vqa_scores(answers: list[str], references: list[list[str]]) -> dict[str, Estimate]:
    """Exact match and VQA accuracy of at least two answers. Each question is one trial.

    Args:
        references: The right answers to each question: one, or those of several people.
    """
    pairs = list(zip(answers, references, strict=True))
    return {
        "exact_match": share([answer in right for answer, right in pairs]),
        "vqa_accuracy": mean(np.array([vqa_accuracy(answer, right) for answer, right in pairs])),
    }


def vqa_accuracy(answer: str, references: list[str]) -> float:
    """VQA's accuracy of an answer, in [0, 1]: min(people who agree / 3, 1), averaged over leaving out one person at a time.

    VQA has ten people per question. With fewer than four, all those left must agree; with one, this is a comparison.
    """
    said, counts = normalised(answer), Counter(map(normalised, references))
    if len(references) == 1:
        return float(counts[said])
    enough = min(ENOUGH_AGREE, len(references) - 1)
    scores = [min((counts[said] - (reference == said)) / enough, 1) for reference in counts.elements()]
    return sum(scores) / len(scores)


def normalised(text: str) -> str:
    """An answer as the VQA evaluation compares it (https://visualqa.org/evaluation.html).

    It is in lower case and has no articles. Numbers up to ten become digits, and contractions get their apostrophe. Punctuation
    becomes a space. It is removed instead if the same mark is next to a space anywhere in the text, or if a comma is between
    digits anywhere. Periods are removed, except in decimals.
    """
    said = text = text.lower().replace("\u2019", "'")
    grouped = re.search(r"\d,\d", said)
    for mark in PUNCTUATION:
        joins = grouped or f"{mark} " in said or f" {mark}" in said
        text = text.replace(mark, "" if joins else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.split() if word not in ARTICLES]
    return " ".join(_BY_LETTERS.get(word.replace("'", ""), word) for word in words)
