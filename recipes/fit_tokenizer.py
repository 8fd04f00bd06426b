"""Stage 1: fits an adapter's tokenizer side by reconstruction, the language model frozen (UniCompress, eq. 8).

    python recipes/fit_tokenizer.py --base model_cards/tiny-janus --output_dir work/stage1

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores.

What is learned:
- drawing: the extractor of global codes and the decompressor, from the VQ tokenizer's latents,
  L = L_reg + codebook_weight * L_cb, with L_cb the cross-entropy of the true dense codes and L_reg the distance of the
  expected codebook entry to the true one. Global tokens pass the codebook straight through; a commitment term keeps
  them near their codes and a usage term (what a code tells of its image, over the batch) keeps them from collapsing.
- reading: the extractor of global tokens, by regression of the dense features (of the vision tower, or the embeddings of
  the codes) from {G, X_cont} with a readout that is thrown away. It is all there is for a base that cannot draw.
With decompressor="cell" the decoder learns from the language model's hidden states, which stage 1 does not have: it is
left for stage 2, and the drawing extractor learns with a "phase" decompressor that is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import load_dataset
from PIL import Image
from scenes_dataset import scenes_dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from trl import TrlParser

from uc_adapters import UniCompressConfig, UniCompressModel, get_uc_model
from uc_adapters.drawing import Drawing
from uc_adapters.families import Family
from uc_adapters.layers import Grid, PhaseDecompressor, average_pool, cells_to_raster, nearest_codes, straight_through
from uc_adapters.layers.attention import Attention
from uc_adapters.layers.positions import stretch

ENOUGH_USAGE = 2.0  # nats: above it the guard against collapse rests, and reconstruction alone decides


@dataclass
class FitArguments:
    """Stage 1. The adapter's own fields are those of UniCompressConfig."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    output_dir: str = field(default="work/stage1", metadata={"help": "Where the adapter is saved."})
    images: str | None = field(
        default=None, metadata={"help": "An image dataset (folder or Hub id) with a column 'image'. None: digit scenes."}
    )
    steps: int = field(default=600, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=32, metadata={"help": "Images a step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak, cosine to zero."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the order of the images."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Torch device."})
    stride: int = field(default=2, metadata={"help": "See UniCompressConfig."})
    num_global_tokens: int = field(default=4, metadata={"help": "See UniCompressConfig."})
    decompressor: str = field(default="cell", metadata={"help": "See UniCompressConfig."})
    decompressor_layers: int = field(default=2, metadata={"help": "See UniCompressConfig."})
    decompressor_width: int = field(default=512, metadata={"help": "See UniCompressConfig."})
    codebook_weight: float = field(default=1.0, metadata={"help": "See UniCompressConfig."})
    r: int = field(default=16, metadata={"help": "LoRA rank, for stage 2."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA alpha, for stage 2."})


class FeatureReadout(nn.Module):
    """Dense features back from {G, X_cont}: scaffolding for the reading extractor, thrown away."""

    def __init__(self, width: int, side: int, stride: int):
        super().__init__()
        self.side, self.stride = side, stride
        self.positions = nn.Parameter(torch.randn(side**2, width) * 0.02)
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, globals_: torch.Tensor, pooled: torch.Tensor, grid: Grid) -> torch.Tensor:
        """G (B, N_g, C), X_cont (B, T', C) -> (B, T, C)."""
        spread = cells_to_raster(pooled.unsqueeze(2).expand(-1, -1, self.stride**2, -1), self.stride, grid)  # (B, T, C)
        x = self.norm(spread + stretch(self.positions, self.side, grid))
        x = x + self.attention(x, self.attention.keys_values(globals_))
        return spread + self.mlp(x)


def image_batches(family: Family, processor, args: FitArguments) -> Iterator[list[torch.Tensor]]:
    """Endless batches of images, shuffled anew each round: the pixels (n, 3, H, W) of each size among them."""
    if args.images is None:
        dataset = scenes_dataset(8192, args.seed)
        images = [row["images"][0] for row in tqdm(dataset, desc="render scenes")]
    else:
        images = load_dataset(args.images, split="train")["image"]
    while True:
        order = torch.randperm(len(images)).tolist()
        for first in range(0, len(order) - args.batch_size + 1, args.batch_size):
            rows: list[Image.Image] = [images[i].convert("RGB") for i in order[first : first + args.batch_size]]
            prepared = processor.image_processor(rows, return_tensors="pt").to(args.device)
            yield [pixels for _, pixels, _ in family.by_size(prepared["pixel_values"], prepared.get("image_sizes"))]


def scale_of(codebook: torch.Tensor) -> torch.Tensor:
    """Mean square length of the entries, by which squared distances are measured: 1 on the unit sphere."""
    return codebook.square().sum(-1).mean()


def usage(globals_: torch.Tensor, codebook: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
    """How much a global token's code tells of its image, in nats, mean over tokens: 0 is collapse.

    The mutual information of code and image over the batch: entropy of the mean assignment less mean entropy. The first
    term alone would be content with one vague assignment for all images.
    """
    near = globals_ @ codebook.T - codebook.square().sum(-1) / 2  # (B, N_g, K)
    shares = (near / (temperature * scale_of(codebook))).softmax(-1)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.clamp(min=1e-9).log()).sum(-1)

    return (entropy(shares.mean(0)) - entropy(shares).mean(0)).mean()


def drawing_loss(drawing: Drawing, decompressor: nn.Module, pixels: torch.Tensor, weight: float) -> tuple[torch.Tensor, dict]:
    """Eq. 8 for the drawing side, and what is logged of it."""
    module, family, codebook = drawing.module, drawing.family, drawing.codebook
    grid, scale = family.draw_grid(tuple(pixels.shape[2:])), scale_of(codebook)
    latents = family.latents(pixels)  # (B, T, C)
    dense = nearest_codes(latents, codebook)  # (B, T)
    globals_ = drawing.globals_of(latents, grid)  # (B, N_g, C)
    g_hat = straight_through(globals_, codebook)
    x_deq = drawing.entries(nearest_codes(average_pool(latents, module.stride, grid), codebook))  # (B, T', C)
    entries = drawing.entries(dense)
    logits = family.code_logits(decompressor(entries, x_deq, g_hat, grid)).float()  # (B, T, K)
    l_cb = F.cross_entropy(logits.flatten(0, 1), dense.flatten())
    l_reg = (logits.softmax(-1) @ codebook - entries).square().sum(-1).mean() / scale
    loss = l_reg + weight * l_cb
    log = {"reg": l_reg.item(), "cb": l_cb.item(), "accuracy": (logits.argmax(-1) == dense).float().mean().item()}
    if globals_.shape[1]:
        codes = nearest_codes(globals_, codebook)  # (B, N_g)
        commitment = (globals_ - codebook[codes]).square().sum(-1).mean() / scale
        told = usage(globals_, codebook)
        loss = loss + weight * (0.25 * commitment - 0.2 * told.clamp(max=ENOUGH_USAGE))
        distinct = sum(len(codes[:, i].unique()) for i in range(codes.shape[1])) / codes.numel()
        log |= {"usage": told.item(), "distinct": distinct}
    return loss, log


def reading_loss(module: nn.Module, readout: FeatureReadout, features: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Regression of the dense features, relative to their variance: 1 is what the mean would give."""
    restored = readout(module.extractor(features, grid), average_pool(features, module.stride, grid), grid)
    return (restored - features).square().mean() / features.var()


@torch.no_grad()
def code_usage(drawing: Drawing, batches: Iterator[list[torch.Tensor]], count: int = 16) -> dict[str, float]:
    """Share of the codebook that the global tokens use, and perplexity of the least used token, on `count` batches."""
    codes = torch.cat([drawing.compress(pixels).globals for _ in range(count) for pixels in next(batches)])  # (N, N_g)
    size = len(drawing.codebook)
    shares = torch.stack([torch.bincount(codes[:, i], minlength=size) for i in range(codes.shape[1])]) / len(codes)
    perplexity = (-(shares * shares.clamp(min=1e-9).log()).sum(-1)).exp()
    return {"share": len(codes.unique()) / size, "perplexity": perplexity.min().item()}


def main(args: FitArguments) -> None:
    set_seed(args.seed)
    base = AutoModelForImageTextToText.from_pretrained(args.base)
    config = UniCompressConfig(
        stride=args.stride,
        num_global_tokens=args.num_global_tokens,
        decompressor=args.decompressor,
        decompressor_layers=args.decompressor_layers,
        decompressor_width=args.decompressor_width,
        codebook_weight=args.codebook_weight,
        r=args.r,
        lora_alpha=args.lora_alpha,
    )
    model: UniCompressModel = get_uc_model(base, config).to(args.device)
    processor = model.compact_processor(AutoProcessor.from_pretrained(args.base))
    model.train_only("tokenizer")

    family, drawing, geometry = model.family, model.drawing, model.family.geometry
    if drawing is None and not args.num_global_tokens:
        raise SystemExit(
            f"--num_global_tokens 0 on a base that cannot draw ({args.base}): stage 1 has nothing to learn; skip it."
        )
    reader = model.reading.active_module()
    readout = FeatureReadout(geometry.read_width, geometry.read_side, args.stride).to(args.device)
    scaffolding = list(readout.parameters())
    if drawing is not None:
        decompressor = drawing.module.decompressor
        if drawing.module.in_loop:
            decompressor = PhaseDecompressor(
                args.stride,
                geometry.draw_side,
                geometry.code_width,
                args.decompressor_width,
                geometry.hidden_size,
                args.decompressor_layers,
            ).to(args.device)
            scaffolding += decompressor.parameters()
    trained = [*(p for p in model.parameters() if p.requires_grad), *scaffolding]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / args.steps))
    )
    batches = image_batches(family, processor, args)
    progress = tqdm(range(args.steps), desc="fit tokenizer")
    for step in progress:
        loss, log = torch.zeros((), device=args.device), {}
        for pixels in next(batches):
            share = len(pixels) / args.batch_size
            if drawing is not None:
                draw, log = drawing_loss(drawing, decompressor, pixels, args.codebook_weight)
                loss = loss + share * draw
            if reader.extractor is not None:
                with torch.no_grad():
                    features = family.read_features(pixels).float()
                read = reading_loss(reader, readout, features, family.read_grid(tuple(pixels.shape[2:])))
                log["read"] = read.item()
                loss = loss + share * read
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix({name: f"{value:.3f}" for name, value in log.items()})
    if drawing is not None and args.num_global_tokens:
        use = code_usage(drawing, batches)
        print(f"global codes in use: {use['share']:.1%} of the codebook, least perplexity {use['perplexity']:.1f}")
        if use["perplexity"] < 2:
            raise RuntimeError(
                f"A global token collapsed: perplexity {use['perplexity']:.2f} over its codes, expected 2 or more. "
                "Train longer, or with a lower --learning_rate."
            )
    model.save_pretrained(args.output_dir, processor=processor)


if __name__ == "__main__":
    main(*TrlParser(FitArguments).parse_args_and_config())
