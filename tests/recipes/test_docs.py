"""The docs quote the figures that the recipes wrote, whole; the README quotes some of them, and no others."""

import json
from pathlib import Path

import ablate
import pytest
from scoring import score_report
from timing import report as benchmark_report

ROOT = Path(__file__).parents[2]
# Document, its files of figures, and what makes a table of one
TABLES = [
    ("docs/speed.md", "docs/benchmark-*.json", benchmark_report.markdown),
    ("docs/training.md", "docs/training-*.json", benchmark_report.markdown),
    ("docs/evaluation.md", "docs/evaluation-*.json", score_report.markdown),
    ("docs/evaluation.md", "docs/ablation.json", ablate.markdown),
]


def cells(text: str) -> set[tuple[str, ...]]:
    """The figures of every row of the tables in a text: all but the label, which a document has its own words for."""
    rows = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    figures = [tuple(cell.strip() for cell in row[1:]) for row in rows]
    return {row for row in figures if any(any(letter.isdigit() for letter in cell) for cell in row)}


def committed(files: str, markdown) -> set[tuple[str, ...]]:
    found = sorted(ROOT.glob(files))
    assert found, files
    return set().union(*(cells(markdown(json.loads(file.read_text()))) for file in found))


@pytest.mark.parametrize(("document", "files", "markdown"), TABLES)
def test_a_document_quotes_all_figures(document, files, markdown):
    assert committed(files, markdown) <= cells((ROOT / document).read_text())


def test_the_readme_quotes_no_other_figures():
    _, _, section = (ROOT / "README.md").read_text().partition("## Figures")
    section = section.partition("\n## ")[0]
    assert cells(section) <= set().union(*(committed(files, markdown) for _, files, markdown in TABLES))
    assert cells(section)
