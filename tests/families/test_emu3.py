"""What is Emu3's own: images of any size, row ends, codes that are words, a prompt that tells the size."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from copies import copied
from helpers import Record, attach, chat, logits, question_inputs
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shallow import shallow
from tiny_world.tiny_emu3 import make_model, make_processor
from transformers import AutoProcessor, Emu3Config, Emu3ForConditionalGeneration, LogitsProcessorList

from uc_adapters import UniCompressCollator, UniCompressConfig, get_uc_model
from uc_adapters.errors import BaseModelError, InputError
from uc_adapters.families import family_of
from uc_adapters.families.emu3 import CompactEmu3Processor
from uc_adapters.images import pack_latents
from uc_adapters.joint_loss import CODES
from uc_adapters.layers import nearest_codes

RATIOS = ["1:1", "2:1", "3:4", "1:2"]
AREA = 64 * 64


@pytest.fixture(scope="module")
def processor():
    return make_processor(32 * 32, 64 * 64)


@pytest.fixture(scope="module")
def pristine(processor):
    torch.manual_seed(0)
    model = shallow(make_model(processor, temporal_downsample_factor=4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.text_model"):
                parameter.mul_(2.5)
    return model


@pytest.fixture(scope="module")
def family(pristine):
    return family_of(pristine)


@pytest.fixture(scope="module")
def mixed(images):
    """Three sizes and ratios: grids of 8 x 8, 4 x 8 and 8 x 6 codes."""
    return [images[0], images[1].resize((64, 32)), images[2].resize((48, 64))]


@pytest.fixture(scope="module")
def attached(pristine):
    """Nothing may change it."""
    return attach(copied(pristine))


@pytest.fixture
def model(attached):
    """A copy, which takes half as long as attaching."""
    return copied(attached)


@pytest.fixture
def compact(model, processor):
    return model.compact_processor(processor)


def to_draw(processor, caption: str, ratio: str = "1:1"):
    text = chat(processor, caption)
    return processor(text=[text], return_for_image_generation=True, ratio=ratio, image_area=AREA, return_tensors="pt")


def draw(model, inputs, **kwargs) -> torch.Tensor:
    return model.generate(**inputs, generation_mode="image", **kwargs)


def together(rows: list) -> dict:
    """Prompts of different lengths and sizes as one batch, padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)

    def padded(name: str) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(row[name], (width - row[name].shape[1], 0)) for row in rows])

    sizes = [size for row in rows for size in row["image_sizes"]]
    return {"input_ids": padded("input_ids"), "attention_mask": padded("attention_mask"), "image_sizes": torch.tensor(sizes)}


# Codes are words


def test_dense_codes_are_the_bases_own(family, processor, mixed):
    for image in mixed:
        prepared = processor.image_processor([image], return_tensors="pt")
        pixels, size = prepared["pixel_values"], prepared["image_sizes"]
        own = family.base.model.vqmodel.encode(pixels, size, return_dict=True).image_tokens[0]
        assert tuple(own.shape) == family.read_grid(tuple(size[0].tolist()))
        assert torch.equal(family.dense_codes(pixels)[0], own.flatten())


def test_in_a_batch_of_any_sizes_codes_are_what_they_are_alone(family, processor, mixed):
    """The base itself encodes the padding, too, which changes the codes beside it."""
    batch = processor.image_processor(mixed, return_tensors="pt")
    for rows, pixels, (height, width) in family.by_size(batch["pixel_values"], batch["image_sizes"]):
        assert pixels.shape[2:] == (height, width)
        for row, codes in zip(rows, family.dense_codes(pixels), strict=True):
            alone = processor.image_processor([mixed[row]], return_tensors="pt")["pixel_values"]
            assert torch.equal(codes, family.dense_codes(alone)[0])


def test_codes_to_entries_to_codes_is_the_identity(family):
    assert torch.equal(nearest_codes(family.codebook, family.codebook), torch.arange(512))


def test_codes_are_read_as_the_base_reads_them(family, processor, mixed):
    prepared = processor.image_processor(mixed[:1], return_tensors="pt")
    own = family.base.model.get_image_features(prepared["pixel_values"], prepared["image_sizes"], return_dict=True)
    dense = own.pooler_output[0].unflatten(0, (8, 9))  # with the row ends
    assert torch.equal(family.read_features(prepared["pixel_values"])[0].unflatten(0, (8, 8)), dense[:, :8])
    assert torch.equal(family.eol.expand(8, -1), dense[:, 8])


def test_code_logits_are_the_words_own_logits(family):
    hidden = torch.randn(2, 3, 192)
    expected = family.base.lm_head(hidden)[..., family.code_token_ids]
    torch.testing.assert_close(family.code_logits(hidden), expected)


def test_words_in_any_order_draw_the_same_codes(pristine, processor):
    """A vocabulary that holds the codes' words out of order: their logits are gathered instead of sliced."""
    vocabulary = dict(pristine.config.vocabulary_map)
    one, other = "<|visual token 000003|>", "<|visual token 000400|>"
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    config = copy.deepcopy(pristine.config)
    config.vocabulary_map = vocabulary
    swapped = Emu3ForConditionalGeneration(config).eval()
    swapped.load_state_dict(pristine.state_dict())
    hidden, straight, mixed_up = torch.randn(5, 192), family_of(pristine), family_of(swapped)
    order = torch.arange(512)
    order[[3, 400]] = order[[400, 3]]
    assert torch.equal(mixed_up.code_token_ids, straight.code_token_ids[order])
    torch.testing.assert_close(mixed_up.code_logits(hidden), straight.code_logits(hidden)[:, order])


def test_drawn_tokens_are_what_the_base_decodes(family):
    codes = torch.randint(512, (2, 6 * 4))
    tokens = family.to_tokens(codes, (6, 4))
    mapping = family.base.vocabulary_mapping
    rows = tokens[:, :-3].view(2, 6, 5)
    assert (rows[..., -1] == mapping.eol_token_id).all()
    assert torch.equal(mapping.convert_bpe2img(rows).flatten(1), codes)
    assert family.base.decode_image_tokens(image_tokens=tokens, height=6, width=4).shape == (2, 3, 48, 32)
    ends = ["<|extra_201|>", "<|image end|>", "<eos>"]
    assert tokens[:, -3:].tolist() == [[family.base.config.vocabulary_map[end] for end in ends]] * 2


# The adapter's processor


@given(
    height=st.integers(20, 400),
    width=st.integers(20, 400),
    stride=st.sampled_from([1, 2, 4]),
    count=st.integers(0, 5),
)
def test_every_image_gets_a_block_that_the_stride_divides(processor, height, width, stride, count):
    compact = CompactEmu3Processor(
        copy.deepcopy(processor.image_processor), processor.tokenizer, stride=stride, num_global_tokens=count
    )
    inputs = compact(text=["<image>"], images=[Image.new("RGB", (width, height))], return_tensors="pt")
    rows, columns = (int(side) // 8 for side in inputs["image_sizes"][0])
    assert rows % stride == columns % stride == 0
    tokens = inputs["input_ids"][0]
    assert (tokens == compact.image_token_id).sum() == UniCompressConfig(
        stride=stride, num_global_tokens=count
    ).num_image_tokens((rows, columns))
    assert (tokens == compact.tokenizer.eol_token_id).sum() == rows // stride


@given(
    ratio=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    area=st.integers(16, 1024).map(lambda side: side**2),
    stride=st.sampled_from([1, 2, 4]),
)
def test_every_ratio_is_drawn_on_a_grid_that_the_stride_divides(processor, ratio, area, stride):
    compact = CompactEmu3Processor(copy.deepcopy(processor.image_processor), processor.tokenizer, stride=stride)
    written = f"{ratio[0]}:{ratio[1]}"
    rows, columns = compact.calculate_generate_size(written, area, 8)
    dense = processor.calculate_generate_size(written, area, 8)
    assert rows % stride == columns % stride == 0
    assert min(rows, columns) > 0
    assert all(abs(ours - theirs) <= stride for ours, theirs in zip((rows, columns), dense, strict=True))


def test_the_block_of_an_image_reads_row_by_row(compact):
    block = compact.replace_image_token({"image_sizes": [[32, 64]]}, 0)
    row = "<image>" * 4 + "<|extra_200|>"
    frame = "<|image start|>4*8<|image token|>{}<|extra_201|><|image end|>"
    assert block == frame.format("<image>" * 5 + row * 2)


def test_the_adapters_processor_of_an_adapters_processor_is_the_same(model, compact):
    assert model.compact_processor(compact).to_dict() == compact.to_dict()


def test_auto_processor_finds_the_saved_class(compact, tmp_path):
    compact.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is CompactEmu3Processor
    assert (loaded.stride, loaded.num_global_tokens) == (2, 4)
    assert loaded.image_processor.spatial_factor == 16
    assert loaded.chat_template == compact.chat_template


# Reading


def test_images_of_several_sizes_read_as_they_do_alone(model, compact, mixed):
    question = "What digit is at the top left?"
    batch = question_inputs(compact, [question] * 3, mixed)
    assert len(set(map(tuple, batch["image_sizes"].tolist()))) == 3
    scores = logits(model, batch)
    for row, image in enumerate(mixed):
        alone = question_inputs(compact, [question], [image])
        torch.testing.assert_close(logits(model, alone)[0], scores[row, -alone["input_ids"].shape[1] :], atol=1e-3, rtol=1e-4)


def test_several_sizes_in_one_prompt(model, compact, mixed):
    text = chat(compact, "<image_placeholder>", "<image_placeholder>", "How many digits are there?")
    assert logits(model, compact(text=[text], images=mixed[:2], return_tensors="pt")).isfinite().all()


def test_pixels_of_the_padding_do_not_count(model, compact, mixed):
    batch = question_inputs(compact, ["What digit is at the top left?"] * 2, mixed[:2])
    before = logits(model, batch)
    batch["pixel_values"][1, :, 32:] = 1.0
    assert torch.equal(logits(model, batch), before)


# Drawing


@pytest.mark.parametrize("decompressor", ["strip", "phase"])
def test_several_ratios_in_one_batch_are_drawn_as_they_are_alone(base, processor, decompressor):
    model = attach(base, decompressor=decompressor)
    compact = model.compact_processor(processor)
    prompts = [to_draw(compact, f"a red {digit}", ratio) for digit, ratio in enumerate(RATIOS)]
    drawn = draw(model, together(prompts), guidance_scale=2.0)
    for row, prompt in zip(drawn, prompts, strict=True):
        alone = draw(model, prompt, guidance_scale=2.0)[0]
        assert torch.equal(row[: len(alone)], alone)
        assert (row[len(alone) :] == model.generation_config.pad_token_id).all()
        height, width = prompt["image_sizes"][0]
        picture = model.decode_image_tokens(image_tokens=alone[None], height=height, width=width)
        assert picture.shape == (1, 3, 8 * height, 8 * width)


def test_several_drawings_of_prompts_of_several_ratios_stay_in_order(model, compact):
    prompts = [to_draw(compact, "a red 3", ratio) for ratio in ("1:1", "2:1", "1:1")]
    drawn = draw(model, together(prompts), num_return_sequences=2, do_sample=True)
    lengths = (drawn != model.generation_config.pad_token_id).sum(1).tolist()
    expected = [height * (width + 1) + 3 for prompt in prompts for height, width in prompt["image_sizes"] * 2]
    assert lengths == expected
    assert len(set(lengths)) == 2


@pytest.mark.parametrize("away", [None, "a blue 7"])
def test_with_seeds_prompts_of_several_ratios_draw_what_each_draws_alone(model, compact, away):
    prompts = [to_draw(compact, "a red 3", ratio) for ratio in ("1:1", "2:1", "1:1")]
    negative = {} if away is None else {"negative_prompt_ids": compact(text=[away], return_tensors="pt")["input_ids"]}
    options = {"do_sample": True, "guidance_scale": 3.0, "num_return_sequences": 2, **negative}
    drawn = draw(model, together(prompts), generator=[torch.Generator().manual_seed(seed) for seed in range(3)], **options)
    assert len(drawn.unique(dim=0)) == 6
    for seed, prompt in enumerate(prompts):
        alone = draw(model, prompt, generator=torch.Generator().manual_seed(seed), **options)
        assert torch.equal(drawn[2 * seed : 2 * seed + 2, : alone.shape[1]], alone)
        assert (drawn[2 * seed : 2 * seed + 2, alone.shape[1] :] == model.generation_config.pad_token_id).all()


@pytest.mark.parametrize(("decompressor", "drawn_globals"), [("strip", 0), ("phase", 4)])
def test_a_row_end_stands_behind_each_row_of_cells(base, processor, decompressor, drawn_globals):
    """In the loop it rides along with the next step: the language model sees what training showed it."""
    model, seen = attach(base, decompressor=decompressor), []
    model.get_base_model().model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    prompt = to_draw(model.compact_processor(processor), "a red 3", "1:2")
    draw(model, prompt)
    steps = torch.cat(seen, 1)[0, prompt["input_ids"].shape[1] :]  # behind the prompt: globals, separator, steps and row ends
    rows, columns = (side // 2 for side in prompt["image_sizes"][0])
    ends = (steps == model.family.eol).all(1).nonzero().flatten().tolist()
    assert ends == [drawn_globals + 1 + columns + row * (columns + 1) for row in range(rows - 1)]
    assert len(seen) == drawn_globals + rows * columns


@pytest.mark.parametrize(("codes_per_step", "globals_"), [(None, False), (3, True), (8, False), (50, True)])
def test_training_scores_drawn_strips_as_drawing_saw_them(base, processor, images, codes_per_step, globals_):
    """Row ends and all: images of two ratios, each drawn alone, in one batch of training."""
    model = attach(base, codes_per_step=codes_per_step, drawing_global_tokens=globals_)
    compact, length = model.compact_processor(processor), codes_per_step or 4
    rows, seen = [], []
    for caption, ratio in (("a red 3 at the top left", "2:1"), ("a blue 7", "1:2")):
        prompt, record = to_draw(compact, caption, ratio), Record()
        tokens = draw(model, prompt, logits_processor=LogitsProcessorList([record]))
        [(height, width)] = prompt["image_sizes"]
        codes = torch.cat(record.codes)[: height * width]  # without what fills up the last step
        assert torch.equal(tokens, model.family.to_tokens(codes[None], (height, width)))
        strips = torch.cat(record.log_probs)[: height * width].split(length)
        seen.append(torch.stack([strip.sum() for strip in strips]))
        latents = {"size": [8 * height, 8 * width], "values": model.family.codebook[codes].numpy().tobytes()}
        user, assistant = [{"type": "text", "text": caption}], [{"type": "image"}]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        rows.append({"messages": messages, "images": images[:1], "latents": [latents]})
    batch = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)(rows)
    assert len(set(map(tuple, batch["gen_image_sizes"].tolist()))) == 2
    with torch.no_grad():
        scores = model(**batch)
    steps = scores.kinds == CODES
    torch.testing.assert_close(scores.log_probs[steps], torch.cat(seen), atol=1e-4, rtol=1e-5)
    assert (scores.is_top1[steps] == 1).all()


def test_text_and_row_ends_of_drawn_strips_stand_where_they_stand_in_the_bases_own_sequence(model, compact, processor, mixed):
    user, told, drawn = ([{"type": "text", "text": "a red 3"}], [{"type": "text", "text": "4"}], [{"type": "image"}])
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate((user, told, user, drawn))
    ]
    rows, seen = [{"messages": messages, "images": [image]} for image in mixed], []
    batch = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)(rows)
    model.get_base_model().model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    config = replace(model.active_peft_config, stride=1, num_global_tokens=0)
    dense = UniCompressCollator(processor, config, caption_dropout=0.0)(rows)
    for row, (height, width) in enumerate((dense["gen_image_sizes"] // 8).tolist()):
        here, of_base = (one["attention_mask"][row].bool() for one in (batch, dense))
        ids, base_ids = batch["input_ids"][row][here], dense["input_ids"][row][of_base]
        drawn, base_drawn = batch["gen_mask"][row][here], dense["gen_mask"][row][of_base]
        ends = ids == compact.tokenizer.eol_token_id
        words = ~drawn & ~ends
        assert torch.equal(ids[words], base_ids[~base_drawn])  # the base's row ends are placeholders
        positions = seen[0][row][here]
        assert torch.equal(positions[words], (~base_drawn).nonzero().flatten())
        places = base_drawn.nonzero().flatten().view(height, width + 1)
        assert torch.equal(positions[ends], places[1::2, width])  # every second row's


def test_a_negative_prompt_with_or_without_the_images_frame_is_the_same(model, compact):
    prompt = to_draw(compact, "a red 3")
    words = compact(text=["a yellow 8"], return_tensors="pt")["input_ids"]
    framed = compact(text=["a yellow 8"], return_for_image_generation=True, image_area=AREA, return_tensors="pt")["input_ids"]
    assert framed.shape[1] > words.shape[1]
    options = {"guidance_scale": 4.0, "do_sample": False}
    assert torch.equal(
        draw(model, prompt, negative_prompt_ids=words, **options), draw(model, prompt, negative_prompt_ids=framed, **options)
    )


def test_the_compact_prompt_of_training_is_that_of_drawing(model, compact, mixed):
    """What the collator lays out for an image to draw begins as the processor's prompt does."""
    caption = "a red 3 at the top left"
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": caption}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": mixed[1:2],
    }
    batch = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)([row])
    prompt = to_draw(compact, caption, "2:1")["input_ids"][0]
    start = (prompt == model.family.boi_token_id(model.generation_config)).nonzero()[0, 0]
    trained = batch["input_ids"][0]
    size = prompt.tolist().index(compact.tokenizer.convert_tokens_to_ids("<|image start|>"))
    assert torch.equal(trained[:size], prompt[:size])
    begin = (trained == prompt[start]).nonzero()[0, 0]
    assert not batch["gen_mask"][0, : begin + 1].any()
    assert batch["gen_mask"][0, begin + 1]


# Bad input


def test_a_drawing_prompt_without_generation_mode_is_refused(model, compact):
    """The base would draw without being told to: dense words, by a model for strips."""
    prompt = to_draw(compact, "a red 3")
    with pytest.raises(InputError, match=r"without generation_mode.*generation_mode='image'"):
        model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"])


@pytest.mark.parametrize("sizes", [None, [[8, 8], [8, 8]], [8, 8]], ids=str)
def test_drawing_sizes_that_do_not_fit_the_prompts_are_refused(model, compact, sizes):
    prompt = to_draw(compact, "a red 3")
    del prompt["image_sizes"]
    with pytest.raises(InputError, match=r"image_sizes of shape .* for 1 prompt.*return_for_image_generation=True"):
        draw(model, prompt, **({} if sizes is None else {"image_sizes": torch.tensor(sizes)}))


def test_a_drawing_size_that_the_stride_does_not_divide_is_refused(model, processor):
    with pytest.raises(InputError, match=r"6 x 9 tokens.*stride 2"):
        draw(model, {**to_draw(processor, "a red 3"), "image_sizes": torch.tensor([[6, 9]])})


def test_images_without_their_sizes_are_refused(model, compact, mixed):
    inputs = question_inputs(compact, ["How many digits are there?"], mixed[:1])
    sizes = inputs.pop("image_sizes")
    for call in (model, partial(model.generate, max_new_tokens=2)):
        with pytest.raises(InputError, match=r"image sizes of shape None for 1 image"):
            call(**inputs)
        with pytest.raises(InputError, match=r"image sizes of shape \(2, 2\) for 1 image"):
            call(**inputs, image_sizes=sizes.repeat(2, 1))
        with pytest.raises(InputError, match=r"60 x 64 pixels.*multiples of 8"):
            call(**inputs, image_sizes=torch.tensor([[60, 64]]))
        with pytest.raises(InputError, match=r"128 x 64 pixels.*lie within"):
            call(**inputs, image_sizes=torch.tensor([[128, 64]]))


def test_latents_to_draw_without_their_sizes_are_refused(model, compact, mixed):
    latents = pack_latents(model.family, compact, mixed[:2])
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a red 3"}]},
        {"role": "assistant", "content": [{"type": "image"}]},
    ]
    rows = [{"messages": messages, "images": [image], "latents": [own]} for image, own in zip(mixed, latents, strict=False)]
    batch = UniCompressCollator(compact, model.active_peft_config)(rows)
    sizes = batch.pop("gen_image_sizes")
    assert model(**batch, gen_image_sizes=sizes).loss.isfinite()
    for wrong in (None, sizes[:1]):
        with pytest.raises(InputError, match=r"image sizes of shape .* for 2 image\(s\); expected \(2, 2\)"):
            model(**batch, gen_image_sizes=wrong)


def test_images_in_a_prompt_to_draw_are_refused(model, compact, mixed):
    prompt = to_draw(compact, "a red 3")
    with pytest.raises(InputError, match=r"pixel_values of shape .* with prompts to draw; expected prompts of text alone"):
        draw(model, prompt, pixel_values=torch.zeros(1, 3, 64, 64))


def test_a_config_without_the_image_words_is_refused(pristine):
    config = Emu3Config.from_dict(pristine.config.to_dict())
    config.vocabulary_map = {word: place for word, place in config.vocabulary_map.items() if word != "<|extra_200|>"}
    base = copied(pristine)
    base.config = config
    with pytest.raises(BaseModelError, match=r"vocabulary_map lacks '<\|extra_200\|>'"):
        get_uc_model(base, UniCompressConfig())


@pytest.mark.parametrize("size", [[0, 8], [-2, 8]])
def test_an_image_of_no_tokens_is_refused(model, compact, size):
    prompt = to_draw(compact, "a red 3", "1:1")
    with pytest.raises(InputError, match=r"image_sizes of .*expected rows and columns of 1 or more"):
        draw(model, {**prompt, "image_sizes": torch.tensor([size])})
