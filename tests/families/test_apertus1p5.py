"""What is Apertus 1.5's own: codes by inner product that come flat, row ends that are text, a head of text alone, audio."""

import copy
import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.24", reason="Apertus 1.5 came with transformers 5.24")

from helpers import ANN, IMAGE, attach, chat, logits, question_inputs
from huggingface_hub import ModelCard
from PIL import Image
from shallow import shallow
from tiny_world.tiny_apertus1p5 import FACTOR, make_model, make_processor
from transformers import (
    Apertus1p5Config,
    Apertus1p5ForConditionalGeneration,
    Apertus1p5TextConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.utils import is_torchvision_available

from uc_adapters import UniCompressCollator, UniCompressConfig, UniCompressModel, get_uc_model, push_folder
from uc_adapters.errors import InputError
from uc_adapters.families import family_of
from uc_adapters.layers import nearest_codes

QUESTIONS = ["What digit is at the top left?", "How many digits are there?", "What colour is the 7?"]


@pytest.fixture(scope="module")
def processor():
    return make_processor(32 * 32, 64 * 64)


@pytest.fixture(scope="module")
def pristine(processor):
    torch.manual_seed(0)
    model = shallow(make_model(processor)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.language_model"):
                parameter.mul_(2.5)
    return model


@pytest.fixture(scope="module")
def family(pristine):
    return family_of(pristine)


@pytest.fixture(scope="module")
def mixed(images):
    """Three sizes and ratios: grids of 8 x 8, 4 x 8 and 8 x 6 codes."""
    return [images[0], images[1].resize((64, 32)), images[2].resize((48, 64))]


@pytest.fixture
def model(pristine):
    return attach(copy.deepcopy(pristine))


@pytest.fixture
def compact(model, processor):
    return model.compact_processor(processor)


def answer(model, inputs, count: int = 4) -> torch.Tensor:
    return model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)[:, -count:]


def codes_by_image(family, prepared) -> list[torch.Tensor]:
    """Our codes of each image of a padded batch."""
    codes = {}
    for rows, pixels, _ in family.by_size(prepared["pixel_values"], prepared["image_sizes"]):
        codes.update(zip(rows, family.dense_codes(pixels), strict=True))
    return [codes[row] for row in range(len(codes))]


# Codes


def test_codes_of_a_batch_of_several_sizes_are_the_bases_own(family, processor, mixed):
    prepared = processor.image_processor(mixed, return_tensors="pt")
    own = family.base.model.get_image_tokens(prepared["pixel_values"], prepared["image_sizes"])
    assert [len(tokens) for tokens in own] == [64, 32, 48]
    for codes, tokens in zip(codes_by_image(family, prepared), own, strict=True):
        assert torch.equal(family.code_token_ids[codes], tokens)


def test_codes_are_compared_by_inner_product_and_not_by_distance(family, processor, mixed):
    pixels = processor.image_processor(mixed[:1], return_tensors="pt")["pixel_values"]
    latents, codes = family.latents(pixels), family.dense_codes(pixels)
    assert torch.equal((latents @ family.codebook.T).argmax(-1), codes)
    assert not torch.equal(nearest_codes(latents, family.codebook), codes)


def test_codes_are_read_as_the_base_reads_them(family, processor, mixed):
    prepared = processor.image_processor(mixed[:1], return_tensors="pt")
    [own] = family.base.get_image_features(**prepared, return_dict=True).pooler_output
    assert torch.equal(family.read_features(prepared["pixel_values"])[0], own)


def test_in_bfloat16_codes_are_those_of_float32(pristine, processor, mixed, tmp_path):
    """The base keeps its tokenizer in float32, since rounding changes codes."""
    pristine.save_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = codes_by_image(family_of(pristine), prepared := processor.image_processor(mixed, return_tensors="pt"))
    model = attach(base)
    assert base.model.language_model.dtype == torch.bfloat16
    assert model.family.codebook.dtype == torch.float32
    assert all(map(torch.equal, codes_by_image(model.family, prepared), expected))
    assert logits(model, question_inputs(model.compact_processor(processor), QUESTIONS, mixed)).isfinite().all()


# Prompts


def test_the_compact_prompt_keeps_the_dense_size_and_separates_its_rows(compact, processor, mixed):
    dense, short = (one.replace_image_token({"image_sizes": [[32, 64]]}, 0) for one in (processor, compact))
    one, row, end = "<|image|>", "<|img_end_of_row|>", "<|img_end|>"
    assert dense == "<|img_start|>4*8<|img_token_start|>" + row.join([one * 8] * 4) + end
    assert short == "<|img_start|>4*8<|img_token_start|>" + one * 5 + row.join([one * 4] * 2) + end
    odd = Image.new("RGB", (40, 56), "red")  # 7 x 5 codes
    assert processor.image_processor([odd], return_tensors="pt")["image_sizes"].tolist() == [[56, 40]]
    [[height, width]] = compact.image_processor([odd], return_tensors="pt")["image_sizes"].tolist()
    assert height % (2 * FACTOR) == width % (2 * FACTOR) == 0


def test_the_compact_processor_makes_the_processors_of_other_adapters(pristine, compact, processor, mixed):
    """Its image processor resizes for its own stride, which must not be taken for the base's."""
    model = attach(copy.deepcopy(pristine), stride=4)
    ours, theirs = (question_inputs(model.compact_processor(one), QUESTIONS, mixed) for one in (processor, compact))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_the_bases_documented_call_makes_the_same_prompt(model, compact, mixed):
    content = [{"type": "image", "image": mixed[1]}, {"type": "text", "text": QUESTIONS[0]}]
    inputs = compact.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = question_inputs(compact, QUESTIONS[:1], mixed[1:2])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(answer(model, inputs), answer(model, expected))


@pytest.mark.parametrize("token", ["<|image|>", "<|img_start|>", "<|img_end|>"])
def test_a_text_with_a_token_of_images_is_refused(model, compact, token):
    messages = [{"role": "user", "content": f"a red {token}"}, {"role": "assistant", "content": "3"}]
    with pytest.raises(InputError, match=rf"image token {re.escape(token)} in its text"):
        UniCompressCollator(compact, model.active_peft_config)([{"messages": messages}])


# transformers' own generate, which encodes images flat


def test_flat_codes_of_several_images_of_several_sizes_are_read_as_ours(model, compact, mixed):
    texts = [chat(compact, IMAGE, IMAGE, QUESTIONS[0]), chat(compact, IMAGE, QUESTIONS[1])]
    thin = Image.new("RGB", (256, 16), "red")  # one row of tokens
    for pictures in (mixed, [mixed[2], thin, mixed[1]]):
        inputs = compact(text=texts, images=pictures, padding=True, return_tensors="pt")
        assert torch.equal(answer(model.get_base_model(), inputs), answer(model, inputs))


def test_prompts_that_do_not_fit_flat_codes_are_refused(model, compact, processor, mixed):
    base, inputs = model.get_base_model(), question_inputs(compact, QUESTIONS, mixed)
    with pytest.raises(
        InputError, match=r"images of \[8, 8, 4, 4, 8, 8\] rows .* each once.*several answers need UniCompressM"
    ):
        base.generate(**inputs, num_beams=2, max_new_tokens=2)
    encoded = base.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    with pytest.raises(InputError, match=r"images of \[\] rows of codes for encoded images of \[64, 32, 48\] codes"):
        base.model(inputs_embeds=base.get_input_embeddings()(inputs["input_ids"]), mm_encoder_outputs={"image": encoded})


# The language model


def language_model_lengths(model) -> list[int]:
    """The number of positions of each call of the language model, from now on."""
    seen: list[int] = []
    model.get_base_model().model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return seen


def test_the_language_model_reads_a_quarter_of_the_codes(model, processor, compact, images):
    lengths = language_model_lengths(model)
    text = len(processor.tokenizer(chat(processor, QUESTIONS[0]))["input_ids"])
    with model.disable_adapter():
        answer(model, question_inputs(processor, QUESTIONS[:1], images[:1]), 1)
    answer(model, question_inputs(compact, QUESTIONS[:1], images[:1]), 1)
    wrapper = 6  # begin, the three tokens of "8*8", their end, end of image
    assert lengths == [text + wrapper + 64 + 7, text + wrapper + 4 + 1 + 16 + 3]


def test_the_joint_loss_scores_answers_as_the_pruned_head_does(model, compact, processor, images):
    user = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": [{"type": "text", "text": "3"}]}]
    batch = UniCompressCollator(compact, model.active_peft_config)([{"messages": messages, "images": images[:1]}])
    with torch.no_grad():
        scored = model(**batch, fused_lm_head=True)
        plain = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert plain.shape[-1] == len(processor.tokenizer)
    labels = batch["labels"][0, 1:]
    told = labels != -100
    expected = plain[0, :-1].log_softmax(-1)[told].gather(1, labels[told, None]).squeeze(1)
    torch.testing.assert_close(scored.log_probs[0][told], expected)


def test_it_hears_beside_what_it_reads(pristine, model, compact, processor, mixed):
    sound = np.sin(np.arange(23) / 3).astype(np.float32)

    def inputs(processor):
        content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        return processor(text=[text + processor.audio_token], images=mixed[:1], audio=[sound], return_tensors="pt")

    dense, short = inputs(processor), inputs(compact)
    assert (short["input_ids"] == processor.audio_token_id).sum() == 6
    with model.disable_adapter():
        assert torch.equal(logits(model, dense), logits(pristine, dense))
        assert torch.equal(answer(model, dense), answer(pristine, dense))
    heard = logits(model, short)
    deaf = {name: value for name, value in short.items() if name not in ("input_values", "padding_mask")}
    assert not torch.equal(heard, logits(model, deaf))
    assert torch.equal(answer(model, short, 1)[0, 0], heard[0, -1].argmax())


# Published shapes


@pytest.fixture(scope="module")
def published():
    """Apertus 1.5 8B by its shapes, with a default adapter. What transformers' config does not have as a default is given."""
    text = Apertus1p5TextConfig(
        intermediate_size=21504, num_key_value_heads=8, output_vocab_size=131072, max_position_embeddings=262144
    )
    with torch.device("meta"):
        base = Apertus1p5ForConditionalGeneration(Apertus1p5Config(text_config=text))
    return get_uc_model(base, UniCompressConfig())


def test_the_published_model_shortens_7569_to_1854(published):
    family, config = published.family, published.active_peft_config
    assert family.dense_placeholders(family.read_grid((1392, 1392))) == 7569  # what the processors make of 1400 x 1400
    assert config.num_image_tokens(family.read_grid((1376, 1376))) == 1854
    assert family.dense_placeholders(family.read_grid((1360, 1440))) == 7650
    assert config.num_image_tokens(family.read_grid((1344, 1440))) == 1895


def test_the_published_model_gets_modules_of_these_shapes(published):
    reader = published.read_layer.active_module()
    embeddings, entries = (torch.zeros(1, 86 * 86, width, device="meta") for width in (4096, 256))
    assert reader(embeddings, entries, (86, 86)).shape == (1, 1854, 4096)
    assert published.family.text_logits(torch.zeros(1, 4096, device="meta")).shape == (1, 131072)
    targets = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in published.named_parameters() if ".lora_A." in name}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}


@pytest.mark.skipif(not is_torchvision_available(), reason="Apertus 1.5's image processor needs torchvision")
@pytest.mark.parametrize(("size", "dense", "short"), [((1400, 1400), 7569, 1854), ((1440, 1360), 7650, 1895)])
def test_the_published_processor_writes_as_many_placeholders(published, processor, size, dense, short):
    from transformers import Apertus1p5ImageProcessor

    whole = copy.deepcopy(processor)
    whole.image_processor = Apertus1p5ImageProcessor()
    for one, expected in ((whole, dense), (published.compact_processor(whole), short)):
        inputs = one(text=[one.image_token], images=[Image.new("RGB", size, "red")], return_tensors="pt")
        assert (inputs["input_ids"] == one.image_token_id).sum() == expected


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_without_torchvision_the_published_processor_and_an_adapters_say_what_they_need(processor, compact, tmp_path):
    for name, one in (("base", processor), ("adapter", compact)):
        one.save_pretrained(tmp_path / name)
        file = tmp_path / name / "processor_config.json"
        file.write_text(file.read_text().replace("Emu3ImageProcessor", "Apertus1p5ImageProcessor"))
        with pytest.raises(ValueError, match="Missing optional dependencies: torchvision"):
            AutoProcessor.from_pretrained(tmp_path / name)


# Sharing


def test_it_is_pushed_and_pulled_and_its_cards_snippet_runs(hub, pristine, processor, images, tmp_path, monkeypatch):
    base, adapter = tmp_path / "base", tmp_path / "apertus-uc4x"
    for part in (pristine, processor):
        part.save_pretrained(base)
    hub.create("org/apertus", {path.name: path.read_bytes() for path in base.iterdir()})
    attach(copy.deepcopy(pristine)).save_pretrained(adapter, processor=processor, base_model="org/apertus")
    push_folder(adapter, "org/apertus-uc4x", token=ANN)
    card = ModelCard(hub.repos["org/apertus-uc4x"].files()["README.md"].decode())
    assert "| tokens to read an image of 64 x 64 codes | 4096 | 1029 |" in card.text
    assert "It reads, and cannot draw: Apertus 1.5 has no decoder" in card.text
    images[0].save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], "README.md", "exec"), {})
    loaded = UniCompressModel.from_pretrained("org/apertus-uc4x")
    assert loaded.family.model_type == "apertus1p5"
