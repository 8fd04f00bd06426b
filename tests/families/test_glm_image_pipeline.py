"""The codes of GLM-Image become pictures in diffusers' own pipeline, with tiny random weights."""

import pytest
import torch
from helpers import IMAGE, attach, chat
from tiny_glm_image import CODES, make_model, make_processor
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from uc_adapters.errors import UnsupportedError
from uc_adapters.families import FAMILIES

pytest.importorskip("diffusers")
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel

from uc_adapters.pipeline import UniCompressPipeline

SIZE = {"height": 256, "width": 256}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return attach(make_model(processor).eval())


@pytest.fixture(scope="module")
def compact(model, processor):
    return model.compact_processor(processor)


@pytest.fixture(scope="module")
def pipeline(model, processor):
    """Around the bare base, as it is published."""
    torch.manual_seed(0)
    text_encoder = T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    transformer = GlmImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=CODES,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    base = make_model(processor).eval()
    base.generation_config.suppress_tokens = list(range(CODES, base.lm_head.out_features))  # a trained base ends in time
    made = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=processor,
        text_encoder=text_encoder.eval(),
        vision_language_encoder=base,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    made.set_progress_bar_config(disable=True)
    return made


def in_fours(codes: torch.Tensor) -> torch.Tensor:
    """Codes (B, 8, 8) -> the prior of the diffusion model, (B, 16 * 16)."""
    return codes.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def picture(pipeline, prior, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {**SIZE, "num_inference_steps": 1, "output_type": "np", "generator": generator, **kwargs}
    return torch.from_numpy(pipeline(prompt="a red 3", prior_token_ids=prior, **options).images)


def test_drawn_codes_become_a_picture(model, compact, pipeline):
    text = chat(compact, "a red 3")
    inputs = compact(text=[text], target_h=256, target_w=256, return_tensors="pt")
    tokens = model.generate(**inputs, generation_mode="image", do_sample=True)
    codes = tokens[:, -64:].view(1, 8, 8)
    image = picture(pipeline, in_fours(codes))
    assert image.shape == (1, 256, 256, 3)
    assert image.isfinite().all()
    assert not torch.equal(picture(pipeline, in_fours((codes + 1) % CODES)), image)


def test_the_bases_own_codes_make_the_pipelines_own_picture(pipeline, processor):
    base = pipeline.vision_language_encoder
    with torch.no_grad():
        own = pipeline.generate_prior_tokens("a red 3", **SIZE, generator=torch.Generator().manual_seed(1))[0]
        torch.manual_seed(1)
        inputs = processor(text=[chat(processor, "a red 3")], target_h=256, target_w=256, return_tensors="pt")
        tokens = base.generate(**inputs, do_sample=True, max_new_tokens=321)
    codes = tokens[:, inputs["input_ids"].shape[1] :][:, 256 : 256 + 64]
    assert torch.equal(in_fours(codes.view(1, 8, 8)), own)


def test_an_edit_becomes_a_picture(model, compact, pipeline, images):
    source = images[0]
    inputs = compact(text=[chat(compact, IMAGE, "a red 3")], images=[source], target_h=256, target_w=256, return_tensors="pt")
    codes = model.generate(**inputs, generation_mode="image", do_sample=True).view(1, 8, 8)
    (read,) = model.read_layer.image_codes(inputs["pixel_values"], inputs["image_sizes"])
    grid = (inputs["image_sizes"][0] // 4).tolist()
    edit = {
        "image": [source.resize((256, 256))],
        "prior_token_image_ids": [in_fours(read.view(1, *grid))[0]],
        "source_image_grid_thw": [torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])],
    }
    image = picture(pipeline, in_fours(codes), **edit)
    assert image.shape == (1, 256, 256, 3)
    assert image.isfinite().all()


def test_the_cards_snippet_draws(model, compact, pipeline, tmp_path):
    """At a size that a tiny model is quick at, with a pipeline from a folder."""
    pipeline.save_pretrained(tmp_path)
    snippet = FAMILIES["glm_image"].drawing_snippet
    for written, ours in (
        ("1024", "256"),
        ("32", "8"),
        ('"zai-org/GLM-Image"', repr(str(tmp_path))),
        ("width=256)", "width=256, num_inference_steps=1)"),
    ):
        assert written in snippet
        snippet = snippet.replace(written, ours)
    names = {"model": model, "processor": compact, "prompt": chat(compact, "a red 3"), "device": "cpu"}
    exec(snippet, names)
    assert names["image"].size == (256, 256)


def test_the_packages_own_pipeline_says_where_pixels_come_from(model, compact):
    with pytest.raises(UnsupportedError, match=r"draws codes, and no pixels: a diffusion model.*GlmImagePipeline.*card"):
        UniCompressPipeline(compact, model)
