"""Loads the rows to train on, from one or several datasets, and checks each row by making a batch of it."""

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
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets
from rows.conversations import FORMS, ROW, UNFINISHED_FORMS, AnyDataset, DatasetError, conversations, decoded, fingerprint_of
from rows.unknown_words import unknown_words
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from uc_adapters import UniCompressCollator, UniCompressModel, __version__
from uc_adapters.errors import InputError
from uc_adapters.images import Images
from uc_adapters.positions import sequence_positions

SHOWN = 10  # bad rows that are named; further ones are only counted
MEND = "correct them, or pass --skip_bad_rows true"


def tokens_of(batch: dict[str, Tensor]) -> int:
    """The number of tokens of the longest sequence of a batch."""
    return batch["input_ids"].shape[1]


def places_of(model: UniCompressModel, batch: dict[str, Tensor]) -> int:
    """Positions of the base's context that a batch takes.

    They exceed its tokens if "strip" draws an image, because its position ids are those of the base's own sequence.

    Raises:
        DatasetError: There is an image to draw, and the base only reads.
    """
    family, mask = model.family, batch["attention_mask"]
    drawn = Images(batch.get("gen_pixel_values"), batch.get("gen_image_sizes"))
    if drawn.values is None:
        return int(mask.sum(1).max())
    if family.why_no_drawing is not None:
        raise DatasetError(f"it has an image to draw, and the base cannot draw: {family.why_no_drawing}")
    sizes, lengths = drawn.sizes(family), batch.get("gen_codes_per_step")
    lengths = [None] * len(sizes) if lengths is None else lengths.tolist()
    heads = [model.code_head_at(length) for length in lengths]
    deltas = [head.position_deltas(family.draw_grid(size)).to(mask.device) for head, size in zip(heads, sizes, strict=True)]
    return int(sequence_positions(mask, [(batch["gen_mask"], deltas)]).max()) + 1


def longest(collator: UniCompressCollator) -> UniCompressCollator:
    """A copy that makes the longest batches: without dropped captions, at the ratios that compress least."""
    config = collator.config
    length = min(config.strip_lengths) if config.decompressor == "strip" else None
    return replace(collator, caption_dropout=0.0, codes_per_step=length, stride=min(config.strides))


@dataclass(frozen=True)
class RowCheck:
    """Checks that a batch can be made of a row, has something to learn and fits into the base's context.

    Args:
        collator: The collator that makes batches.
        context: Number of positions that the base has.
        places: How many positions a batch takes. Default: its number of tokens.
        teacher: The collator that makes a teacher's batches of the same rows, which must fit, too. Default: no teacher.
    """

    collator: UniCompressCollator
    context: int
    places: Callable[[dict[str, Tensor]], int] = tokens_of
    teacher: UniCompressCollator | None = None

    def settings(self) -> tuple:
        """Everything, beside the row, on which the result of a check depends."""
        config, processor = self.collator.config, state_of(self.collator.processor)
        adapter = config.stride, config.num_global_tokens, config.decompressor
        adapter = *adapter, config.codes_per_step, config.drawing_global_tokens, processor
        versions = [__version__, *map(version, ("transformers", "pillow"))]
        return *adapter, self.context, self.places is not tokens_of, self.teacher is not None, versions

    def unknown(self, row: dict) -> list[str]:
        """The words of a row that the base's tokenizer does not know."""
        texts = [part["text"] for turn in row["messages"] for part in turn["content"] if part.get("text")]
        return unknown_words(self.collator.processor.tokenizer, texts)

    def problem(self, row: dict) -> str | None:
        """What is wrong with a row; None if nothing is."""
        try:
            row = decoded(row)
            batch = self.collator([row])
            lengths = [self.places(batch), *([tokens_of(self.teacher([row]))] if self.teacher else [])]
        except InputError as error:
            problem = str(error).removeprefix(f"{row['origin']}: ")
            unanswered = self.teacher and problem.startswith("Nothing to learn")
            return f"{problem} The base's own answer is empty." if unanswered else problem
        except Exception as error:  # a damaged file can raise anything, from PIL or a processor
            return f"{type(error).__name__}: {error}"
        if max(lengths) <= self.context:
            return None
        whose = " for the base as teacher" if lengths[-1] > lengths[0] else ""
        return f"{max(lengths)} tokens{whose}, where the base takes {self.context}; shorten the text, or take fewer images"


@dataclass(frozen=True)
class Part:
    """A part of each dataset's rows: those to evaluate on, or those to train on.

    Args:
        share: Share of the rows to evaluate on.
        evaluation: Whether the part is the one to evaluate on.
        seed: Seed of the choice of rows.
    """

    share: float
    evaluation: bool
    seed: int

    def of(self, dataset: Dataset) -> Dataset:
        """The rows of the part. Rows made of one row of the source stay together.

        Raises:
            DatasetError: One of the two parts has no row.
        """
        origins = list(dict.fromkeys(dataset["origin"]))
        count = round(self.share * len(origins))
        if not 0 < count < len(origins):
            raise DatasetError(
                f"--eval_share {self.share:g} of {len(origins)} row(s) leaves {count} to evaluate on and "
                f"{len(origins) - count} to train on; expected a share from 0 to 1 that leaves one of each at least. Choose "
                "another, or name an --eval_dataset."
            )
        chosen = {origins[index] for index in np.random.default_rng(self.seed).permutation(len(origins))[:count]}
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
    """Loads the rows of all `sources` that pass a check, still encoded; `conversations.samples` decodes them.

    Args:
        sources: See `conversations.conversations`.
        check: The check. A row that does not pass it is bad.
        weights: Share of each source in the mixture; shorter sources repeat. Default: every row once, source by source.
        split: Split of each source. Default "train".
        columns: The sources' column for each of our names. Default: their names are ours.
        part: The part of the rows to load. Default: all of them. Not with `streaming`.
        streaming: Reads rows while training, for data that does not fit on the disk. Each pass checks the rows as they come.
        skip_bad_rows: Leaves bad rows out and reports them, instead of stopping. It stops all the same if there is no good row
            (when streaming: none in a shard).
        seed: Seed of the mixture.
        fill_in: Completes the rows of each source before they are checked. Not with `streaming`.
        encode: Adds columns to each checked source, before they are mixed. Not with `streaming`.

    Raises:
        DatasetError: A dataset has no known form, it has bad rows (when streaming: raised when they are read), or the
            options contradict each other.
    """
    if not sources:
        raise DatasetError("There is no dataset; expected at least one.")
    if weights is not None and (len(weights) != len(sources) or not all(weight > 0 for weight in weights)):
        raise DatasetError(f"--dataset_weights {weights} for {len(sources)} dataset(s); expected one for each, all above 0.")
    if streaming and (encode or fill_in or part):
        raise DatasetError("streaming with fill_in, encode or part; expected none of these, because they need all rows.")
    check = replace(check, collator=longest(check.collator))
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
    """Checks all rows before training starts. The results are kept in datasets' cache."""
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
    """Prints the words that the base does not know."""
    words = Counter(word for words_of_row in unknown for word in words_of_row)
    if words:
        rows, named = sum(map(bool, unknown)), ", ".join(word for word, _ in words.most_common(SHOWN))
        more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
        tqdm.write(f"{source}: {rows} row(s) have words that the base reads as its unknown token: {named}{more}.")


def _check_as_they_come(source: str, check: RowCheck, skip: bool, options: dict) -> IterableDataset:
    """Checks each row when it is read. Shards stay shards, so that several workers can share them; each numbers its rows."""
    dataset = conversations(source, streaming=True, **options)
    count = dataset.num_shards

    def checked(shards: list[int]) -> Iterator[dict]:
        for shard in shards:
            where = f", shard {shard + 1} of {count}" if count > 1 else ""
            yield from _checked_shard(dataset.shard(count, shard), source, where, check, skip)

    return IterableDataset.from_generator(checked, ROW, {"shards": list(range(count))})


def _checked_shard(dataset: IterableDataset, source: str, where: str, check: RowCheck, skip: bool) -> Iterator[dict]:
    """Yields the good rows of a shard. Reports the number of bad ones when the shard ends or is left."""
    # Iterating the dataset itself in a worker would share the shard out among all workers once more.
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
    """Everything that defines a processor, as (name, bytes) of its files, whatever its last call was."""
    processor = copy.deepcopy(processor)
    processor.tokenizer.backend_tokenizer.no_padding()  # a call with padding or truncation leaves its settings there
    processor.tokenizer.backend_tokenizer.no_truncation()
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        return [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())]
