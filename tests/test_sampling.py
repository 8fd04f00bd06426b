import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from uc_adapters.sampling import CodeSampler


def sampler(base, generators=(), guidance=None, **fields) -> CodeSampler:
    prompts = torch.ones(3, 5, dtype=torch.long)
    return CodeSampler(base, GenerationConfig(**fields), prompts, guidance, LogitsProcessorList(), list(generators))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}])
def test_codes_are_drawn_as_multinomial_draws_them(pristine, seed, options):
    logits = torch.randn(3, 512, generator=torch.Generator().manual_seed(9))
    sample = sampler(pristine, [torch.Generator().manual_seed(seed)], do_sample=True, **options)
    probabilities = sample.processors(sample.prompts, logits.clone()).softmax(-1)
    expected = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)
    assert torch.equal(sample(logits)[0], expected)


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_rows_of_several_generators_are_drawn_as_each_draws_its_own(pristine, guidance):
    """As on a GPU, where prompts with a seed each are drawn as one batch; two drawings of each of three prompts here."""
    logits = torch.randn(6 if guidance is None else 12, 512, generator=torch.Generator().manual_seed(9))
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    prompts = torch.ones(6, 5, dtype=torch.long)
    config = GenerationConfig(do_sample=True)
    together, _ = CodeSampler(pristine, config, prompts, guidance, None, generators)(logits)
    for place, seed in enumerate((4, 5, 6)):
        own = torch.cat([logits[start + 2 * place : start + 2 * place + 2] for start in range(0, len(logits), 6)])
        alone, _ = CodeSampler(pristine, config, prompts[:2], guidance, None, [torch.Generator().manual_seed(seed)])(own)
        assert torch.equal(together[:6][2 * place : 2 * place + 2], alone[:2])


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_to_draw_nothing_from_win_by_no_number(pristine, do_sample):
    scores = torch.randn(4, 512, generator=torch.Generator().manual_seed(9))
    scores[1], scores[2, 5], scores[3, :500] = -torch.inf, torch.nan, -torch.inf
    _, won = sampler(pristine, do_sample=do_sample)(scores[:3])
    assert won.isfinite().tolist() == [True, False, False]
    assert sampler(pristine, do_sample=do_sample)(scores[[0, 3, 3]])[1].isfinite().all()


def test_guided_codes_are_those_of_the_prompts_and_stand_twice(pristine):
    prompted, blank = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(9))
    codes, _ = sampler(pristine, guidance=4.0, do_sample=False)(torch.cat([prompted, blank]))
    log_probs = [part.log_softmax(-1) for part in (prompted, blank)]
    expected = (log_probs[1] + 4 * (log_probs[0] - log_probs[1])).argmax(-1)
    assert torch.equal(codes, expected.repeat(2))
