import pytest
import torch
from helpers import CAPTIONS, DENSE, attach, drawing_inputs
from timing.models import SHAPES, janus_config
from tiny_world.tiny_janus import make_processor
from transformers import JanusForConditionalGeneration

from uc_adapters import UniCompressCollator, UniCompressConfig, get_uc_model
from uc_adapters.compression import DrawCompressor, ReadCompressor
from uc_adapters.errors import InputError
from uc_adapters.families import FAMILIES, family_of
from uc_adapters.families.janus import Janus
from uc_adapters.layers import nearest_codes


@pytest.fixture(scope="module")
def family(pristine):
    return family_of(pristine)


@pytest.fixture(scope="module")
def pixels(short_processor, images):
    return short_processor.image_processor(images, return_tensors="pt")["pixel_values"]


def test_janus_is_a_family(family):
    assert FAMILIES["janus"] is Janus
    assert type(family) is Janus


def test_geometry(family):
    geometry = family.geometry
    assert (geometry.hidden_size, geometry.num_layers, geometry.intermediate_size) == (192, 2, 512)
    assert (geometry.image_size, geometry.read_width, geometry.read_side) == (64, 128, 8)
    assert (geometry.draw_side, geometry.num_codes, geometry.code_width) == (8, 512, 8)


def test_codes_to_entries_to_codes_is_the_identity(family):
    codes = torch.arange(512).view(8, DENSE)
    grid = family.base.model.vqmodel.quantize.get_codebook_entry(codes)  # (8, C, 8, 8): what the decoder is given
    entries = grid.flatten(2).transpose(1, 2)
    assert torch.equal(nearest_codes(entries, family.codebook), codes)
    torch.testing.assert_close(family.codebook[codes], entries)


def test_latents_are_unit_norm_and_of_the_codes_grid(family, pixels):
    latents = family.latents(pixels)
    assert latents.shape == (4, DENSE, 8)
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(4, DENSE))
    assert not latents.requires_grad


def test_dense_codes_are_the_cosine_nearest_of_what_the_base_encodes(family, pixels):
    vqmodel = family.base.model.vqmodel
    codes = family.dense_codes(pixels)
    with torch.no_grad():
        hidden = vqmodel.quant_conv(vqmodel.encoder(pixels)).flatten(2).transpose(1, 2)  # (B, T, C)
    cosines = torch.nn.functional.cosine_similarity(hidden.unsqueeze(2), vqmodel.quantize.embedding.weight, dim=-1)
    torch.testing.assert_close(cosines.gather(2, codes.unsqueeze(2)).squeeze(2), cosines.amax(2))
    assert family.base.decode_image_tokens(codes).shape == (4, 64, 64, 3)


def test_encoding_leaves_the_pixels_as_they_were(family, pixels):
    before = pixels.clone()
    family.latents(pixels)
    assert torch.equal(pixels, before)


def test_read_features_are_what_the_aligner_gets(family, pixels):
    seen = []
    hook = family.base.model.aligner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        family.base.model.get_image_features(pixels)
        features = family.read_features(pixels)
    hook.remove()
    assert torch.equal(features, seen[0])


def test_code_logits_are_the_bases_head_below_any_host(pristine, base):
    hidden = torch.randn(2, 3, 192)
    expected = pristine.model.generation_head(hidden)
    assert torch.equal(attach(base).family.code_logits(hidden), expected)


def test_the_unconditional_prompt_is_the_stock_one(family, short_processor):
    ids = drawing_inputs(short_processor, CAPTIONS)["input_ids"]
    seen = []
    hook = family.base.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    family.base.generate(ids, attention_mask=torch.ones_like(ids), generation_mode="image")
    hook.remove()
    assert torch.equal(family.unconditional(ids, family.base.generation_config), seen[0][len(ids) :])


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (0, 3, 64, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_pixels_of_another_shape_are_refused(family, shape):
    with pytest.raises(InputError, match="3, 64, 64"):
        family.check_pixels(torch.zeros(shape), None)


def janus_pro(shape: str) -> JanusForConditionalGeneration:
    """A published Janus-Pro by its shapes, without weights."""
    with torch.device("meta"):
        return JanusForConditionalGeneration(janus_config(*SHAPES[shape]))


@pytest.fixture(scope="module", params=SHAPES)
def published(request):
    """Name, language model's shape, and the model on the meta device with a default adapter."""
    return request.param, SHAPES[request.param], get_uc_model(janus_pro(request.param), UniCompressConfig())


def module_of(model, kind):
    return next(module for module in model.modules() if isinstance(module, kind))


def count(model, chosen) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if chosen(name))


def test_published_models_shorten_576_to_149(published):
    _, _, model = published
    assert model.num_image_tokens == 4 + 1 + 144
    with model.disable_adapter():
        assert model.num_image_tokens == 576


def test_published_models_draw_in_144_steps(published):
    _, _, model = published
    assert model.family.draw_grid((384, 384)) == (24, 24)
    assert model.active_peft_config.num_gen_tokens((24, 24)) - 1 == 144  # the separator is known


def test_published_models_get_modules_of_these_shapes(published):
    _, (hidden, _, _, _), model = published
    reader, drawer = module_of(model, ReadCompressor), module_of(model, DrawCompressor)
    assert reader(torch.zeros(2, 576, 1024, device="meta"), (24, 24)).shape == (2, 149, 1024)
    assert reader.extractor.queries.shape == (4, 1024)
    assert drawer.extractor is None
    assert drawer.globals_of(torch.zeros(2, 576, 8, device="meta"), (24, 24)).shape == (2, 0, 8)
    strips = [torch.zeros(shape, device="meta") for shape in ((6, 4, 8), (6, hidden), (6, 0, 8))]
    assert drawer.decompressor(*strips).shape == (6, 4, hidden)
    aligned = model.get_base_model().model.aligner(torch.zeros(1, 576, 1024, device="meta"))
    assert aligned.shape == (1, 149, hidden)


@pytest.fixture(scope="module")
def of_phase():
    return get_uc_model(janus_pro("janus-pro-1b"), UniCompressConfig(decompressor="phase"))


def test_drawn_global_codes_have_an_extractor_of_these_shapes(of_phase):
    drawer = module_of(of_phase, DrawCompressor)
    assert drawer.extractor.queries.shape == (4, 512)
    assert drawer.globals_of(torch.zeros(2, 576, 8, device="meta"), (24, 24)).shape == (2, 4, 8)
    compact = [torch.zeros(shape, device="meta") for shape in ((2, 576, 8), (2, 144, 8), (2, 4, 8))]
    assert drawer.decompressor(*compact, (24, 24)).shape == (2, 576, 2048)


def test_published_models_gain_at_most_three_per_cent(published):
    name, _, model = published
    base = count(model, lambda name: "lora_" not in name)
    compression = count(model, lambda name: ".lora_uc." in name)
    lora = count(model, lambda name: ".lora_A." in name or ".lora_B." in name)
    assert round(base / 1e9, 2) == {"janus-pro-1b": 2.08, "janus-pro-7b": 7.41}[name]
    print(f"{name}: base {base:,}, compression {compression:,} ({compression / base:.2%}), LoRA at r=8 {lora:,}")
    assert 0 < compression <= 0.03 * base
    assert lora > 0


def test_every_decompressor_stays_within_three_per_cent_of_the_smaller_model(of_phase):
    """With "strip", all above."""
    of_raster = get_uc_model(janus_pro("janus-pro-1b"), UniCompressConfig(decompressor="raster"))
    for model in (of_phase, of_raster):
        base = count(model, lambda name: "lora_" not in name)
        compression = count(model, lambda name: ".lora_uc." in name)
        print(f"{model.active_peft_config.decompressor}: compression {compression:,} ({compression / base:.2%})")
        assert compression <= 0.03 * base


def test_published_models_stay_on_the_meta_device(published):
    _, _, model = published
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_batch_for_another_geometry_has_its_own_length(images):
    config = UniCompressConfig(stride=4, num_global_tokens=2)
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a red 3"}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": images[:1],
    }
    batch = UniCompressCollator(make_processor(2 + 1 + 4), config, caption_dropout=0.0)([row])
    assert batch["gen_mask"].sum() == 1 + 4
