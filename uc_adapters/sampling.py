"""Samples codes from logits on the device: guidance, transformers' own logits processors, and the random choice."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    ClassifierFreeGuidanceLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    WatermarkLogitsProcessor,
)

from .errors import UnsupportedError

# Processors that cannot work on codes, with the argument of `generate` that adds them. They need the codes drawn so far (but
# get the prompt's tokens), or an end token, which images lack.
OF_TEXT = {
    EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
    EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty",
    ExponentialDecayLengthPenalty: "exponential_decay_length_penalty",
    ForcedBOSTokenLogitsProcessor: "forced_bos_token_id",
    ForcedEOSTokenLogitsProcessor: "forced_eos_token_id",
    NoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
    RepetitionPenaltyLogitsProcessor: "repetition_penalty",
    SuppressTokensAtBeginLogitsProcessor: "begin_suppress_tokens",
    SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
    WatermarkLogitsProcessor: "watermarking_config",
}


class CodeSampler:
    """Samples codes (B,) from logits (B, K).

    With guidance, the logits are (2B, K), with the prompts first, and the codes are (2B,), each code twice.

    Args:
        base: The base model; its `generate` knows which processors a config asks for.
        config: `do_sample`, `temperature`, `top_k`, `top_p`, `suppress_tokens`, ...; tokens in it are codes, from 0 to K - 1.
        prompts: The prompts' ids, (B, L), which logits processors expect.
        guidance: Scale of classifier-free guidance; None for logits without it.
        processors: The user's processors. They run after guidance and the processors of the config.
        generators: Sources of randomness, in order, each for an equal share of the rows. If empty, torch's global one is used.

    Raises:
        UnsupportedError: A processor is one of `OF_TEXT`, or bans or biases a sequence of several codes.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: GenerationConfig,
        prompts: torch.Tensor,
        guidance: float | None,
        processors: LogitsProcessorList | None,
        generators: list[torch.Generator],
    ):
        self.guide = None if guidance is None else ClassifierFreeGuidanceLogitsProcessor(guidance)
        self.processors = base._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompts.shape[1],
            encoder_input_ids=prompts,
            logits_processor=LogitsProcessorList(processors or []),
            device=prompts.device,
        )
        for processor in self.processors:
            _refuse_text(processor)
        self.do_sample, self.prompts, self.generators = config.do_sample, prompts, generators
        torch._dynamo.maybe_mark_dynamic(prompts, 1)  # the compiled step works for prompts of every length

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the codes, and the score of each, (B,). A score is not finite if there was nothing to draw from."""
        scores = logits.float()
        if self.guide is not None:
            # Guidance comes first: a forbidden code has -inf with the prompt and without it, and the difference would be NaN
            scores = self.guide(self.prompts, scores)  # (2B, K) -> (B, K)
        for processor in self.processors:  # the list's own call looks at every signature again, for each code
            scores = processor(self.prompts, scores)
        if self.do_sample:
            # The same as torch.multinomial, bit for bit, without its check of the probabilities, which waits for the device
            scores = scores.softmax(-1) / self._races(scores)
        won, codes = scores.max(-1)
        return (codes if self.guide is None else codes.repeat(2)), won

    def _races(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns exponential random numbers, (B, K)."""
        races = torch.empty_like(scores)
        if not self.generators:
            return races.exponential_()
        for rows, generator in zip(races.chunk(len(self.generators)), self.generators, strict=True):
            rows.exponential_(generator=generator)
        return races


def _refuse_text(processor: LogitsProcessor) -> None:
    """Raises UnsupportedError for a processor that needs a text."""
    argument = next((name for kind, name in OF_TEXT.items() if isinstance(processor, kind)), None)
    if isinstance(processor, SequenceBiasLogitsProcessor) and any(len(codes) > 1 for codes in processor.sequence_bias):
        kind = "bad_words_ids" if isinstance(processor, NoBadWordsLogitsProcessor) else "sequence_bias"
        argument = f"{kind} of several codes in a row"
    if argument is not None:
        raise UnsupportedError(
            f"{argument} ({type(processor).__name__}) needs the codes drawn so far, or an end token; expected processors that "
            "change the scores of single codes, such as suppress_tokens, or bad_words_ids and sequence_bias of one code each. "
            "Remove the argument: when an image is drawn, a processor gets only the prompt and the scores of the next code."
        )
