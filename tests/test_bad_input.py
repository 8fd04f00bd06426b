"""Prompts, images and options that cannot work: each is refused by name, with what to do instead."""

from contextlib import nullcontext

import pytest
import torch
from helpers import (
    CAPTIONS,
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
from uc_adapters.errors import AdapterNameError, BaseModelError, InputError, UnsupportedError


@pytest.fixture
def model(shared):
    """What is refused changes nothing."""
    return shared()


@pytest.fixture
def own(base):
    """One that a test may change."""
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
        model(**{**batch, "gen_pixel_values": torch.zeros(1, 3, 32, 32)})
    batch["gen_mask"][0, batch["gen_mask"][0].nonzero()[0]] = False
    with pytest.raises(InputError, match=r"16 positions.*17.*UniCompressCollator"):
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


@pytest.mark.parametrize("decompressor", ["strip", "phase"])
def test_beam_search_for_drawing(shared, prompts, decompressor):
    with pytest.raises(UnsupportedError, match=r"num_beams=3.*num_beams=1"):
        draw(shared(decompressor=decompressor), prompts, num_beams=3)


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
    with pytest.raises(InputError, match=r"which begins an image, without generation_mode; expected.*'image'"):
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


def test_drawing_in_training_with_checkpointed_gradients(own, prompts):
    model = own
    drawn = draw(model, prompts, do_sample=False)
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    with pytest.raises(UnsupportedError, match=r"keeps no cache; call model\.eval\(\)"):
        draw(model, prompts)
    assert torch.equal(draw(model.eval(), prompts, do_sample=False), drawn)


def test_labels_of_another_collator(model, short_question):
    with pytest.raises(InputError, match=r"21 image placeholder\(s\) labelled as text.*UniCompressCollator"):
        model(**short_question, labels=short_question["input_ids"])


def test_several_adapters_chosen_at_once(own):
    model = own
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


# Placeholders without their images


@pytest.mark.parametrize("use", [logits, answer])
@pytest.mark.parametrize("enabled", [True, False])
def test_placeholders_without_an_image(model, short_question, dense_question, use, enabled):
    words = {name: value for name, value in (short_question if enabled else dense_question).items() if name != "pixel_values"}
    with (
        nullcontext() if enabled else model.disable_adapter(),
        pytest.raises(InputError, match=rf"{21 if enabled else 64} image placeholders and no images.*processor\(text="),
    ):
        use(model, words)


def test_placeholders_without_an_image_to_draw_from(model, short_processor, images):
    texts = [chat(short_processor, IMAGE, "a red 3")]
    inputs = short_processor(text=texts, images=images[:1], return_tensors="pt", generation_mode="image")
    inputs.pop("pixel_values")
    with pytest.raises(InputError, match="21 image placeholders and no images"):
        draw(model, inputs)
    with pytest.raises(InputError, match="21 image placeholders and no images"):
        model.generate(inputs["input_ids"], generation_mode="image")


def test_places_to_draw_without_an_image(model, short_processor, images):
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a red 3"}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": images[:1],
    }
    batch = UniCompressCollator(short_processor, model.active_peft_config, caption_dropout=0.0)([row])
    del batch["gen_pixel_values"]
    with pytest.raises(InputError, match="17 image placeholders and no images"):
        model(**batch)


def test_placeholders_in_a_negative_prompt(model, prompts):
    ids = torch.tensor([[7, model.family.image_token_id, 8]])
    for guidance_scale in (1.0, 3.0):
        with pytest.raises(InputError, match=r"negative_prompt_ids hold image placeholders \(token \d+\).*no images"):
            draw(model, prompts, guidance_scale=guidance_scale, negative_prompt_ids=ids)


def test_images_that_came_encoded_are_no_missing_ones(model, short_question):
    whole = logits(model, short_question)
    with torch.no_grad():
        features = model.get_base_model().model.get_image_features(short_question["pixel_values"], return_dict=True)
    words = {name: value for name, value in short_question.items() if name != "pixel_values"}
    assert torch.equal(logits(model, {**words, "mm_encoder_outputs": {"image": features}}), whole)


# Numbers that are none, and names that nobody knows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), "2", -3, -0.1, [2.0]])
def test_a_guidance_that_is_no_number(model, prompts, value):
    with pytest.raises(InputError, match=r"guidance_scale=.*; expected a (finite )?number"):
        draw(model, prompts, guidance_scale=value)


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "typical_p", "min_p", "top_h", "epsilon_cutoff", "repetition_penalty"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sampling_option_that_is_not_finite(model, prompts, name, value):
    for mode in ("image", "text"):
        with pytest.raises(InputError, match=f"{name}={value}; expected a finite number"):
            model.generate(**prompts, generation_mode=mode, do_sample=True, **{name: value})


def test_a_number_that_is_none_in_a_generation_config(own, prompts):
    model = own
    model.generation_config.guidance_scale = float("nan")
    with pytest.raises(InputError, match="guidance_scale=nan; expected a finite number"):
        draw(model, prompts)


@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_a_count_of_drawings_that_is_none(model, prompts, value):
    with pytest.raises(InputError, match=r"num_return_sequences=.*; expected a whole number, 1 or more"):
        draw(model, prompts, do_sample=True, num_return_sequences=value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("drawn_latent", "gen_latents"), ("pixel_value", "pixel_values"), ("label", "labels"), ("colour", "arguments that")],
)
def test_an_argument_of_forward_that_nobody_knows(model, short_question, dense_question, name, meant):
    with pytest.raises(InputError, match=rf"{name} is unknown to the forward of .*Janus.*expected {meant}"):
        model(**short_question, **{name: torch.zeros(1)})
    with model.disable_adapter(), pytest.raises(InputError, match=f"{name} is unknown"):
        model(**dense_question, **{name: torch.zeros(1)})


def test_an_input_of_the_base_that_the_loss_would_ignore(model, short_question):
    """As the audio of a base that also hears: the loss of a training batch is computed from text and images alone."""
    ids = short_question["input_ids"]
    embeddings = torch.zeros(*ids.shape, 192)
    with pytest.raises(InputError, match=r"inputs_embeds with images to draw.*text tokens and images alone. Remove"):
        model(**short_question, labels=torch.full_like(ids, 7), fused_lm_head=True, inputs_embeds=embeddings)


def test_what_the_base_takes_is_taken(model, short_question):
    plain = logits(model, short_question)
    more = {
        "use_cache": True,
        "output_hidden_states": True,
        "return_dict": True,
        "logits_to_keep": 0,
        "num_items_in_batch": None,
    }
    assert torch.equal(logits(model, {**short_question, **more}), plain)


def test_a_generator_is_refused_in_reading_as_the_base_refuses_it(model, pristine, short_question, dense_question):
    for reader, inputs in ((pristine, dense_question), (model, short_question)):
        for name, value in (("generator", torch.Generator()), ("progress", True)):
            with pytest.raises(ValueError, match=rf"not used by the model: \['{name}'\]"):
                reader.generate(**inputs, max_new_tokens=1, do_sample=True, **{name: value})


# No adapter


def test_the_last_adapter_deleted(own, short_question, prompts, short_processor, tmp_path):
    model = own
    model.delete_adapter("default")
    uses = [
        lambda: logits(model, short_question),
        lambda: answer(model, short_question),
        lambda: draw(model, prompts),
        lambda: model.compact_processor(short_processor),
        lambda: model.save_pretrained(tmp_path),
        lambda: model.push_to_hub("org/adapter"),
    ]
    for use in uses:
        with pytest.raises(AdapterNameError, match=r"no adapter 'default' any more; expected an adapter.*unload\(\)"):
            use()
    assert list(tmp_path.iterdir()) == []
    model.add_adapter("default", small_config())
    model.set_adapter("default")
    assert logits(model, short_question).isfinite().all()
