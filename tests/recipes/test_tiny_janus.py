import pytest
import torch
from helpers import CAPTIONS, DENSE, draw, drawing_inputs, question_inputs, rng
from tiny_world.digits import COLOURS, DESCRIBE, PLACES, random_scene
from transformers import AutoModelForImageTextToText, AutoProcessor, JanusForConditionalGeneration, JanusProcessor


def test_the_classes_are_transformers_own(pristine, processor):
    assert type(pristine) is JanusForConditionalGeneration
    assert type(processor) is JanusProcessor


def test_the_model_is_tiny(pristine):
    assert sum(parameter.numel() for parameter in pristine.parameters()) < 5_000_000


def test_the_repo_folder_loads_through_the_auto_classes(base_folder, pristine, processor):
    model = AutoModelForImageTextToText.from_pretrained(base_folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in pristine.state_dict().items())
    again = AutoProcessor.from_pretrained(base_folder)
    assert again.num_image_tokens == processor.num_image_tokens == DENSE
    assert again.chat_template == processor.chat_template


def test_the_dense_base_reads_and_draws(pristine, processor, images):
    inputs = question_inputs(processor, ["How many digits are there?"], images[:1])
    assert (inputs["input_ids"] == pristine.config.image_token_id).sum() == DENSE
    assert pristine.generate(**inputs, max_new_tokens=2).shape[0] == 1
    tokens = draw(pristine, drawing_inputs(processor, CAPTIONS))
    assert tokens.shape == (3, DENSE)
    assert pristine.decode_image_tokens(tokens).shape == (3, 64, 64, 3)


@pytest.mark.parametrize("text", [*COLOURS, *PLACES, *CAPTIONS, DESCRIBE, "What digit is at the top left?"])
def test_the_tokenizer_knows_the_tiny_worlds_words(processor, text):
    tokenizer = processor.tokenizer
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_an_image_comes_back_from_the_processor_as_it_was(processor):
    image = random_scene(rng(0), "held-out").image("held-out")
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    restored = ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8)
    assert bytes(restored.flatten().tolist()) == image.tobytes()
