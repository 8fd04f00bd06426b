"""What each of two processes of torchrun runs for test_many_processes.py.

Training for a few steps on rows that are read, on rows that are drawn, and on both; rank 0 writes what was logged and the
weights that it ended with. By the trainers of both stages, and finetune.py itself; and sharded by torch's `fully_shard`, since
accelerate, and so a trainer, shards on accelerators alone.
"""

import json

import finetune_runs
import torch
from datasets import Dataset
from helpers import attach
from tiny_world.scenes_dataset import scene_row
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin, set_seed
from trl import SFTConfig

from uc_adapters import UniCompressCollator, UniCompressModel
from uc_adapters.training.joint import JointTrainer
from uc_adapters.training.reconstruction import ReconstructionStage, ReconstructionTrainer

STEPS = 2
# Of finetune.py: AdamW's first steps are of the rate itself, whichever way rounding turns them
RATES = {"learning_rate": 1e-4, "max_steps": 2}
# Of `scene_row`: even ones are read, odd ones drawn
SEEDS = {"reading": range(0, 96, 2), "drawing": range(1, 97, 2), "mixed": range(48)}
RUNS = [("mixed", 1), *((kind, 2) for kind in SEEDS)]  # stage 1 looks at images alone, whoever reads or draws them
SHORT = {"stage_1_steps": 2, "stage_1_learning_rate": 1e-4}
ALTERNATING = [0, 2, 1, 3]  # of four rows, two each: one process reads while the other draws


def model_and_processor(base: str) -> tuple[UniCompressModel, ProcessorMixin]:
    set_seed(0)
    model = attach(AutoModelForImageTextToText.from_pretrained(base))
    return model, model.compact_processor(AutoProcessor.from_pretrained(base))


def rows_of(seeds) -> Dataset:
    def render(batch: dict) -> dict:
        made = [scene_row(seed, "train") for seed in batch["seed"]]
        return {name: [row[name] for row in made] for name in ("messages", "images")}

    return Dataset.from_dict({"seed": list(seeds)}).with_transform(render)


def train(base: str, output_dir: str, kind: str, stage: int, batch_size: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a trainer logged, and the adapter's weights; in each process that takes part."""
    model, processor = model_and_processor(base)
    training = SFTConfig(
        output_dir=output_dir,
        max_steps=STEPS,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    options = {"args": training, "train_dataset": rows_of(SEEDS[kind])}
    if stage == 1:
        trainer = ReconstructionTrainer(ReconstructionStage(model), processing_class=processor, **options)
    else:
        collator = UniCompressCollator(processor, model.active_peft_config, caption_dropout=0.3)
        trainer = JointTrainer(model, processing_class=processor, data_collator=collator, **options)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], weights_of(model)


def train_sharded(base: str, kind: str, rank: int, world: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The same by hand: loss and gradients of stage 2, the weights sharded where there are two processes."""
    model, processor = model_and_processor(base)
    model.train_only("language model")
    if world > 1:
        for layer in model.get_base_model().model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    collate, log, rows = UniCompressCollator(processor, model.active_peft_config, 0.3), [], rows_of(SEEDS[kind])
    collate.epoch = 0
    for step in range(STEPS):
        of_step = [rows[4 * step + place] for place in ALTERNATING]
        labels = int((collate(of_step)["labels"][:, 1:] != -100).sum())
        mine = of_step if world == 1 else of_step[2 * rank : 2 * rank + 2]
        loss = model(**collate(mine), fused_lm_head=True, num_items_in_batch=labels).loss * world  # gradients are averaged
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shared = loss.detach() / world
        if world > 1:
            distributed.all_reduce(shared)
        log.append({"loss": shared.item()})
    return log, weights_of(model)


def weights_of(model: UniCompressModel) -> dict[str, torch.Tensor]:
    weights = {name: value.detach() for name, value in model.state_dict().items() if "lora_" in name}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in weights.items()}


def save(file: str, log: list[dict], weights: dict[str, torch.Tensor]) -> None:
    if distributed.get_rank() == 0:
        torch.save({"log": json.dumps(log), "weights": weights}, file)


def run(base: str, dataset: str, output: str) -> None:
    """All trainings, in each of two processes."""
    torch.set_num_threads(1)  # others do not survive a fork
    for kind, stage in RUNS:
        save(f"{output}/{kind}-{stage}.pt", *train(base, output, kind, stage, 2))
    training = {"per_device_train_batch_size": 1, "use_cpu": False, **RATES}  # no use_cpu: torchrun alone tells it
    finetune_runs.train(base, f"{output}/finetune", dataset=[dataset], distill=True, training=training, **SHORT)
    for kind in SEEDS:
        save(f"{output}/{kind}-sharded.pt", *train_sharded(base, kind, distributed.get_rank(), 2))
    distributed.destroy_process_group()
