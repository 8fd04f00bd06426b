"""Drawing in the compact domain: N + T / s^2 sampled steps of the language model, then dense tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import GenerationMode

from .drawing import Drawing
from .errors import BaseModelError, InputError, UnsupportedError
from .families import Family
from .hosts import ReadHost
from .layers import Grid, cells_of
from .sampling import CodeSampler
from .steps import Steps


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
    drawing: Drawing,
    reading: ReadHost,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    image_sizes: torch.Tensor | None = None,
    negative_prompt_ids: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
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
        logits_processor: Applied to every code's logits (B, K), after guidance.
        generator: Source of randomness for `do_sample=True`; default torch's global one.
        progress: Shows a bar over the steps.
        **kwargs: Fields of the generation config: `do_sample`, `temperature`, `top_k`, `top_p`, `guidance_scale`,
            `num_return_sequences`; `cache_implementation`, `compile_config` and `disable_compile`, see `Steps`.

    Returns:
        Tokens of the dense images (B * num_return_sequences, T') for the base's `decode_image_tokens`, as the base itself
        would have drawn them; images of fewer tokens than the largest are padded on the right.

    Raises:
        InputError: A prompt that is empty or does not end in the image's begin, a size that the stride does not divide, or an
            unknown argument.
        UnsupportedError: Beam search, structured outputs, a cache that is neither "dynamic" nor "static", or a model in
            training that checkpoints its gradients.
        BaseModelError: The language model's states are no finite numbers.
    """
    family, base = drawing.family, drawing.family.base
    if base.training and base.is_activation_checkpointing:
        raise UnsupportedError("Drawing while training with gradient checkpointing keeps no cache; call model.eval() first.")
    config, unknown = base._prepare_generation_config(generation_config, **kwargs)
    if unknown:
        raise InputError(
            f"generate(generation_mode='image') got {', '.join(sorted(unknown))}; expected fields of the generation config, "
            "input_ids, attention_mask, pixel_values, image_sizes, negative_prompt_ids, negative_prompt_attention_mask, "
            "logits_processor, generator or progress. Leave the others out: only codes of images are drawn as it is."
        )
    if config.get_generation_mode() not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise UnsupportedError(
            f"num_beams={config.num_beams} asks for beam search, which cannot draw images; expected num_beams=1. "
            "Use greedy decoding, or do_sample=True with num_return_sequences for several drawings."
        )
    if config.return_dict_in_generate:
        raise UnsupportedError("return_dict_in_generate=True; expected False: drawing returns the dense tokens alone.")
    config.validate()
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    input_ids, attention_mask = left_pad(input_ids, attention_mask)
    _check_prompts(family, input_ids, attention_mask, config)
    grids = family.prompt_grids(len(input_ids), image_sizes)
    for grid in set(grids):
        cells_of(grid, drawing.module.stride)  # raises where the stride does not divide it
    base._prepare_special_tokens(config, True, device=input_ids.device)
    guidance = family.default_guidance if config.guidance_scale is None else config.guidance_scale
    config.guidance_scale = None  # ours is the first processor; a second one must not be made of it
    guided = guidance > 1

    prompts = reading.embed_prompt(input_ids, pixel_values, None, input_ids == family.image_token_id)  # (B, L, D)
    if guided:
        negative = _negative_prompts(family, input_ids, config, negative_prompt_ids, negative_prompt_attention_mask)
        blank, blank_mask = negative or (family.unconditional(input_ids, config), attention_mask)  # (B, L')
        blank = base.get_input_embeddings()(blank)
        length = max(prompts.shape[1], blank.shape[1])
        prompts, blank = (F.pad(part, (0, 0, length - part.shape[1], 0)) for part in (prompts, blank))
        attention_mask, blank_mask = (F.pad(part, (length - part.shape[1], 0)) for part in (attention_mask, blank_mask))

    sampling = {"base": base, "config": config, "processors": logits_processor, "generator": generator}
    repeats = config.num_return_sequences
    tokens: dict[int, torch.Tensor] = {}
    for grid in dict.fromkeys(grids):  # images of one size are drawn at once
        rows = torch.tensor([row for row, of_row in enumerate(grids) if of_row == grid]).repeat_interleave(repeats)
        inputs, mask, ids = prompts[rows], attention_mask[rows], input_ids[rows]
        if guided:  # twice as many: with the prompt, and with the blank one
            inputs, mask = torch.cat([inputs, blank[rows]]), torch.cat([mask, blank_mask[rows]])
        guided_sample = CodeSampler(prompts=ids, guidance=guidance if guided else None, **sampling)
        globals_, cells = _draw_compact(drawing, inputs, mask, grid, guided_sample, config, progress)
        plain_sample = CodeSampler(prompts=ids, guidance=None, **sampling)
        codes = drawing.expand(globals_[: len(rows)], cells[: len(rows)], grid, plain_sample)
        places = [int(row) * repeats + index % repeats for index, row in enumerate(rows)]
        tokens.update(zip(places, family.to_tokens(codes, grid), strict=True))
    in_order = [tokens[place] for place in range(len(tokens))]
    return pad_sequence(in_order, batch_first=True, padding_value=config.pad_token_id or 0)


def _draw_compact(
    drawing: Drawing,
    prompts: torch.Tensor,
    mask: torch.Tensor,
    grid: Grid,
    sample: CodeSampler,
    config: GenerationConfig,
    progress: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The language model's loop: global codes (B, N) and cells (B, T', k)."""
    family, module = drawing.family, drawing.module
    count, (rows, columns) = module.num_global_codes, cells_of(grid, module.stride)
    row_end = family.row_end.expand(len(prompts), 1, -1) if family.row_ends else None
    advances = drawing.advances(grid)  # (N + 1 + T',)
    if family.row_ends:
        head, cells = advances[: count + 1], advances[count + 1 :].unflatten(0, (rows, columns))
        advances = torch.cat([head, F.pad(cells, (0, 1), value=1).flatten()])  # with the end of each row of cells
    step = Steps(family, mask, advances, config)
    # A generator cannot be compiled: its codes are then drawn as they are uncompiled, and the language model alone is
    draw_cell = step.compiled(drawing.draw_cell) if sample.generator is None else drawing.draw_cell

    bar = tqdm(total=count + rows * columns, desc="draw", disable=not progress)
    inputs = prompts
    globals_ = torch.empty(len(prompts), count, dtype=torch.long, device=prompts.device)
    for index in range(count):
        codes = sample(family.code_logits(step(inputs)))
        globals_[:, index] = codes
        inputs = family.embed_codes(codes).unsqueeze(1)
        bar.update()
    # The separator is known, as a row's end is: it rides along with the token before it and costs no step.
    inputs = torch.cat([inputs, drawing.separator.expand(len(inputs), 1, -1)], 1)
    width = module.stride**2 if module.in_loop else 1
    cells = globals_.new_empty(len(prompts), rows * columns, width)
    entries = drawing.entries(globals_)
    for index in range(rows * columns):
        if index:
            inputs = drawing.embed_cells(cells[:, index - 1 : index])  # (B, 1, k) -> (B, 1, D)
            if family.row_ends and index % columns == 0:
                inputs = torch.cat([inputs, row_end], 1)
        hidden = step(inputs)
        cells[:, index] = draw_cell(hidden, entries, sample)
        bar.update()
    bar.close()
    if not bool(hidden.isfinite().all()):  # once, behind the loop: keys and values that are no numbers spoil all that follows
        raise BaseModelError(
            f"The language model's last states are no finite numbers in {hidden.dtype}; expected numbers. Load the base with "
            "dtype=torch.bfloat16 or torch.float32, and check its weights."
        )
    return globals_, cells


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
    begin, framed = family.image_begin(config), family.frame(input_ids, config)
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
    words = attention_mask.bool() & ~family.frame(input_ids, config)
    empty = (~words.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"Row(s) {empty} hold an empty prompt; expected at least one word before the image's begin.")
    begin = family.image_begin(config)
    if not bool((input_ids[:, -1] == begin).all()):
        raise InputError(
            f"A drawing prompt ends in token {input_ids[:, -1].tolist()}; expected the image's begin, {begin}. Prepare "
            f"prompts with the adapter's processor: {family.drawing_snippet.splitlines()[0]}"
        )
