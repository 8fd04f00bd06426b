"""What a recipe trains on: the rows of one dataset or several, each checked by making a batch of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets
from rows.conversations import FORMS, ROW, UNFINISHED_FORMS, AnyDataset, DatasetError, conversations, decoded, fingerprint_of
from rows.unknown_words import unknown_words
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from uc_adapters import UniCompressCollator, UniCompressModel, __version__
from uc_adapters.errors import InputError
from uc_adapters.images import Images

SHOWN = 10  # bad rows named before they are only counted
MEND = "mend them, or pass --skip_bad_rows true"


def tokens_of(batch: dict[str, Tensor]) -> int:
    """Tokens of the longest sequence of a row."""
    return batch["input_ids"].shape[1]


def places_of(model: UniCompressModel, batch: dict[str, Tensor]) -> int:
    """Places of the base's context that it takes: more than tokens where "strip" draws an image at the base's own places.

    Raises:
        DatasetError: An image to draw, for a base that only reads.
    """
    family, places = model.family, batch["attention_mask"].sum(1)  # (B,)
    drawn = Images(batch.get("gen_pixel_values"), batch.get("gen_image_sizes"))
    if drawn.values is None:
        return int(places.max())
    if family.why_no_drawing is not None:
        raise DatasetError(f"an image to draw, for a base that cannot: {family.why_no_drawing}")
    position_deltas = [model.code_head.position_deltas(family.draw_grid(size)) for size in drawn.sizes(family)]
    draws = batch["gen_mask"].any(1)  # one image a sequence
    places[draws] += torch.stack([(of_image - 1).sum() for of_image in position_deltas]).to(places.device)
    return int(places.max())


@dataclass(frozen=True)
class RowCheck:
    """What a row must pass: a batch can be made of it, which has something to learn and fits into the base's context.

    Args:
        collator: What will make batches.
        context: Places that the base takes.
        places: How many of them a row takes, by its batch. Default: its tokens.
        teacher: What makes a teacher's batches of the same rows, which must fit, too. Default: nobody teaches.
    """

    collator: UniCompressCollator
    context: int
    places: Callable[[dict[str, Tensor]], int] = tokens_of
    teacher: UniCompressCollator | None = None

    def settings(self) -> tuple:
        """All that a verdict follows from, beside the row."""
        config = self.collator.config
        of_adapter = config.stride, config.num_global_tokens, config.decompressor, state_of(self.collator.processor)
        versions = [__version__, *map(version, ("transformers", "pillow"))]
        return *of_adapter, self.context, self.places is not tokens_of, self.teacher is not None, versions

    def unknown(self, row: dict) -> list[str]:
        """Words of a row that the base does not know."""
        texts = [part["text"] for turn in row["messages"] for part in turn["content"] if part.get("text")]
        return unknown_words(self.collator.processor.tokenizer, texts)

    def problem(self, row: dict) -> str | None:
        """What is wrong with a row; None where nothing is."""
        try:
            row = decoded(row)
            batch = self.collator([row])
            lengths = [self.places(batch), *([tokens_of(self.teacher([row]))] if self.teacher else [])]
        except InputError as error:
            problem = str(error).removeprefix(f"{row['origin']}: ")
            unanswered = self.teacher and problem.startswith("Nothing to learn")
            return f"{problem} The base has no word to answer it with." if unanswered else problem
        except Exception as error:  # whatever a file may hold: PIL's, a processor's
            return f"{type(error).__name__}: {error}"
        if max(lengths) <= self.context:
            return None
        whose = " of the base's own, which teaches" if lengths[-1] > lengths[0] else ""
        return f"{max(lengths)} tokens{whose}, where the base takes {self.context}; shorten the text, or take fewer images"


@dataclass(frozen=True)
class Part:
    """A part of each dataset's rows: those to evaluate on, or the others.

    Args:
        share: Of the rows to evaluate on.
        evaluation: Whether these are wanted.
        seed: Which rows they are.
    """

    share: float
    evaluation: bool
    seed: int

    def of(self, dataset: Dataset) -> Dataset:
        """Those rows; what was made of one row of the source stays together.

        Raises:
            DatasetError: No row is left on one of the sides.
        """
        origins = list(dict.fromkeys(dataset["origin"]))
        count = round(self.share * len(origins))
        if not 0 < count < len(origins):
            raise DatasetError(
                f"--eval_share {self.share:g} of {len(origins)} row(s) leaves {count} to evaluate on and "
                f"{len(origins) - count} to train on; expected a share from 0 to 1 that leaves one of each at least. Choose "
                "another, or name an --eval_dataset."
            )
        chosen = {origins[place] for place in np.random.default_rng(self.seed).permutation(len(origins))[:count]}
        return dataset.select([row for row, origin in enumerate(dataset["origin"]) if (origin in chosen) == self.evaluation])


def training_rows(
    sources: list[str],
    check: RowCheck,
    *,
    weights: list[float] | None = None,
    split: str = "train",
    columns: dict[str, str] | None = None,
    part: Part | None = None,
    streaming: bool = False,
    skip_bad_rows: bool = False,
    seed: int = 0,
    fill_in: Callable[[Dataset], Dataset] | None = None,
    encode: Callable[[Dataset], Dataset] | None = None,
) -> AnyDataset:
    """The rows of all `sources` that pass a check, still encoded: `conversations.samples` decodes them.

    Args:
        sources: See `conversations.conversations`.
        check: A row that does not pass it is bad.
        weights: Share of each source in the mixture; shorter ones repeat. Default: every row once, source by source.
        split: Of each source. Default "train".
        columns: The sources' names of columns, by ours. Default: they have our names.
        part: Which of the rows. Default: all of them. Not with `streaming`.
        streaming: Reads while it trains, for what does not fit on the disk; rows are checked as they come, on every pass.
        skip_bad_rows: Leaves bad rows out and says how many, instead of stopping. Without any good row it stops all the same
            (when streaming: without one in a shard).
        seed: Of the mixture.
        fill_in: Completes the rows of each source before they are checked. Not with `streaming`.
        encode: Adds columns to each checked source, before they are mixed. Not with `streaming`.

    Raises:
        DatasetError: A dataset of no known form, bad rows (when streaming: once they come), or options that do not go together.
    """
    if not sources:
        raise DatasetError("No dataset; expected at least one.")
    if weights is not None and (len(weights) != len(sources) or not all(weight > 0 for weight in weights)):
        raise DatasetError(f"weights {weights} for {len(sources)} dataset(s); expected as many, all above 0.")
    if streaming and (encode or fill_in or part):
        raise DatasetError("streaming with something to add to the rows, or a part of them; expected one of them.")
    check = replace(check, collator=replace(check.collator, caption_dropout=0.0))
    options = {"split": split, "columns": columns}
    if streaming:
        datasets = [_check_as_they_come(source, check, skip_bad_rows, options) for source in sources]
    else:
        datasets = [_check_all(source, check, skip_bad_rows, fill_in, options) for source in sources]
        datasets = [part.of(dataset) for dataset in datasets] if part else datasets
        datasets = [encode(dataset) for dataset in datasets] if encode else datasets
    if weights is None:
        return concatenate_datasets(datasets)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(datasets, shares, seed=seed, stopping_strategy="all_exhausted")


def _check_all(
    source: str, check: RowCheck, skip: bool, fill_in: Callable[[Dataset], Dataset] | None, options: dict
) -> Dataset:
    """All rows at once, before training starts; what was found is kept in datasets' cache."""
    dataset = conversations(source, forms=FORMS | UNFINISHED_FORMS if fill_in else FORMS, **options)
    dataset = fill_in(dataset) if fill_in else dataset
    checked = dataset.map(
        lambda row: {"problem": check.problem(row), "unknown": check.unknown(row)},
        remove_columns=dataset.column_names,
        features=Features({"problem": Value("string"), "unknown": List(Value("string"))}),
        new_fingerprint=fingerprint_of(dataset._fingerprint, check.settings()),
        desc=f"check {source}",
    )
    problems = checked["problem"][:]
    _say_unknown(source, checked["unknown"][:])
    good, bad, index = [], [], 0
    for origin, made in groupby(dataset["origin"]):
        indices = range(index, index := index + len(list(made)))
        problem = next((problems[index] for index in indices if problems[index]), None)
        if problem is None:
            good += indices
        else:
            bad.append(f"{origin}: {problem}")
    if not bad:
        return dataset
    count = f"{len(bad)} bad row(s) in {source}"
    named = "\n  ".join([*bad[:SHOWN], *([f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else [])])
    if not skip:
        raise DatasetError(f"{count}; {MEND}:\n  {named}")
    if not good:
        raise DatasetError(f"{count}, and no good one; expected at least one:\n  {named}")
    tqdm.write(f"{count} skipped:\n  {named}")
    return dataset.select(good)


def _say_unknown(source: str, unknown: list[list[str]]) -> None:
    """Names the words that the base does not know."""
    words = Counter(word for of_row in unknown for word in of_row)
    if words:
        rows, named = sum(map(bool, unknown)), ", ".join(word for word, _ in words.most_common(SHOWN))
        more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
        tqdm.write(f"{source}: {rows} row(s) have words that the base does not know, and takes all for one: {named}{more}.")


def _check_as_they_come(source: str, check: RowCheck, skip: bool, options: dict) -> IterableDataset:
    """Each row when it is read. Shards stay shards, which several workers share; rows are numbered in each."""
    dataset = conversations(source, streaming=True, **options)
    count = dataset.num_shards

    def checked(shards: list[int]) -> Iterator[dict]:
        for shard in shards:
            where = f", shard {shard + 1} of {count}" if count > 1 else ""
            yield from _checked_shard(dataset.shard(count, shard), source, where, check, skip)

    return IterableDataset.from_generator(checked, ROW, {"shards": list(range(count))})


def _checked_shard(dataset: IterableDataset, source: str, where: str, check: RowCheck, skip: bool) -> Iterator[dict]:
    """Good rows; bad ones are counted when the shard ends or is left."""
    # Not by iterating the dataset: in a worker that would share the shard out among all workers once more.
    rows = ({name: values[0] for name, values in batch.items()} for batch in dataset.iter(batch_size=1))
    good, bad = 0, 0
    try:
        for origin, made in groupby(rows, key=lambda row: row["origin"]):
            made = list(made)
            problem = next(filter(None, map(check.problem, made)), None)
            if problem is None:
                good += 1
                yield from made
                continue
            if not skip:
                raise DatasetError(f"A bad row; {MEND}:\n  {origin}{where}: {problem}")
            bad += 1
            if bad <= SHOWN:
                tqdm.write(f"{origin}{where} skipped: {problem}")
        if bad and not good:
            raise DatasetError(f"{bad} bad row(s) in {source}{where}, and no good one; expected at least one.")
    finally:
        if bad:
            tqdm.write(f"{bad} bad row(s) in {source}{where} skipped, {good} good row(s) read")


def state_of(processor: ProcessorMixin) -> list[tuple[str, bytes]]:
    """All that a processor is: its files, whatever it was last called with."""
    processor = copy.deepcopy(processor)
    processor.tokenizer.backend_tokenizer.no_padding()  # a call with padding or truncation leaves its settings there
    processor.tokenizer.backend_tokenizer.no_truncation()
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())]
