"""The commands on the emoji adapter's card, as far as a clone without npm can run them."""

import json
import re
import shlex
from pathlib import Path

import finetune
import pytest
from finetuning.arguments import FinetuneParser

from uc_adapters.training import last_checkpoint

ROOT = Path(__file__).parents[2]
CARD = (ROOT / "model_cards" / "emoji-janus-uc4x" / "README.md").read_text()


def loss_of(run: Path) -> float:
    """The loss that a run logged first."""
    return json.loads((last_checkpoint(run) / "trainer_state.json").read_text())["log_history"][0]["loss"]


def test_the_short_training_has_the_losses_of_the_card(tmp_path, monkeypatch):
    (command,) = re.findall(r"python recipes/finetune\.py (.*--output_dir) work/check", CARD.replace("\\\n", ""))
    said = re.search(r"a loss of ([\d.]+) in stage 1, and of ([\d.]+) in stage 2", CARD)
    monkeypatch.chdir(ROOT)  # the command's paths
    finetune.main(*FinetuneParser().parse_args_and_config([*shlex.split(command), str(tmp_path), "--use_cpu", "true"]))
    for run, loss in zip((tmp_path / "stage1", tmp_path), said.groups(), strict=True):
        assert loss_of(run) == pytest.approx(float(loss), rel=1e-3)  # other cores sum in another order
