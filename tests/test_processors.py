"""What a generation config asks of every code: what works on codes, what is refused by name, and what changes nothing."""

import pytest
import torch
from helpers import CAPTIONS, DECOMPRESSORS, attach, draw, drawing_inputs
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from uc_adapters.errors import InputError, UnsupportedError

CODES = 512  # of the tiny base
UPPER = list(range(CODES // 2, CODES))

# Each leaves half of the codes, or fewer, to draw from
FORBIDDING = {
    "suppress_tokens": UPPER,
    "bad_words_ids": [[code] for code in UPPER],
    "sequence_bias": [[[code], -1e4] for code in UPPER],
}
SAMPLING = {
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.5,
    "top_h": 0.3,
    "min_p": 0.2,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.5,
}
REFUSED = {
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "begin_suppress_tokens": [3],
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (2, 1.5),
    "watermarking_config": {"greenlist_ratio": 0.3},
    "max_time": 60.0,
    "stop_strings": ["red"],
    "num_beams": 2,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "dola_layers": "low",
    "constraints": [1],
    "force_words_ids": [[1]],
    "return_dict_in_generate": True,
}
# An image has the length of its grid, and no end token
VOID = {"min_new_tokens": 1, "min_length": 99, "max_new_tokens": 1, "max_length": 99, "renormalize_logits": True}
# The caches and what is compiled (test_steps.py); how many drawings, and by what guidance (test_generation.py); special tokens
ELSEWHERE = {
    "cache_implementation", "compile_config", "disable_compile", "do_sample", "guidance_scale", "num_return_sequences",
    "bos_token_id", "pad_token_id", "remove_invalid_values",
}  # fmt: skip
# Of modes that are refused, of texts, of outputs beside the tokens, or kept for old configs: nothing in a drawing asks for them
UNUSED = {
    "assistant_confidence_threshold", "assistant_ensemble_weight", "assistant_lookbehind", "cache_config",
    "continuous_batching_config", "decoder_start_token_id", "diversity_penalty", "early_stopping", "eos_token_id",
    "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "output_attentions", "output_hidden_states", "output_logits",
    "output_scores", "penalty_alpha", "prefill_chunk_size", "speculation_type", "target_lookbehind", "token_healing",
    "transformers_version", "use_cache", "_from_model_config",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(shared):
    return shared()


@pytest.fixture(scope="module")
def plainly_sampled(model, prompts):
    return sampled(model, prompts)


@pytest.fixture(scope="module")
def prompts(short_processor):
    return drawing_inputs(short_processor, CAPTIONS[:2])


def sampled(model, prompts, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return draw(model, prompts, **{"do_sample": True, "guidance_scale": 2.0, "generator": generator, **options})


def test_every_field_of_a_generation_config_is_accounted_for():
    """A new transformers may bring another: it has to be tried on codes, and put into one of the lists."""
    known = {*FORBIDDING, *SAMPLING, *REFUSED, *VOID, *ELSEWHERE, *UNUSED}
    assert set(vars(GenerationConfig())) - known - {"_commit_hash", "generation_kwargs"} == set()


@pytest.mark.parametrize(("name", "guidance_scale"), [*((name, 2.0) for name in FORBIDDING), ("suppress_tokens", 1.0)])
def test_forbidden_codes_are_never_drawn(model, prompts, plainly_sampled, name, guidance_scale):
    for do_sample in (False, True):
        options = {"guidance_scale": guidance_scale, "do_sample": do_sample, name: FORBIDDING[name]}
        tokens = sampled(model, prompts, **options)
        assert tokens.max() < UPPER[0]
        assert len(tokens[0].unique()) > 4
    free = plainly_sampled if guidance_scale == 2.0 else sampled(model, prompts, guidance_scale=guidance_scale)
    assert free.max() >= UPPER[0]


@pytest.mark.parametrize("decompressor", ["phase", "raster"])  # and "strip" above
def test_codes_are_forbidden_by_every_decompressor(shared, prompts, decompressor):
    assert sampled(shared(decompressor=decompressor), prompts, suppress_tokens=UPPER).max() < UPPER[0]


@pytest.fixture(scope="module")
def among_all(model, prompts):
    return sampled(model, prompts, top_k=0)


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_is_warped(model, prompts, among_all, name):
    plain = among_all
    assert not torch.equal(sampled(model, prompts, **{"top_k": 0, name: SAMPLING[name]}), plain)


@pytest.mark.parametrize("name", VOID)
def test_the_length_of_a_text_changes_nothing(model, prompts, plainly_sampled, name):
    assert torch.equal(sampled(model, prompts, **{name: VOID[name]}), plainly_sampled)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_a_text_is_refused_by_name(model, prompts, name):
    with pytest.raises(UnsupportedError, match=name):
        sampled(model, prompts, **{name: REFUSED[name]})


def test_contrastive_search_is_refused_by_name(model, prompts):
    with pytest.raises(UnsupportedError, match=r"penalty_alpha=0\.6 asks for contrastive search"):
        sampled(model, prompts, do_sample=False, penalty_alpha=0.6, top_k=4)


@pytest.mark.parametrize(("name", "value"), [("bad_words_ids", [[3], [4, 5]]), ("sequence_bias", [[[3, 4], 1.0]])])
def test_codes_in_a_row_are_refused_by_name(model, prompts, name, value):
    with pytest.raises(UnsupportedError, match=f"{name} of several codes in a row"):
        sampled(model, prompts, **{name: value})


def test_a_refused_processor_is_refused_from_the_user_too(model, prompts):
    with pytest.raises(UnsupportedError, match="RepetitionPenaltyLogitsProcessor"):
        sampled(model, prompts, logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)]))


def test_what_is_refused_may_be_set_to_nothing(model, prompts, plainly_sampled):
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "forced_eos_token_id": None, "streamer": None}
    assert torch.equal(sampled(model, prompts, **neutral), plainly_sampled)


# Nothing to draw from


class Spoil(LogitsProcessor):
    """Leaves a code's scores as they are, but for one row of one step."""

    def __init__(self, value: float, step: int):
        self.value, self.left = value, step

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            scores = scores.clone()
            scores[-1] = self.value
        return scores


every_way = pytest.mark.parametrize("do_sample", [False, True])


@every_way
@pytest.mark.parametrize(
    ("value", "step"), [(float("nan"), 1), (float("nan"), 64), *((float(value), 30) for value in ("nan", "inf", "-inf"))]
)
def test_one_spoilt_code_refuses_the_drawing(model, prompts, do_sample, value, step):
    spoil = LogitsProcessorList([Spoil(value, step)])
    with pytest.raises(InputError, match="nothing to draw a code from"):
        sampled(model, prompts, do_sample=do_sample, logits_processor=spoil)


@pytest.mark.parametrize("decompressor", DECOMPRESSORS)
def test_a_decompressor_that_is_not_finite_refuses_the_drawing(base, prompts, decompressor):
    model = attach(base, decompressor=decompressor)
    with torch.no_grad():
        model.code_head.module.decompressor.decoder.out.weight[0, 0] = float("nan")
    for do_sample in (False, True):
        with pytest.raises(InputError, match=r"NaN or infinite.*Nothing is returned.*weights"):
            sampled(model, prompts, do_sample=do_sample)


@every_way
def test_a_code_head_that_is_not_finite_refuses_the_drawing(base, prompts, do_sample):
    model = attach(base)
    with torch.no_grad():
        base.model.generation_head.get_base_layer().vision_head.weight[7] = float("inf")
    with pytest.raises(InputError, match="NaN or infinite"):
        sampled(model, prompts, do_sample=do_sample)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_emptied_vocabulary_refuses_the_drawing(model, prompts, guidance_scale):
    for do_sample in (False, True):
        with pytest.raises(InputError, match=r"all codes were forbidden.*suppress_tokens"):
            sampled(model, prompts, do_sample=do_sample, guidance_scale=guidance_scale, suppress_tokens=list(range(CODES)))
