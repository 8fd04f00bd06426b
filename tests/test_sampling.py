import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from uc_adapters.sampling import CodeSampler


def sampler(base, generator=None, guidance=None, **fields) -> CodeSampler:
    prompts = torch.ones(3, 5, dtype=torch.long)
    return CodeSampler(base, GenerationConfig(**fields), prompts, guidance, LogitsProcessorList(), generator)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}])
def test_codes_are_drawn_as_multinomial_draws_them(pristine, seed, options):
    logits = torch.randn(3, 512, generator=torch.Generator().manual_seed(9))
    sample = sampler(pristine, torch.Generator().manual_seed(seed), do_sample=True, **options)
    probabilities = sample.processors(sample.prompts, logits.clone()).softmax(-1)
    expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    assert torch.equal(sample(logits), expected)


def test_guided_codes_are_those_of_the_prompts_and_stand_twice(pristine):
    prompted, blank = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(9))
    codes = sampler(pristine, guidance=4.0, do_sample=False)(torch.cat([prompted, blank]))
    log_probs = [part.log_softmax(-1) for part in (prompted, blank)]
    expected = (log_probs[1] + 4 * (log_probs[0] - log_probs[1])).argmax(-1)
    assert torch.equal(codes, expected.repeat(2))
