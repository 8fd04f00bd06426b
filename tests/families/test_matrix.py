"""What holds for every family, over the list in specs.py."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from copies import copied
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from helpers import (
    IMAGE,
    assert_same,
    attach,
    base_weights,
    chat,
    logits,
    lora_weights,
    question_inputs,
    randomise,
    small_config,
)
from peft import PeftModel
from PIL import Image
from scoring.stock_calls import calls_of
from specs import SPECS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor, GenerationConfig
from trl import SFTConfig, SFTTrainer

from uc_adapters import UniCompressCollator, UniCompressModel, get_uc_model
from uc_adapters.errors import BaseModelError, ConfigError, InputError, UnsupportedError
from uc_adapters.families import FAMILIES, family_of

QUESTIONS = ["What digit is at the top left?", "How many digits are there?", "What colour is the 7?"]
CAPTIONS = ["a red 3 at the top left", "a blue 7", "a green 1 at the bottom right and a cyan 9 at the top left"]
GEOMETRIES = [{}, {"stride": 1}, {"stride": 4}, {"num_global_tokens": 0}, {"stride": 4, "num_global_tokens": 1}]


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def spec(request):
    return request.param


@pytest.fixture(scope="module")
def processor(spec):
    return spec.make_processor()


@pytest.fixture(scope="module")
def pristine(spec, processor):
    torch.manual_seed(0)
    model = spec.make_model(processor).eval()
    language_model = FAMILIES[spec.name].module_names["language model"]
    with torch.no_grad():  # livelier than at its default start, where every image reads nearly the same
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and (name.startswith(language_model) or "embed" in name):
                parameter.mul_(2.5)
    return model


@pytest.fixture(scope="module")
def pictures(images):
    """Three images of different sizes and ratios."""
    return [images[0], images[1].resize((64, 32)), images[2].resize((48, 64))]


@pytest.fixture(scope="module")
def attached(spec, pristine):
    """Nothing may change it."""
    return attach(copied(pristine), stride=spec.stride)


@pytest.fixture
def model(attached):
    """A copy, which takes a tenth of the time of attaching."""
    return copied(attached)


@pytest.fixture
def compact(model, processor):
    """The adapter's processor."""
    return model.compact_processor(processor)


@pytest.fixture
def drawing(spec):
    """Skips families that do not draw."""
    if not spec.draws:
        pytest.skip(f"{spec.name} does not draw")


@pytest.fixture
def answering(spec):
    """Skips families that do not answer."""
    if not spec.answers:
        pytest.skip(f"{spec.name} does not answer")


@pytest.fixture
def short_reading(spec):
    """Skips families that leave the images to read as they are."""
    if not spec.compresses_reading:
        pytest.skip(f"{spec.name} reads images as its base does")


def answer(model, inputs, count: int = 4) -> torch.Tensor:
    """Greedy tokens behind the prompt."""
    return model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)[:, -count:]


def prompts(model, processor, texts: list[str]):
    return calls_of(model).prompts(processor, [chat(processor, text) for text in texts])


def draw(model, inputs, **kwargs) -> torch.Tensor:
    return model.generate(**inputs, generation_mode="image", do_sample=False, **kwargs)


def conversation(read: Image.Image, drawn: Image.Image | None) -> dict:
    """A row that reads one image, and draws another or answers in words."""
    user = [{"type": "image"}, {"type": "text", "text": "What digit is at the top left?"}]
    told = {"type": "text", "text": "3"} if drawn is None else {"type": "image"}
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": [told]}]
    return {"messages": messages, "images": [read] if drawn is None else [read, drawn]}


@pytest.fixture
def rows(spec, pictures):
    """Rows of different images; some are drawn where the family draws."""
    one, other, third = pictures
    answers = [conversation(one, None), conversation(other, None)] if spec.answers else []
    return [conversation(one, other), conversation(other, third), *answers] if spec.draws else answers


# Attach and take off


def test_the_list_holds_every_family():
    assert {spec.name for spec in SPECS} == set(FAMILIES)


def test_attaching_changes_no_weight_of_the_base(pristine, model):
    assert_same(base_weights(model), dict(pristine.named_parameters()))
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_lora_stays_in_the_language_model(model):
    language_model = f"base_model.model.{model.family.module_names['language model']}."
    targets = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    assert targets
    assert all(name.startswith(language_model) for name in targets)


def test_taken_off_the_base_is_as_it_was_and_carries_again(pristine, model, processor, pictures):
    inputs = question_inputs(processor, QUESTIONS[:1], pictures[:1])
    base = model.unload()
    assert_same(base.state_dict(), pristine.state_dict())
    assert torch.equal(logits(base, inputs), logits(pristine, inputs))
    assert not any(module._forward_pre_hooks for module in base.modules())
    again = attach(base)
    assert logits(again, question_inputs(again.compact_processor(processor), QUESTIONS[:1], pictures[:1])).isfinite().all()


def test_a_copy_is_equal_and_its_own(model, compact, pictures):
    inputs = question_inputs(compact, QUESTIONS[:1], pictures[:1])
    before, twin = logits(model, inputs), copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), before)
    randomise(twin, seed=5)
    assert not torch.equal(logits(twin, inputs), before)
    assert torch.equal(logits(model, inputs), before)


# Disable


def test_disabled_it_is_its_base(pristine, model, processor, pictures):
    inputs = question_inputs(processor, QUESTIONS, pictures)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(pristine, inputs))
        assert torch.equal(answer(model, inputs), answer(pristine, inputs))


class Operations(TorchDispatchMode):
    """Lists what PyTorch computes."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_disabled_the_base_computes_what_it_did_and_no_more(pristine, model):
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad(), Operations() as expected:
        pristine(input_ids=ids)
    with torch.no_grad(), model.disable_adapter(), Operations() as found:
        model.get_base_model()(input_ids=ids)
    assert found.names == expected.names


def test_enabled_it_reads_otherwise(model, compact, pictures):
    one, other = (question_inputs(compact, QUESTIONS[:1], [picture]) for picture in (pictures[0], pictures[0].rotate(180)))
    before = logits(model, one)
    assert not torch.allclose(before, logits(model, other))
    randomise(model, seed=1)
    assert not torch.allclose(before, logits(model, one))


# Batch


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_prompt_holds_the_adapters_placeholders(short_reading, base, processor, pictures, geometry):
    model = attach(base, **geometry)
    inputs = question_inputs(model.compact_processor(processor), QUESTIONS, pictures)
    sizes = model.family.sizes(inputs["pixel_values"], inputs.get("image_sizes"))
    expected = [model.active_peft_config.num_image_tokens(model.family.read_grid(size)) for size in sizes]
    assert (inputs["input_ids"] == model.family.image_token_id).sum(1).tolist() == expected
    assert logits(model, inputs).isfinite().all()


def test_an_image_reads_the_same_alone_and_beside_others(spec, model, compact, pictures):
    together = question_inputs(compact, QUESTIONS, pictures)
    scores, answers = logits(model, together), answer(model, together) if spec.answers else None
    for row, (question, picture) in enumerate(zip(QUESTIONS, pictures, strict=True)):
        alone = question_inputs(compact, [question], [picture])
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(logits(model, alone)[0], scores[row, -length:], atol=1e-3, rtol=1e-4)
        if spec.answers:
            assert torch.equal(answer(model, alone)[0], answers[row])


def test_several_images_in_one_prompt_are_read_in_order(model, compact, pictures):
    text = chat(compact, IMAGE, IMAGE, QUESTIONS[0])

    def read(*chosen) -> torch.Tensor:
        return logits(model, compact(text=[text], images=list(chosen), return_tensors="pt"))

    assert not torch.allclose(read(pictures[0], pictures[0].rotate(90)), read(pictures[0].rotate(90), pictures[0]))


def test_several_answers_to_one_image(answering, model, compact, pictures):
    inputs = question_inputs(compact, QUESTIONS, pictures)
    tokens = model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=3, min_new_tokens=3)
    assert tokens.shape == (6, inputs["input_ids"].shape[1] + 3)


def test_generate_says_what_forward_scores_highest(answering, model, compact, pictures):
    inputs = question_inputs(compact, QUESTIONS[:1], pictures[:1])
    told, ids = answer(model, inputs, 3)[0], inputs["input_ids"]
    for token in told:
        step = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert logits(model, step)[0, -1].argmax() == token
        ids = torch.cat([ids, token.view(1, 1)], 1)


def test_transformers_own_generate_on_the_base_reads_compactly(answering, model, compact, pictures):
    inputs = question_inputs(compact, QUESTIONS[:2], [pictures[0], pictures[0].rotate(90)])
    assert torch.equal(answer(model.get_base_model(), inputs), answer(model, inputs))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_several_answers_through_a_plain_peft_model(answering, fresh, model, compact, pictures, tmp_path, options):
    """Where images are words, transformers repeats them by their dense lengths: refused."""
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(fresh(), str(tmp_path)).eval()
    inputs = question_inputs(compact, QUESTIONS[:2], [pictures[0], pictures[0].rotate(90)])
    options = {**options, "max_new_tokens": 2, "min_new_tokens": 2}
    if not model.family.shared_vocabulary:
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options)
        torch.manual_seed(0)
        assert torch.equal(plain.generate(**inputs, **options), expected)
        return
    with pytest.raises(UnsupportedError, match=r"above 1 through a plain PeftModel.*UniCompressModel.from_pretrained"):
        plain.generate(**inputs, **options)
    with pytest.raises(UnsupportedError, match=r"above 1 through a plain PeftModel"):
        plain.generate(**inputs, generation_config=GenerationConfig(**options))
    plain.base_model.model.generation_config.num_beams = 2  # a forward has no beams
    assert logits(plain, inputs).isfinite().all()


def test_a_trainable_adapter_answers_without_a_graph(answering, model, compact, pictures):
    """A graph of the images would stay in memory, and candidates' arguments could not be copied."""
    assert any(weight.requires_grad for weight in model.parameters())
    inputs = question_inputs(compact, QUESTIONS[:1], pictures[:1])
    kept = model.read_layer.encode_for_generate(dict(inputs)).get("mm_encoder_outputs", {}).get("image")
    assert kept is None or not any(embeddings.requires_grad for embeddings in kept.pooler_output)
    told = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    base = copy.deepcopy(model).unload()
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=4, assistant_model=base), told)


def test_merged_it_reads_and_draws_the_same(spec, pristine, model, processor, compact, pictures):
    inputs, dense = question_inputs(compact, QUESTIONS, pictures), question_inputs(processor, QUESTIONS, pictures)
    expected = logits(model, inputs)
    with model.merged_adapter():
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-3, rtol=1e-4)
        if spec.draws:
            assert draw(model, prompts(model, compact, CAPTIONS[:1])).numel()
        with model.disable_adapter():
            assert torch.equal(logits(model, dense), logits(pristine, dense))
    assert torch.equal(logits(model, inputs), expected)
    assert_same(base_weights(model), dict(pristine.named_parameters()))


def test_with_an_offloaded_tokenizer_it_reads_and_draws_the_same(spec, fresh, model, compact, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    base = fresh()
    tokenizer = base.get_submodule(model.family.module_names["tokenizer"])
    cpu_offload(tokenizer, execution_device=torch.device("cpu"))
    offloaded = UniCompressModel.from_pretrained(base, tmp_path).eval()
    inputs = question_inputs(compact, QUESTIONS, pictures)
    assert torch.equal(logits(offloaded, inputs), logits(model, inputs))
    if spec.draws:
        to_draw = prompts(model, compact, CAPTIONS[:1])
        assert torch.equal(draw(offloaded, to_draw), draw(model, to_draw))


def test_wholly_offloaded_it_reads_and_draws_the_same(spec, fresh, model, compact, pictures, tmp_path):
    model.save_pretrained(tmp_path)
    base = fresh()
    cpu_offload(base, execution_device=torch.device("cpu"))
    offloaded = UniCompressModel.from_pretrained(base, tmp_path).eval()
    inputs = question_inputs(compact, QUESTIONS, pictures)
    if spec.offloads_vision:
        assert torch.equal(logits(offloaded, inputs), logits(model, inputs))
    if spec.draws:
        to_draw = prompts(model, compact, CAPTIONS[:1])
        assert torch.equal(draw(offloaded, to_draw), draw(model, to_draw))


# Save, load, switch


def test_saved_and_loaded_it_reads_and_draws_the_same(spec, fresh, model, processor, compact, pictures, tmp_path):
    model.save_pretrained(tmp_path, processor=processor)
    loaded, loaded_processor = (
        UniCompressModel.from_pretrained(fresh(), tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    loaded_processor.chat_template = compact.chat_template  # Chameleon's class saves none
    inputs, again = (question_inputs(each, QUESTIONS, pictures) for each in (compact, loaded_processor))
    assert_same(dict(again), dict(inputs))
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    if spec.answers:
        plain = PeftModel.from_pretrained(fresh(), str(tmp_path)).eval()
        assert torch.equal(logits(plain, inputs), logits(model, inputs))
    if spec.draws:
        to_draw = prompts(model, loaded_processor, CAPTIONS)
        assert torch.equal(draw(loaded, to_draw), draw(model, to_draw))


def test_switching_between_adapters(spec, model, processor, compact, pictures):
    model.add_adapter("other", small_config(stride=4, num_global_tokens=2))
    randomise(model, "other", seed=3)
    first = question_inputs(compact, QUESTIONS, pictures)
    before = logits(model, first)
    model.set_adapter("other")
    second = question_inputs(model.compact_processor(processor), QUESTIONS, pictures)
    assert (second["input_ids"].shape[1] < first["input_ids"].shape[1]) == spec.compresses_reading
    there = logits(model, second)
    model.set_adapter("default")
    assert torch.equal(logits(model, first), before)
    model.delete_adapter("default")
    assert torch.equal(logits(model, second), there)


def test_two_active_adapters_are_refused(model, compact, pictures):
    model.add_adapter("other", small_config())
    inputs = question_inputs(compact, QUESTIONS[:1], pictures[:1])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedError, match=r"'default', 'other'.*expected one"):
        model(**inputs)


# Draw


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("decompressor", ["strip", "phase"])
def test_a_prompt_draws_the_same_alone_and_beside_others(spec, drawing, base, processor, decompressor, guidance_scale):
    model = attach(base, decompressor=decompressor, stride=spec.stride)
    compact = model.compact_processor(processor)
    together = draw(model, prompts(model, compact, CAPTIONS), guidance_scale=guidance_scale)
    for row, caption in zip(together, CAPTIONS, strict=True):
        assert torch.equal(draw(model, prompts(model, compact, [caption]), guidance_scale=guidance_scale)[0], row)


def test_a_drawing_becomes_a_picture(drawing, model, compact):
    if model.family.why_no_pixels is not None:
        pytest.skip("draws codes and no pixels")
    inputs, calls = prompts(model, compact, CAPTIONS), calls_of(model)
    pixels = model.family.to_pixels(draw(model, inputs), calls.grid(model, inputs))
    assert pixels.shape == (3, 3, 64, 64)
    assert pixels.isfinite().all()


def test_guidance_counts(drawing, model, compact):
    inputs = prompts(model, compact, CAPTIONS)
    plain, guided = (draw(model, inputs, guidance_scale=scale) for scale in (1.0, 4.0))
    assert not torch.equal(plain, guided)


def test_a_blank_negative_prompt_is_the_default_guidance(drawing, model, compact):
    inputs = prompts(model, compact, CAPTIONS)
    blank = model.family.unconditional(inputs["input_ids"], model.generation_config)
    given = {"negative_prompt_ids": blank, "negative_prompt_attention_mask": inputs["attention_mask"]}
    assert torch.equal(draw(model, inputs, guidance_scale=3.0, **given), draw(model, inputs, guidance_scale=3.0))


def test_a_negative_prompt_leads_away_and_one_row_serves_all(drawing, model, compact):
    inputs, words = prompts(model, compact, CAPTIONS), compact.tokenizer(["a yellow 8"], return_tensors="pt")["input_ids"]
    default = draw(model, inputs, guidance_scale=3.0)
    one = draw(model, inputs, guidance_scale=3.0, negative_prompt_ids=words)
    assert not torch.equal(one, default)
    assert torch.equal(one, draw(model, inputs, guidance_scale=3.0, negative_prompt_ids=words.expand(3, -1)))


def test_several_drawings_of_one_prompt(drawing, model, compact):
    inputs = prompts(model, compact, CAPTIONS[:2])
    torch.manual_seed(0)
    tokens = model.generate(**inputs, generation_mode="image", do_sample=True, num_return_sequences=2)
    assert len(tokens) == 4
    assert not torch.equal(tokens[0], tokens[1])


# Train


def test_a_mixed_batch_scores_what_its_rows_score_alone(model, compact, rows):
    collator = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)
    with torch.no_grad():
        together = model(**collator(rows), fused_lm_head=True)
        alone = [model(**collator([row]), fused_lm_head=True) for row in rows]
    for row, single in enumerate(alone):
        length = single.log_probs.shape[1]
        torch.testing.assert_close(together.log_probs[row, :length], single.log_probs[0], atol=1e-3, rtol=1e-4)
        assert torch.equal(together.label_mask[row, :length], single.label_mask[0])
        assert not together.label_mask[row, length:].any()


def test_what_frames_an_image_is_not_learned(drawing, model, compact, pictures):
    row = conversation(pictures[0], pictures[1])
    batch = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)([row])
    places = int(batch["gen_mask"].sum())
    assert (batch["labels"][batch["gen_mask"]] != -100).sum() == places - 1  # the separator is known
    words = batch["labels"][(batch["labels"] != -100) & ~batch["gen_mask"]]
    assert words.tolist() == [compact.tokenizer.eos_token_id]


def test_a_dropped_caption_is_what_guidance_draws_from(drawing, model, compact, pictures):
    row = conversation(pictures[0], pictures[0])
    row["messages"][0]["content"], row["images"] = [{"type": "text", "text": CAPTIONS[0]}], row["images"][1:]
    batch = UniCompressCollator(compact, model.active_peft_config, caption_dropout=1.0)([row])
    prompt = prompts(model, compact, CAPTIONS[:1])["input_ids"]
    blank = model.family.unconditional(prompt, model.generation_config)
    assert torch.equal(batch["input_ids"][:, : blank.shape[1]], blank)


def test_two_steps_of_sft_trainer_train_stage_2_alone(model, compact, rows, tmp_path):
    model.train_only("language model")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}  # buffers, too
    before = lora_weights(model)
    options = {"max_length": None, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    options |= {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    options |= {"per_device_train_batch_size": len(rows), "max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=False, **options),
        train_dataset=as_dataset(rows),
        processing_class=compact,
        data_collator=UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0),
    ).train()
    assert_same({name: value for name, value in model.state_dict().items() if "lora_" not in name}, state)
    after = lora_weights(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == trainable


def as_dataset(rows: list[dict]) -> Dataset:
    part = {"type": Value("string"), "text": Value("string")}
    messages = List({"role": Value("string"), "content": List(part)})
    return Dataset.from_list(rows, features=Features({"messages": messages, "images": List(ImageFeature())}))


def test_bfloat16_reads_and_draws(spec, model, compact, pictures):
    model.to(torch.bfloat16)
    inputs = question_inputs(compact, QUESTIONS, pictures)
    assert logits(model, inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}).isfinite().all()
    if spec.draws:
        assert len(draw(model, prompts(model, compact, CAPTIONS))) == 3


# Bad input


def test_a_family_that_cannot_draw_says_why(spec, model, compact, pictures):
    if spec.draws:
        pytest.skip(f"{spec.name} draws")
    inputs = question_inputs(compact, QUESTIONS[:1], pictures[:1])
    with pytest.raises(UnsupportedError, match=r"cannot draw.*no decoder"):
        model.generate(**inputs, generation_mode="image")
    with pytest.raises(UnsupportedError, match=r"cannot draw.*no decoder"):
        model(**inputs, gen_pixel_values=inputs["pixel_values"], labels=inputs["input_ids"])
    assert model.code_head is None


def test_the_bases_placeholders_are_refused_while_enabled(short_reading, model, processor, pictures):
    inputs = question_inputs(processor, QUESTIONS[:1], pictures[:1])
    for call in (model, model.generate):
        with pytest.raises(InputError, match=r"\d+ image placeholders for 1 image.*enabled, expected \d+ an image.*adapter"):
            call(**inputs)


def test_the_adapters_placeholders_are_refused_while_disabled(short_reading, model, compact, pictures):
    inputs = question_inputs(compact, QUESTIONS[:1], pictures[:1])
    with model.disable_adapter():
        for call in (model, model.generate):
            with pytest.raises(InputError, match=r"placeholders.*disabled, expected \d+ an image.*base"):
                call(**inputs)


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (1, 1, 64, 64), (3, 64, 64)])
def test_pixels_of_another_shape_are_refused(model, compact, pictures, shape):
    inputs = question_inputs(compact, QUESTIONS[:1], pictures[:1])
    with pytest.raises(InputError, match=r"pixel_values of shape.*expected \(images, 3,"):
        model(**inputs | {"pixel_values": torch.zeros(shape)})


def test_an_empty_batch_is_refused(spec, model):
    with pytest.raises(InputError, match=r"shape \(0, 3\)"):
        model.generate(torch.zeros(0, 3, dtype=torch.long), generation_mode="image" if spec.draws else None)


def test_drawing_prompts_that_cannot_be_are_refused(drawing, model, compact):
    inputs = prompts(model, compact, CAPTIONS)
    short = {**inputs, "input_ids": inputs["input_ids"][:, :-1], "attention_mask": inputs["attention_mask"][:, :-1]}
    with pytest.raises(InputError, match="which begins an image"):
        draw(model, short)
    blank = model.family.unconditional(inputs["input_ids"], model.generation_config)
    frame = model.family.wrapper_mask(inputs["input_ids"], model.generation_config)
    with pytest.raises(InputError, match=r"Row\(s\) \[0, 1, 2\] hold an empty prompt"):
        draw(model, {**inputs, "input_ids": blank, "attention_mask": frame.long()})
    with pytest.raises(UnsupportedError, match="num_beams=2"):
        draw(model, inputs, num_beams=2)
    with pytest.raises(InputError, match="got colour"):
        draw(model, inputs, colour="red")
    with pytest.raises(InputError, match=r"negative_prompt_ids of shape \(2, 4\) for 3 prompt"):
        draw(model, inputs, guidance_scale=2.0, negative_prompt_ids=torch.zeros(2, 4, dtype=torch.long))


def test_a_base_that_carries_an_adapter_or_is_a_part_is_refused(model, fresh):
    with pytest.raises(BaseModelError, match="carries an adapter already"):
        get_uc_model(model.get_base_model(), small_config())
    with pytest.raises(BaseModelError, match=r"No family|lacks"):
        get_uc_model(fresh().model, small_config())


def test_the_adapter_of_another_base_is_refused(spec, model, fresh, processor, tmp_path):
    model.save_pretrained(tmp_path)
    other = spec.make_model(processor)
    quantise = other.get_submodule(FAMILIES[spec.name].module_names["tokenizer"]).quantize.embedding
    with torch.no_grad():
        quantise.weight.copy_(quantise.weight.flip(0))
    with pytest.raises(BaseModelError, match="another codebook"):
        UniCompressModel.from_pretrained(other, tmp_path)
    assert not any(isinstance(module, nn.ModuleDict) for name, module in other.named_modules() if name.endswith("lora_uc"))


def test_target_modules_that_match_nothing_are_refused(base):
    with pytest.raises(ConfigError, match=r"'conv_in'.*matches nothing"):
        get_uc_model(base, small_config(target_modules=["conv_in"]))


def test_a_stride_that_divides_no_grid_is_refused(short_reading, base, processor, pictures):
    if family_of(base).geometry.image_size is not None:
        with pytest.raises(BaseModelError, match="stride=3 does not divide"):
            get_uc_model(base, small_config(stride=3))
        return
    model = attach(base)
    odd = Image.new("RGB", (72, 40), "red")  # 5 x 9 codes
    inputs = question_inputs(processor, QUESTIONS[:1], [odd])
    with pytest.raises(InputError, match=r"5 x 9 tokens.*stride 2"):
        model(**inputs)
    adapters = question_inputs(model.compact_processor(processor), QUESTIONS[:1], [odd])
    assert logits(model, adapters).isfinite().all()


def test_codes_are_the_bases_under_autocast_too(model, processor, pictures):
    prepared = model.family.image_inputs(processor, pictures)
    sizes = prepared.get("image_sizes")

    def codes() -> list[torch.Tensor]:
        return [model.family.dense_codes(pixels) for _, pixels, _ in model.family.by_size(prepared["pixel_values"], sizes)]

    exact = codes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, codes(), exact))
