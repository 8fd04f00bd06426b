"""Drawing in the compact domain: N + T / s^2 sampled steps of the language model, then dense tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMode

from .code_head import CodeHead, Sampler
from .errors import BaseModelError, InputError, UnsupportedError
from .families import Family
from .layers import Grid, compact_grid
from .sampling import CodeSampler
from .steps import Steps
from .tuner_layers import ReadLayer

# Fields of a generation config that ask for another way to generate than greedy decoding and sampling, with what asks for none
MODES = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "constraints": None,
    "force_words_ids": None,
    "prompt_lookup_num_tokens": None,
    "use_mtp": False,
    "assistant_early_exit": None,
    "dola_layers": None,
    "penalty_alpha": None,
}


def left_pad(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the padding of every row (B, L) to its left, the order of its tokens kept."""
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask of shape {tuple(attention_mask.shape)} for input_ids of shape {tuple(input_ids.shape)}; expected "
            "the same. Pass on both as the processor returns them."
        )
    order = attention_mask.argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


@torch.no_grad()
def draw(
    head: CodeHead,
    read_layer: ReadLayer,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    image_sizes: torch.Tensor | None = None,
    negative_prompt_ids: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress: bool | Callable[[], object] = False,
    **kwargs,
) -> torch.Tensor:
    """Draws one image a prompt: what `UniCompressModel.generate(..., generation_mode="image")` does.

    Only codes are ever sampled: the base's own constraint, where its codes are words among others.

    Args:
        drawing: The active adapter's drawing side.
        reading: Its reading side.
        input_ids: Prompts (B, L), each ending in the image's begin, as the processor prepares prompts to draw.
        attention_mask: (B, L); padding on either side.
        pixel_values: Images that the prompts contain, to read. Not where images have any size: those prompts are words.
        image_sizes: Where images have any size, the rows and columns of each in tokens, (B, 2), as the processor gives them.
        negative_prompt_ids: What guidance leads away from, (1, L') or (B, L'). Default: the prompt without its words. Where
            they do not end in an image's begin, the frame of the prompt's own image follows.
        negative_prompt_attention_mask: (1, L') or (B, L').
        generation_config: Defaults to the base's. `guidance_scale` > 1 draws with classifier-free guidance.
        logits_processor: Applied to every code's logits (B, K), after guidance and the generation config's own processors.
        generator: Source of randomness for `do_sample=True`; default torch's global one. A list has one for each prompt: its
            drawings are then those of the prompt drawn alone with it. On a CPU that holds bit for bit, since each prompt is
            then drawn by itself, and takes the time of that. On other devices the batch is drawn at once: the random numbers
            are the same, but matrix products of another batch size round differently, which can turn a close choice.
        progress: True shows a bar over the steps. A function is called behind each step instead. Default False.
        **kwargs: Fields of the generation config: `do_sample`, `temperature`, `top_k`, `top_p`, `guidance_scale`,
            `num_return_sequences`, `suppress_tokens`, ...; `cache_implementation`, `compile_config` and `disable_compile`, see
            `Steps`. Where they hold tokens, these are codes. An image has the length of its grid, so what bounds the length of
            a text (`max_new_tokens`, `min_new_tokens`, ...) changes nothing.

    Returns:
        Tokens of the dense images (B * num_return_sequences, T') for the base's `decode_image_tokens`, as the base itself
        would have drawn them; images of fewer tokens than the largest are padded on the right.

    Raises:
        InputError: A prompt that is empty or does not end in the image's begin, a size that the stride does not divide, an
            unknown argument, a number that is none, placeholders in a negative prompt, generators that are not one a prompt,
            or codes for which there was nothing to draw from: scores that are not finite, or processors that forbid all.
        UnsupportedError: Beam search, structured outputs, a logits processor that works on texts alone, a cache that is neither
            "dynamic" nor "static", or a model in training that checkpoints its gradients.
        BaseModelError: The language model's states are no finite numbers.
    """
    family, base = head.family, head.family.base
    if base.training and base.is_activation_checkpointing:
        raise UnsupportedError("Drawing while training with gradient checkpointing keeps no cache; call model.eval() first.")
    config = _drawing_config(base, generation_config, kwargs)
    base._prepare_special_tokens(config, True, device=input_ids.device)
    config._eos_token_tensor = input_ids.new_empty(0)  # no code ends an image: nothing has to keep one from ending
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    input_ids, attention_mask = left_pad(input_ids, attention_mask)
    _check_prompts(family, input_ids, attention_mask, config)
    grids = family.prompt_grids(len(input_ids), image_sizes)
    for grid in set(grids):
        compact_grid(grid, head.module.stride)  # raises where the stride does not divide it
    negative = _negative_prompts(family, input_ids, config, negative_prompt_ids, negative_prompt_attention_mask)
    generators = _generators(generator, input_ids)
    if isinstance(generator, list) and len(input_ids) > 1 and input_ids.device.type == "cpu":
        options = {"generation_config": generation_config, "logits_processor": logits_processor, "progress": progress, **kwargs}
        parts = _prompts_alone(family, input_ids, attention_mask, pixel_values, image_sizes, negative)
        drawn = [
            draw(head, read_layer, **part, generator=[own], **options) for part, own in zip(parts, generators, strict=True)
        ]
        return _padded([tokens for of_prompt in drawn for tokens in of_prompt], config)
    guidance = family.default_guidance if config.guidance_scale is None else config.guidance_scale
    config.guidance_scale = None  # ours is the first processor; a second one must not be made of it
    guided = guidance > 1

    prompts = read_layer.embed_prompt(input_ids, pixel_values, None, input_ids == family.image_token_id)  # (B, L, D)
    if guided:
        blank, blank_mask = negative or (family.unconditional(input_ids, config), attention_mask)  # (B, L')
        blank = base.get_input_embeddings()(blank)
        length = max(prompts.shape[1], blank.shape[1])
        prompts, blank = (F.pad(part, (0, 0, length - part.shape[1], 0)) for part in (prompts, blank))
        attention_mask, blank_mask = (F.pad(part, (length - part.shape[1], 0)) for part in (attention_mask, blank_mask))

    sampling = {"base": base, "config": config, "processors": logits_processor}
    repeats = int(config.num_return_sequences)
    tokens: dict[int, torch.Tensor] = {}
    for grid in dict.fromkeys(grids):  # images of one size are drawn at once
        of_grid = [row for row, of_row in enumerate(grids) if of_row == grid]
        rows = torch.tensor(of_grid).repeat_interleave(repeats)
        inputs, mask, ids = prompts[rows], attention_mask[rows], input_ids[rows]
        if guided:  # twice as many: with the prompt, and with the blank one
            inputs, mask = torch.cat([inputs, blank[rows]]), torch.cat([mask, blank_mask[rows]])
        own = [generators[row] for row in of_grid] if isinstance(generator, list) else generators
        sampling |= {"prompts": ids, "generators": own}
        guided_sample = CodeSampler(guidance=guidance if guided else None, **sampling)
        globals_, steps, won = _draw_compact(head, inputs, mask, grid, guided_sample, config, progress)
        plain_sample = CodeSampler(guidance=None, **sampling)
        codes = head.expand(globals_[: len(rows)], steps[: len(rows)], grid, _noting(plain_sample, won))
        _check_won(won)
        places = [int(row) * repeats + index % repeats for index, row in enumerate(rows)]
        tokens.update(zip(places, family.to_tokens(codes, grid), strict=True))
    return _padded([tokens[place] for place in range(len(tokens))], config)


def _padded(tokens: list[torch.Tensor], config: GenerationConfig) -> torch.Tensor:
    """Tokens of images (T',) each, padded on the right, (B, T')."""
    return pad_sequence(tokens, batch_first=True, padding_value=config.pad_token_id or 0)


def _drawing_config(base: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict) -> GenerationConfig:
    """The config that `generate` makes of its arguments; an error where it asks for what drawing does not do."""
    for fields in (vars(generation_config or base.generation_config), kwargs):
        _check_numbers(fields)
    config, left = base._prepare_generation_config(generation_config, **kwargs)
    unknown = sorted(name for name, value in left.items() if value is not None)
    if unknown:
        raise InputError(
            f"generate(generation_mode='image') got {', '.join(unknown)}; expected fields of the generation config, input_ids, "
            "attention_mask, pixel_values, image_sizes, negative_prompt_ids, negative_prompt_attention_mask, logits_processor, "
            "generator or progress. Remove these arguments: sampling is already restricted to image codes."
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        asked = [f"{name}={value!r}" for name, none in MODES.items() if (value := getattr(config, name)) not in (None, none)]
        raise UnsupportedError(
            f"{', '.join(asked)} asks for {mode.value.replace('_', ' ')}, which cannot draw images; expected greedy decoding "
            "or sampling (num_beams=1). Remove it; do_sample=True with num_return_sequences makes several drawings."
        )
    limits = [f"{name}={value!r}" for name in ("max_time", "stop_strings") if (value := getattr(config, name)) is not None]
    if limits:
        raise UnsupportedError(f"{', '.join(limits)} cannot stop an image: half of one has no pixels. Remove it.")
    if config.return_dict_in_generate:
        raise UnsupportedError("return_dict_in_generate=True; expected False: drawing returns the dense tokens alone.")
    config.validate()
    return config


def check_finite(fields: dict) -> None:
    """Raises InputError for NaN and infinity among the fields of a generation config, which compares them with its bounds."""
    infinite = sorted(name for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value))
    if infinite:
        raise InputError(f"{infinite[0]}={fields[infinite[0]]}; expected a finite number.")


def _check_numbers(fields: dict) -> None:
    check_finite(fields)
    guidance, count = fields.get("guidance_scale"), fields.get("num_return_sequences")
    if guidance is not None and not (isinstance(guidance, Real) and guidance >= 0):
        raise InputError(f"guidance_scale={guidance!r}; expected a number, 0 or more. Up to 1 it draws without guidance.")
    if count is not None and not (isinstance(count, Integral) and count >= 1):
        raise InputError(f"num_return_sequences={count!r}; expected a whole number, 1 or more.")


def _generators(generator: torch.Generator | list[torch.Generator] | None, input_ids: torch.Tensor) -> list[torch.Generator]:
    """None, one for all prompts, or one for each."""
    if generator is None:
        return []
    generators, count = (generator, len(input_ids)) if isinstance(generator, list) else ([generator], 1)
    if not all(isinstance(own, torch.Generator) for own in generators) or len(set(map(id, generators))) != count:
        raise InputError(
            f"generator={generator!r} for {len(input_ids)} prompt(s); expected a torch.Generator, or a list with another one "
            "for each prompt: [torch.Generator(device).manual_seed(seed) for seed in seeds]."
        )
    return generators


def _prompts_alone(
    family: Family,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixel_values: torch.Tensor | None,
    image_sizes: torch.Tensor | None,
    negative: tuple[torch.Tensor, torch.Tensor] | None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Arguments of `draw` for each prompt by itself, without the padding that the batch gave it."""
    counts = (input_ids == family.image_token_id).sum(1)  # (B,)
    if pixel_values is not None:
        counts = counts // (counts.sum() // len(pixel_values))  # of images
    images = None if pixel_values is None else pixel_values.split(counts.tolist())
    for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        alone = {"input_ids": ids[mask.bool()][None]}
        if counts[row]:
            alone["pixel_values"] = images[row]
        if image_sizes is not None:
            alone["image_sizes"] = image_sizes[row : row + 1]
        if negative is not None:
            alone["negative_prompt_ids"] = negative[0][row][negative[1][row].bool()][None]
        yield alone


def _draw_compact(
    head: CodeHead,
    prompts: torch.Tensor,
    mask: torch.Tensor,
    grid: Grid,
    sample: CodeSampler,
    config: GenerationConfig,
    progress: bool | Callable[[], object],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The language model's loop: global codes (B, N) and steps (B, T', k); and the scores that won them, (B,) each."""
    family, module = head.family, head.module
    count, (rows, columns) = module.num_global_codes, compact_grid(grid, module.stride)
    eol = family.eol.expand(len(prompts), 1, -1) if family.has_eol else None
    position_deltas = head.position_deltas(grid)  # (N + 1 + T',)
    if family.has_eol:
        front, of_steps = position_deltas[: count + 1], position_deltas[count + 1 :].unflatten(0, (rows, columns))
        position_deltas = torch.cat([front, F.pad(of_steps, (0, 1), value=1).flatten()])  # with the end of each row of steps
    step = Steps(family, mask, position_deltas, config)
    # A generator cannot be compiled: its codes are then drawn as they are uncompiled, and the language model alone is
    draw_step = _draw_step if sample.generators else step.compiled(_draw_step)
    won: list[torch.Tensor] = []

    bar = tqdm(total=count + rows * columns, desc="draw", disable=progress is not True)
    advance = progress if callable(progress) else bar.update
    inputs = prompts
    globals_ = torch.empty(len(prompts), count, dtype=torch.long, device=prompts.device)
    for index in range(count):
        codes = _noting(sample, won)(family.code_logits(step(inputs)))
        globals_[:, index] = codes
        inputs = family.embed_codes(codes).unsqueeze(1)
        advance()
    # The separator is known, as a row's end is: it rides along with the token before it and costs no step.
    inputs = torch.cat([inputs, head.separator.expand(len(inputs), 1, -1)], 1)
    steps = globals_.new_empty(len(prompts), rows * columns, head.codes_per_step)
    entries = head.entries(globals_)
    for index in range(rows * columns):
        if index:
            inputs = head.embed_steps(steps[:, index - 1 : index])  # (B, 1, k) -> (B, 1, D)
            if family.has_eol and index % columns == 0:
                inputs = torch.cat([inputs, eol], 1)
        hidden = step(inputs)
        steps[:, index], of_step = draw_step(head, hidden, entries, sample)
        won.append(of_step.clone())  # a CUDA graph's output is overwritten
        advance()
    bar.close()
    if not bool(hidden.isfinite().all()):  # once, behind the loop: keys and values that are no numbers spoil all that follows
        raise BaseModelError(
            f"The language model's last states are no finite numbers in {hidden.dtype}; expected numbers. Load the base with "
            "dtype=torch.bfloat16 or torch.float32, and check its weights."
        )
    return globals_, steps, won


def _draw_step(
    head: CodeHead, hidden: torch.Tensor, entries: torch.Tensor, sample: CodeSampler
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of the next step (B, k), and the scores that won them, (k, B)."""
    won: list[torch.Tensor] = []
    codes = head.draw_step(hidden, entries, _noting(sample, won))
    return codes, torch.stack(won)


def _noting(sample: CodeSampler, won: list[torch.Tensor]) -> Sampler:
    """A sampler of codes alone, which leaves the scores that won them in `won`."""

    def pick(logits: torch.Tensor) -> torch.Tensor:
        codes, scores = sample(logits)
        won.append(scores)
        return codes

    return pick


def _check_won(won: list[torch.Tensor]) -> None:
    """Raises InputError unless every code won by a number; looked at once a drawing, since a look waits for the device."""
    if not bool(torch.cat([scores.flatten() for scores in won]).isfinite().all()):
        raise InputError(
            "There was nothing to draw a code from: all codes were forbidden, or their scores were NaN or infinite. Nothing is "
            "returned. Check suppress_tokens, bad_words_ids, sequence_bias and logits_processor; without them, the weights of "
            "the adapter or of the base's code head are not finite: load them again."
        )


def _negative_prompts(
    family: Family,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    negative_ids: torch.Tensor | None,
    negative_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Negative prompts, each in front of its image's frame: ids and mask (B, L'); None where there are none."""
    if negative_ids is None:
        return None
    count = len(input_ids)
    if negative_ids.ndim != 2 or negative_ids.shape[0] not in (1, count) or negative_ids.shape[1] == 0:
        raise InputError(
            f"negative_prompt_ids of shape {tuple(negative_ids.shape)} for {count} prompt(s); expected ({count}, tokens), or "
            "one row for all."
        )
    if negative_mask is None:
        negative_mask = torch.ones_like(negative_ids)
    if negative_mask.shape != negative_ids.shape:
        raise InputError(
            f"negative_prompt_attention_mask of shape {tuple(negative_mask.shape)}; expected that of negative_prompt_ids, "
            f"{tuple(negative_ids.shape)}."
        )
    if bool((negative_ids == family.image_token_id).any()):
        raise InputError(
            f"negative_prompt_ids hold image placeholders (token {family.image_token_id}); expected words alone: a negative "
            "prompt has no images. Leave them out."
        )
    begin, framed = family.boi_token_id(config), family.wrapper_mask(input_ids, config)
    rows = []
    for ids, frame, words, mask in zip(
        input_ids, framed, negative_ids.expand(count, -1), negative_mask.expand(count, -1), strict=True
    ):
        words = words[mask.bool()]
        behind = frame.flip(0).cumprod(0).flip(0).bool()  # the frame that the prompt ends in: all behind its last word
        rows.append(words if len(words) and words[-1] == begin else torch.cat([words, ids[behind]]))
    ids = pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")


def _check_prompts(family: Family, input_ids: torch.Tensor, attention_mask: torch.Tensor, config: GenerationConfig) -> None:
    words = attention_mask.bool() & ~family.wrapper_mask(input_ids, config)
    empty = (~words.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"Row(s) {empty} hold an empty prompt; expected at least one word before the image's begin.")
    begin = family.boi_token_id(config)
    if not bool((input_ids[:, -1] == begin).all()):
        raise InputError(
            f"A drawing prompt ends in token {input_ids[:, -1].tolist()}; expected the image's begin, {begin}. Prepare "
            f"prompts with the adapter's processor: {family.drawing_snippet.splitlines()[0]}"
        )
