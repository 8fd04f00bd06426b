"""The dense base as a teacher of images of any size, which it draws with the ends of their rows."""

import pytest
import torch
from copies import copied
from finetune_runs import TRAINING, say
from helpers import attach
from shallow import shallow
from tiny_world import tiny_emu3
from tiny_world.scenes_dataset import scenes_dataset
from trl import SFTConfig

from uc_adapters import UniCompressCollator
from uc_adapters.images import Images
from uc_adapters.training.distillation import DistillationTrainer, dense_codes, teacher_targets

IMAGE = {"type": "image"}


@pytest.fixture(scope="module")
def processor():
    return tiny_emu3.make_processor(32 * 32, 64 * 64)


@pytest.fixture(scope="module")
def pristine(processor):
    torch.manual_seed(0)
    model = shallow(tiny_emu3.make_model(processor)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name.startswith("model.text_model"):
                parameter.mul_(2.5)
    return model


@pytest.fixture
def distiller(pristine, processor, tmp_path):
    model = attach(copied(pristine))
    options = {"max_length": None, "remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    compact = model.compact_processor(processor)
    return DistillationTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), **options, **TRAINING),
        train_dataset=scenes_dataset(8, 1),
        processing_class=compact,
        teacher_processor=processor,
        data_collator=UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0),
    )


@pytest.fixture
def rows(images):
    """Images of three sizes: one row reads one, answers and draws another, one draws, one reads."""
    square, wide, tall = images[0], images[1].resize((64, 32)), images[2].resize((48, 64))

    def row(pictures: list, *contents) -> dict:
        messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        return {"messages": messages, "images": pictures}

    made = [
        row([square, wide], [IMAGE, say("How many digits are there?")], [say("4")], [say("a blue 7")], [IMAGE]),
        row([tall], [say("a red 3")], [IMAGE]),
        row([square], [IMAGE, say("What digit is at the top left?")], [say("3")]),
    ]
    return [row | {"taught": True} for row in made]


def by_hand(pristine, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of one row: the bare base's last hidden states (L, D), and the places of each image's codes."""
    ids, drawn = batch["input_ids"].clone(), batch.get("gen_mask")
    places = []
    if drawn is not None:
        sizes = batch["gen_image_sizes"]
        words = pristine.model.get_image_tokens(batch["gen_pixel_values"], sizes)  # with the ends of rows
        ids[drawn] = words.flatten().long()
        [[rows, columns]] = (sizes // 8).tolist()
        places = [drawn[0].nonzero().view(rows, columns + 1)[:, :columns].flatten()]
    read = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    with torch.no_grad():
        return pristine.model(input_ids=ids, **read).last_hidden_state[0], places


def test_the_teacher_says_what_the_bare_base_says_of_each_row(distiller, pristine, rows):
    told = teacher_targets(distiller.model, distiller.data_collator(rows)["teacher"], 1.0)
    assert told["teacher_states"].shape == (2, 48, 192)  # images of 4 x 8 and 8 x 6 codes
    states, probs = [], []
    for row in rows:
        batch = distiller.data_collator.dense([row])
        hidden, places = by_hand(pristine, batch)
        states += [hidden[of_image - 1] for of_image in places]
        words = batch["labels"][0] != -100
        words &= ~batch.get("gen_mask", torch.zeros(1, len(words), dtype=torch.bool))[0]
        probs.append(pristine.lm_head(hidden[:-1][words[1:]]).softmax(-1))
    for found, expected in zip(told["teacher_states"], states, strict=True):
        torch.testing.assert_close(found[: len(expected)], expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(told["teacher_probs"], torch.cat(probs), atol=1e-4, rtol=1e-3)


def test_a_step_learns_from_it(distiller, rows):
    batch = distiller.data_collator(rows)
    batch.pop("origins")
    loss = distiller.compute_loss(distiller.model, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(w.grad.isfinite().all() for w in distiller.model.parameters() if w.requires_grad)


def test_codes_of_images_of_several_sizes_are_their_own(distiller, rows):
    teacher, family = distiller.data_collator(rows)["teacher"], distiller.model.family
    pixels, sizes = teacher["gen_pixel_values"], teacher["gen_image_sizes"]
    found = dense_codes(family, Images(pixels, sizes))
    assert [len(codes) for codes in found] == [4 * 8, 8 * 6]
    alone = [family.latents(image[None, :, :height, :width])[0] for image, (height, width) in zip(pixels, sizes, strict=True)]
    latents = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
    for image, (height, width), codes in zip(pixels, sizes, found, strict=True):
        assert torch.equal(family.dense_codes(image[None, :, :height, :width])[0], codes)
    for codes, of_latents in zip(found, dense_codes(family, Images(image_sizes=sizes, latents=latents)), strict=True):
        assert torch.equal(codes, of_latents)
