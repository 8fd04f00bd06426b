"""From logits to codes, all on the device: guidance, transformers' own logits processors, the draw itself."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import ClassifierFreeGuidanceLogitsProcessor


class CodeSampler:
    """Logits (B, K) -> codes (B,); guided, logits (2B, K), with the prompts first, -> each code twice, (2B,).

    Args:
        base: Whose `generate` knows the processors of a config.
        config: `do_sample`, `temperature`, `top_k`, `top_p`, ...
        prompts: Ids (B, L), as logits processors expect them.
        guidance: Scale of classifier-free guidance; None for logits without it.
        processors: Of the user, behind guidance.
        generator: Source of randomness; None: torch's global one.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: GenerationConfig,
        prompts: torch.Tensor,
        guidance: float | None,
        processors: LogitsProcessorList | None,
        generator: torch.Generator | None,
    ):
        ahead = [] if guidance is None else [ClassifierFreeGuidanceLogitsProcessor(guidance)]
        self.processors = base._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompts.shape[1],
            encoder_input_ids=prompts,
            logits_processor=LogitsProcessorList([*ahead, *(processors or [])]),
            device=prompts.device,
        )
        self.guided, self.do_sample, self.prompts, self.generator = guidance is not None, config.do_sample, prompts, generator
        torch._dynamo.maybe_mark_dynamic(prompts, 1)  # what is compiled serves prompts of every length

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        scores = self.processors(self.prompts, logits.float())  # guided: (2B, K) -> (B, K)
        if self.do_sample:
            # As torch.multinomial draws, to the bit, without its look at the probabilities: that waits for the device
            races = torch.empty_like(scores).exponential_(generator=self.generator)
            scores = scores.softmax(-1) / races
        codes = scores.argmax(-1)
        return codes.repeat(2) if self.guided else codes
