"""The commands on the emoji adapter's card, as far as a clone without npm can run them."""

import re
import shlex
from pathlib import Path

import finetune
import pytest
from finetune_runs import log_of
from finetuning.arguments import FinetuneParser

ROOT = Path(__file__).parents[2]
CARD = (ROOT / "model_cards" / "emoji-janus-uc4x" / "README.md").read_text()


def test_the_short_training_has_the_losses_of_the_card(tmp_path, monkeypatch):
    (command,) = re.findall(r"python recipes/finetune\.py (.*--output_dir) work/check", CARD.replace("\\\n", ""))
    said = re.search(r"a loss of ([\d.]+) in stage 1, and of ([\d.]+) in stage 2", CARD)
    monkeypatch.chdir(ROOT)  # the command's paths
    finetune.main(*FinetuneParser().parse_args_and_config([*shlex.split(command), str(tmp_path), "--use_cpu", "true"]))
    for run, loss in zip((tmp_path / "stage1", tmp_path), said.groups(), strict=True):
        assert log_of(run)[0]["loss"] == pytest.approx(float(loss), rel=1e-3)  # other cores sum in another order
