"""Prompts, images and options that cannot work: each is refused by name, with what to do instead."""

import pytest
import torch
from helpers import (
    CAPTIONS,
    DECOMPRESSORS,
    IMAGE,
    answer,
    attach,
    chat,
    draw,
    drawing_inputs,
    logits,
    question_inputs,
    small_config,
)

from uc_adapters import UniCompressCollator, get_uc_model
from uc_adapters.errors import BaseModelError, InputError, UnsupportedError


@pytest.fixture
def model(base):
    return attach(base)


@pytest.fixture
def prompts(short_processor):
    return drawing_inputs(short_processor, CAPTIONS)


@pytest.mark.parametrize("use", [logits, answer])
def test_dense_inputs_to_an_enabled_adapter(model, dense_question, use):
    with pytest.raises(InputError, match=r"64 image placeholders for 1 image.*enabled.*21.*adapter.*AutoProcessor"):
        use(model, dense_question)


@pytest.mark.parametrize("use", [logits, answer])
def test_short_inputs_to_a_disabled_adapter(model, short_question, use):
    with (
        pytest.raises(InputError, match=r"21 image placeholders for 1 image.*disabled.*64.*base.*AutoProcessor"),
        model.disable_adapter(),
    ):
        use(model, short_question)


def test_dense_inputs_to_draw_from(model, processor, images):
    inputs = processor(
        text=[chat(processor, IMAGE, "a red 3")],
        images=images[:1],
        return_tensors="pt",
        generation_mode="image",
    )
    with pytest.raises(InputError, match=r"64 image placeholders.*21"):
        draw(model, inputs)


def test_more_images_than_placeholders(model, short_processor, short_question, images):
    pixels = short_processor.image_processor(images[:2], return_tensors="pt")["pixel_values"]
    with pytest.raises(InputError, match=r"21 image placeholders for 2 image"):
        logits(model, {**short_question, "pixel_values": pixels})


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 64, 32), (1, 1, 64, 64), (1, 4, 64, 64), (3, 64, 64), (0, 3, 64, 64)])
@pytest.mark.parametrize("use", [logits, answer])
def test_an_image_of_the_wrong_size_or_mode(model, short_question, use, shape):
    shown = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=rf"{shown}.*3, 64, 64.*processor"):
        use(model, {**short_question, "pixel_values": torch.zeros(shape)})


def test_an_image_to_draw_of_the_wrong_size(model, short_processor, images):
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a red 3"}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": images[:1],
    }
    batch = UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0)([row])
    with pytest.raises(InputError, match=r"\(1, 3, 32, 32\).*3, 64, 64"):
        model(**{**batch, "drawn_pixel_values": torch.zeros(1, 3, 32, 32)})
    batch["drawn_mask"][0, batch["drawn_mask"][0].nonzero()[0]] = False
    with pytest.raises(InputError, match=r"16 places.*17.*UniCompressCollator"):
        model(**batch)


@pytest.mark.parametrize("mode", ["text", "image"])
@pytest.mark.parametrize("shape", [(0, 4), (1, 0), (0, 0), (4,)])
def test_an_empty_batch_or_prompt(model, shape, mode):
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    shown = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=rf"{shown}.*\(batch, tokens\)"):
        model.generate(**inputs, generation_mode=mode)


def test_no_input_at_all(model):
    with pytest.raises(InputError, match="None"):
        model.generate(generation_mode="image")


def test_a_prompt_to_draw_without_a_word(model, short_processor):
    inputs = short_processor(
        text=["", chat(short_processor, "a red 3")], padding=True, return_tensors="pt", generation_mode="image"
    )
    with pytest.raises(InputError, match="prompt"):
        draw(model, inputs)


def test_a_row_that_is_all_padding(model, prompts):
    prompts["attention_mask"][1] = 0
    with pytest.raises(InputError, match="prompt"):
        draw(model, prompts)


def test_a_prompt_that_does_not_begin_an_image(model, short_processor):
    inputs = short_processor(text=[chat(short_processor, "a red 3")], return_tensors="pt")
    with pytest.raises(InputError, match=r'ends in token \[22\].*5.*generation_mode="image"'):
        draw(model, inputs)


@pytest.mark.parametrize("decompressor", DECOMPRESSORS)
def test_beam_search_for_drawing(base, prompts, decompressor):
    with pytest.raises(UnsupportedError, match=r"num_beams=3.*num_beams=1"):
        draw(attach(base, decompressor=decompressor), prompts, num_beams=3)


def test_structured_output_of_drawing(model, prompts):
    with pytest.raises(UnsupportedError, match="return_dict_in_generate=True"):
        draw(model, prompts, return_dict_in_generate=True)


def test_a_misspelt_option_of_drawing(model, pristine, prompts):
    with pytest.raises(ValueError, match="guidence_scale"):
        draw(pristine, prompts, guidence_scale=3.0)  # the base's behaviour
    with pytest.raises(ValueError, match="guidence_scale"):
        draw(model, prompts, guidence_scale=3.0)


def test_a_sampling_option_out_of_range(model, prompts):
    with pytest.raises(ValueError, match="temperature"):
        draw(model, prompts, do_sample=True, temperature=-1.0)


def test_a_refusal_leaves_the_model_as_it_was(model, short_processor, short_question, dense_question, prompts):
    before = logits(model, short_question), draw(model, prompts)
    with pytest.raises(InputError):
        logits(model, dense_question)
    with pytest.raises(UnsupportedError):
        draw(model, prompts, num_beams=2)
    assert torch.equal(logits(model, short_question), before[0])
    assert torch.equal(draw(model, prompts), before[1])


def test_a_batch_of_unequal_image_counts_is_fine(model, short_processor, images):
    inputs = question_inputs(short_processor, ["What colour is the 3?"] * 2, images[:2])
    assert logits(model, inputs).shape[0] == 2


def test_an_unknown_generation_mode(model, prompts):
    with pytest.raises(InputError, match=r"generation_mode='images'; expected 'image' to draw, 'text'"):
        model.generate(**prompts, generation_mode="images")


def test_a_prompt_to_draw_without_the_generation_mode(model, prompts):
    with pytest.raises(InputError, match=r"an image's begin, without generation_mode; expected.*'image'"):
        model.generate(**prompts)
    assert model.generate(**prompts, generation_mode="text", max_new_tokens=1).shape[0] == len(CAPTIONS)


def test_arguments_by_position(model, prompts):
    with pytest.raises(InputError, match=r"2 arguments by position; expected input_ids alone"):
        model.generate(prompts["input_ids"], prompts["attention_mask"], generation_mode="image")


@pytest.mark.parametrize("mode", ["image", "text"])
def test_an_attention_mask_of_another_shape(model, prompts, mode):
    for mask in (prompts["attention_mask"][:1], prompts["attention_mask"][:, 3:]):
        with pytest.raises(InputError, match=r"attention_mask of shape .* for input_ids of shape"):
            model.generate(**{**prompts, "attention_mask": mask}, generation_mode=mode)


def test_drawing_in_training_with_checkpointed_gradients(model, prompts):
    drawn = draw(model, prompts, do_sample=False)
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    with pytest.raises(UnsupportedError, match=r"keeps no cache; call model\.eval\(\)"):
        draw(model, prompts)
    assert torch.equal(draw(model.eval(), prompts, do_sample=False), drawn)


def test_labels_of_another_collator(model, short_question):
    with pytest.raises(InputError, match=r"21 image placeholder\(s\) labelled as words.*UniCompressCollator"):
        model(**short_question, labels=short_question["input_ids"])


def test_several_adapters_chosen_at_once(model):
    with pytest.raises(UnsupportedError, match=r"\['default', 'other'\]\); expected one"):
        model.set_adapter(["default", "other"])
    model.set_adapter(["default"])
    assert model.active_adapter == "default"


def test_a_base_by_its_name_alone():
    with pytest.raises(BaseModelError, match=r"base='org/janus' is a str; expected a loaded model"):
        get_uc_model("org/janus", small_config())


@pytest.mark.parametrize("share", [-0.1, 10, float("nan")])
def test_a_caption_dropout_that_is_no_share(model, short_processor, share):
    with pytest.raises(InputError, match=rf"caption_dropout={share}; expected a share from 0 to 1"):
        UniCompressCollator(short_processor, model.active_peft_config, share)


def test_rows_of_another_form(model, short_processor):
    with pytest.raises(InputError, match=r"A row of prompt, completion; expected .*messages"):
        UniCompressCollator(short_processor, model.active_peft_config)([{"prompt": "2", "completion": "3"}])
