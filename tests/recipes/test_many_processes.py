"""Two processes at half the batch train as one does at the whole, whatever their batches hold."""

import json
from pathlib import Path

import pytest
import torch
import two_processes
from finetune_runs import train, write_captioned
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("data") / "captioned")


@pytest.fixture(scope="module")
def of_two(base_folder, captioned, tmp_path_factory):
    """The folder of what two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    # As `torchrun --standalone --nproc_per_node 2` does it, but by forks
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test", "start_method": "fork"}
    torchrun = elastic_launch(LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, **options), two_processes.run)
    torchrun(str(base_folder), str(captioned), str(folder))
    return folder


def assert_same_training(file: Path, log: list[dict], weights: dict[str, torch.Tensor]) -> None:
    theirs = torch.load(file)
    assert len(log) == two_processes.STEPS
    for one, two in zip(log, json.loads(theirs["log"]), strict=True):
        assert one.keys() == two.keys()
        for what in one.keys() - {"num_tokens"}:
            assert two[what] == pytest.approx(one[what], rel=1e-4, abs=1e-5), what
    assert theirs["weights"].keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(theirs["weights"][name], value, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("kind", "stage"), two_processes.RUNS)
def test_two_processes_train_as_one(base_folder, of_two, tmp_path, kind, stage):
    one = two_processes.train(str(base_folder), str(tmp_path), kind, stage, 4)
    assert_same_training(of_two / f"{kind}-{stage}.pt", *one)


@pytest.mark.parametrize("kind", two_processes.SEEDS)
def test_two_sharded_processes_train_as_one(base_folder, of_two, kind):
    assert_same_training(of_two / f"{kind}-sharded.pt", *two_processes.train_sharded(str(base_folder), kind, 0, 1))


def test_two_processes_write_the_adapter_that_one_does(base_folder, of_two, captioned, tmp_path):
    """With a teacher: JointTrainer, without one, is among the trainers above."""
    options = {"dataset": [str(captioned)], "distill": True, "training": two_processes.RATES, **two_processes.SHORT}
    folders = train(base_folder, tmp_path, stage_1_batch_size=8, **options), of_two / "finetune"
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-3, rtol=1e-2)


def test_sharding_in_one_process_is_refused(base_folder, captioned, tmp_path):
    config = str(TESTS.parent / "recipes" / "configs" / "fsdp2.json")
    options = {"dataset": [str(captioned)], "training": {"fsdp": True, "fsdp_config": config}}
    with pytest.raises(ValueError, match="only works in distributed training"):
        train(base_folder, tmp_path, **options)
