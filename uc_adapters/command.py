"""The command `uc-adapters`: draws, answers questions about pictures, and shows what an adapter is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor

from .config import UniCompressConfig
from .errors import InputError, UnsupportedError
from .families import family_of_processor
from .files.folder import find_weights, read_config
from .files.pull import pull
from .hub.card import ratios_of, token_counts
from .model import UniCompressModel
from .pictures import open_picture, to_pil
from .version import __version__

EXAMPLES = """examples:
  uc-adapters info org/janus-uc4x
  uc-adapters draw org/janus-uc4x "A fox in the snow." --output fox.png
  uc-adapters ask org/janus-uc4x fox.png "What animal is it?"
  uc-adapters draw model_cards/tiny-janus-uc4x "a red 3 at the top left" --base_model model_cards/tiny-janus --guidance_scale 2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 after an error of one line on stderr; wrong usage exits with 2."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:  # all errors of this package are ValueErrors
        print(f"uc-adapters: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def draw(args: argparse.Namespace) -> None:
    """Draws one prompt and writes the pictures."""
    files = _output_files(Path(args.output), args.count)
    if not args.prompt.strip():
        raise InputError("The prompt is empty; expected a text that says what to draw.")
    if args.negative_prompt is not None and not args.negative_prompt.strip():
        raise InputError("--negative_prompt is empty; expected a text. Leave it out to lead away from nothing.")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}; expected a whole number from 0 to 2**63 - 1.")
    folder = _adapter_folder(args)
    processor = AutoProcessor.from_pretrained(folder)
    kind = family_of_processor(processor)  # tells what fails before gigabytes of a base are loaded
    if kind.why_no_drawing:
        raise UnsupportedError(f"The base of {args.adapter} cannot draw: {kind.why_no_drawing}. Use `uc-adapters ask`.")
    if kind.why_no_pixels:
        raise UnsupportedError(
            f"The base of {args.adapter} draws codes, and no pixels: {kind.why_no_pixels}. The adapter's card shows how."
        )
    UniCompressConfig.from_pretrained(folder).strip_length(args.codes_per_step)  # raises InputError for one that is not trained
    model = _load_model(folder, args)
    model.merge_if_room()
    family = model.family
    turn = {"role": "user", "content": [{"type": "text", "text": args.prompt}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    inputs = family.prompt_inputs(processor, [text]).to(family.device)
    names = ("guidance_scale", "temperature", "codes_per_step")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.negative_prompt is not None:
        options["negative_prompt_ids"] = processor.tokenizer(args.negative_prompt, return_tensors="pt").input_ids.to(
            family.device
        )
    if args.seed is not None:
        options["generator"] = torch.Generator(family.device).manual_seed(args.seed)
    tokens = model.generate(
        **inputs, generation_mode="image", do_sample=True, num_return_sequences=args.count, progress=True, **options
    )
    (grid,) = family.prompt_grids(1, inputs.get("image_sizes"))
    for image, file in zip(to_pil(processor, family.to_pixels(tokens, grid)), files, strict=True):
        image.save(file)
        print(file)


def ask(args: argparse.Namespace) -> None:
    """Answers a question about a picture."""
    if not args.question.strip():
        raise InputError("The question is empty; expected a text.")
    image = open_picture(args.image)
    folder = _adapter_folder(args)
    processor = AutoProcessor.from_pretrained(folder)
    if why_no_answers := family_of_processor(processor).why_no_answers:
        raise UnsupportedError(f"The base of {args.adapter} cannot answer: {why_no_answers}. Draw with UniCompressModel.")
    model = _load_model(folder, args)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=[image], return_tensors="pt").to(model.family.device)
    count, context = inputs["input_ids"].shape[1], model.family.base.config.get_text_config().max_position_embeddings
    if count >= context:
        raise InputError(f"Picture and question have {count} tokens; expected fewer than {context}, the base's context.")
    answer = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


def info(args: argparse.Namespace) -> None:
    """Prints what an adapter is. Its files are checked as loading checks them; the base is not loaded."""
    folder = pull(args.adapter)
    config, written = UniCompressConfig.from_pretrained(folder), read_config(folder)
    with safe_open(find_weights(folder), framework="pt") as file:
        count = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    megabytes = (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size / 1e6
    commit = f" at commit {config.revision[:8]}" if config.revision else ""
    lines = [
        ("adapter", args.adapter),
        ("base", f"{config.base_model_name_or_path or 'not named'}{commit} ({written['base_geometry']['model_type']})"),
        ("decompressor", f"{config.decompressor}, {config.decompressor_layers} layers, width {config.decompressor_width}"),
        *ratios_of(written).items(),
        ("global tokens", f"{config.num_global_tokens}{', in front of drawings, too' if config.drawing_global_tokens else ''}"),
        ("LoRA", f"rank {config.r}, alpha {config.lora_alpha:g}" if config.target_modules else "none"),
        *((what, f"{compact}, the base {base}") for what, base, compact in token_counts(written)),
        ("size", f"{count:,} parameters, {megabytes:.1f} MB"),
        ("seal", "intact" if written.get("seal") else "none"),
        ("saved by", f"uc-adapters {config.uc_adapters_version}, format {config.format_version}"),
    ]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:{width}}  {value}" for name, value in lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="uc-adapters", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"uc-adapters {__version__}")
    commands = parser.add_subparsers(required=True, metavar="draw | ask | info")

    of_model = argparse.ArgumentParser(add_help=False)
    of_model.add_argument("adapter", help="the adapter: a folder, or a Hub id")
    of_model.add_argument("--base_model", help="the base: a folder, or a Hub id; default: the one that the adapter names")
    of_model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    of_model.add_argument("--dtype", default="auto", help="of the base: float32, bfloat16, float16; default: its own")

    drawing = commands.add_parser("draw", parents=[of_model], help="draw a picture of a prompt")
    drawing.add_argument("prompt", help="what to draw")
    drawing.add_argument("--output", default="drawing.png", help="the file to write; default: %(default)s")
    drawing.add_argument("--count", type=int, default=1, help="how many pictures; default: %(default)s")
    drawing.add_argument("--seed", type=int, help="for the same pictures again")
    drawing.add_argument("--guidance_scale", type=float, help="strength of guidance; default: the base's own")
    drawing.add_argument("--temperature", type=float, help="below 1 for likelier codes; default: the base's own")
    drawing.add_argument("--codes_per_step", type=int, help="codes in a step, if the adapter is trained for several")
    drawing.add_argument("--negative_prompt", help="what guidance leads away from")
    drawing.set_defaults(run=draw)

    asking = commands.add_parser("ask", parents=[of_model], help="ask a question about a picture")
    asking.add_argument("image", help="a picture file")
    asking.add_argument("question", help="the question")
    asking.add_argument("--max_new_tokens", type=int, default=256, help="longest answer, in tokens; default: %(default)s")
    asking.set_defaults(run=ask)

    showing = commands.add_parser("info", help="show base, sizes and token counts of an adapter")
    showing.add_argument("adapter", help="the adapter: a folder, or a Hub id")
    showing.set_defaults(run=info)
    return parser


def _adapter_folder(args: argparse.Namespace) -> Path:
    """The adapter's folder, pulled if it is on the Hub. What can be known before weights are loaded is checked.

    Raises:
        HubError, AdapterFileError: There is no adapter.
        InputError: The device is not there.
    """
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise InputError(
            f"--device {args.device}: {str(error).splitlines()[0]} Expected cpu, or a device of this machine."
        ) from None
    folder = pull(args.adapter)
    read_config(folder)
    return folder


def _load_model(folder: Path, args: argparse.Namespace) -> UniCompressModel:
    """Loads the adapter in a folder on its base."""
    return UniCompressModel.from_pretrained(folder, base_model=args.base_model, dtype=args.dtype, device_map=args.device).eval()


def _output_files(output: Path, count: int) -> list[Path]:
    """The files to write: OUTPUT, or OUTPUT-1, OUTPUT-2, ... for several.

    Raises:
        InputError: There would be none, PIL cannot write their format, their folder does not exist, or they are folders.
    """
    if count < 1:
        raise InputError(f"--count {count}; expected 1 or more.")
    formats = sorted(suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE)
    if output.suffix.lower() not in formats:
        raise InputError(f"--output {output} ends in {output.suffix!r}; expected a picture's ending, such as .png or .jpg.")
    if not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist. Make it first.")
    files = [output] if count == 1 else [output.with_stem(f"{output.stem}-{place}") for place in range(1, count + 1)]
    if folder := next((file for file in files if file.is_dir()), None):
        raise InputError(f"--output: {folder} is a folder; expected a file to write. Choose another name.")
    return files
