"""Pretrains the tiny dense Janus on scenes of real handwritten digits: VQ tokenizer, vision tower, then everything jointly.

    python recipes/pretrain_tiny.py --output_dir model_cards/tiny-janus

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores; the time is on the checkpoint's card.
Each stage is saved in `work_dir`; `--resume` starts behind the last stage found there.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from digits import COLOURS, DESCRIBE, QUESTION_KINDS, Scene, random_scene
from safetensors.torch import load_file, save_file
from sklearn.cluster import MiniBatchKMeans
from tiny_janus import make_model, make_processor
from torch import nn
from tqdm.auto import tqdm
from transformers import JanusForConditionalGeneration, JanusProcessor, set_seed
from trl import TrlParser

from uc_adapters.layers import raster_to_cells


@dataclass
class PretrainArguments:
    """Arguments of the three stages."""

    output_dir: str = field(default="model_cards/tiny-janus", metadata={"help": "The repo folder to write."})
    work_dir: str = field(default="work/pretrain_tiny", metadata={"help": "Where finished stages are kept."})
    resume: bool = field(default=False, metadata={"help": "Reuse the stages found in work_dir."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the training scenes."})
    pool: int = field(default=16384, metadata={"help": "Training scenes rendered once and drawn from at random."})
    vq_steps: int = field(default=900, metadata={"help": "Steps of the VQ tokenizer."})
    vision_steps: int = field(default=1800, metadata={"help": "Steps in which the vision tower names the cells."})
    joint_steps: int = field(default=1100, metadata={"help": "Steps of joint reading and drawing."})


class ScenePool:
    """Scenes rendered once, with the dense codes of each (set once the VQ tokenizer is trained)."""

    def __init__(self, size: int, rng: np.random.Generator, split: str = "train"):
        self.rng = rng
        self.scenes = [random_scene(rng, split) for _ in range(size)]
        self.pixels = torch.from_numpy(np.stack([scene.render(split) for scene in self.scenes]))  # (N, 64, 64, 3)
        self.codes = torch.empty(0)

    def draw(self, count: int) -> np.ndarray:
        return self.rng.integers(len(self.scenes), size=count)

    def pixel_values(self, rows: np.ndarray) -> torch.Tensor:
        """(B, 3, 64, 64) in [-1, 1], as the processor gives them."""
        return self.pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1

    @torch.no_grad()
    def encode(self, vqmodel: nn.Module) -> None:
        batches = np.array_split(np.arange(len(self.scenes)), math.ceil(len(self.scenes) / 64))
        codes = [
            nearest_codes(unit_latents(vqmodel, self.pixel_values(rows)), vqmodel.quantize.embedding.weight)
            for rows in tqdm(batches, desc="encode the pool")
        ]
        self.codes = torch.cat(codes)  # (N, 64)


def unit_latents(vqmodel: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """The encoder's latents on the unit sphere, (B, T, 8)."""
    latents = vqmodel.quant_conv(vqmodel.encoder(pixel_values))  # (B, 8, 8, 8)
    return F.normalize(latents.flatten(2).transpose(1, 2), dim=-1)


def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Indices of the nearest codes by cosine, (B, T)."""
    return (latents @ F.normalize(codebook, dim=-1).T).argmax(-1)


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 50):
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vq(model: JanusForConditionalGeneration, pool: ScenePool, steps: int, batch_size: int = 24) -> dict:
    """Autoencoder first, then a codebook by spherical k-means, kept up by moving averages and restarts."""
    vqmodel = model.model.vqmodel
    codebook = vqmodel.quantize.embedding.weight  # (K, 8)
    size = codebook.shape[0]
    warmup = steps // 6
    trained = [p for name, p in vqmodel.named_parameters() if not name.startswith("quantize")]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = cosine_schedule(optimizer, steps)
    counts, sums = torch.ones(size), torch.empty(0)
    progress = tqdm(range(steps), desc="VQ tokenizer")
    for step in progress:
        pixels = pool.pixel_values(pool.draw(batch_size))
        latents = unit_latents(vqmodel, pixels)  # (B, T, 8)
        flat = latents.detach().flatten(0, 1)  # (B * T, 8)
        commitment = torch.zeros(())
        if step == warmup:
            with torch.no_grad():
                many = [unit_latents(vqmodel, pool.pixel_values(pool.draw(64))).flatten(0, 1) for _ in range(8)]
                kmeans = MiniBatchKMeans(size, n_init=1, random_state=0, batch_size=4096).fit(torch.cat(many).numpy())
                codebook.copy_(F.normalize(torch.from_numpy(kmeans.cluster_centers_).float(), dim=-1))
                sums = codebook.clone()
        if step >= warmup:
            codes = nearest_codes(latents, codebook)
            chosen = codebook[codes].detach()
            commitment = (latents - chosen).square().sum(-1).mean()
            update_codebook(codebook, counts, sums, flat, codes.flatten(), restart=step < 0.8 * steps)
            latents = latents + (chosen - latents).detach()  # straight through
        grid = latents.transpose(1, 2).unflatten(2, (8, 8))  # (B, 8, 8, 8)
        restored = vqmodel.decoder(vqmodel.post_quant_conv(grid))
        error = (restored - pixels).square().mean()
        loss = error + 0.3 * (restored - pixels).abs().mean() + 0.1 * commitment
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            psnr = -10 * math.log10(error.item() / 4)
            progress.set_postfix(psnr=f"{psnr:.1f}", used=int((counts > 0.1).sum()))
    return {"psnr_last_batch": round(psnr, 2)}


@torch.no_grad()
def update_codebook(codebook, counts, sums, latents, codes, restart: bool, decay: float = 0.97) -> None:
    """Moving averages on the sphere; codes that fell out of use restart at the worst represented latents."""
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


def by_cell(x: torch.Tensor) -> torch.Tensor:
    """Groups an 8 x 8 raster by the scene's four cells: (B, 64, ...) -> (B, 4, 16, ...)."""
    return raster_to_cells(x, 4)


def patch_labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands in the cell of each patch, (B, 4, 16): digits with 10 for empty, colours with 6 for empty."""
    names = list(COLOURS)
    digits = [[10 if cell is None else cell.digit for cell in scene.cells] for scene in scenes]
    colours = [[len(names) if cell is None else names.index(cell.colour) for cell in scene.cells] for scene in scenes]
    return tuple(torch.tensor(labels).unsqueeze(-1).expand(-1, -1, 16) for labels in (digits, colours))


class CellHead(nn.Module):
    """Names a cell's digit and colour from a hidden state; used in training, then dropped."""

    def __init__(self, width: int):
        super().__init__()
        self.digit, self.colour = nn.Linear(width, 11), nn.Linear(width, len(COLOURS) + 1)

    def loss(self, hidden: torch.Tensor, digits: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
        digit_loss = F.cross_entropy(self.digit(hidden).flatten(0, -2), digits.flatten())
        return digit_loss + F.cross_entropy(self.colour(hidden).flatten(0, -2), colours.flatten())


def train_vision(model: JanusForConditionalGeneration, pool: ScenePool, steps: int, batch_size: int = 48) -> dict:
    """Teaches every patch of the vision tower to name its cell: from the default start it stays blind to digits."""
    tower = model.model.vision_model
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.normal_(std=0.3)
        tower.embeddings.patch_embedding.weight.mul_(3)
    head = CellHead(tower.config.hidden_size)
    trained = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = cosine_schedule(optimizer, steps)
    progress = tqdm(range(steps), desc="vision tower")
    for step in progress:
        rows = pool.draw(batch_size)
        features = tower(pool.pixel_values(rows)).last_hidden_state
        loss = head.loss(by_cell(features), *patch_labels([pool.scenes[row] for row in rows]))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        held = ScenePool(500, np.random.default_rng(1), "held-out")
        digits, _ = patch_labels(held.scenes)
        named = head.digit(by_cell(tower(held.pixel_values(np.arange(500))).last_hidden_state)).argmax(-1)
        accuracy = (named == digits)[digits < 10].float().mean().item()
    print(f"a patch names {accuracy:.1%} of held-out digits")
    return {"loss_last_batch": round(loss.item(), 4), "held_out_digits": round(accuracy, 4)}


class JointBatches:
    """Reading and drawing batches for the joint stage, tokenized by the model's own processor."""

    def __init__(self, processor: JanusProcessor, pool: ScenePool):
        self.processor, self.pool, self.rng = processor, pool, pool.rng
        self.tokenizer = processor.tokenizer
        self.answer_start = self.tokenizer.convert_tokens_to_ids("<|Assistant|>")

    def reading(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Several questions a row; labels on the answers alone. input_ids (B, L), labels (B, L), pixel_values."""
        image = self.processor.replace_image_token({}, 0)
        texts = []
        for row in rows:
            scene = self.pool.scenes[row]
            pairs = [scene.question(kind, self.rng) for kind in ("digit", *QUESTION_KINDS, "colour")]
            pairs = [pair for pair in pairs if pair] + [(DESCRIBE, scene.caption())]
            turns = [pairs[i] for i in self.rng.permutation(len(pairs))]
            text = "".join(f"<|User|>: {question}\n\n<|Assistant|>: {answer}<eos>" for question, answer in turns)
            texts.append("<bos>" + text.replace("<|User|>: ", f"<|User|>: {image}", 1))
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        ids = batch["input_ids"]
        # an answer runs from behind "<|Assistant|> :" through its <eos>
        started = (ids == self.answer_start).cumsum(1)
        ended = F.pad((ids == self.tokenizer.eos_token_id).cumsum(1), (1, -1))  # the eos itself still belongs to it
        prefix = (ids == self.answer_start) | F.pad(ids == self.answer_start, (1, -1))
        labels = ids.masked_fill(~((started > ended) & ~prefix), -100)
        return {**batch, "labels": labels, "pixel_values": self.pool.pixel_values(rows)}

    def drawing(self, rows: np.ndarray, drop: float = 0.1) -> dict[str, torch.Tensor]:
        """Prompts ending in the image's begin, left-padded; a share has every word replaced by padding, for guidance."""
        captions = [self.pool.scenes[row].shuffled_caption(self.rng) for row in rows]
        texts = [f"<bos><|User|>: {caption}\n\n<|Assistant|>:<begin_of_image>" for caption in captions]
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        ids = batch["input_ids"]
        dropped = torch.from_numpy(self.rng.random(len(rows)) < drop)
        kept = (ids == self.tokenizer.bos_token_id) | (torch.arange(ids.shape[1]) == ids.shape[1] - 1)
        batch["input_ids"] = ids.masked_fill(dropped[:, None] & ~kept, self.tokenizer.pad_token_id)
        return {**batch, "codes": self.pool.codes[rows], "dropped": dropped}


def reading_loss(model: JanusForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def drawing_loss(model, batch: dict[str, torch.Tensor], head: CellHead, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the dense codes, and the binding loss: each step's hidden state names its cell."""
    codes, mask = batch["codes"], batch["attention_mask"]
    prompt = model.get_input_embeddings()(batch["input_ids"])  # (B, P, D)
    drawn = model.prepare_embeddings_for_image_generation(codes[:, :-1])  # (B, 63, D)
    mask = F.pad(mask, (0, drawn.shape[1]), value=1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([prompt, drawn], 1), attention_mask=mask, use_cache=False
    ).last_hidden_state[:, prompt.shape[1] - 1 :]  # (B, 64, D)
    code_loss = F.cross_entropy(model.model.generation_head(hidden).flatten(0, 1), codes.flatten())
    told = ~batch["dropped"]
    return code_loss, head.loss(by_cell(hidden[told]), *(label[told] for label in labels))


def train_joint(model, processor, pool: ScenePool, steps: int, read_rows: int = 24, draw_rows: int = 32) -> dict:
    """Reading and drawing together; the VQ tokenizer and the vision tower are frozen (CHANGELOG: what went wrong)."""
    with torch.no_grad():  # the drawing side starts from the codes' own geometry
        model.model.generation_embeddings.weight.copy_(F.normalize(model.model.vqmodel.quantize.embedding.weight, dim=-1))
    batches = JointBatches(processor, pool)
    head = CellHead(model.config.text_config.hidden_size)
    frozen = (".vqmodel.", ".vision_model.")
    model.model.vision_model.requires_grad_(False)
    trained = [p for name, p in model.named_parameters() if not any(part in name for part in frozen)]
    trained += head.parameters()
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.02)
    schedule = cosine_schedule(optimizer, steps)
    progress = tqdm(range(steps), desc="joint")
    log = []
    for step in progress:
        answers = reading_loss(model, batches.reading(pool.draw(read_rows)))
        rows = pool.draw(draw_rows)
        codes, binding = drawing_loss(model, batches.drawing(rows), head, patch_labels([pool.scenes[row] for row in rows]))
        (answers + codes + binding).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            losses = {"read": answers.item(), "draw": codes.item(), "bind": binding.item()}
            log.append({"step": step, **losses})
            progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})
    return {"log": log}


def save_repo(model: JanusForConditionalGeneration, processor: JanusProcessor, output_dir: str) -> None:
    """bfloat16 on disk to stay small; the config says float32, in which it loads and runs."""
    model.to(torch.bfloat16)
    model.save_pretrained(output_dir)
    config_file = Path(output_dir, "config.json")
    config_file.write_text(config_file.read_text().replace('"bfloat16"', '"float32"'))
    processor.save_pretrained(output_dir)


def main(args: PretrainArguments) -> None:
    set_seed(args.seed)
    work = Path(args.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    processor = make_processor()
    model = make_model(processor)
    pool = ScenePool(args.pool, np.random.default_rng(args.seed))
    stages = {
        "vq": lambda: train_vq(model, pool, args.vq_steps),
        "vision": lambda: train_vision(model, pool, args.vision_steps),
        "joint": lambda: train_joint(model, processor, pool, args.joint_steps),
    }
    for index, (name, train) in enumerate(stages.items()):
        if index:  # a stage's own seed: resuming gives what one run gives
            set_seed(args.seed + index)
            pool.rng = np.random.default_rng([args.seed, index])
        checkpoint = work / f"{name}.safetensors"
        if name == "joint":
            pool.encode(model.model.vqmodel)
        if args.resume and checkpoint.exists():
            model.load_state_dict(load_file(checkpoint))
            continue
        start = time.perf_counter()
        model.train()
        report = train()
        report["seconds"] = round(time.perf_counter() - start)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, checkpoint)
        (work / f"{name}.json").write_text(json.dumps(report, indent=1))
        print(f"{name}: {report['seconds']} s")
    save_repo(model, processor, args.output_dir)


if __name__ == "__main__":
    main(*TrlParser(PretrainArguments).parse_args_and_config())
