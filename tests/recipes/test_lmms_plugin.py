"""lmms-eval, the field's own harness, on an adapter; skipped unless it is installed (see docs/how-to/evaluate.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import make_scenes_folder
import pytest
from finetune_runs import write_rows
from PIL import Image
from scoring.contenders import answer, contenders

from uc_adapters import UniCompressModel

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
model = pytest.importorskip("uc_lmms.model", reason="the plugin is not installed: pip install -e recipes/lmms_plugin")

TASKS = Path(__file__).parents[2] / "recipes" / "lmms_plugin" / "tasks"


@pytest.fixture(scope="module")
def questions(base_folder, tmp_path_factory):
    """A folder to run in, with the questions of the task, whose right answers are what the base says."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "work" / "digit-questions"
    make_scenes_folder.main(make_scenes_folder.ScenesFolderArguments(output_dir=str(folder), scenes=3, seed=1))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (base,) = contenders(str(base_folder), None)
    for row in rows:
        row["answer"] = told(base, folder, row)
    write_rows(folder / "metadata.jsonl", rows)
    return root


def told(contender, folder: Path, row: dict) -> str:
    """As the task asks: eight words at most."""
    return answer(contender, [Image.open(folder / row["file_name"])], [row["question"]], max_new_tokens=8)[0]


def run(root: Path, model_args: str) -> float:
    """What `python -m lmms_eval` writes as the task's exact match."""
    options = {"model": "uc_adapters", "model_args": model_args, "tasks": "digit_scenes", "include_path": TASKS}
    options |= {"batch_size": 2, "device": "cpu", "output_path": root / "results"}
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]
    subprocess.run(command, cwd=root, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
    newest = max((root / "results").rglob("*_results.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())["results"]["digit_scenes"]["exact_match,none"]


def test_lmms_eval_scores_an_adapter_as_it_answers(base_folder, plain_folder, questions):
    folder = questions / "work" / "digit-questions"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    _, adapter = contenders(str(base_folder), str(plain_folder))
    right = sum(told(adapter, folder, row) == row["answer"] for row in rows)
    assert right < len(rows)
    assert run(questions, f"pretrained={plain_folder},base={base_folder}") == pytest.approx(right / len(rows))


def test_lmms_eval_scores_the_bare_base_beside_it(base_folder, questions):
    assert run(questions, f"base={base_folder}") == 1


def test_an_adapter_knows_its_base(plain_folder):
    asked = model.UcAdapters(pretrained=str(plain_folder), device="cpu")
    assert isinstance(asked.model, UniCompressModel)
    assert asked.model.num_image_tokens == 21


def test_what_it_cannot_do_is_said(base_folder):
    with pytest.raises(ValueError, match="expected --model_args pretrained=ADAPTER"):
        model.UcAdapters()
    bare = model.UcAdapters(base=str(base_folder), device="cpu")
    with pytest.raises(NotImplementedError, match="output_type: generate_until"):
        bare.loglikelihood([])
    with pytest.raises(NotImplementedError, match="in one round"):
        bare.generate_until_multi_round([])
