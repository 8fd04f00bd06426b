"""Reading at several strides is trained and scored in one run."""

import json

import train_strides
from train_strides import StrideArguments

from uc_adapters import UniCompressModel


def test_it_trains_and_scores_every_stride(base_folder, fresh, tmp_path):
    folder = tmp_path / "dial"
    lengths = {"stage_1_steps": 1, "max_steps": 2, "batch_size": 2, "scenes": 2}
    result = train_strides.main(StrideArguments(base=str(base_folder), stride=[1, 4], output_dir=str(folder), **lengths))
    assert {stride: score["tokens"] for stride, score in result["scores"].items()} == {"1": 69, "4": 9}
    assert all(0 <= score["mean"]["value"] <= 1 for score in result["scores"].values())
    assert json.loads((folder / "scores.json").read_text()) == result
    assert UniCompressModel.from_pretrained(fresh(), folder).active_peft_config.strides == (1, 4)
