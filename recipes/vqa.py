"""Questions about images: what a dataset asks, a contender's answers, and their scores: exact match, and VQA's accuracy."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from contenders import Contender
from conversations import DatasetError, decoded
from datasets import Dataset
from scipy.stats import binomtest, bootstrap
from tqdm.auto import tqdm

CONFIDENCE = 0.95
ENOUGH_AGREE = 3  # people who gave an answer, for it to count whole
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
# Those whose letters alone are another word (we're, she'll, I'd) stay away: an apostrophe there would be a guess.
CONTRACTIONS = """
    ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he's how'd how's
    i'd've i'm isn't it'd it'd've it'll i've let's ma'am mightn't mightn't've might've mustn't must've needn't o'clock oughtn't
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

    A caption that an image is also drawn from is no answer.

    Args:
        rows: Of `conversations`.

    Raises:
        DatasetError: A question or an answer without words.
    """
    questions = []
    for index, (messages, origin, first) in enumerate(zip(rows["messages"], rows["origin"], rows["first"], strict=True)):
        if not first:
            continue
        images = 0
        for place, turn in enumerate(messages):
            parts = [part["type"] for part in turn["content"]]
            if turn["role"] == "assistant":
                if "image" in parts:  # drawn: what follows would be asked about the dataset's picture of it
                    break
                if images:
                    asked = [
                        part["text"] for message in messages[:place] for part in message["content"] if part["type"] == "text"
                    ]
                    told = [part["text"] for part in turn["content"]]
                    if not told or not all(asked) or not all(told):
                        raise DatasetError(f"{origin}: a question or an answer without words; expected both.")
                    questions.append(Question(index, images, messages[:place], told))
            images += parts.count("image")
    return questions


@torch.no_grad()
def answer_questions(
    contender: Contender, rows: Dataset, questions: list[Question], batch_size: int, max_new_tokens: int
) -> list[str]:
    """Answers, greedily."""
    processor, answers = contender.processor, []
    for first in tqdm(range(0, len(questions), batch_size), desc=f"{contender.name} answers", leave=False):
        batch = questions[first : first + batch_size]
        seen = [decoded(rows[question.row] | {"messages": question.messages}) for question in batch]
        texts = [processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False) for row in seen]
        images = [image for row, question in zip(seen, batch, strict=True) for image in row["images"][: question.images]]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt").to(contender.model.device)
        output = contender.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def vqa_scores(answers: list[str], references: list[list[str]], seed: int) -> dict[str, dict[str, float]]:
    """Exact match and VQA accuracy of at least two answers, each {"value", "low", "high"}, with 95 % intervals.

    Exact match takes Wilson's interval, VQA accuracy a bootstrap's (percentiles).
    """
    exact = [answer.strip() in told for answer, told in zip(answers, references, strict=True)]
    soft = [vqa_accuracy(answer, told) for answer, told in zip(answers, references, strict=True)]
    wilson = binomtest(sum(exact), len(exact)).proportion_ci(CONFIDENCE, method="wilson")
    drawn_again = bootstrap((soft,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=seed).confidence_interval
    return {
        "exact_match": {"value": float(np.mean(exact)), "low": float(wilson.low), "high": float(wilson.high)},
        "vqa_accuracy": {"value": float(np.mean(soft)), "low": float(drawn_again.low), "high": float(drawn_again.high)},
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
    but for apostrophes, colons and decimal points. A comma between digits goes without a space.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("\u2019", "'"))
    text = re.sub(r"\.(?!\d)", "", text)  # periods go; those of decimals stay
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = [NUMBERS.get(word, word) for word in text.split() if word not in ARTICLES]
    return " ".join(_BY_LETTERS.get(word.replace("'", ""), word) for word in words)
