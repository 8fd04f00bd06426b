"""Generates images in compact form: N + T / s^2 sampled steps of the language model, then the dense tokens."""

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
from .images import Images
from .layers import Grid
from .positions import dense_reading, sequence_positions
from .sampling import CodeSampler
from .steps import Steps
from .tuner_layers import ReadLayer

# Fields of a generation config that ask for other methods than greedy decoding and sampling, with the value that does not
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
    """Moves the padding of every row (B, L) to the left, and keeps the order of its tokens."""
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
    gen_image_sizes: torch.Tensor | None = None,
    negative_prompt_ids: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress: bool | Callable[[], object] = False,
    **kwargs,
) -> torch.Tensor:
    """Generates one image for each prompt; `UniCompressModel.generate(..., generation_mode="image")` calls it.

    Only image codes are sampled, also when they share one vocabulary with the text tokens, as in the base's own generation.

    Args:
        head: The active adapter's code head.
        read_layer: The layer that compresses the images to read.
        input_ids: Prompts (B, L). Each ends in the token that begins an image, as the processor prepares prompts to draw.
        attention_mask: (B, L), with padding on either side. Default: no padding.
        pixel_values: The images in the prompts, which the model reads.
        image_sizes: The rows and columns of each image to draw, in tokens, (B, 2), as the processor gives them, if the base
            draws images of any size. With `gen_image_sizes`, the sizes in pixels of the images in the prompts, (N, 2).
        gen_image_sizes: Height and width in pixels of each image to draw, (B, 2), if the processor gives them.
        negative_prompt_ids: Prompts that guidance leads away from, (1, L') or (B, L'). Default: the prompt without its text
            tokens. If they do not end in the token that begins an image, the wrapper tokens at the end of the prompt are added.
        negative_prompt_attention_mask: (1, L') or (B, L').
        generation_config: Default: the base's. `guidance_scale` > 1 draws with classifier-free guidance.
        logits_processor: Processors of every code's logits (B, K). They run after guidance and the config's own processors.
        generator: The source of randomness for `do_sample=True`. Default: torch's global one. A list has one generator for each
            prompt. Each drawing is then the one that its prompt gives alone with this generator. On a CPU that holds bit for
            bit: the prompts are drawn one by one, which takes longer. On other devices the batch is drawn at once. The random
            numbers are the same, but matrix products of another batch size round differently, which can change a close choice.
        progress: True shows a progress bar over the steps. A function is called after each step instead. Default False.
        **kwargs: Fields of the generation config: `do_sample`, `temperature`, `top_k`, `top_p`, `guidance_scale`,
            `num_return_sequences`, `suppress_tokens`, ...; for `cache_implementation`, `compile_config` and `disable_compile`
            see `Steps`. Tokens in these fields are codes. The grid sets the length of an image, so fields that limit the length
            of a text (`max_new_tokens`, `min_new_tokens`, ...) have no effect.

    Returns:
        The tokens of the dense images, (B * num_return_sequences, tokens), in the form that the base's own `generate` returns
        and its `decode_image_tokens` takes. The tokens of a preview come before those of its image. Images with fewer tokens
        than the largest are padded on the right.

    Raises:
        InputError: A prompt is empty, is too long for the base, or does not end in the token that begins an image; the stride
            does not divide a size; an argument is unknown; a number is not finite or out of range; a negative prompt has image
            placeholders; the generators are not one for each prompt; or no code could be sampled: scores are not finite, or
            processors forbid all codes.
        UnsupportedError: The arguments ask for beam search, structured outputs, a logits processor that needs text, or a cache
            other than "dynamic" and "static"; or the model is in training mode with gradient checkpointing.
        BaseModelError: The language model's hidden states are not finite.
    """
    family, base = head.family, head.family.base
    if base.training and base.is_activation_checkpointing:
        raise UnsupportedError("Drawing in training mode with gradient checkpointing keeps no cache; call model.eval() first.")
    config = _drawing_config(base, generation_config, kwargs)
    base._prepare_special_tokens(config, True, device=input_ids.device)
    config._eos_token_tensor = input_ids.new_empty(0)  # no code ends an image, so no processor has to forbid an end
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    input_ids, attention_mask = left_pad(input_ids, attention_mask)
    _check_prompts(family, input_ids, attention_mask, config)
    read = Images(pixel_values, None if gen_image_sizes is None else image_sizes)
    drawings = _drawings(family, input_ids, image_sizes if gen_image_sizes is None else gen_image_sizes)
    for grid in {grid for drawing in drawings for grid in drawing}:
        head.count_steps(grid)  # raises InputError if the stride has to divide the grid, and does not
    negative = _negative_prompts(family, input_ids, config, negative_prompt_ids, negative_prompt_attention_mask)
    _check_lengths(head, attention_mask, drawings, "prompt")
    if negative is not None:
        _check_lengths(head, negative[1], drawings, "negative prompt")
    generators = _generators(generator, input_ids)
    if isinstance(generator, list) and len(input_ids) > 1 and input_ids.device.type == "cpu":
        options = {"generation_config": generation_config, "logits_processor": logits_processor, "progress": progress, **kwargs}
        sizes = image_sizes, gen_image_sizes
        parts = _prompts_alone(family, input_ids, attention_mask, read, sizes, negative)
        drawn = [
            draw(head, read_layer, **part, generator=[single], **options)
            for part, single in zip(parts, generators, strict=True)
        ]
        return _padded([tokens for prompt_tokens in drawn for tokens in prompt_tokens], config)
    guidance = family.default_guidance if config.guidance_scale is None else config.guidance_scale
    config.guidance_scale = None  # `CodeSampler` applies guidance itself; the config must not add a second processor for it
    guided = guidance > 1

    places = input_ids == family.image_token_id
    if guided and not family.guides_edits and bool(places.any()):
        raise UnsupportedError(
            f"guidance_scale={guidance} with images in the prompt; expected 1, since a {family.model_type} base edits without "
            "guidance. Remove it."
        )
    prompts = read_layer.embed_prompt(input_ids, pixel_values, read.image_sizes, places)  # (B, L, D)
    dense = dense_reading(family, read, places)
    positions = sequence_positions(attention_mask, dense) if dense else None  # (..., B, L)
    if guided:
        blank, blank_mask = negative or (family.unconditional(input_ids, config), attention_mask)  # (B, L')
        blank = base.get_input_embeddings()(blank)
        length = max(prompts.shape[1], blank.shape[1])
        prompts, blank = (F.pad(part, (0, 0, length - part.shape[1], 0)) for part in (prompts, blank))
        attention_mask, blank_mask = (F.pad(part, (length - part.shape[1], 0)) for part in (attention_mask, blank_mask))

    sampling = {"base": base, "config": config, "processors": logits_processor}
    repeats = int(config.num_return_sequences)
    tokens: dict[int, torch.Tensor] = {}
    for drawing in dict.fromkeys(drawings):  # drawings of one size are drawn at once
        size_rows = [row for row, row_drawing in enumerate(drawings) if row_drawing == drawing]
        rows = torch.tensor(size_rows).repeat_interleave(repeats)
        inputs, mask, ids = prompts[rows], attention_mask[rows], input_ids[rows]
        size_positions = None if positions is None else positions[..., rows, :]
        if guided:  # the batch doubles: first the prompts, then the blank or negative prompts
            inputs, mask = torch.cat([inputs, blank[rows]]), torch.cat([mask, blank_mask[rows]])
        size_generators = [generators[row] for row in size_rows] if isinstance(generator, list) else generators
        sampling |= {"prompts": ids, "generators": size_generators}
        guided_sample = CodeSampler(guidance=guidance if guided else None, **sampling)
        compact, won = _draw_compact(head, inputs, mask, size_positions, drawing, guided_sample, config, progress)
        expand_sample = _noting(CodeSampler(guidance=None, **sampling), won)
        dense_tokens = [
            family.to_tokens(head.expand(globals_[: len(rows)], steps[: len(rows)], grid, expand_sample), grid)
            for grid, (globals_, steps) in zip(drawing, compact, strict=True)
        ]
        _check_won(won)
        places = [int(row) * repeats + index % repeats for index, row in enumerate(rows)]
        tokens.update(zip(places, torch.cat(dense_tokens, 1), strict=True))
    return _padded([tokens[place] for place in range(len(tokens))], config)


def _check_lengths(head: CodeHead, attention_mask: torch.Tensor, drawings: list[tuple[Grid, ...]], name: str) -> None:
    """Raises InputError where a prompt and its image do not fit into the base's context."""
    context = head.family.base.config.get_text_config().max_position_embeddings
    taken = {drawing: int(_fed_deltas(head, drawing).sum(-1).max()) for drawing in set(drawings)}
    for length, drawing in zip(attention_mask.sum(1).tolist(), drawings, strict=True):
        if length + taken[drawing] > context:
            raise InputError(
                f"A {name} of {length} tokens is too long for the base: expected at most {context - taken[drawing]}, since its "
                f"context is {context} tokens and the image takes {taken[drawing]} of them. Shorten the {name}."
            )


def _padded(tokens: list[torch.Tensor], config: GenerationConfig) -> torch.Tensor:
    """Pads the tokens of each image on the right and stacks them, (B, tokens)."""
    return pad_sequence(tokens, batch_first=True, padding_value=config.pad_token_id or 0)


def _drawing_config(base: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict) -> GenerationConfig:
    """Returns the config that `generate` makes of its arguments. Raises an error if drawing cannot do what it asks for."""
    for fields in (vars(generation_config or base.generation_config), kwargs):
        _check_numbers(fields)
    config, left = base._prepare_generation_config(generation_config, **kwargs)
    unknown = sorted(name for name, value in left.items() if value is not None)
    if unknown:
        raise InputError(
            f"generate(generation_mode='image') got {', '.join(unknown)}; expected fields of the generation config, input_ids, "
            "attention_mask, pixel_values, image_sizes, gen_image_sizes, negative_prompt_ids, negative_prompt_attention_mask, "
            "codes_per_step, logits_processor, generator, progress. Remove them: sampling is already restricted to image codes."
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
        raise UnsupportedError(f"{', '.join(limits)} cannot stop an image: an unfinished image cannot be decoded. Remove it.")
    if config.return_dict_in_generate:
        raise UnsupportedError(
            "return_dict_in_generate=True; expected False: drawing returns only the dense tokens. Remove it."
        )
    config.validate()
    return config


def check_finite(fields: dict) -> None:
    """Raises InputError if a field of a generation config is NaN or infinite. transformers' own bounds do not refuse these."""
    infinite = sorted(name for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value))
    if infinite:
        raise InputError(f"{infinite[0]}={fields[infinite[0]]}; expected a finite number.")


def _check_numbers(fields: dict) -> None:
    check_finite(fields)
    guidance, temperature, count = (fields.get(name) for name in ("guidance_scale", "temperature", "num_return_sequences"))
    if guidance is not None and not (isinstance(guidance, Real) and guidance >= 0):
        raise InputError(f"guidance_scale={guidance!r}; expected a number, 0 or more. Use 1 or less to draw without guidance.")
    if temperature is not None and not (isinstance(temperature, Real) and temperature > 0):
        raise InputError(f"temperature={temperature!r}; expected a number above 0. do_sample=False takes the likeliest codes.")
    if count is not None and not (isinstance(count, Integral) and count >= 1):
        raise InputError(f"num_return_sequences={count!r}; expected a whole number, 1 or more.")


def _generators(generator: torch.Generator | list[torch.Generator] | None, input_ids: torch.Tensor) -> list[torch.Generator]:
    """Returns the generators as a list: empty, one for all prompts, or one for each. Raises InputError for anything else."""
    if generator is None:
        return []
    generators, count = (generator, len(input_ids)) if isinstance(generator, list) else ([generator], 1)
    if not all(isinstance(single, torch.Generator) for single in generators) or len(set(map(id, generators))) != count:
        raise InputError(
            f"generator={generator!r} for {len(input_ids)} prompt(s); expected a torch.Generator, or a list with a "
            "different one for each prompt: [torch.Generator(device).manual_seed(seed) for seed in seeds]."
        )
    return generators


def _drawings(family: Family, input_ids: torch.Tensor, sizes: torch.Tensor | None) -> list[tuple[Grid, ...]]:
    """Returns the grids that each prompt draws, in order: that of the preview, if the base draws one, and that of the image."""
    drawings = []
    reads = (input_ids == family.image_token_id).any(1).tolist()
    for grid, reads_images in zip(family.prompt_grids(len(input_ids), sizes), reads, strict=True):
        preview = None if reads_images else family.preview_grid(grid)
        drawings.append((grid,) if preview is None else (preview, grid))
    return drawings


def _prompts_alone(
    family: Family,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    read: Images,
    sizes: tuple[torch.Tensor | None, torch.Tensor | None],
    negative: tuple[torch.Tensor, torch.Tensor] | None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the arguments of `draw` for each prompt alone, without the padding of the batch."""
    image_sizes, gen_image_sizes = sizes
    counts = (input_ids == family.image_token_id).sum(1)  # (B,)
    if read.image_sizes is not None:  # of any size: how many images end in each prompt
        lengths = torch.tensor([family.dense_placeholders(family.read_grid(size)) for size in read.sizes(family)])
        counts = torch.searchsorted(lengths.cumsum(0), counts.cumsum(0), right=True).diff(prepend=counts.new_zeros(1))
    elif read.values is not None:
        counts = counts // (counts.sum() // len(read.values))  # images in each prompt
    first = 0
    for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
        alone = {"input_ids": ids[mask.bool()][None]}
        images, first = slice(first, first + int(counts[row])), first + int(counts[row])
        if counts[row]:
            alone["pixel_values"] = read.values[images]
        if gen_image_sizes is not None:
            alone["gen_image_sizes"] = gen_image_sizes[row : row + 1]
            if counts[row]:
                alone["image_sizes"] = image_sizes[images]
        elif image_sizes is not None:
            alone["image_sizes"] = image_sizes[row : row + 1]
        if negative is not None:
            alone["negative_prompt_ids"] = negative[0][row][negative[1][row].bool()][None]
        yield alone


def _draw_compact(
    head: CodeHead,
    prompts: torch.Tensor,
    mask: torch.Tensor,
    prompt_positions: torch.Tensor | None,
    drawing: tuple[Grid, ...],
    sample: CodeSampler,
    config: GenerationConfig,
    progress: bool | Callable[[], object],
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """Runs the language model's loop over the grids of a drawing.

    Returns:
        For each grid the global codes (B, N) and the steps (B, T', k); and the scores of all chosen codes.
    """
    family, count = head.family, head.module.num_global_codes
    eol = family.eol.expand(len(prompts), 1, -1) if family.has_eol else None
    step = Steps(family, mask, _fed_deltas(head, drawing), config, prompt_positions)
    # torch.compile does not support generators, so with generators only the language model is compiled
    draw_step = _draw_step if sample.generators else step.compiled(_draw_step)
    won: list[torch.Tensor] = []
    compact: list[tuple[torch.Tensor, torch.Tensor]] = []

    ends = [head.row_ends(grid) for grid in drawing]
    bar = tqdm(total=sum(count + len(steps) for steps in ends), desc="draw", disable=progress is not True)
    advance = progress if callable(progress) else bar.update
    inputs = prompts
    for grid, row_ends in zip(drawing, ends, strict=True):
        globals_ = torch.empty(len(prompts), count, dtype=torch.long, device=prompts.device)
        for index in range(count):
            codes = _noting(sample, won)(family.code_logits(step(inputs)))
            globals_[:, index] = codes
            inputs = family.embed_codes(codes).unsqueeze(1)
            advance()
        # What is given and the EOL tokens are known, so they are fed together with the token before them and cost no step
        given = head.given(len(prompts))  # (B, n, D)
        states = step.states(torch.cat([inputs, given], 1), given.shape[1])
        guides, hidden = head.guides(globals_, states[:, :-1]), states[:, -1].contiguous()
        steps = globals_.new_empty(len(prompts), len(row_ends), head.codes_per_step)
        for index, ends_row in enumerate(row_ends):
            if index:
                hidden = step(inputs)
            steps[:, index], step_scores = draw_step(head, hidden, guides, sample)
            won.append(step_scores.clone())  # the next call overwrites the output of a CUDA graph
            steps[:, index, math.prod(grid) - index * head.codes_per_step :] = 0  # what fills up the last step is no code
            advance()
            inputs = head.embed_steps(steps[:, index : index + 1])  # (B, 1, k) -> (B, 1, D)
            if ends_row:
                inputs = torch.cat([inputs, eol], 1)
        compact.append((globals_, steps))
    bar.close()
    if not bool(hidden.isfinite().all()):  # one check after the loop: a NaN in the cache spreads to all later states
        raise BaseModelError(
            f"The language model's hidden states are not finite numbers in {hidden.dtype}; expected finite numbers. Load the "
            "base with dtype=torch.bfloat16 or torch.float32, and check its weights."
        )
    return compact, won


def _fed_deltas(head: CodeHead, drawing: tuple[Grid, ...]) -> torch.Tensor:
    """Returns by how much the position id grows at each token that the loop feeds, with EOL tokens, (..., tokens)."""
    parts, after = [], 1
    for grid in drawing:
        deltas = head.position_deltas(grid)  # (..., N + 1 + T' + 1)
        deltas[..., 0] += after - 1  # the image before moves the position on
        deltas, after = deltas[..., :-1], deltas[..., -1]
        ends = torch.tensor([False] * (head.module.num_globals + 1) + head.row_ends(grid))  # (tokens,)
        fed = torch.stack([torch.ones_like(ends), ends], -1).to(deltas.device)  # (tokens, 2): each token, and an EOL token
        parts.append(torch.stack([deltas, torch.ones_like(deltas)], -1)[..., fed])
    return torch.cat(parts, -1)


def _draw_step(
    head: CodeHead, hidden: torch.Tensor, globals_: torch.Tensor, sample: CodeSampler
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the codes of the next step, (B, k), and the scores with which they were chosen, (k, B)."""
    won: list[torch.Tensor] = []
    codes = head.draw_step(hidden, globals_, _noting(sample, won))
    return codes, torch.stack(won)


def _noting(sample: CodeSampler, won: list[torch.Tensor]) -> Sampler:
    """Wraps a `CodeSampler` so that it returns only the codes, and appends their scores to `won`."""

    def pick(logits: torch.Tensor) -> torch.Tensor:
        codes, scores = sample(logits)
        won.append(scores)
        return codes

    return pick


def _check_won(won: list[torch.Tensor]) -> None:
    """Raises InputError if a code was chosen with a score that is not finite. Called once, since it waits for the device."""
    if not bool(torch.cat([scores.flatten() for scores in won]).isfinite().all()):
        raise InputError(
            "There was nothing to draw a code from: all codes were forbidden, or their scores were NaN or infinite; expected "
            "at least one finite score. Nothing is returned. Check suppress_tokens, bad_words_ids, sequence_bias and "
            "logits_processor. If none of them is set, the weights of the adapter or of the base's code head are not finite: "
            "load them again."
        )


def _negative_prompts(
    family: Family,
    input_ids: torch.Tensor,
    config: GenerationConfig,
    negative_ids: torch.Tensor | None,
    negative_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns ids and mask (B, L') of the negative prompts, each followed by its image's wrapper tokens; None without any."""
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
            f"negative_prompt_ids hold image placeholders (token {family.image_token_id}); expected text tokens only: a "
            "negative prompt has no images. Remove the placeholders."
        )
    begin, wrapped = family.boi_token_id(config), family.wrapper_mask(input_ids, config)
    rows = []
    for ids, wrapper, text, mask in zip(
        input_ids, wrapped, negative_ids.expand(count, -1), negative_mask.expand(count, -1), strict=True
    ):
        text = text[mask.bool()]
        ending = wrapper.flip(0).cumprod(0).flip(0).bool()  # the wrapper tokens after the prompt's last text token
        rows.append(text if len(text) and text[-1] == begin else torch.cat([text, ids[ending]]))
    ids = pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id, padding_side="left")
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_value=0, padding_side="left")


def _check_prompts(family: Family, input_ids: torch.Tensor, attention_mask: torch.Tensor, config: GenerationConfig) -> None:
    text = attention_mask.bool() & ~family.wrapper_mask(input_ids, config)
    empty = (~text.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"Row(s) {empty} hold an empty prompt; expected at least one text token before the token that begins the image. "
            "Write a prompt, or leave the row out."
        )
    begin = family.boi_token_id(config)
    if not bool((input_ids[:, -1] == begin).all()):
        raise InputError(
            f"A prompt to draw ends in token {input_ids[:, -1].tolist()}; expected token {begin}, which begins an image. "
            f"Prepare prompts with the adapter's processor: {family.drawing_snippet.splitlines()[0]}"
        )
