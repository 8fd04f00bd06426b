"""Pretrains a tiny dense base from nothing: first the VQ tokenizer, then the vision tower, then reading and drawing together.

    python recipes/pretrain_tiny.py --output_dir model_cards/tiny-janus
    python recipes/pretrain_tiny.py --family emu3 --output_dir work/tiny-emu3
    python recipes/pretrain_tiny.py --family apertus1p5 --output_dir work/tiny-apertus1p5   # transformers 5.24 or later
    python recipes/pretrain_tiny.py --dataset pictures --output_dir work/pictures-base
    python recipes/pretrain_tiny.py --dataset pictures --shape small --device cuda --output_dir work/pictures-base

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores; the checkpoint's card says how long it took.
Without `--dataset` it trains on scenes of real handwritten digits. With it, it trains on the captioned images of any dataset,
a few thousand or more, such as a folder of images whose metadata.jsonl has {"file_name": ..., "text": ...}. Images become
64 x 64. `--shape small` has 256 codes an image and 19 M parameters, and wants a GPU: a step takes a CPU core half a minute.
Each stage is saved in `work_dir`; `--resume true` starts after the last stage found there.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from reporting.environment import is_here, make_current
from safetensors.torch import load_file, save_file
from sklearn.cluster import MiniBatchKMeans
from tiny_world import tiny_emu3, tiny_janus
from tiny_world.caption_pool import CaptionPool, caption_words, captioned_rows
from tiny_world.emu3_pretraining import Emu3Pretraining
from tiny_world.janus_pretraining import JanusPretraining
from tiny_world.scene_pool import ScenePool, nearest_codes
from tiny_world.shapes import SHAPES, Shape
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from trl import TrlParser

FAMILIES = {"janus": (tiny_janus, JanusPretraining), "emu3": (tiny_emu3, Emu3Pretraining)}
if hasattr(transformers, "Apertus1p5Config"):  # transformers 5.24 and later
    from tiny_world import tiny_apertus1p5
    from tiny_world.apertus1p5_pretraining import Apertus1p5Pretraining

    FAMILIES["apertus1p5"] = tiny_apertus1p5, Apertus1p5Pretraining


@dataclass
class PretrainArguments:
    """What to pretrain, on what, and for how long."""

    family: str = field(default="janus", metadata={"help": "janus, emu3, or apertus1p5 with transformers 5.24."})
    output_dir: str = field(default="work/tiny", metadata={"help": "The model folder to write."})
    shape: str = field(default="tiny", metadata={"help": "tiny, or small for a larger janus."})
    device: str = field(
        default="cpu",
        metadata={"help": "Torch device. On a GPU, the VQ tokenizer trains in TF32, the rest in bfloat16."},
    )
    work_dir: str = field(default="work/pretrain_tiny", metadata={"help": "Where finished stages are kept."})
    resume: bool = field(default=False, metadata={"help": "Reuse the stages found in work_dir."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the training data."})
    dataset: str | None = field(
        default=None, metadata={"help": "Captioned images: folder, file or Hub id. None: digit scenes."}
    )
    pool: int = field(default=16384, metadata={"help": "Maximum number of images, made or read once, to sample from."})
    vq_steps: int | None = field(
        default=None, metadata={"help": "Steps of the VQ tokenizer. None: 900 for digit scenes, 2,000 for a dataset."}
    )
    vision_steps: int = field(default=1800, metadata={"help": "Steps in which the vision tower learns to name what it sees."})
    joint_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of reading, and drawing. None: 1,100 for digit scenes, 2,000 for a dataset."},
    )


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 50):
    """A schedule of the learning rate: linear warm-up, and a cosine that falls to 0 at `steps`."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vq(tiny: JanusPretraining | Emu3Pretraining, steps: int, shape: Shape) -> dict:
    """Trains the VQ tokenizer: an autoencoder first, then with a codebook.

    The codebook starts from spherical k-means. Moving averages and restarts keep it up to date.
    """
    vqmodel, pool = tiny.vqmodel, tiny.pool
    codebook = vqmodel.quantize.embedding.weight  # (K, 8)
    size = codebook.shape[0]
    warmup = steps // 6
    trained = tiny.vq_parameters()
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = cosine_schedule(optimizer, steps)
    counts, sums = codebook.new_ones(size), torch.empty(0)
    progress = tqdm(range(steps), desc="VQ tokenizer")
    for step in progress:
        pixels = pool.pixel_values(pool.draw(shape.vq_rows))
        latents = tiny.latents(pixels)  # (B, T, 8)
        flat = latents.detach().flatten(0, 1)  # (B * T, 8)
        commitment = latents.new_zeros(())
        if step == warmup:
            with torch.no_grad():
                batches = shape.kmeans_latents // (64 * latents.shape[1])
                many = [tiny.latents(pool.pixel_values(pool.draw(64))).flatten(0, 1) for _ in range(batches)]
                kmeans = MiniBatchKMeans(size, n_init=1, random_state=0, batch_size=4096).fit(torch.cat(many).cpu().numpy())
                centres = torch.from_numpy(kmeans.cluster_centers_).float().to(codebook.device)
                codebook.copy_(F.normalize(centres, dim=-1))
                sums = codebook.clone()
        if step >= warmup:
            codes = nearest_codes(latents, codebook)
            chosen = codebook[codes].detach()
            commitment = (latents - chosen).square().sum(-1).mean()
            update_codebook(codebook, counts, sums, flat, codes.flatten(), restart=step < 0.8 * steps)
            latents = latents + (chosen - latents).detach()  # straight-through estimator
        restored = tiny.restore(latents)
        loss = pool.restoration_loss(restored, pixels) + 0.1 * commitment
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            psnr = -10 * math.log10((restored - pixels).detach().square().mean().item() / 4)
            progress.set_postfix(psnr=f"{psnr:.1f}", used=int((counts > 0.1).sum()))
    return {"psnr_last_batch": round(psnr, 2)}


@torch.no_grad()
def update_codebook(codebook, counts, sums, latents, codes, restart: bool, decay: float = 0.97) -> None:
    """Updates the codebook by moving averages on the sphere; codes out of use restart at the worst represented latents."""
    size = codebook.shape[0]
    counts.mul_(decay).add_(torch.bincount(codes, minlength=size).float(), alpha=1 - decay)
    sums.mul_(decay).index_add_(0, codes, latents, alpha=1 - decay)
    codebook.copy_(F.normalize(sums, dim=-1))
    dead = (counts < 0.05).nonzero().flatten()
    if restart and len(dead):
        worst = (
            (latents * codebook[codes]).sum(-1).topk(4 * len(dead), largest=False).indices
            if 4 * len(dead) < len(latents)
            else torch.arange(len(latents))
        )
        fresh = latents[worst[torch.randperm(len(worst))[: len(dead)]]]
        dead = dead[: len(fresh)]
        codebook[dead], sums[dead], counts[dead] = fresh, fresh, 1.0


def train_vision(tiny: JanusPretraining, steps: int, shape: Shape) -> dict:
    """Trains the vision tower to name what it sees. From the default initialisation it stays blind to digits."""
    tower, pool = tiny.model.model.vision_model, tiny.pool
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.normal_(std=0.3)
        tower.embeddings.patch_embedding.weight.mul_(3)
    head = pool.head(tower.config.hidden_size).to(pool.device)
    trained = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.75 * shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = cosine_schedule(optimizer, steps)
    progress = tqdm(range(steps), desc="vision tower")
    for step in progress:
        rows = pool.draw(shape.vision_rows)
        with _autocast(pool.device):
            loss = head.loss(tower(pool.seen(rows)).last_hidden_state, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        return {"loss_last_batch": round(loss.item(), 4), **head.report(tower)}


def train_joint(tiny: JanusPretraining | Emu3Pretraining, steps: int, shape: Shape) -> dict:
    """Trains reading and, if the base draws, drawing together; returns the losses of every tenth step."""
    head = tiny.pool.head(tiny.model.config.text_config.hidden_size).to(tiny.pool.device)
    trained = [*tiny.joint_parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.02)
    schedule = cosine_schedule(optimizer, steps)
    progress = tqdm(range(steps), desc="joint")
    log = []
    for step in progress:
        with _autocast(tiny.pool.device):
            losses = {"read": tiny.reading_loss(tiny.pool.draw(shape.read_rows), head)}
            if tiny.draws:
                losses["draw"], losses["bind"] = tiny.drawing_losses(tiny.pool.draw(shape.draw_rows), head)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            losses = {name: loss.item() for name, loss in losses.items()}
            log.append({"step": step, **losses})
            progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
    return {"log": log}


def _autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; on a CPU it would be slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def save_repo(model: PreTrainedModel, processor: ProcessorMixin, output_dir: str) -> None:
    """Saves the weights in bfloat16, to stay small, but for modules that the model's class always keeps in float32.

    The config says float32, so that the model loads and runs in it.
    """
    precise = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if not any(part in precise for part in name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(output_dir)
    config_file = Path(output_dir, "config.json")
    config_file.write_text(config_file.read_text().replace('"bfloat16"', '"float32"'))
    processor.save_pretrained(output_dir)


def main(args: PretrainArguments) -> None:
    if args.family not in FAMILIES:
        raise SystemExit(f"--family {args.family!r} is not known; expected {' or '.join(FAMILIES)}.")
    if args.shape not in SHAPES or (args.shape != "tiny" and args.family != "janus"):
        raise SystemExit(f"--shape {args.shape!r} with --family {args.family}; expected tiny, or small with janus.")
    if not is_here(args.device):
        raise SystemExit(f"--device {args.device!r} is not here; expected cpu, or the device of a GPU, such as cuda.")
    make_current(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # every batch of a stage has one shape
    make, pretraining = FAMILIES[args.family]
    shape, of_shape = SHAPES[args.shape], {"shape": SHAPES[args.shape]} if args.family == "janus" else {}
    set_seed(args.seed)
    work = Path(args.work_dir, args.family if args.shape == "tiny" else f"{args.family}-{args.shape}")
    rng = np.random.default_rng(args.seed)
    if args.dataset is None:
        processor = make.make_processor(**of_shape)
        pool = ScenePool(args.pool, rng)
    else:
        rows = captioned_rows(args.dataset, args.pool, rng)
        words = caption_words(rows["caption"])
        print(f"{len(rows):,} captioned images, {len(words):,} words")
        processor = make.make_processor(words=words, **of_shape)
        pool = CaptionPool(rows, processor, rng)
        work /= Path(args.dataset).name  # so that --resume finds no stage of another vocabulary
    work.mkdir(parents=True, exist_ok=True)
    model = make.make_model(processor, **of_shape).to(args.device)
    pool.to(model.device)
    tiny = pretraining(model, processor, pool)
    vq_steps, joint_steps = (900, 1100) if args.dataset is None else (2000, 2000)
    stages = {"vq": lambda: train_vq(tiny, args.vq_steps or vq_steps, shape)}
    if tiny.has_vision_tower:
        stages["vision"] = lambda: train_vision(tiny, args.vision_steps, shape)
    stages["joint"] = lambda: train_joint(tiny, args.joint_steps or joint_steps, shape)
    for index, (name, train) in enumerate(stages.items()):
        if index:  # each stage has its own seed, so that a resumed run gives what an uninterrupted one gives
            set_seed(args.seed + index)
            pool.rng = np.random.default_rng([args.seed, index])
        checkpoint = work / f"{name}.safetensors"
        if name == "joint":
            tiny.vqmodel.eval()
            for parameter in tiny.vqmodel.parameters():  # the codes that are learned are those of the saved tokenizer
                parameter.data = parameter.data.bfloat16().float()
            pool.encode(tiny.latents, tiny.vqmodel.quantize.embedding.weight)
        if args.resume and checkpoint.exists():
            model.load_state_dict(load_file(checkpoint, device=str(model.device)))
            continue
        start = time.perf_counter()
        model.train()
        report = train()
        report["seconds"] = round(time.perf_counter() - start)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, checkpoint)
        (work / f"{name}.json").write_text(json.dumps(report, indent=1))
        print(f"{name}:", ", ".join(f"{what} {value}" for what, value in report.items() if what != "log"))
    save_repo(model, processor, args.output_dir)


if __name__ == "__main__":
    main(*TrlParser(PretrainArguments).parse_args_and_config())
