"""Compares base and adapter in two to three minutes: draws prompts, reads pictures, prints a table, writes quickstart.png.

    python recipes/quickstart.py
    python recipes/quickstart.py --prompt "rocket, noto style" --seed 7
    python recipes/quickstart.py --image cat.jpg --question "Describe the image."
    python recipes/quickstart.py --adapter work/dial --codes_per_step 8 --stride 4
    python recipes/quickstart.py --base deepseek-community/Janus-Pro-1B --adapter YOUR_ADAPTER --prompt "a fox" --device cuda

Needs: pip install -c constraints.txt -e ".[recipes]". Tested on two CPU cores; the last line needs a GPU. The shipped pair
knows by heart the emoji that it was trained on; its card tells which. `--codes_per_step` and `--stride` choose among the
ratios of an adapter that is trained for several.
"""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import torch
import transformers
from demo.race import warm_up
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rows.turns import CAPTION_REQUEST
from rows.unknown_words import unknown_words
from scoring.contenders import (
    Contender,
    answer,
    check_sampling,
    contenders,
    draw,
    drawn_steps,
    load_processor,
    read_tokens,
    sampling_of,
    why_no_drawing,
)
from tiny_world.tiny_words import split_words
from tqdm.auto import tqdm
from transformers import AutoConfig
from trl import TrlParser

from uc_adapters.errors import InputError
from uc_adapters.families import family_of_processor
from uc_adapters.pictures import open_picture

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

CARDS = Path(__file__).parents[1] / "model_cards"  # found from any working directory
PICTURES = Path(__file__).parent / "emoji_pictures/sample/train"
STYLE = "noto"
THINGS = ("fire engine", "penguin", "pizza", "rocket", "cactus", "guitar")
THINGS += ("crab", "birthday cake", "panda", "bicycle", "mushroom", "helicopter")
COLUMNS = 6  # of the picture


@dataclass
class QuickstartArguments:
    """What to read, what to draw, and with which models."""

    base: str = field(default=str(CARDS / "emoji-janus"), metadata={"help": "The dense base: folder or Hub id."})
    adapter: str = field(default=str(CARDS / "emoji-janus-uc4x"), metadata={"help": "The adapter: folder or Hub id."})
    codes_per_step: int | None = field(
        default=None, metadata={"help": "Codes in a step of --adapter, if it is trained for several."}
    )
    stride: int | None = field(default=None, metadata={"help": "Stride at which --adapter reads, likewise."})
    image: str | None = field(default=None, metadata={"help": "Your image to ask about."})
    question: str | None = field(default=None, metadata={"help": "The question about --image."})
    prompt: str | None = field(default=None, metadata={"help": "Your prompt to draw."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Torch device."})
    temperature: float = field(default=0.7, metadata={"help": "Sampling temperature of drawings. Janus-Pro: 1."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance of drawings. None: the base's own."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    output: str = field(default="quickstart.png", metadata={"help": "The picture to write."})


@dataclass
class Reading:
    """A question about an image, the true answer if it is known, and each contender's answer."""

    image: Image.Image
    question: str
    truth: str | None = None
    told: dict[str, str] = field(default_factory=dict)


@dataclass
class Drawn:
    """A prompt, and each contender's drawing and seconds."""

    prompt: str
    images: dict[str, Image.Image] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def read_all(pair: list[Contender], readings: list[Reading]) -> None:
    """Asks both contenders every question, and stores their answers in `readings`."""
    for contender in pair:
        for reading in tqdm(readings, desc=f"{contender.name} reads", leave=False):
            reading.told[contender.name] = answer(contender, [reading.image], [reading.question], max_new_tokens=64)[0]


def draw_all(pair: list[Contender], drawings: list[Drawn], args: QuickstartArguments) -> dict[str, float]:
    """Draws every prompt with both contenders in turn, one at a time, and stores the images in `drawings`.

    Each contender warms up by two steps: a whole drawing of a large base takes minutes on a CPU.

    Returns:
        Each contender's mean seconds an image.
    """
    sampling = sampling_of(args.temperature, args.guidance_scale)
    for contender in pair:
        warm_up(contender)
    for index, drawn in enumerate(tqdm(drawings, desc="draw, in turn", leave=False)):
        for contender in pair:
            torch.manual_seed(args.seed + index)
            (drawn.images[contender.name],), drawn.seconds[contender.name] = draw(contender, [drawn.prompt], **sampling)
    return {contender.name: sum(drawn.seconds[contender.name] for drawn in drawings) / len(drawings) for contender in pair}


def shipped_pictures() -> list[Reading]:
    """The shipped pictures of one style, and their captions."""
    rows = map(json.loads, (PICTURES / "metadata.jsonl").read_text().splitlines())
    of_style = [row for row in rows if row["style"] == STYLE]
    return [Reading(load_image(str(PICTURES / row["file_name"])), CAPTION_REQUEST, row["text"]) for row in of_style]


def print_table(pair: list[Contender], readings: list[Reading], drawings: list[Drawn], seconds: dict[str, float]) -> None:
    """Prints one line per figure: base, adapter, ratio."""
    base, adapter = (contender.name for contender in pair)
    rows = [("tokens an image, read", *(read_tokens(contender.processor) for contender in pair), "{:.0f}")]
    if why_no_drawing(pair[0]) is None:
        rows.append(("model steps an image, drawn", *(drawn_steps(contender) for contender in pair), "{:.0f}"))
    known = [reading for reading in readings if reading.truth is not None]
    if known:
        right = [sum(split_words(r.told[name]) == split_words(r.truth) for r in known) / len(known) for name in (base, adapter)]
        rows.append((f"captions told right (of {len(known)})", *right, "{:.0%}"))
    if seconds:
        rows.append(("seconds an image, batch 1", seconds[base], seconds[adapter], "{:.3f}"))
    print(f"\n{'':32}{base:>10}{adapter:>10}{'ratio':>10}")
    for name, dense_figure, short_figure, form in rows:
        ratio = f"{dense_figure / short_figure:.2f}" if short_figure else "-"
        print(f"{name:32}{form.format(dense_figure):>10}{form.format(short_figure):>10}{ratio:>10}")


def picture(pair: list[Contender], readings: list[Reading], drawings: list[Drawn], path: str) -> None:
    """Writes a picture: drawings at the top, base over adapter, and below them the images read, with both answers."""
    blocks, readings = [drawings[first : first + COLUMNS] for first in range(0, len(drawings), COLUMNS)], readings[:COLUMNS]
    columns, rows = max(2, *map(len, [*blocks, readings])), 2 * len(blocks) + (1 if readings else 0)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")

    def wrap(text: str) -> str:
        return textwrap.fill(text, 28)

    for first, block in enumerate(blocks):
        for column, drawn in enumerate(block):
            for place, contender in enumerate(pair):
                axis = axes[2 * first + place][column]
                axis.imshow(drawn.images[contender.name])
                label = f"{contender.name}: {drawn_steps(contender)} steps, {drawn.seconds[contender.name]:.2f} s"
                axis.set_title(label if place else f"{wrap(drawn.prompt)}\n{label}", fontsize=8)
    for column, reading in enumerate(readings):
        axis = axes[rows - 1][column]
        axis.imshow(reading.image)
        lines = [reading.question, *(f"{contender.name}: {reading.told[contender.name]}" for contender in pair)]
        axis.set_title("\n".join(wrap(line) for line in lines), fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"\nwrote {Path(path).resolve()}")


def check(args: QuickstartArguments) -> None:
    """Exits with one line, before anything is loaded, on arguments that cannot work."""
    if (args.image is None) != (args.question is None):
        raise SystemExit(f"--image {args.image} and --question {args.question}: expected both, or neither.")
    for name in ("prompt", "question"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            raise SystemExit(f"--{name} is empty; expected a text.")
    check_sampling(args.temperature, args.guidance_scale, args.seed)
    output = Path(args.output)
    if not output.parent.is_dir():
        raise SystemExit(f"--output {output}: the folder {output.parent} does not exist. Create it first.")
    formats = FigureCanvasAgg.get_supported_filetypes()
    if output.is_dir() or output.suffix[1:] not in formats:
        raise SystemExit(f"--output {output}: expected a file that ends in one of .{', .'.join(sorted(formats))}.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise SystemExit(
            f"--device {args.device}: {str(error).splitlines()[0]} Expected cpu, or a device of this machine."
        ) from None


def load_image(path: str) -> Image.Image:
    """Loads an image file as the recipes train on it: upright, RGB, transparent parts on white."""
    try:
        return open_picture(path)
    except InputError as error:
        raise SystemExit(f"--image {error}") from None


def check_texts(base: str, prompts: list[str], questions: list[str]) -> None:
    """Looks at prompts and questions with the base's processor alone: its weights may be gigabytes.

    Warns of words that the base does not know.

    Raises:
        SystemExit: The processor cannot be loaded, the base cannot draw or answer, or a text is too long.
    """
    try:
        processor = load_processor(base)
        context = AutoConfig.from_pretrained(base).get_text_config().max_position_embeddings
        family = family_of_processor(processor)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--base {base}: {str(error).splitlines()[0]}") from None
    if prompts and (reason := family.why_no_drawing or family.why_no_pixels):
        raise SystemExit(f"{base} cannot draw: {reason}. Expected --image and --question, without --prompt.")
    if questions and (reason := family.why_no_answers):
        raise SystemExit(f"{base} cannot answer: {reason}. Expected --prompt, without --image and --question.")
    room = context - read_tokens(processor)  # an image to draw takes about as many
    for name, texts in (("prompt", prompts), ("question", questions)):
        for text in texts:
            if (count := len(processor.tokenizer(text)["input_ids"])) > room:
                raise SystemExit(
                    f"--{name} has {count} tokens; expected at most {room}, which the base has room for. Shorten it."
                )
    if unknown := unknown_words(processor.tokenizer, [*prompts, *questions]):
        words = ", ".join(unknown)
        print(f"warning: the model does not know {words}; it reads each as the same unknown word.", file=sys.stderr)


def load(args: QuickstartArguments) -> list[Contender]:
    """Loads base and adapter; exits with one line if that fails."""
    try:
        return contenders(args.base, args.adapter, args.device, args.codes_per_step, args.stride)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--base {args.base} with --adapter {args.adapter}: {error}") from None


def main(args: QuickstartArguments) -> None:
    check(args)
    readings = [] if args.image is None else [Reading(load_image(args.image), args.question)]
    drawings = [] if args.prompt is None else [Drawn(args.prompt)]
    if not readings and not drawings:
        readings, drawings = shipped_pictures(), [Drawn(f"{thing}, {STYLE} style") for thing in THINGS]
    # Janus warns at every answer that max_new_tokens overrides max_length, which is only at its default (20)
    transformers.logging.set_verbosity_error()
    check_texts(args.base, [drawn.prompt for drawn in drawings], [reading.question for reading in readings])
    torch.manual_seed(args.seed)
    pair = load(args)
    pair[1].model.merge_if_room()
    read_all(pair, readings)
    seconds = draw_all(pair, drawings, args) if drawings else {}
    for reading in readings:
        answers = ", ".join(f"{name}: {said!r}" for name, said in reading.told.items())
        print(f"{reading.question} {answers}" + ("" if reading.truth is None else f" (truth: {reading.truth!r})"))
    print_table(pair, readings, drawings, seconds)
    picture(pair, readings, drawings, args.output)


if __name__ == "__main__":
    main(*TrlParser(QuickstartArguments).parse_args_and_config())
