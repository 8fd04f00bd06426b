"""Trains and scores an adapter of a tiny base that draws, with one number of codes in a step or several to choose among.

    python recipes/train_ratios.py --data work/ratios.pt --prepare 43200
    python recipes/train_ratios.py --data work/ratios.pt --codes_per_step 8 --output_dir work/ratios/8
    python recipes/train_ratios.py --data work/ratios.pt --codes_per_step 1 2 4 8 16 --output_dir work/ratios/dial

Needs: pip install -c constraints.txt -e ".[recipes]". Rehearsed on CPU cores: a step of 32 scenes takes a second of one core.

It is `finetune.py --distill` with less around it, so that many adapters train in minutes of a GPU, side by side: prompts and
codes are made once for all of them (`--prepare`), shapes are fixed, and on a GPU a whole step is one CUDA graph. The adapter
only learns to draw, from the codes and from the dense base, whose weight falls from 1 to 0. It is then scored on held-out
scenes at each of its ratios: NLL, quarters and whole scenes drawn right, seconds. OUTPUT_DIR/scores.json has scores and losses.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from reporting.environment import environment
from scipy.stats import sem
from scoring.contenders import Contender, contenders, drawn_steps, twin_of
from scoring.scene_scores import SPLIT, score_drawing, score_nats
from scoring.stock_calls import calls_of, drawing_inputs
from tiny_world.digits import random_scene
from tqdm.auto import tqdm
from transformers import set_seed
from trl import TrlParser

from uc_adapters import UniCompressConfig, UniCompressModel, get_uc_model
from uc_adapters.code_head import CompactCodes, code_head_of
from uc_adapters.families import Family, family_of
from uc_adapters.generation import left_pad

SAMPLING = {"do_sample": True, "temperature": 0.7, "guidance_scale": 2.0}  # the defaults of evaluate_scenes.py
DROPOUT = 0.1  # the share of prompts without their captions
CHUNK = 256  # scenes that are encoded at once


@dataclass
class RatioArguments:
    """What to train, and for how long. The defaults are those of finetune.py."""

    base: str = field(default="model_cards/tiny-janus", metadata={"help": "The dense base: folder or Hub id."})
    data: str = field(default="work/ratios.pt", metadata={"help": "File of the prepared scenes."})
    prepare: int = field(default=0, metadata={"help": "Make the file with so many scenes, and train nothing."})
    codes_per_step: list[int] = field(default_factory=lambda: [4], metadata={"help": "Codes in a step; several: a dial."})
    drawing_global_tokens: bool = field(default=False, metadata={"help": "Global tokens in front of drawings."})
    num_global_tokens: int = field(default=4, metadata={"help": "How many."})
    decompressor_layers: int = field(default=2, metadata={"help": "Layers of the decompressor."})
    decompressor_width: int = field(default=192, metadata={"help": "Width of the decompressor."})
    r: int = field(default=64, metadata={"help": "LoRA rank and alpha."})
    max_steps: int = field(default=1350, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=32, metadata={"help": "Scenes in a step."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Peak learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and dropped captions."})
    output_dir: str = field(default="work/ratios/4", metadata={"help": "Folder of the adapter and its scores."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to train and to score."}
    )
    graph: bool = field(default=torch.cuda.is_available(), metadata={"help": "Make a CUDA graph of a step."})
    scenes: int = field(default=500, metadata={"help": "Held-out scenes to score. 0: none."})
    scenes_seed: int = field(default=1, metadata={"help": "Seed of the held-out scenes and of the sampling."})
    score_batch: int = field(default=125, metadata={"help": "Prompts drawn at once."})


@dataclass
class Scenes:
    """Prepared scenes: what a step is made of.

    Attributes:
        ids: Drawing prompts, (N, L), padded on the left.
        blank: The same without their text, (N, L).
        mask: The attention mask of both, (N, L).
        codes: The base's own codes, (N, T).
    """

    ids: torch.Tensor
    blank: torch.Tensor
    mask: torch.Tensor
    codes: torch.Tensor

    def to(self, device: str) -> Scenes:
        """The same on a device. They are kept in 16 bits, and used in 64."""
        return Scenes(*(value.to(device).long() for value in vars(self).values()))

    def part(self, rows: slice) -> Scenes:
        """Some of the scenes."""
        return Scenes(*(value[rows] for value in vars(self).values()))

    def batch(self, rows: torch.Tensor, dropped: torch.Tensor) -> Scenes:
        """The scenes of `rows` (B,), without the captions of those that are `dropped` (B,)."""
        ids = torch.where(dropped.unsqueeze(1), self.blank[rows], self.ids[rows])
        return Scenes(ids, self.blank[rows], self.mask[rows], self.codes[rows])


@torch.no_grad()
def prepare(dense: Contender, count: int, seed: int = 43) -> Scenes:
    """Makes scenes of the train scans, with prompts and codes."""
    family, calls, parts = family_of(dense.model), calls_of(dense.model), []
    rng = np.random.default_rng(seed)
    for first in tqdm(range(0, count, CHUNK), desc="scenes"):
        scenes = [random_scene(rng, "train") for _ in range(min(CHUNK, count - first))]
        inputs = drawing_inputs(dense.processor, [scene.shuffled_caption(rng) for scene in scenes], calls)
        ids, mask = left_pad(inputs["input_ids"], inputs["attention_mask"])
        pixels = dense.processor.image_processor([scene.image("train") for scene in scenes], return_tensors="pt")
        codes = family.dense_codes(pixels["pixel_values"].to(dense.model.device))
        parts.append((ids, family.unconditional(ids, dense.model.generation_config), mask, codes.cpu()))
    length = max(ids.shape[1] for ids, *_ in parts)
    pad = dense.model.generation_config.pad_token_id or 0
    columns = []
    for value, *tensors in zip((pad, pad, 0, 0), *parts, strict=True):
        width = max(length, tensors[0].shape[1]) if tensors[0] is not parts[0][3] else tensors[0].shape[1]
        padded = [torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0), value=value) for tensor in tensors]
        columns.append(torch.cat(padded).short())
    return Scenes(*columns)


def before_codes(family: Family, scenes: Scenes, inputs: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
    """Runs a language model on prompts and the inputs of images (B, n, D); returns the states before each of them, (B, n, D).

    `deltas` (n,) says by how much the position id grows at each input.
    """
    prompt = family.base.get_input_embeddings()(scenes.ids)
    count, length = inputs.shape[1] - 1, prompt.shape[1]  # no state is needed at the last input
    mask = torch.nn.functional.pad(scenes.mask, (0, count), value=1).bool()
    causal = torch.ones(length + count, length + count, dtype=torch.bool, device=mask.device).tril()
    allowed = (causal & mask.unsqueeze(1)) | torch.eye(length + count, dtype=torch.bool, device=mask.device)
    positions = (scenes.mask.cumsum(1) - 1).clamp(min=0)
    positions = torch.cat([positions, positions[:, -1:] + deltas[:-1].cumsum(0)], 1)
    hidden = family.language_model(
        inputs_embeds=torch.cat([prompt, inputs[:, :-1]], 1),
        attention_mask=allowed.unsqueeze(1),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    return hidden[:, length - 1 :]


class Training:
    """The training of one adapter.

    Args:
        model: The base with the adapter.
        teacher: The dense base.
        args: How to train.
    """

    def __init__(self, model: UniCompressModel, teacher: torch.nn.Module, args: RatioArguments):
        self.model, self.teacher, self.args = model.train(), family_of(teacher), args
        model.train_only("language model")
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        module, lengths = model.code_head.module, model.active_peft_config.strip_lengths
        self.heads = {length: code_head_of(model.family, module, length) for length in lengths}
        side = model.family.geometry.draw_side
        self.grid = (side, side)
        self.deltas = {length: head.position_deltas(self.grid)[:-1] for length, head in self.heads.items()}
        self.teacher_deltas = torch.ones(side**2, dtype=torch.long, device=args.device)
        for head in self.heads.values():
            assert head.codebook is not None  # computed before a graph is recorded
        # Filled before each step, since a recorded step reads the same memory every time
        self.rate, self.weight = torch.zeros((), device=args.device), torch.zeros((), device=args.device)
        self.scenes: Scenes | None = None
        # A ratio a scene, since a ratio a step would need more steps; each as often as its number, as in the collator
        ends = np.round(args.batch_size * np.cumsum(lengths) / sum(lengths)).astype(int)
        self.rows = {length: slice(first, end) for length, first, end in zip(lengths, [0, *ends], ends, strict=False)}
        untrained = [length for length, rows in self.rows.items() if rows.stop == rows.start]
        if untrained:
            raise SystemExit(
                f"--batch_size {args.batch_size} leaves no scene in a step for {untrained} of --codes_per_step "
                f"{' '.join(map(str, lengths))}; expected a larger batch."
            )
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, weight_decay=0.01, capturable=args.graph, foreach=args.graph
        )
        self.recorded: Callable[[], dict[int, torch.Tensor]] | None = None

    def scores(self, length: int, scenes: Scenes) -> torch.Tensor:
        """The negative log-probability of each step of scenes with `length` codes in a step, as in the joint loss, (B, T')."""
        head = self.heads[length]
        with torch.no_grad():
            dense = self.teacher.embed_codes(scenes.codes)
            states = before_codes(self.teacher, scenes, dense, self.teacher_deltas)  # (B, T, D)
        none = scenes.codes[:, :0]
        codes = CompactCodes(none, head.step_codes(none, scenes.codes, self.grid), scenes.codes, self.grid)
        hidden = before_codes(head.family, scenes, head.embed(codes), self.deltas[length])
        return -head.score(hidden, codes, states, self.weight).log_probs[:, -head.count_steps(self.grid) :]

    def losses(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The mean over the steps of all scenes, and that of each ratio. The scenes are shared out among the ratios."""
        scored = {length: self.scores(length, self.scenes.part(rows)) for length, rows in self.rows.items()}
        total, count = sum(x.sum() for x in scored.values()), sum(x.numel() for x in scored.values())
        return total / count, {length: x.detach().mean() for length, x in scored.items()}

    def update(self) -> dict[int, torch.Tensor]:
        """Forward, backward, update; returns the loss of each ratio."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, of_ratios = self.losses()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        return of_ratios

    def step(self) -> dict[int, torch.Tensor]:
        """The same, as a CUDA graph if there is to be one."""
        if not self.args.graph:
            return self.update()
        if self.recorded is None:
            self.recorded = self._recorded()
        return self.recorded()

    def _recorded(self) -> Callable[[], dict[int, torch.Tensor]]:
        """Records a step. What the warm-up changes is put back: the weights, and the optimizer's states, which were zero."""
        kept = [weight.detach().clone() for weight in self.weights]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            of_ratios = self.update()
        with torch.no_grad():
            for weight, before in zip(self.weights, kept, strict=True):
                weight.copy_(before)
                for value in self.optimizer.state[weight].values():
                    value.zero_()

        def replay() -> dict[int, torch.Tensor]:
            graph.replay()
            return of_ratios

        return replay

    def run(self, data: Scenes) -> list[dict[str, float]]:
        """Trains; returns the mean loss of each ratio every 50 steps."""
        args, log = self.args, []
        rng = np.random.default_rng(args.seed)
        warm_up, sums = max(1, round(0.03 * args.max_steps)), {}
        rows = torch.arange(args.batch_size, device=args.device)
        dropped = torch.from_numpy(rng.random((args.max_steps, args.batch_size)) < DROPOUT).to(args.device)
        for step in tqdm(range(args.max_steps), desc="train", mininterval=10):
            batch = data.batch((rows + step * args.batch_size) % len(data.codes), dropped[step])
            if self.scenes is None:
                self.scenes = batch
            for name, value in vars(batch).items():
                getattr(self.scenes, name).copy_(value)
            done = max(0, step - warm_up) / max(1, args.max_steps - warm_up)
            factor = (step + 1) / warm_up if step < warm_up else 0.5 * (1 + math.cos(math.pi * done))
            self.rate.fill_(args.learning_rate * factor)
            self.weight.fill_(1 - step / args.max_steps)
            for length, loss in self.step().items():
                sums.setdefault(length, []).append(loss.clone())
            if (step + 1) % 50 == 0 or step + 1 == args.max_steps:
                log.append({"step": step + 1} | {f"loss {k}": torch.stack(v).mean().item() for k, v in sorted(sums.items())})
                sums = {}
        return log


def score(contender: Contender, lengths: tuple[int, ...], args: RatioArguments) -> dict[str, dict[str, float]]:
    """Scores an adapter on held-out scenes, at each of its ratios."""
    rng = np.random.default_rng(args.scenes_seed)
    scenes = [random_scene(rng, SPLIT) for _ in range(args.scenes)]
    found = {}
    for length in lengths:
        at = replace(contender, codes_per_step=length)
        nats = score_nats(at, scenes)
        drawing = score_drawing([at], scenes, args.scenes_seed, args.score_batch, **SAMPLING)[at.name]
        found[str(length)] = {
            "steps": drawn_steps(at),
            "nats": float(nats.mean()),
            "nats_standard_error": float(sem(nats)),
            "quarters": drawing.estimates["quarters"].value,
            "scenes": drawing.estimates["scenes"].value,
            "seconds_per_image": drawing.seconds,
        }
    return found


def markdown(result: dict) -> str:
    """A row for each ratio of OUTPUT_DIR/scores.json."""
    lines = ["| | steps | NLL (nats an image) | quarters right | whole scenes |", "|---|---|---|---|---|"]
    for length, at in result["scores"].items():
        nats = f"{at['nats']:.1f} ± {1.96 * at['nats_standard_error']:.1f}"
        lines.append(f"| {length} codes a step | {at['steps']} | {nats} | {at['quarters']:.1%} | {at['scenes']:.1%} |")
    return "\n".join(lines).replace("%", " %")


def main(args: RatioArguments) -> dict | None:
    (dense,) = contenders(args.base, None, args.device)
    if args.prepare:
        Path(args.data).parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(prepare(dense, args.prepare)), args.data)
        return None
    set_seed(args.seed)
    config = UniCompressConfig(
        codes_per_step=args.codes_per_step,
        drawing_global_tokens=args.drawing_global_tokens,
        num_global_tokens=args.num_global_tokens,
        decompressor_layers=args.decompressor_layers,
        decompressor_width=args.decompressor_width,
        r=args.r,
        lora_alpha=args.r,
    )
    model = get_uc_model(twin_of(dense.model), config).to(args.device)
    data = Scenes(**torch.load(args.data)).to(args.device)
    start = time.perf_counter()
    log = Training(model, dense.model, args).run(data)
    seconds = time.perf_counter() - start
    processor = model.compact_processor(dense.processor)
    model.eval().save_pretrained(args.output_dir, processor=processor)
    result = {
        "settings": asdict(args),
        "train_seconds": seconds,
        "parameters": sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name),
        "log": log,
        "environment": environment(args.device),
    }
    file = Path(args.output_dir, "scores.json")
    file.write_text(json.dumps(result, indent=2) + "\n")  # before the scores, which may fail or be cut off
    if args.scenes:
        result["scores"] = score(Contender("adapter", model, processor), config.strip_lengths, args)
        file.write_text(json.dumps(result, indent=2) + "\n")
        print(markdown(result))
    return result


if __name__ == "__main__":
    main(*TrlParser(RatioArguments).parse_args_and_config())
