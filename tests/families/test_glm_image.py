"""What is GLM-Image's own: a preview before each image, positions with rows and columns, codes in place of pixels, edits."""

import copy
import shutil

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from helpers import ANN, IMAGE, Record, attach, chat, logits, small_config
from tiny_glm_image import CODES, make_model, make_processor
from transformers import AutoProcessor, GlmImageConfig, GlmImageForConditionalGeneration, LogitsProcessorList
from trl import SFTConfig

from uc_adapters import UniCompressCollator, UniCompressConfig, UniCompressModel, get_uc_model
from uc_adapters.command import main
from uc_adapters.errors import InputError, UnsupportedError
from uc_adapters.families import family_of
from uc_adapters.images import pack_latents
from uc_adapters.training import DistillationTrainer, JointTrainer, ReconstructionStage, ReconstructionTrainer, teacher_targets

SIZES = {"square": (256, 256), "with a last step that is not full": (256, 192)}  # previews of 16 x 16 and 18 x 13 codes


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def pristine(processor):
    torch.manual_seed(0)
    model = make_model(processor).eval()
    with torch.no_grad():  # livelier than at its default start
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "language_model" in name:
                parameter.mul_(2.5)
        model.lm_head.weight.mul_(10)
        model.lm_head.weight[CODES:].mul_(0.01)  # codes are likelier than what is none, as in the published base
    return model


@pytest.fixture(scope="module")
def attached(pristine):
    return attach(copy.deepcopy(pristine))


@pytest.fixture
def model(attached):
    return copy.deepcopy(attached)


@pytest.fixture(scope="module")
def compact(attached, processor):
    return attached.compact_processor(processor)


@pytest.fixture(scope="module")
def pictures(images):
    """Three pictures of different sizes; their codes are 8 x 8, 8 x 16 and 11 x 8."""
    return [images[0], images[1].resize((64, 32)), images[2].resize((48, 64))]


def prompt_inputs(processor, texts=("a red 3",), size=(256, 256)):
    texts = [chat(processor, text) for text in texts]
    return processor(text=texts, padding=True, target_h=size[0], target_w=size[1], return_tensors="pt")


def edit_inputs(processor, sources, text="a red 3", size=(256, 256)):
    """One prompt for each source."""
    texts = [chat(processor, IMAGE, text) for _ in sources]
    return processor(text=texts, images=sources, padding=True, target_h=size[0], target_w=size[1], return_tensors="pt")


def draw(model, inputs, **kwargs) -> torch.Tensor:
    return model.generate(**inputs, generation_mode="image", **{"do_sample": False, **kwargs})


def own(base, inputs) -> torch.Tensor:
    """The base's own drawing: preview, image and end."""
    grids = inputs["image_grid_thw"][: inputs["images_per_sample"][0]]
    grids = grids[-1:] if "pixel_values" in inputs else grids
    count = int(grids.prod(1).sum()) + 1
    with torch.no_grad():
        tokens = base.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return tokens[:, inputs["input_ids"].shape[1] :]


@pytest.fixture
def fed(request):
    """Hooks a model's language model; returns the position ids and the number of tokens of each of its steps."""
    handles = []

    def hook(base) -> list[tuple[torch.Tensor, int]]:
        calls = []

        def note(module, args, kwargs):
            calls.append((kwargs["position_ids"], kwargs["inputs_embeds"].shape[1]))

        handles.append(base.model.language_model.register_forward_pre_hook(note, with_kwargs=True))
        return calls

    yield hook
    for handle in handles:
        handle.remove()


def row(drawn, source=None, text="a red 3") -> dict:
    content = [{"type": "text", "text": text}] if source is None else [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "image"}]}]
    return {"messages": messages, "images": [drawn] if source is None else [source, drawn]}


# The base's own


def test_dense_codes_are_the_bases_own(pristine, processor, pictures):
    family = family_of(pristine)
    packed = processor.image_processor(pictures, return_tensors="pt")
    with torch.no_grad():
        features = pristine.get_image_features(packed["pixel_values"], packed["image_grid_thw"], return_dict=True)
        expected = pristine.get_image_tokens(features.pooler_output).split(packed["image_grid_thw"].prod(1).tolist())
    prepared = family.image_inputs(processor, pictures)
    found = {}
    for rows, pixels, _ in family.by_size(prepared["pixel_values"], prepared["image_sizes"]):
        found.update(zip(rows, family.dense_codes(pixels), strict=True))
    for index, codes in enumerate(expected):
        assert torch.equal(found[index], codes)


@pytest.mark.parametrize("edits", [False, True])
def test_disabled_it_draws_as_its_base_to_the_bit(pristine, model, processor, pictures, edits):
    inputs = edit_inputs(processor, pictures[1:2]) if edits else prompt_inputs(processor, size=(256, 192))
    with model.disable_adapter():
        assert torch.equal(own(model, inputs), own(pristine, inputs))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("edits", [False, True])
def test_every_step_stands_where_its_last_code_stands_in_the_base(
    pristine, model, processor, compact, pictures, fed, size, edits
):
    make = (lambda p: edit_inputs(p, pictures[1:2], size=size)) if edits else (lambda p: prompt_inputs(p, size=size))
    with torch.no_grad():
        calls = fed(pristine)
        own(pristine, make(processor))
        prompt, *dense = (positions for positions, _ in calls)
        calls = fed(model.get_base_model())
        draw(model, make(compact))
    first, *steps = (positions for positions, _ in calls)
    length = prompt.shape[-1]
    assert torch.equal(first[..., :length], prompt)  # text, and the images that are read
    dense = torch.cat([positions.expand(3, 1, 1) for positions in dense], -1)[:, 0]  # (3, codes), of which the end has none
    rows, columns = size[0] // 32, size[1] // 32
    counts = [rows * columns] if edits else [{256: 16 * 16, 192: 18 * 13}[size[1]], rows * columns]
    expected, begin = [], 0
    for count in counts:
        last = [begin + min(code + 4, count) - 1 for code in range(0, count, 4)]
        expected += [dense[:, code] for code in last]
        assert torch.equal(
            (first if begin == 0 else steps[len(expected) - len(last) - 1])[:, 0, -1], dense[:, begin]
        )  # separator
        begin += count
    # The last step of a drawing is never fed, and the separator of the image is fed with the last step of the preview
    found = [positions[:, 0, 0] for positions in steps]
    assert len(found) == len(expected) - 1
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("edits", [False, True])
def test_a_drawing_takes_a_quarter_of_the_steps(pristine, model, processor, compact, pictures, fed, edits):
    make = (lambda p: edit_inputs(p, pictures[:1])) if edits else prompt_inputs
    dense, short = fed(pristine), fed(model.get_base_model())
    own(pristine, make(processor))
    codes = draw(model, make(compact))
    count = 64 if edits else 256 + 64
    assert codes.shape == (1, count)
    assert (len(dense), len(short)) == (count + 1, count // 4)
    assert (codes < CODES).all()


def test_the_published_shape_takes_320_steps_of_1281():
    with torch.device("meta"):
        base = GlmImageForConditionalGeneration(GlmImageConfig())
    family, config = family_of(base), UniCompressConfig()
    assert (family.geometry.num_codes, family.geometry.code_width, family.geometry.hidden_size) == (16384, 2048, 4096)
    grids = [family.preview_grid((32, 32)), (32, 32)]  # a picture of 1024 x 1024 pixels
    assert grids[0] == (16, 16)
    assert sum(family.dense_placeholders(grid) for grid in grids) + 1 == 1281  # with the end
    assert sum(config.num_gen_tokens(grid) - 1 for grid in grids) == 320  # the grids set the length: no step draws the end
    assert family.preview_grid((36, 24)) == (19, 13)  # the processor's own default
    assert config.num_gen_tokens((19, 13)) - 1 == 62  # 61 steps of four codes, and one of three
    model = get_uc_model(base, config, low_cpu_mem_usage=True)
    layer = model.get_base_model().model.vqmodel.quant_conv.lora_uc["default"]
    assert sum(weight.numel() for weight in layer.parameters()) == 47_209_984


# Draw


def test_prompts_of_an_adapter_are_the_bases(processor, compact, pictures):
    for make in (prompt_inputs, lambda p: edit_inputs(p, pictures[:1])):
        base, adapter = make(processor), make(compact)
        assert torch.equal(base["input_ids"], adapter["input_ids"])
        assert adapter["gen_image_sizes"].tolist() == [[32, 32]]


@pytest.mark.parametrize("decompressor", ["strip", "phase", "raster"])
def test_every_decompressor_draws(pristine, processor, decompressor):
    model = attach(copy.deepcopy(pristine), decompressor=decompressor)
    codes = draw(model, prompt_inputs(model.compact_processor(processor)))
    assert codes.shape == (1, 320)
    assert (codes < CODES).all()


def test_a_drawing_that_windows_cannot_cover_is_refused_by_phase_alone(pristine, processor):
    model = attach(copy.deepcopy(pristine), decompressor="phase")
    with pytest.raises(InputError, match=r"18 x 13 tokens.*stride 2"):
        draw(model, prompt_inputs(model.compact_processor(processor), size=(256, 192)))


@pytest.mark.parametrize(
    ("size", "edits", "codes_per_step"),
    [*[(size, edits, None) for size in SIZES.values() for edits in (False, True)], ([*SIZES.values()][-1], False, 7)],
)
def test_the_likelihood_by_forward_is_that_step_by_step(pristine, processor, pictures, size, edits, codes_per_step):
    fields = {"codes_per_step": codes_per_step, "drawing_global_tokens": codes_per_step is not None}
    model, length = attach(copy.deepcopy(pristine), **fields), codes_per_step or 4
    compact = model.compact_processor(processor)
    inputs = edit_inputs(compact, pictures[1:2], size=size) if edits else prompt_inputs(compact, size=size)
    record = Record()
    codes = draw(model, inputs, logits_processor=LogitsProcessorList([record]))[0]
    rows, columns = size[0] // 32, size[1] // 32
    grids = [(rows, columns)] if edits else [{256: (16, 16), 192: (18, 13)}[size[1]], (rows, columns)]
    counts = [grid[0] * grid[1] for grid in grids]
    family, config = model.family, model.active_peft_config
    places = sum(config.num_gen_tokens(grid) for grid in grids)
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"].new_full((1, places), family.image_token_id)], 1)
    gen_mask = torch.zeros_like(ids, dtype=torch.bool)
    gen_mask[:, -places:] = True
    latents = torch.nn.utils.rnn.pad_sequence([family.codebook[part] for part in codes.split(counts)], batch_first=True)
    read = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        scored = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=ids.where(gen_mask, -100),
            gen_mask=gen_mask,
            gen_latents=latents,
            gen_image_sizes=torch.tensor(grids) * 4,
            **read,
        )
    steps, drawn = [], iter(torch.stack(record.log_probs).flatten().tolist())
    for count in counts:
        steps += [0.0] * (config.num_drawing_globals + 1)  # learned global tokens and the separator
        for first in range(0, count, length):
            log_probs = [next(drawn) for _ in range(length)]
            steps.append(sum(log_probs[: min(length, count - first)]))  # what fills up the last step is no code
    assert next(drawn, None) is None
    torch.testing.assert_close(scored.log_probs[0, -places:], torch.tensor(steps), atol=1e-3, rtol=1e-4)


def test_prompts_of_several_lengths_and_sources_draw_the_same_alone(model, compact, pictures):
    texts = ["a red 3", "a blue 7 at the bottom right and a green 1 at the top right"]
    for row, text in zip(draw(model, prompt_inputs(compact, texts)), texts, strict=True):
        assert torch.equal(draw(model, prompt_inputs(compact, [text]))[0], row)
    together = draw(model, edit_inputs(compact, pictures))
    for row, picture in zip(together, pictures, strict=True):
        assert torch.equal(draw(model, edit_inputs(compact, [picture]))[0], row)
    assert not torch.equal(together[0], together[1])
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]  # drawn one by one
    seeded = draw(model, edit_inputs(compact, pictures), do_sample=True, generator=generators)
    for seed, picture in enumerate(pictures):
        generator = [torch.Generator().manual_seed(seed)]
        assert torch.equal(draw(model, edit_inputs(compact, [picture]), do_sample=True, generator=generator)[0], seeded[seed])


def test_an_edit_reads_its_source_as_the_base_does(pristine, processor, pictures):
    """The forward of an adapter whose LoRA does nothing yet is the base's own."""
    model = get_uc_model(copy.deepcopy(pristine), small_config()).eval()
    found = logits(model, edit_inputs(model.compact_processor(processor), pictures))
    assert torch.equal(found, logits(pristine, edit_inputs(processor, pictures)))


@pytest.mark.parametrize("edits", [False, True])
def test_a_static_cache_draws_the_same(model, compact, pictures, edits):
    inputs = edit_inputs(compact, pictures[:2]) if edits else prompt_inputs(compact, ["a red 3", "a blue 7 at the top left"])
    assert torch.equal(draw(model, inputs, cache_implementation="static"), draw(model, inputs))


def test_two_sources_are_read_in_order(model, compact, pictures):
    text = chat(compact, IMAGE, IMAGE, "a red 3")

    def edit(*sources):
        return draw(model, compact(text=[text], images=list(sources), target_h=256, target_w=256, return_tensors="pt"))

    assert not torch.equal(edit(pictures[0], pictures[1]), edit(pictures[1], pictures[0]))


def test_guidance(model, compact, pictures):
    inputs = prompt_inputs(compact)
    assert not torch.equal(draw(model, inputs), draw(model, inputs, guidance_scale=4.0))
    with pytest.raises(UnsupportedError, match=r"guidance_scale=4.0 with images in the prompt.*edits without"):
        draw(model, edit_inputs(compact, pictures[:1]), guidance_scale=4.0)


# Train


def test_a_batch_draws_previews_but_for_edits(model, compact, pictures):
    collator = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)
    batch = collator([row(pictures[0]), row(pictures[1], pictures[2])])
    assert batch["gen_image_sizes"].tolist() == [[64, 64], [32, 32], [32, 64]]  # preview, image; the image of the edit
    assert batch["gen_mask"].sum(1).tolist() == [1 + 64 + 1 + 16, 1 + 32]
    assert ((batch["labels"] != -100) & batch["gen_mask"]).sum(1).tolist() == [64 + 16, 32]  # separators are known
    learned = batch["labels"][(batch["labels"] != -100) & ~batch["gen_mask"]]
    assert learned.tolist() == [compact.tokenizer.eos_token_id] * 2
    for index, inputs in enumerate([prompt_inputs(compact), edit_inputs(compact, pictures[2:], size=(256, 512))]):
        prompt = inputs["input_ids"][0]
        assert torch.equal(batch["input_ids"][index, : len(prompt)], prompt)


def test_a_batch_of_another_ratio_has_its_placeholders(pristine, processor, pictures):
    """Its images have 256, 64 and 128 codes. Global tokens and separators are known."""
    model = attach(copy.deepcopy(pristine), codes_per_step=7, drawing_global_tokens=True)
    collator = UniCompressCollator(model.compact_processor(processor), model.active_peft_config, caption_dropout=0.0)
    batch = collator([row(pictures[0]), row(pictures[1], pictures[2])])
    assert batch["gen_mask"].sum(1).tolist() == [5 + 37 + 5 + 10, 5 + 19]
    assert ((batch["labels"] != -100) & batch["gen_mask"]).sum(1).tolist() == [37 + 10, 19]
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


def test_a_dropped_caption_is_the_unconditional_prompt(model, compact, pictures):
    """But not that of an edit, which has no guidance."""
    edit = UniCompressCollator(compact, model.active_peft_config, caption_dropout=1.0)([row(pictures[0], pictures[1])])
    assert not (edit["input_ids"] == compact.tokenizer.pad_token_id).any()
    batch = UniCompressCollator(compact, model.active_peft_config, caption_dropout=1.0)([row(pictures[0])])
    prompt = prompt_inputs(compact)["input_ids"]
    blank = model.family.unconditional(prompt, model.generation_config)
    assert torch.equal(batch["input_ids"][:, : prompt.shape[1]], blank)
    assert (blank[0, :3] == compact.tokenizer.pad_token_id).all()
    assert torch.equal(blank[0, 3:], prompt[0, 3:])  # the grids, and the begin


def test_latents_train_as_their_pictures_do(model, compact, pictures):
    rows = [row(pictures[0]), row(pictures[1], pictures[2])]
    packed = [{**each, "latents": pack_latents(model.family, compact, each["images"])} for each in rows]
    collator = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)
    with torch.no_grad():
        expected, found = model(**collator(rows)), model(**collator(packed))
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-4, rtol=1e-4)


def trainer_options(model, compact, rows, folder, **kwargs):
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        **kwargs,
    )
    collator = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)
    part = {"type": Value("string"), "text": Value("string")}
    features = {"messages": List({"role": Value("string"), "content": List(part)}), "images": List(ImageFeature())}
    dataset = Dataset.from_list(rows, features=Features(features))
    return {"model": model, "args": args, "train_dataset": dataset, "processing_class": compact, "data_collator": collator}


@pytest.mark.parametrize("distils", [False, True])
def test_training_changes_what_it_draws_and_nothing_of_the_base(
    pristine, model, processor, compact, pictures, tmp_path, distils
):
    rows = [row(pictures[0]), row(pictures[1], pictures[2])]
    options = trainer_options(model, compact, rows, tmp_path)
    trainer = DistillationTrainer(**options, teacher_processor=processor) if distils else JointTrainer(**options)
    before = draw(model, edit_inputs(compact, pictures[:1]))
    trainer.train()
    model.eval()
    assert not torch.equal(draw(model, edit_inputs(compact, pictures[:1])), before)
    with model.disable_adapter():
        inputs = edit_inputs(processor, pictures[:1])
        assert torch.equal(own(model, inputs), own(pristine, inputs))


def test_the_teacher_is_the_bare_base_on_its_own_sequence(pristine, model, processor, compact, pictures, tmp_path):
    """The base's own drawing loop gives its states; the codes are those of the pictures."""
    rows = [row(pictures[0]), row(pictures[1], pictures[2])]
    trainer = DistillationTrainer(**trainer_options(model, compact, rows, tmp_path), teacher_processor=processor)
    batch = trainer.data_collator(rows)
    states = teacher_targets(trainer.model, batch["teacher"], 1.0)["teacher_states"]
    assert states.shape == (3, 256, 64)  # preview, image, edit
    family = model.family
    inputs = [prompt_inputs(processor), edit_inputs(processor, pictures[2:], size=(256, 512))]
    for of_images, each, drawn in zip([[0, 1], [2]], inputs, pictures, strict=False):
        codes = [
            family.dense_codes(family.image_inputs(processor, [drawn])["pixel_values"])[0]
            if index
            else family.dense_codes(family.preview_inputs(processor, [drawn])["pixel_values"])[0]
            for index in of_images
        ]
        forced = torch.cat(codes)
        seen = []
        handle = pristine.lm_head.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0][:, -1]))

        def force(sequence_so_far, scores, forced=forced, length=each["input_ids"].shape[1]):
            code = forced[sequence_so_far.shape[1] - length]
            return torch.full_like(scores, -torch.inf).index_fill(1, code[None], 0.0)

        with torch.no_grad():
            pristine.generate(**each, do_sample=False, max_new_tokens=len(forced), logits_processor=[force])
        handle.remove()
        expected = torch.cat(seen).split([len(part) for part in codes])
        for index, part in zip(of_images, expected, strict=True):
            torch.testing.assert_close(states[index, : len(part)], part, atol=1e-3, rtol=1e-3)


def test_stage_1_has_nothing_to_train_with_strip_and_trains_phase(pristine, model, processor, compact, pictures, tmp_path):
    rows = [{"images": [picture]} for picture in (pictures[0], pictures[0].rotate(90))]
    args = trainer_options(model, compact, [row(pictures[0])], tmp_path)["args"]
    with pytest.raises(InputError, match="Stage 1 has nothing to train"):
        ReconstructionTrainer(ReconstructionStage(model), args, processing_class=compact)
    other = attach(copy.deepcopy(pristine), decompressor="phase")
    stage = ReconstructionStage(other)
    result = ReconstructionTrainer(stage, args, processing_class=other.compact_processor(processor), train_dataset=rows).train()
    assert torch.isfinite(torch.tensor(result.training_loss))


def test_answers_are_refused(model, compact, pictures):
    with pytest.raises(UnsupportedError, match=r"glm_image base cannot answer: its head scores codes alone"):
        model.generate(**prompt_inputs(compact))
    told = row(pictures[0])
    told["messages"][1]["content"], told["images"] = [{"type": "text", "text": "3"}], []
    with pytest.raises(InputError, match=r"assistant turn has a text.*cannot answer: its head scores codes alone"):
        UniCompressCollator(compact, model.active_peft_config)([told])


def test_the_bases_own_inputs_are_refused_while_enabled(model, processor, pictures):
    with pytest.raises(InputError, match=r"pixel_values of shape.*expected \(images, 3, height, width\)"):
        draw(model, edit_inputs(processor, pictures[:1]))
    with pytest.raises(InputError, match=r"gen_image_sizes of shape None for 1 prompt.*compact_processor"):
        draw(model, {name: value for name, value in prompt_inputs(processor).items() if not name.startswith("image")})


# Share


def test_saved_and_loaded_it_draws_and_edits_the_same(pristine, processor, model, compact, pictures, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    pristine.save_pretrained(base)
    model.save_pretrained(adapter, processor=processor, base_model=str(base))
    loaded = UniCompressModel.from_pretrained(str(adapter)).eval()
    again = AutoProcessor.from_pretrained(adapter)
    for make in (prompt_inputs, lambda p: edit_inputs(p, pictures[:1])):
        assert torch.equal(draw(loaded, make(again)), draw(model, make(compact)))
    card = (adapter / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert "| and the image itself | 1024 | 256 |" in card
    assert "GlmImagePipeline" in card
    assert "it shortens what the model draws." in card
    assert "max_new_tokens" not in card  # nothing is answered


def test_the_command_says_what_the_base_cannot(model, processor, images, tmp_path, capsys):
    model.save_pretrained(tmp_path / "adapter", processor=processor)
    images[0].save(tmp_path / "source.png")
    assert main(["draw", str(tmp_path / "adapter"), "a red 3", "--output", str(tmp_path / "drawing.png")]) == 1
    assert "draws codes, and no pixels" in capsys.readouterr().err
    assert main(["ask", str(tmp_path / "adapter"), str(tmp_path / "source.png"), "a red 3"]) == 1
    assert "cannot answer: its head scores codes alone" in capsys.readouterr().err


def test_a_base_in_a_pipelines_repo_loads_from_its_subfolder(hub, pristine, processor, tmp_path):
    """As it is published: the repo of a diffusers pipeline."""
    pristine.save_pretrained(tmp_path / "base")
    files = {f"vision_language_encoder/{path.name}": path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub.create("org/glm", {"model_index.json": b"{}", **files})
    base = GlmImageForConditionalGeneration.from_pretrained("org/glm", subfolder="vision_language_encoder")
    model = attach(base.eval())
    model.push_to_hub("org/glm-uc4x", processor=processor, token=ANN)
    loaded = UniCompressModel.from_pretrained("org/glm-uc4x").eval()
    compact = AutoProcessor.from_pretrained("org/glm-uc4x")
    expected = draw(model, prompt_inputs(compact))
    assert torch.equal(draw(loaded, prompt_inputs(compact)), expected)
    (tmp_path / "pipeline").mkdir()
    shutil.copytree(tmp_path / "base", tmp_path / "pipeline/vision_language_encoder")
    for folder in ("base", "pipeline"):
        local = UniCompressModel.from_pretrained("org/glm-uc4x", base_model=str(tmp_path / folder)).eval()
        assert torch.equal(draw(local, prompt_inputs(compact)), expected)
