"""The short way to train many ratios learns from the same loss as the trainers of the package."""

import json

import pytest
import torch
import train_ratios
from helpers import attach
from scoring.contenders import Contender, contenders
from train_ratios import RatioArguments, Scenes, Training, prepare

from uc_adapters import UniCompressCollator
from uc_adapters.training import teacher_collator, teacher_targets


@pytest.mark.parametrize("globals_", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_loss_of_the_codes_is_that_of_the_forward(base_folder, fresh, processor, images, globals_, weight):
    (dense,) = contenders(str(base_folder), None)
    model = attach(fresh(), codes_per_step=(2, 5), drawing_global_tokens=globals_)
    captions = ["a red 3 at the top left", "a blue 7"]
    scenes = Scenes(*(value.long() for value in vars(prepare(Contender("base", dense.model, processor), 2)).values()))
    pixels = processor.image_processor(images[:2], return_tensors="pt")["pixel_values"]
    scenes.codes = model.family.dense_codes(pixels)
    inputs = processor(
        text=[processor.apply_chat_template([_said(caption)], add_generation_prompt=True) for caption in captions],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        generation_mode="image",
    )
    scenes.ids, scenes.mask = inputs["input_ids"], inputs["attention_mask"]
    training = Training(model, dense.model, RatioArguments(device="cpu"))
    training.weight.fill_(weight)
    compact = model.compact_processor(processor)
    rows = [
        {"messages": [_said(caption), {"role": "assistant", "content": [{"type": "image"}]}], "images": [image]}
        for caption, image in zip(captions, images[:2], strict=True)
    ]
    for length in (2, 5):
        collate = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0, codes_per_step=length)
        batch = collate(rows)
        taught = teacher_collator(collate, processor)(rows) | {"taught": torch.zeros(2, dtype=torch.bool)}
        output = model(**batch, **teacher_targets(model, taught, weight))
        of_codes = -output.log_probs[output.kinds == 3].view(2, -1)
        torch.testing.assert_close(training.scores(length, scenes), of_codes, atol=1e-4, rtol=1e-5)


def _said(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def test_it_trains_and_scores_every_ratio(base_folder, tmp_path):
    data = str(tmp_path / "scenes.pt")
    options = {"base": str(base_folder), "data": data, "device": "cpu", "graph": False}
    assert train_ratios.main(RatioArguments(**options, prepare=6)) is None
    folder = tmp_path / "dial"
    options |= {"codes_per_step": [16, 64], "max_steps": 2, "batch_size": 5, "r": 2, "decompressor_width": 64}
    result = train_ratios.main(RatioArguments(**options, scenes=2, score_batch=2, output_dir=str(folder)))
    assert [result["scores"][length]["steps"] for length in ("16", "64")] == [4, 1]
    assert json.loads((folder / "scores.json").read_text()) == result
    assert (folder / "adapter_model.safetensors").is_file()
    with pytest.raises(SystemExit, match=r"--batch_size 2 leaves no scene in a step for \[16\] of --codes_per_step 16 64"):
        train_ratios.main(RatioArguments(**options | {"batch_size": 2}, scenes=0, output_dir=str(tmp_path / "small")))
