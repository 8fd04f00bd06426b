"""A bare base and an adapter on the same weights, and the calls that are the same for both: answer and draw."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scoring.stock_calls import base_of, calls_of, drawing_inputs
from tiny_world.digits import IMAGE_SIZE
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from uc_adapters import UniCompressConfig, UniCompressModel
from uc_adapters.families import family_of
from uc_adapters.layers import Grid
from uc_adapters.pictures import to_pil


@dataclass
class Contender:
    """A model with the processor that has its number of placeholders.

    `codes_per_step` is the number of codes in a step with which an adapter draws, if it is trained for several. Default: the
    one in the middle.
    """

    name: str
    model: torch.nn.Module
    processor: ProcessorMixin
    codes_per_step: int | None = None


def twin_of(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares every weight. An adapter on the copy leaves the model itself without one."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def contenders(
    base: str,
    adapter: str | None,
    device: str = "cpu",
    codes_per_step: int | None = None,
    stride: int | None = None,
    also: Sequence[str] = (),
) -> list[Contender]:
    """Loads the bare base with transformers and, if there are any, adapters on the same weights, as `with_adapter` does.

    Args:
        also: More adapters, each with the name that `also_names` gives it.
    """
    model = AutoModelForImageTextToText.from_pretrained(base).eval().to(device)
    dense = Contender("base", model, load_processor(base))
    first = [] if adapter is None else [with_adapter(dense, adapter, "adapter", codes_per_step, stride)]
    return [dense, *first, *(with_adapter(dense, source, name) for source, name in zip(also, also_names(also), strict=True))]


def check_adapters(
    adapter: str | None, also: Sequence[str] = (), codes_per_step: int | None = None, stride: int | None = None
) -> None:
    """Looks at the adapters by their configs alone, since models and data may take minutes to load.

    Raises:
        SystemExit: There are ratios and no adapter, or two columns would have one name.
        ValueError: An adapter is not there, or is not trained for the ratios.
    """
    if adapter is None and (codes_per_step, stride) != (None, None):
        raise SystemExit("--codes_per_step or --stride without --adapter, whose ratios they choose; expected one.")
    also_names(also)
    if adapter is not None:
        config = UniCompressConfig.from_pretrained(adapter)
        config.strip_length(codes_per_step)
        config.read_stride(stride)
    for source in also:
        UniCompressConfig.from_pretrained(source)


def also_names(also: Sequence[str]) -> list[str]:
    """The names that head the columns of the adapters of --also: those of their folders.

    Raises:
        SystemExit: Two columns would have one name.
    """
    names = [Path(source).resolve().name for source in also]
    if len({"base", "adapter", *names}) < 2 + len(names):
        raise SystemExit(
            f"--also {' '.join(also)}: expected adapters in folders of different names, none of them base or adapter, "
            "because the names head the columns."
        )
    return names


def with_adapter(
    dense: Contender, adapter: str, name: str, codes_per_step: int | None = None, stride: int | None = None
) -> Contender:
    """Loads an adapter on a bare base's weights, with the ratios at which it is to draw and to read.

    Raises:
        InputError: The adapter is not trained for one of them.
    """
    model = UniCompressModel.from_pretrained(twin_of(dense.model), adapter).eval()
    model.active_peft_config.strip_length(codes_per_step)  # before anything is read
    processor = load_processor(adapter)
    return Contender(name, model, processor if stride is None else model.compact_processor(processor, stride), codes_per_step)


def check_sampling(temperature: float, guidance_scale: float | None, seed: int) -> None:
    """Exits if the sampling options are out of range. `guidance_scale` may be None, the base's own."""
    if not 0 < temperature < float("inf"):
        raise SystemExit(f"--temperature {temperature}: expected a number above 0, because drawings are sampled.")
    if guidance_scale is not None and not 1 < guidance_scale < float("inf"):
        raise SystemExit(f"--guidance_scale {guidance_scale}: expected a number above 1, because drawings are guided.")
    if seed < 0:
        raise SystemExit(f"--seed {seed}: expected 0 or more.")


def sampling_of(temperature: float, guidance_scale: float | None) -> dict:
    """The arguments of `generate` that sample a drawing. If `guidance_scale` is None, `generate` takes the base's own."""
    return {"do_sample": True, "temperature": temperature} | (
        {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    )


def load_processor(source: str) -> ProcessorMixin:
    """Loads the processor in a folder or repo, and checks that it has a chat template."""
    processor = AutoProcessor.from_pretrained(source)
    if processor.chat_template is None:  # Chameleon's processor keeps none, but its tokenizer has the saved one
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise SystemExit(f"{source} has no chat template; expected a file chat_template.jinja beside its processor's.")
    return processor


def why_no_drawing(contender: Contender) -> str | None:
    """The reason why a contender's base cannot draw; None if it can."""
    return family_of(base_of(contender.model)).why_no_drawing


def grid_of(contender: Contender) -> Grid:
    """The grid of the codes that a contender draws."""
    calls = calls_of(contender.model)
    return calls.grid(contender.model, drawing_inputs(contender.processor, ["a red 3"], calls))


def answer(contender: Contender, images: list[Image.Image], questions: list[str], max_new_tokens: int = 16) -> list[str]:
    """The greedy answer to each question about its image."""
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]} for question in questions]
    return reply(contender, [[turn] for turn in asked], images, max_new_tokens)


@torch.no_grad()
def reply(contender: Contender, chats: list[list[dict]], images: list[Image.Image], max_new_tokens: int = 16) -> list[str]:
    """The next turn of each conversation, greedily. `images` are those of all conversations, in order."""
    processor = contender.processor
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
    inputs = inputs.to(contender.model.device, dtype=contender.model.dtype)  # casts pixels; ids stay integers
    output = contender.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


@torch.no_grad()
def draw(contender: Contender, prompts: list[str], **sampling) -> tuple[list[Image.Image], float]:
    """Draws a batch of prompts; also returns the seconds to pixels: language model, decompressor, image decoder."""
    model = contender.model
    calls = calls_of(model)
    inputs = drawing_inputs(contender.processor, prompts, calls).to(model.device)
    if contender.codes_per_step is not None:
        sampling |= {"codes_per_step": contender.codes_per_step}
    start = time.perf_counter()
    tokens = calls.draw(model, inputs, **sampling)
    pixels = family_of(base_of(model)).to_pixels(tokens, calls.grid(model, inputs))
    if pixels.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return to_pil(contender.processor, pixels), seconds


def read_tokens(processor: ProcessorMixin) -> int:
    """The number of tokens that the language model reads of a scene: placeholders, and EOL tokens if there are any."""
    tokenizer = processor.tokenizer
    block = processor.replace_image_token({"image_sizes": [[IMAGE_SIZE, IMAGE_SIZE]]}, 0)
    of_image = {tokenizer.convert_tokens_to_ids(processor.image_token), getattr(tokenizer, "eol_token_id", None)}
    return sum(token in of_image for token in tokenizer(block)["input_ids"])


def drawn_steps(contender: Contender) -> int:
    """The number of steps of the language model to draw a scene."""
    grid = grid_of(contender)
    if not isinstance(contender.model, UniCompressModel):
        return family_of(contender.model).dense_placeholders(grid)
    return contender.model.active_peft_config.num_gen_steps(grid, contender.codes_per_step)


def draw_in_turn(
    pair: list[Contender], captions: list[str], seed: int, batch_size: int, **sampling
) -> Iterator[tuple[slice, Contender, list[Image.Image], float]]:
    """Draws each batch with every contender, from the same seed, after a warm-up each; yields images and seconds."""
    seeds = np.random.default_rng(seed).integers(2**31, size=len(captions)).tolist()
    for contender in pair:
        draw(contender, captions[:batch_size], **sampling)
    for first in tqdm(range(0, len(captions), batch_size), desc="draw, in turn"):
        batch = slice(first, first + batch_size)
        for contender in pair:
            torch.manual_seed(seeds[first])
            yield batch, contender, *draw(contender, captions[batch], **sampling)


def side_by_side(scores: dict[str, dict]) -> dict[str, dict]:
    """Turns {contender: {score: value}} into {score: {contender: value}}."""
    return {what: {name: values[what] for name, values in scores.items()} for what in next(iter(scores.values()))}
