"""The docs quote the figures that the recipes wrote, each in one place; what they link to is there, and their snippets run."""

import json
import re
from pathlib import Path

import ablate
import draw_figures
import evaluate_dataset
import numpy as np
import pytest
import train_ratios
import train_strides
import validate_judge
from helpers import attach, lora_weights
from PIL import Image
from scoring import score_report
from timing import report as benchmark_report

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
# Page, its files of figures, and what makes a table of one
TABLES = [
    ("docs/figures/speed.md", "docs/benchmark-*.json", benchmark_report.markdown),
    ("docs/figures/training-cost.md", "docs/training-*.json", benchmark_report.markdown),
    ("docs/figures/quality.md", "docs/evaluation-*.json", score_report.markdown),
    ("docs/figures/ablations.md", "docs/ablation.json", ablate.markdown),
    ("docs/figures/judge.md", "docs/judge-*.json", validate_judge.markdown),
    ("docs/figures/pictures.md", "docs/pictures-*.json", evaluate_dataset.markdown),
    ("docs/figures/ratios.md", "docs/ratios/*.json", train_ratios.markdown),
    ("docs/figures/ratios.md", "docs/strides/*.json", train_strides.markdown),
]
Rows = set[tuple[str, ...]]


def rows(text: str) -> Rows:
    """The figures of every row of the tables in a text: all but the label, which a page has its own words for."""
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    figures = [tuple(cell.strip() for cell in line[1:]) for line in lines]
    return {row for row in figures if any(any(letter.isdigit() for letter in cell) for cell in row)}


def committed(files: str, markdown) -> Rows:
    """The rows that the recipe's own report makes of its committed files."""
    found = sorted(ROOT.glob(files))
    assert found, files
    return set().union(*(rows(markdown(json.loads(file.read_text()))) for file in found))


def quotes(row: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    """Whether a row's figures are some of another's, in its order."""
    rest = iter(whole)
    return all(cell in rest for cell in row if cell)


@pytest.mark.parametrize(("page", "files", "markdown"), TABLES)
def test_a_page_quotes_all_figures(page, files, markdown):
    assert committed(files, markdown) <= rows((ROOT / page).read_text())


@pytest.mark.parametrize(("page", "files", "markdown"), TABLES)
def test_a_table_stands_in_one_place(page, files, markdown):
    figures = committed(files, markdown)
    others = [other for other in [*PAGES, "CONTRIBUTING.md", "recipes/README.md"] if other != page]
    assert [other for other in others if rows((ROOT / other).read_text()) & figures] == []


def test_the_readme_quotes_no_other_figures():
    _, _, section = (ROOT / "README.md").read_text().partition("## Results")
    quoted = rows(section.partition("\n## ")[0])
    figures = set().union(*(committed(files, markdown) for _, files, markdown in TABLES))
    assert quoted
    assert [row for row in quoted if not any(quotes(row, whole) for whole in figures)] == []


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "recipes/README.md"])
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    paths = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [path for path in paths if path and not ((ROOT / page).parent / path).exists()] == []


def test_the_menu_lists_every_script():
    menu = (ROOT / "recipes" / "README.md").read_text()
    assert [script.name for script in (ROOT / "recipes").glob("*.py") if f"`{script.name}`" not in menu] == []


def test_the_pictures_show_the_committed_figures(tmp_path):
    """Drawn anew, they look as they do in the repository: `recipes/draw_figures.py` mends it where not."""
    for drawn in draw_figures.main(tmp_path):
        ours, theirs = (
            np.asarray(Image.open(folder / drawn.name).convert("RGB")) for folder in (tmp_path, ROOT / "docs/images")
        )
        assert ours.shape == theirs.shape
        assert np.abs(ours.astype(int) - theirs).mean() < 0.5


def test_both_stages_train_as_pasted_for_two_steps(base, short_processor, images, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/how-to/train.md").read_text(), re.DOTALL)
    (snippet,) = [snippet for snippet in snippets if "ReconstructionTrainer" in snippet]
    for setting, small in (("max_steps", 2), ("per_device_train_batch_size", 2)):
        snippet = re.sub(rf"{setting}=\d+", f"{setting}={small}", snippet)
    snippet = snippet.replace('"report_to": "none"', '"report_to": "none", "use_cpu": True')
    told, asked = [{"type": "text", "text": "2"}], [{"type": "image"}, {"type": "text", "text": "How many digits are there?"}]
    caption, drawn = [{"type": "text", "text": "a red 3"}], [{"type": "image"}]
    turns = [(asked, told), (caption, drawn)]
    examples = [
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": model}], "images": [images[0]]}
        for user, model in turns
    ]
    model = attach(base)
    before = lora_weights(model)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "train.md", "exec"), {"model": model, "processor": short_processor, "rows": examples})
    after = lora_weights(model)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert any("extractor" in name for name in moved)  # stage 1
    assert any("lora_A" in name or "lora_B" in name for name in moved)  # stage 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
