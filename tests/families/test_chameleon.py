"""What is Chameleon's own: codes that its logits mask, images of one size, no decoder."""

from functools import partial

import pytest
import quickstart
import torch
from copies import copied
from finetune_runs import write_rows
from finetuning.answers import filled_in
from helpers import attach, logits, question_inputs
from huggingface_hub import ModelCard
from rows.conversations import DatasetError
from rows.training_rows import RowCheck, places_of, training_rows
from tiny_chameleon import CODES, make_model, make_processor

from uc_adapters import UniCompressCollator
from uc_adapters.errors import UnsupportedError
from uc_adapters.families import family_of


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def pristine(processor):
    torch.manual_seed(0)
    return make_model(processor).eval()


@pytest.fixture(scope="module")
def family(pristine):
    return family_of(pristine)


@pytest.fixture(scope="module")
def pixels(processor, images):
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def test_dense_codes_are_the_bases_own(family, pixels):
    own = family.base.model.vqmodel.encode(pixels).image_tokens
    assert torch.equal(family.dense_codes(pixels), own.view(len(pixels), 64))


def test_codes_are_read_as_the_base_reads_them(family, pixels):
    own = family.base.model.get_image_features(pixels, return_dict=True).pooler_output
    assert torch.equal(family.read_features(pixels), own)


def test_text_logits_are_the_bases_with_images_masked(pristine, processor, images):
    inputs = question_inputs(processor, ["What digit is at the top left?"], images[:1])
    expected = logits(pristine, inputs)
    with torch.no_grad():
        hidden = pristine.model(**inputs).last_hidden_state
    ours = family_of(pristine).text_logits(hidden)
    assert torch.equal(ours, expected)
    assert (ours[..., family_of(pristine).code_token_ids] == torch.finfo(ours.dtype).min).all()
    assert len(family_of(pristine).code_token_ids) == CODES


def test_the_joint_loss_masks_images_as_the_base_does(pristine, base, processor, images):
    """Scores of the answer, from TRL's path and from the base's own logits."""
    model = attach(base)
    compact = model.compact_processor(processor)
    user = [{"type": "image"}, {"type": "text", "text": "What digit is at the top left?"}]
    said = [{"type": "text", "text": "3"}]
    row = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": said}], "images": images[:1]}
    batch = UniCompressCollator(compact, model.active_peft_config)([row])
    with torch.no_grad():
        scored = model(**batch, fused_lm_head=True)
        plain = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][0, 1:]
    told = labels != -100
    expected = plain[0, :-1].log_softmax(-1)[told].gather(1, labels[told, None]).squeeze(1)
    torch.testing.assert_close(scored.log_probs[0][told], expected)


def test_images_to_draw_in_a_training_batch_are_refused(base, processor, images):
    model = attach(base)
    compact = model.compact_processor(processor)
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a red 3"}]},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": images[:1],
    }
    with pytest.raises(UnsupportedError, match=r"chameleon base cannot draw.*no decoder"):
        model(**UniCompressCollator(compact, model.active_peft_config)([row]))


def test_rows_to_draw_are_refused_before_training_whether_or_not_a_teacher_is_to_draw_them(base, processor, images, tmp_path):
    images[0].save(tmp_path / "0.png")
    model = attach(base)
    check = RowCheck(
        UniCompressCollator(model.compact_processor(processor), model.active_peft_config), 512, partial(places_of, model)
    )
    captioned = write_rows(tmp_path / "captioned.jsonl", [{"image": "0.png", "text": "a red 3"}])
    with pytest.raises(DatasetError, match=r"row 0 \(0.png\): .*an image to draw, and the base cannot draw: .*no decoder"):
        training_rows([captioned], check)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"text": "a red 3"}])
    with pytest.raises(DatasetError, match=r"prompts.jsonl, row 0 is a prompt to draw, and the base cannot draw: .*no decoder"):
        training_rows([prompts], check, fill_in=lambda rows: filled_in(rows, model, processor))


def test_the_card_of_an_adapter_that_only_reads_promises_no_drawing(pristine, processor, tmp_path):
    attach(copied(pristine)).save_pretrained(tmp_path, processor=processor, base_model="org/chameleon")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "it shortens what the model reads." in card.text
    assert "what it draws" not in card.text


def test_the_quickstart_shows_what_a_base_reads_that_cannot_draw(pristine, processor, images, tmp_path, capsys):
    base, adapter, image = (str(tmp_path / name) for name in ("base", "adapter", "image.png"))
    pristine.save_pretrained(base)
    processor.save_pretrained(base)
    model = attach(copied(pristine))
    model.save_pretrained(adapter, processor=model.compact_processor(processor), base_model=base)
    images[0].save(image)
    given = {"base": base, "adapter": adapter, "device": "cpu", "output": str(tmp_path / "quickstart.png")}
    quickstart.main(quickstart.QuickstartArguments(**given, image=image, question="What digit is at the top left?"))
    assert "tokens an image, read" in capsys.readouterr().out
    assert (tmp_path / "quickstart.png").is_file()
    with pytest.raises(SystemExit, match=r"cannot draw: .*Expected --image and --question, without --prompt"):
        quickstart.main(quickstart.QuickstartArguments(**given))
