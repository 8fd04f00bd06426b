"""From logits to codes, all on the device: guidance, transformers' own logits processors, the draw itself."""

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

# Processors that need what codes do not have: the tokens so far (they are given the prompt's), or an end token. Each with the
# argument of `generate` that asks for it.
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
    """Logits (B, K) -> codes (B,); guided, logits (2B, K), with the prompts first, -> each code twice, (2B,).

    Args:
        base: Whose `generate` knows the processors of a config.
        config: `do_sample`, `temperature`, `top_k`, `top_p`, `suppress_tokens`, ...; tokens in it are codes, from 0 to K - 1.
        prompts: Ids (B, L), as logits processors expect them.
        guidance: Scale of classifier-free guidance; None for logits without it.
        processors: Of the user, behind guidance and those of the config.
        generators: Sources of randomness, each for an equal share of the rows, in order. Empty: torch's global one.

    Raises:
        UnsupportedError: A processor of `OF_TEXT`, or a ban or bias of several codes in a row.
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
        torch._dynamo.maybe_mark_dynamic(prompts, 1)  # what is compiled serves prompts of every length

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes, and the score that won each of them, (B,): it is not finite where there was nothing to draw from."""
        scores = logits.float()
        if self.guide is not None:
            # Ahead of the others: a code that they forbid is -inf with the prompt and without it, and the difference is NaN
            scores = self.guide(self.prompts, scores)  # (2B, K) -> (B, K)
        scores = self.processors(self.prompts, scores)
        if self.do_sample:
            # As torch.multinomial draws, to the bit, without its look at the probabilities: that waits for the device
            scores = scores.softmax(-1) / self._races(scores)
        won, codes = scores.max(-1)
        return (codes if self.guide is None else codes.repeat(2)), won

    def _races(self, scores: torch.Tensor) -> torch.Tensor:
        """Exponential random numbers, (B, K)."""
        races = torch.empty_like(scores)
        if not self.generators:
            return races.exponential_()
        for rows, generator in zip(races.chunk(len(self.generators)), self.generators, strict=True):
            rows.exponential_(generator=generator)
        return races


def _refuse_text(processor: LogitsProcessor) -> None:
    argument = next((name for kind, name in OF_TEXT.items() if isinstance(processor, kind)), None)
    if isinstance(processor, SequenceBiasLogitsProcessor) and any(len(codes) > 1 for codes in processor.sequence_bias):
        kind = "bad_words_ids" if isinstance(processor, NoBadWordsLogitsProcessor) else "sequence_bias"
        argument = f"{kind} of several codes in a row"
    if argument is not None:
        raise UnsupportedError(
            f"{argument} ({type(processor).__name__}) needs the codes drawn so far, or an end token; expected processors that "
            "change the scores of one code, such as suppress_tokens, or bad_words_ids and sequence_bias of single codes. "
            "Remove the argument: while an image is drawn, a processor sees the prompt and the scores of the next code."
        )
