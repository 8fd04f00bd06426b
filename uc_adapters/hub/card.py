"""Writes the card of an adapter's repo: each save replaces the generated block, and keeps what a person wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PureWindowsPath

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from ..config import UniCompressConfig
from ..errors import AdapterFileError, InputError
from ..families import FAMILIES, check_present
from ..files.folder import CARD_NAME, read_config
from ..layers import Grid
from ..version import INSTALL, __version__

TEMPLATE = Path(__file__).with_name("card_template.md")
EXAMPLE = "A fox in the snow."
RESULTS_NAME = ".eval_results/uc-adapters.yaml"
RECORD = "unicompress"  # the metadata field that holds the facts in the generated block
_BEGIN = "<!-- uc-adapters: generated from here; what stands outside is yours and is kept -->"
_END = "<!-- uc-adapters: generated until here -->"
_BLOCK = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)


@dataclass(frozen=True)
class CardFacts:
    """Facts for a card that the adapter itself does not know. A fact that is left out is taken from the existing card.

    Args:
        license: The Hub's name of the license, such as "apache-2.0".
        datasets: Hub ids of the training data.
        training: Settings of the training, by name. They are dropped when the weights change. Of a path on this machine, the
            card gives only the name.
        evaluation: The JSON that `recipes/evaluate_scenes.py` or `evaluate_dataset.py` writes, as a file or a mapping: every
            entry of the form {"base": number, "adapter": number} at its top, in "reading" or in "drawing" is a metric, and
            "dataset" names the data. Dropped when the weights change.
        prompt: The prompt in the snippet, such as a caption of the training data. Default: a fox, or words that a tokenizer of
            whole words knows.
    """

    license: str | None = None
    datasets: Sequence[str] = ()
    training: Mapping[str, object] | None = None
    evaluation: str | PathLike | Mapping[str, object] | None = None
    prompt: str | None = None


def render_card(config: dict, name: str, facts: CardFacts, existing: Sequence[str] = (), example: str = EXAMPLE) -> str:
    """Returns the text of an adapter's card.

    Args:
        config: The fields of its sealed `adapter_config.json`.
        name: What the snippet loads: the repo's id, or `local_name` of the folder.
        facts: New facts.
        existing: The existing cards, the most important last. Their metadata is kept, and the text that a person wrote into the
            last of them.
        example: The prompt of the snippet if no facts have one.

    Raises:
        AdapterFileError: An existing card's metadata cannot be read.
        InputError: The evaluation holds no metric.
    """
    old = [_parse(text, name) for text in existing]
    fields: dict = {}
    for card in old:
        tags = [*fields.get("tags", []), *(card.data.tags or [])]
        fields |= {**card.data.to_dict(), "tags": list(dict.fromkeys(tags))}
    fields[RECORD] = _sound(fields.get(RECORD))
    record = _record(config, name, facts, fields[RECORD])
    data = _metadata(config, facts, fields, record)
    geometry, base = config["base_geometry"], config["base_model_name_or_path"]
    rows = [(metric, f"{base:.4g}", f"{adapter:.4g}") for metric, (base, adapter) in record["metrics"].items()]
    new = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        begin=_BEGIN,
        end=_END,
        name=Path(name).name,
        source=name,
        config=config,
        ratios=ratios_of(config),
        base=hub_id(base) or (Path(base).name if base else None),
        on_hub=hub_id(base),
        version=__version__,
        install=INSTALL,
        prompt=json.dumps(record.get("prompt", example), ensure_ascii=False),
        family=FAMILIES[geometry["model_type"]],
        tokens=_table(("", "base", "with this adapter"), token_counts(config)),
        training=_table(("setting", "value"), record["training"].items()),
        dataset=record["dataset"],
        metrics=_table(("", "base", "with this adapter"), rows),
    )
    own = next((card for card in reversed(old) if _has_own_text(card)), None)
    if own is not None:
        block = _BLOCK.search(new.text)[0]
        new.text = _BLOCK.sub(lambda _: block, own.text) if _BLOCK.search(own.text) else f"{own.text.rstrip()}\n\n{block}\n"
    return str(new)


def ratios_of(config: dict) -> dict[str, str]:
    """Returns the ratios for which the adapter of a config's fields is trained: "stride", and with "strip" "codes per step"."""
    adapter = _ratio_fields(config)
    ratios = {"stride": (adapter.strides, adapter.read_stride())}
    if adapter.decompressor == "strip":
        ratios["codes per step"] = adapter.strip_lengths, adapter.strip_length()
    return {
        name: ", ".join(map(str, trained)) + (f" (default {default})" if len(trained) > 1 else "")
        for name, (trained, default) in ratios.items()
    }


def _ratio_fields(config: dict) -> UniCompressConfig:
    """Returns a config with those fields of a saved config that set the number of tokens. An older one lacks some."""
    fields = ("stride", "num_global_tokens", "decompressor", "codes_per_step")
    return UniCompressConfig(**{name: config[name] for name in fields if name in config})


def token_counts(config: dict) -> list[tuple[str, int, int]]:
    """Returns what an image costs the language model: the name of each cost, the base's number, and the adapter's.

    Raises:
        BaseModelError: The base's family needs a newer transformers.
    """
    check_present(config["base_geometry"]["model_type"])
    geometry = config["base_geometry"]
    adapter = _ratio_fields(config)
    family = FAMILIES[geometry["model_type"]]
    image = "an image" if family.example_grid is None else "an image of {} x {} codes".format(*family.example_grid)

    def row(what: str, grid: Grid, compact: int) -> tuple[str, int, int]:
        return what, grid[0] * (grid[1] + family.has_eol), compact

    # the separator and the row ends count when reading; when drawing they are known, and take no step
    table = []
    if family.compresses_reading:
        grid = family.example_grid or (geometry["read_side"],) * 2
        ends = grid[0] // adapter.read_stride() if family.has_eol else 0
        table.append(row(f"tokens to read {image}", grid, adapter.num_image_tokens(grid) + ends))
    if family.why_no_drawing is None:
        grid = family.example_grid or (geometry["draw_side"],) * 2
        what = f"steps of the language model to draw {'one' if table else image}"
        preview = family.preview_grid(grid)
        if preview is not None:
            table.append(row(f"{what}: its preview", preview, adapter.num_gen_steps(preview)))
            what = "and the image itself"
        table.append(row(what, grid, adapter.num_gen_steps(grid)))
    return table


def render_results(card: str) -> str | None:
    """Returns the text of `RESULTS_NAME` for a card: its metrics as the Hub reads them for a benchmark's leaderboard.

    The Hub shows a metric whose dataset is registered there as a benchmark, with a task of the metric's name.

    Args:
        card: What `render_card` returned.

    Returns:
        YAML; None if there are no metrics, or their data is no dataset of the Hub.
    """
    record = ModelCard(card).data.to_dict()[RECORD]
    dataset = record["dataset"]
    if not dataset or "/" not in dataset or hub_id(dataset) is None:
        return None
    entries = [
        EvalResultEntry(
            dataset_id=dataset, task_id=_task_id(metric), value=adapter, notes=f"the base in the same run: {base:.4g}"
        )
        for metric, (base, adapter) in record["metrics"].items()
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def update_card(folder: Path, facts: CardFacts, source: str | None = None) -> None:
    """Writes the card of a saved adapter's folder again, with new facts.

    Args:
        folder: A folder that `save_pretrained` wrote.
        facts: New facts, such as an evaluation.
        source: What the snippet loads. Default: the Hub id in the existing card, or else the folder's name.
    """
    path = folder / CARD_NAME
    existing = [path.read_text("utf-8")] if path.is_file() else []
    name = source or published_as(folder) or local_name(folder)
    text = render_card(read_config(folder), name, facts, existing, example_prompt(folder))
    path.write_text(text, "utf-8")


def published_as(folder: Path) -> str | None:
    """Returns the Hub id that the card in a folder was written for, if any."""
    path = folder / CARD_NAME
    record = _parse(path.read_text("utf-8"), str(folder)).data.to_dict().get(RECORD) if path.is_file() else None
    return hub_id(record.get("source")) if isinstance(record, dict) else None


def local_name(folder: Path) -> str:
    """Returns the name of a local folder in its card. A card may be published, so it does not give the path."""
    return f"./{folder.resolve().name}"


def hub_id(base: str | None) -> str | None:
    """Returns the name of a base if it is a Hub id, and None if it is a local path or missing."""
    try:
        validate_repo_id(base or "")
    except HFValidationError:
        return None
    return None if Path(base).exists() else base


def _parse(text: str, name: str) -> ModelCard:
    try:
        return ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise AdapterFileError(
            f"The {CARD_NAME} of {name} has metadata that cannot be read: {error}. Correct the part between the '---' lines."
        ) from error


def _has_own_text(card: ModelCard) -> bool:
    """Returns whether a card holds a person's text besides the generated block and its heading."""
    record = card.data.to_dict().get(RECORD)
    heading = f"# {Path(str(record.get('source'))).name}" if isinstance(record, dict) else None
    return _BLOCK.sub("", card.text).strip() not in ("", heading)


def _record(config: dict, name: str, facts: CardFacts, old: dict) -> dict:
    """Returns the facts of the generated block. The metadata keeps them, for later saves of the same weights."""
    weights = config["seal"]["weights_sha256"]
    record = {"source": name, "weights_sha256": weights, "training": {}, "dataset": None, "metrics": {}}
    if old.get("weights_sha256") == weights:
        record |= {key: old[key] for key in ("training", "dataset", "metrics") if key in old}
    if facts.training is not None:
        record["training"] = {str(setting): str(value) for setting, value in facts.training.items()}
    if facts.evaluation is not None:
        record["dataset"], record["metrics"] = _read_evaluation(facts.evaluation)
    record["training"] = {setting: _without_paths(value) for setting, value in record["training"].items()}
    record["dataset"] = record["dataset"] and _without_paths(record["dataset"])
    prompt = facts.prompt or old.get("prompt")
    return record if prompt is None else record | {"prompt": prompt}


def _without_paths(text: str) -> str:
    """Replaces each path on this machine by its name: "/home/ann/pictures, 9 rows" becomes "pictures, 9 rows"."""

    def name(match: re.Match) -> str:
        word = match[0]
        if not re.search(r"[/\\][^/\\]", word):
            return word
        path = PureWindowsPath(word)  # knows both separators, and drives
        return path.name if path.root or path.drive or path.parts[0] in ("~", "..") else word

    return re.sub(r"[^\s,;`'\"()]+", name, text)  # whole words: a search from each letter would take quadratic time


def example_prompt(folder: Path) -> str:
    """Returns EXAMPLE, or words that the folder's tokenizer knows, if it is a tokenizer of whole words and lacks those."""
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text("utf-8"))["model"] if file.is_file() else {}
    words = [word for word in model.get("vocab", ()) if word.isalpha()] if model.get("type") == "WordLevel" else []
    known = not words or {word.lower() for word in re.findall(r"\w+", EXAMPLE)} <= set(words)
    return EXAMPLE if known else " ".join(words[:5])


def _sound(record: object) -> dict:
    """Returns the record of an earlier save, or nothing if somebody edited it into another form."""
    try:
        numbers = [value for base, adapter in record.get("metrics", {}).values() for value in (base, adapter)]
        good = all(isinstance(value, (int, float)) for value in numbers)
        good &= isinstance(record.get("training", {}), dict) and isinstance(record.get("prompt", ""), str)
    except (AttributeError, TypeError, ValueError):  # not a mapping of pairs
        return {}
    return record if good else {}


def _metadata(config: dict, facts: CardFacts, fields: dict, record: dict) -> ModelCardData:
    """Returns the Hub's metadata: that of the old cards, updated by the new facts."""
    base = hub_id(config["base_model_name_or_path"])
    family = FAMILIES[config["base_geometry"]["model_type"]]
    task = "image-text-to-text" if family.why_no_drawing else "text-to-image" if family.why_no_answers else "any-to-any"
    known = {
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "library_name": "uc-adapters",
        "pipeline_tag": task,
        "license": facts.license,
        "datasets": [name for name in facts.datasets if hub_id(name)] or None,
        RECORD: record,
    }
    before = fields[RECORD]
    fields |= {key: value for key, value in known.items() if value is not None}
    tags = [tag for tag in fields.get("tags") or [] if not str(tag).startswith("base_model:adapter:")]
    base_tag = [f"base_model:adapter:{fields['base_model']}"] if "base_model" in fields else []
    fields["tags"] = [*tags, *({"unicompress"} - set(tags)), *base_tag]
    results = [
        EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=record["dataset"],
            metric_type=_task_id(metric),
            metric_name=metric,
            metric_value=adapter,
        )
        for metric, (_, adapter) in record["metrics"].items()
    ]
    if "model-index" in fields:  # a person's own results stay; ours belong to the weights that were measured
        ours = {(before.get("dataset"), metric) for metric in before.get("metrics", {})}
        _, there = model_index_to_eval_results(fields.pop("model-index"))
        results += [result for result in there if (result.dataset_name, result.metric_name) not in ours]
    if not results:
        return ModelCardData(**fields)
    return ModelCardData(**fields, model_name=Path(record["source"]).name, eval_results=results)


def _task_id(metric: str) -> str:
    return metric.replace(" ", "_")


def _read_evaluation(evaluation: str | PathLike | Mapping) -> tuple[str, dict[str, list[float]]]:
    """Returns the name of the data, and the base's and the adapter's value of every metric."""
    content = evaluation if isinstance(evaluation, Mapping) else _read_json(Path(evaluation))
    with_intervals = [part for name in ("reading", "drawing") if isinstance(part := content.get(name), Mapping)]
    metrics = {
        str(name).replace("_", " "): values
        for entries in (content, *with_intervals)
        for name, pair in entries.items()
        if isinstance(pair, Mapping) and (values := _values(pair, entries is not content)) is not None
    }
    if not metrics:
        raise InputError(
            f"The evaluation holds no metric: its entries are {', '.join(map(repr, content))}; expected some of the form "
            "name: {'base': number, 'adapter': number}, as recipes/evaluate_scenes.py --json writes."
        )
    return str(content.get("dataset", "a dataset without a name")), metrics


def _values(pair: Mapping, with_intervals: bool) -> list[float] | None:
    """Returns the base's and the adapter's value of a metric, or None if it is none."""
    if not pair.keys() >= {"base", "adapter"}:  # `evaluate_scenes.py --also` adds the scores of further adapters
        return None
    values = [pair["base"], pair["adapter"]]
    if with_intervals:
        values = [value.get("value") if isinstance(value, Mapping) else value for value in values]
    return values if all(isinstance(value, (int, float)) for value in values) else None


def _read_json(path: Path) -> Mapping:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"The evaluation {path} is no JSON: {error}; expected that of evaluate_scenes.py --json.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"The evaluation {path} is a JSON {type(content).__name__}; expected an object of metrics.")
    return content


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(map(_table_cell, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) if lines else ""


def _table_cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
