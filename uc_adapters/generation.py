"""Drawing in the compact domain: N_g + T / s^2 sampled steps of the language model, then dense tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import ClassifierFreeGuidanceLogitsProcessor, GenerationMode

from .drawing import Drawing, Sampler
from .errors import InputError, UnsupportedError

DEFAULT_GUIDANCE = 5.0  # as stock Janus, where neither the call nor the generation config sets one


def left_pad(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the padding of every row (B, L) to its left, the order of its tokens kept."""
    order = attention_mask.argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


@torch.no_grad()
def draw(
    drawing: Drawing,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    generation_config=None,
    logits_processor: LogitsProcessorList | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    **kwargs,
) -> torch.Tensor:
    """Draws one image a prompt, as `JanusForConditionalGeneration.generate(generation_mode="image")` does.

    Args:
        drawing: The active adapter's drawing side.
        input_ids: Prompts (B, L), each ending in the image's begin token (`processor(..., generation_mode="image")`).
        attention_mask: (B, L); padding on either side.
        pixel_values: Images that the prompts contain, to read.
        generation_config: Defaults to the base's. `guidance_scale` > 1 draws with classifier-free guidance.
        logits_processor: Applied to every code's logits, after guidance.
        generator: Source of randomness for `do_sample=True`; default torch's global one.
        progress: Shows a bar over the steps.
        **kwargs: Fields of the generation config: `do_sample`, `temperature`, `top_k`, `top_p`, `guidance_scale`,
            `num_return_sequences`.

    Returns:
        Dense codes (B * num_return_sequences, T) for the base's `decode_image_tokens`.

    Raises:
        InputError: A prompt that is empty or does not end in the image's begin, or an unknown argument.
        UnsupportedError: Beam search, or structured outputs.
    """
    family, base = drawing.family, drawing.family.base
    config, unknown = base._prepare_generation_config(generation_config, **kwargs)
    if unknown:
        raise InputError(
            f"generate(generation_mode='image') got {', '.join(sorted(unknown))}; expected fields of the generation config, "
            "input_ids, attention_mask, pixel_values, logits_processor, generator or progress. Leave the others out."
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
    _check_prompts(input_ids, attention_mask, config)
    base._prepare_special_tokens(config, True, device=input_ids.device)

    # Prompts: (B, L) -> (B * n, L), doubled where guidance needs the unconditional model too
    prompts = family.embed_prompt(input_ids, pixel_values, input_ids == family.image_token_id)
    guidance = DEFAULT_GUIDANCE if config.guidance_scale is None else config.guidance_scale
    repeats = config.num_return_sequences
    prompts = prompts.repeat_interleave(repeats, 0)
    mask = attention_mask.repeat_interleave(repeats, 0)
    count = len(prompts)
    guided = guidance > 1
    if guided:
        blank = family.unconditional(input_ids, config).repeat_interleave(repeats, 0)
        prompts = torch.cat([prompts, base.get_input_embeddings()(blank)])
        mask = mask.repeat(2, 1)
    expanded_ids = input_ids.repeat_interleave(repeats, 0)

    def sampler(guided: bool) -> Sampler:
        processors = LogitsProcessorList()
        if guided:
            processors.append(ClassifierFreeGuidanceLogitsProcessor(guidance))
        processors.extend(logits_processor or [])
        config.guidance_scale = None  # ours is the first processor; a second one must not be made of it
        processors = base._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=input_ids.shape[1],
            encoder_input_ids=input_ids,
            logits_processor=processors,
            device=input_ids.device,
        )

        def sample(logits: torch.Tensor) -> torch.Tensor:
            scores = processors(expanded_ids, logits.float())  # guided: (2B, K) -> (B, K)
            if config.do_sample:
                codes = torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
            else:
                codes = scores.argmax(-1)
            return codes.repeat(2) if guided else codes

        return sample

    globals_, cells = _draw_compact(drawing, prompts, mask, sampler(guided), progress)
    return drawing.expand(globals_[:count], cells[:count], sampler(False))


def _draw_compact(
    drawing: Drawing, prompts: torch.Tensor, mask: torch.Tensor, sample: Sampler, progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The language model's loop: global codes (B, N_g) and cells (B, T', k)."""
    family, module = drawing.family, drawing.module
    cache = DynamicCache(config=family.base.config.get_text_config())
    cell_count = family.geometry.draw_side**2 // module.stride**2
    # The whole sequence's mask and positions at once, (B, L + N_g + 1 + T'): padding takes no position
    mask = F.pad(mask, (0, module.num_global_tokens + 1 + cell_count), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def step(inputs: torch.Tensor) -> torch.Tensor:
        """Feeds inputs (B, n, D) behind what the cache holds; returns the last hidden state (B, D)."""
        seen = cache.get_seq_length()
        output = family.language_model(
            inputs_embeds=inputs,
            attention_mask=mask[:, : seen + inputs.shape[1]],
            position_ids=positions[:, seen : seen + inputs.shape[1]],
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    bar = tqdm(total=module.num_global_tokens + cell_count, desc="draw", disable=not progress)
    inputs = prompts
    globals_ = torch.zeros(len(prompts), 0, dtype=torch.long, device=prompts.device)
    for _ in range(module.num_global_tokens):
        codes = sample(family.code_logits(step(inputs)))
        globals_ = torch.cat([globals_, codes.unsqueeze(1)], 1)
        inputs = family.embed_codes(codes).unsqueeze(1)
        bar.update()
    # The separator is known: it rides along with the last global token and costs no step.
    inputs = torch.cat([inputs, drawing.separator.expand(len(inputs), 1, -1)], 1)
    cells = []
    for index in range(cell_count):
        if index:
            inputs = drawing.embed_cells(cells[-1].unsqueeze(1))  # (B, 1, k) -> (B, 1, D)
        cells.append(drawing.draw_cell(step(inputs), globals_, sample))
        bar.update()
    bar.close()
    return globals_, torch.stack(cells, 1)


def _check_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor, config) -> None:
    begin = config.generation_kwargs["boi_token_id"]
    words = attention_mask.bool() & (input_ids != begin) & (input_ids != config.bos_token_id)
    empty = (~words.any(1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"Row(s) {empty} hold an empty prompt; expected at least one word before the image's begin.")
    if not bool((input_ids[:, -1] == begin).all()):
        raise InputError(
            f"A drawing prompt ends in token {input_ids[:, -1].tolist()}; expected the image's begin, {begin}. "
            "Prepare prompts with processor(text=..., generation_mode='image')."
        )
