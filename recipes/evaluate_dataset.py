"""Scores a base and an adapter side by side on any dataset: drawings by FID, CLIP score and real pictures; answers by accuracy.

    python recipes/evaluate_dataset.py --base B --adapter A --dataset pictures --json scores.json
    python recipes/evaluate_dataset.py --base B --adapter A --prompts evaluation_metadata.jsonl --output_dir work/geneval
    python recipes/evaluate_dataset.py --base B --adapter A --dataset pictures --split test --references train \
        --labels concept style --features none --clip none

Needs: pip install -c constraints.txt -e ".[recipes]"; --labels also needs the extra judge, FID's own Inception torch-fidelity.

`--dataset` is a Hub id, a folder or a file. Its columns are those of `finetune.py`, and they decide what is scored:
    image + text, messages       both draw the captions: FID (--features) and CLIP score (--clip)
    image + question + answer,   both answer greedily: exact match, and accuracy as VQA counts it
    image + question + answers,  (several people's answers, as in VQA v2)
    messages
`--labels` names columns that say what is in a picture. Drawings are judged by their nearest real picture and by a Fréchet
distance, in the features of an ImageNet classifier. The tokenizer is judged by what it gives back of real pictures. Base and
adapter describe the real pictures, and have to name the labels.
`--prompts` draws a prompt file in GenEval's format into OUTPUT_DIR/base and OUTPUT_DIR/adapter, which GenEval's own evaluator
scores. Base and adapter draw the same prompts in turn, from the same seeds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import transformers
from datasets import Dataset
from reporting.environment import check_device, check_output, environment, make_current
from reporting.intervals import estimate, mean
from rows.captions import check_rows, drawn_rows, labelled_pictures
from rows.conversations import FORMS, REFERENCED_FORMS, DatasetError, column_names, conversations
from scoring.contenders import Contender, check_adapters, check_sampling, contenders, sampling_of, side_by_side, why_no_drawing
from scoring.geneval import draw_prompts, free_folder, read_prompts
from scoring.picture_features import PACKAGES, PictureFeatures
from scoring.picture_judge import PictureJudge, Values
from scoring.picture_metrics import load_clip, load_features, score_pictures
from scoring.score_names import difference_text, label_of, score_text
from scoring.vqa import Question, answer_questions, questions_of, vqa_scores
from timing.stopwatch import fitting_batch
from tqdm.auto import tqdm
from trl import TrlParser

PROMPT_SAMPLES = 4  # GenEval's


@dataclass
class EvaluateDatasetArguments:
    """What to score, and how."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    adapter: str | None = field(default=None, metadata={"help": "The adapter: folder or Hub id. None: the base alone."})
    also: list[str] | None = field(default=None, metadata={"help": "More adapters, with a column of the table each."})
    codes_per_step: int | None = field(
        default=None, metadata={"help": "Codes in a step of --adapter, if it is trained for several."}
    )
    stride: int | None = field(default=None, metadata={"help": "Stride at which --adapter reads, likewise."})
    dataset: str | None = field(default=None, metadata={"help": "Hub id, folder or file."})
    split: str = field(default="train", metadata={"help": "Split of the dataset. A file or a plain folder only has train."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "The dataset's names of columns, such as text=caption, as in finetune.py."}
    )
    labels: list[str] | None = field(
        default=None, metadata={"help": "Columns that say what is in a picture, such as concept style, to be judged by."}
    )
    references: list[str] | None = field(
        default=None, metadata={"help": "Further splits whose real pictures --labels compares with. None: those of --split."}
    )
    limit: int | None = field(default=None, metadata={"help": "Maximum number of rows, chosen by --seed. None: all."})
    features: str = field(default="inception", metadata={"help": "FID's extractor: inception, module:factory, or none."})
    clip: str = field(
        default="openai/clip-vit-base-patch16", metadata={"help": "CLIP score's CLIPModel: folder or Hub id, or none."}
    )
    prompts: str | None = field(default=None, metadata={"help": "A prompt file in GenEval's format (JSONL) to draw."})
    samples: int | None = field(
        default=None, metadata={"help": "Drawings of each caption, or prompt. None: one of a caption, four of a prompt."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "A new folder for the drawings of --prompts."})
    seed: int = field(default=0, metadata={"help": "Seed of the chosen rows and of the sampling."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance, base and adapter alike. None: the base's own."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of drawings, base and adapter alike."})
    max_new_tokens: int = field(default=16, metadata={"help": "Maximum number of tokens of an answer."})
    device: str = field(default="cpu", metadata={"help": "Torch device of both models."})
    json: str | None = field(default=None, metadata={"help": "File to write the scores to."})


def main(args: EvaluateDatasetArguments) -> dict:
    # Janus warns at every answer that max_new_tokens overrides max_length, which is only at its default (20)
    transformers.logging.set_verbosity_error()
    check(args)
    make_current(args.device)
    prompts = read_prompts(args.prompts) if args.prompts else []
    folder = free_folder(args.output_dir) if args.output_dir else None
    rows = checked_rows(args) if args.dataset else None
    drawn = drawn_rows(rows) if rows else []
    questions = questions_of(rows) if rows else []
    counts = len(drawn), len(questions)
    if rows and (1 in counts or not any(counts)):  # a single row has no interval
        raise DatasetError(
            f"{args.dataset} has {counts[0]} caption(s) with an image to draw, and {counts[1]} question(s) about an image with "
            "an answer; expected two or more of one of them, or of both. Take more rows, or raise --limit."
        )
    if args.labels and not drawn:
        raise DatasetError(f"{args.dataset} has no captions with an image; expected some, for --labels judges what is drawn.")
    judge = judge_of(args, drawn) if args.labels else None
    features, clip = (load_features(args.features), load_clip(args.clip)) if drawn else (None, None)
    pair = contenders(args.base, args.adapter, args.device, args.codes_per_step, args.stride, args.also or ())
    reason = why_no_drawing(pair[0])
    if reason is not None and (drawn or prompts):
        raise SystemExit(
            f"{args.adapter or args.base} cannot draw: {reason}. Expected a dataset of questions to read, and no --prompts."
        )
    sampling = sampling_of(args.temperature, args.guidance_scale)

    def score_all() -> dict:
        scores: dict = {
            "dataset": args.dataset,
            "drawing": {},
            "reconstruction": {},
            "reading": {},
            "differences": {},
            "geneval": {},
        }
        if drawn:
            samples = args.samples or 1
            scored = score_pictures(pair, drawn, features, clip, args.seed, args.batch_size, judge, samples, **sampling)
            scores["drawing"] = {"n": samples * len(drawn), **scored}
        if judge is not None:
            scores["reconstruction"], scores["reading"] = {"n": len(drawn)}, {"descriptions": len(drawn)}
            for part, values in judged(judge, pair, args.max_new_tokens).items():
                scores[part] |= side_by_side({name: estimated(of_contender) for name, of_contender in values.items()})
                scores["differences"] |= differences(values)
        if questions:
            scores["reading"] |= {"n": len(questions), **score_answers(pair, rows, questions, args)}
        if prompts:
            samples = args.samples or PROMPT_SAMPLES
            seconds = draw_prompts(pair, prompts, samples, folder, args.seed, args.batch_size, **sampling)
            scores["geneval"] = {"prompts": len(prompts), "samples": samples, "seconds": seconds}
        return scores

    scores = fitting_batch(score_all, args.batch_size)
    scores["settings"] = vars(args)
    scores["environment"] = environment(args.device, PACKAGES if judge else ())
    print(markdown(scores))
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def judged(judge: PictureJudge, pair: list[Contender], max_new_tokens: int) -> dict[str, dict[str, Values]]:
    """What the judge says of each contender, by the part of the scores: {part: {contender: values}}."""
    return {
        "drawing": {contender.name: judge.drawings(contender.name) | judge.nats(contender) for contender in pair},
        "reconstruction": {contender.name: judge.reconstructions(contender) for contender in pair},
        "reading": {contender.name: judge.descriptions(contender, max_new_tokens) for contender in pair},
    }


def estimated(values: Values) -> dict[str, dict | float]:
    """Each score with its interval, if it is not one number for all captions together."""
    return {what: value if isinstance(value, float) else asdict(estimate(value)) for what, value in values.items()}


def differences(values: dict[str, Values]) -> dict[str, dict]:
    """By how much the adapter differs from the base, caption by caption. Empty if there is no adapter."""
    if "adapter" not in values:
        return {}
    base, adapter = values["base"], values["adapter"]
    arrays = [what for what, value in base.items() if not isinstance(value, float)]
    return {what: asdict(mean(adapter[what].mean(0) - base[what].mean(0))) for what in arrays}


def score_answers(pair: list[Contender], rows: Dataset, questions: list[Question], args: EvaluateDatasetArguments) -> dict:
    """Exact match and VQA accuracy of each contender, as {score: {contender: estimate}}."""
    references = [question.references for question in questions]
    answers = {c.name: answer_questions(c, rows, questions, args.batch_size, args.max_new_tokens) for c in pair}
    estimates = {name: vqa_scores(given, references) for name, given in answers.items()}
    return side_by_side({name: {what: asdict(x) for what, x in by_score.items()} for name, by_score in estimates.items()})


def check(args: EvaluateDatasetArguments) -> None:
    """Exits on arguments that would fail after minutes, or give scores without meaning."""
    if not args.dataset and not args.prompts:
        raise SystemExit("There is nothing to score; expected --dataset, or --prompts with --output_dir.")
    if bool(args.prompts) != bool(args.output_dir):
        raise SystemExit(f"--prompts {args.prompts} with --output_dir {args.output_dir}; expected both, or neither.")
    for option in ("batch_size", "samples", "max_new_tokens"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise SystemExit(f"--{option} {getattr(args, option)}: expected 1 or more.")
    if args.labels and not args.dataset:
        raise SystemExit(f"--labels {' '.join(args.labels)} without --dataset; expected the dataset with these columns.")
    if args.references and not args.labels:
        raise SystemExit(f"--references {' '.join(args.references)} without --labels; expected the columns to judge by, too.")
    if len({args.split, *(args.references or [])}) < 1 + len(args.references or []):
        raise SystemExit(
            f"--references {' '.join(args.references)}: expected splits other than --split {args.split}, each once."
        )
    if args.limit is not None and args.limit < 2:
        raise SystemExit(f"--limit {args.limit}: expected 2 or more, because a single row has no interval.")
    check_sampling(args.temperature, args.guidance_scale, args.seed)
    check_device(args.device)
    check_output("json", args.json)
    check_adapters(args.adapter, args.also or (), args.codes_per_step, args.stride)


def checked_rows(args: EvaluateDatasetArguments) -> Dataset:
    """The dataset's rows, still encoded. Each can be decoded, and its caption has a text.

    Raises:
        DatasetError: There is nothing to load, the columns are of no known form, or a row has a damaged image, no text, or not
            as many images as its messages say.
    """
    rows = rows_of(args)
    if args.limit is not None:
        firsts = [index for index, first in enumerate(rows["first"]) if first]
        chosen = np.random.default_rng(args.seed).permutation(firsts)[: args.limit]
        rows = rows.select(sorted(chosen))
    check_rows(rows)
    return rows


def rows_of(args: EvaluateDatasetArguments) -> Dataset:
    """All rows of the split, with a column for each of --labels."""
    columns, labels = column_names(args.columns), args.labels or []
    return conversations(args.dataset, forms=REFERENCED_FORMS | FORMS, split=args.split, columns=columns, labels=labels)


def judge_of(args: EvaluateDatasetArguments, drawn: Dataset) -> PictureJudge:
    """A judge of the captions that are drawn, by the real pictures of --split and --references."""
    splits = [args.split, *(args.references or [])]
    pictures = labelled_pictures(args.dataset, splits, args.labels, column_names(args.columns))
    place = {origin: index for index, origin in reversed(list(enumerate(pictures["origin"])))}  # --split is the first
    count = len(drawn) * (args.samples or 1)
    if count <= PictureFeatures.num_features:
        tqdm.write(
            f"{count} drawings are few for a Fréchet distance of {PictureFeatures.num_features} features: it is larger than "
            "that of many drawings. Compare it only with that of equally many, or raise --samples."
        )
    own = [place[origin] for origin in drawn["origin"]]
    return PictureJudge(pictures, own, args.labels, args.batch_size, args.device)


def markdown(scores: dict) -> str:
    """A markdown table with one column for each contender and one row for each score."""
    parts = [scores[part] for part in ("drawing", "reconstruction", "reading")]
    table = [
        (label_of(what), {name: score_text(what, value) for name, value in figures.items()} | difference(scores, what))
        for part in parts
        for what, figures in part.items()
        if isinstance(figures, dict)
    ]
    if scores["geneval"]:
        seconds = {name: score_text("seconds", value) for name, value in scores["geneval"]["seconds"].items()}
        table.append(("GenEval prompts: seconds an image", seconds))
    names = list(dict.fromkeys(name for _, figures in table for name in figures))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(figures.get(name, "") for name in names) + " |" for label, figures in table]
    counts = {
        "drawings": scores["drawing"].get("n"),
        "descriptions": scores["reading"].get("descriptions"),
        "answers": scores["reading"].get("n"),
    }
    return "\n".join(lines) + "\n\n" + ", ".join(f"{n} {what}" for what, n in counts.items() if n)


def difference(scores: dict, what: str) -> dict[str, str]:
    """The entry of a score in the table's last column."""
    found = scores["differences"].get(what)
    return {"adapter - base": difference_text(what, found)} if found else {}


if __name__ == "__main__":
    main(*TrlParser(EvaluateDatasetArguments).parse_args_and_config())
