"""Trainers of one's own: docs/how-to/train.md's snippet runs as pasted, and what cannot work says so."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import attach, lora_weights
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

from uc_adapters import UniCompressCollator
from uc_adapters.errors import InputError, UnsupportedError
from uc_adapters.training import JointTrainer, ReconstructionStage, ReconstructionTrainer

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "train.md"
OPTIONS = {"max_length": None, "remove_unused_columns": False, "bf16": False, "report_to": "none", "use_cpu": True}


def say(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


def test_the_docs_snippet_trains_as_pasted(base, short_processor, images, tmp_path, monkeypatch):
    image = {"type": "image"}
    question, caption = [image, *say("How many digits are there?")], say("a red 3")
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}], "images": [images[0]]}
        for asked, told in ((question, say("2")), (caption, [image]))
    ]
    snippet = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1]
    model = attach(base)
    before = lora_weights(model)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {"model": model, "processor": short_processor, "rows": rows})
    after = lora_weights(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained != set()


def test_preference_trainers_are_refused(base, short_processor, images, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": [{"type": "image"}, *say("How many digits are there?")]}],
        "chosen": [{"role": "assistant", "content": say("2")}],
        "rejected": [{"role": "assistant", "content": say("3")}],
        "images": images[:1],
    }
    trainer = DPOTrainer(
        model=attach(base),
        args=DPOConfig(output_dir=str(tmp_path), max_steps=1, **OPTIONS),
        train_dataset=Dataset.from_list([row, row]),
        processing_class=short_processor,
    )
    with pytest.raises(UnsupportedError, match=r"different numbers of tokens; expected SFTTrainer"):
        trainer.train()


def test_a_stage_1_without_anything_to_train_is_refused(base, short_processor, tmp_path):
    stage = ReconstructionStage(attach(base, num_global_tokens=0))
    with pytest.raises(InputError, match=r"Stage 1 has nothing to train.*Go on with stage 2"):
        ReconstructionTrainer(stage, TrainingArguments(str(tmp_path)), processing_class=short_processor)


def test_arguments_of_transformers_alone_are_refused(base, short_processor, tmp_path):
    model = attach(base)
    collator = UniCompressCollator(short_processor, model.active_peft_config)
    with pytest.raises(InputError, match=r"args=TrainingArguments; expected.*SFTConfig"):
        JointTrainer(model, TrainingArguments(str(tmp_path)), data_collator=collator)
