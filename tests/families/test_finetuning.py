"""finetune.py trains an adapter of every family, on images of several sizes."""

import json

import finetune
import pytest
import torch
from finetune_runs import ARGUMENTS, TRAINING
from finetuning import stages
from PIL import Image
from safetensors.torch import load_file
from specs import SPECS
from transformers import set_seed


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: spec.name)
def spec(request):
    return request.param


@pytest.fixture(scope="module")
def base_folder(spec, tmp_path_factory):
    folder, processor = tmp_path_factory.mktemp(spec.name), spec.make_processor()
    set_seed(0)
    spec.make_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "template.jinja").write_text(processor.chat_template)  # Chameleon's processor saves none
    return folder


@pytest.fixture
def dataset(spec, tmp_path):
    """Questions, and drawings where the base can draw."""
    rows = []
    for index, size in enumerate([(64, 64), (64, 32), (48, 48), (32, 64)]):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", size, (60 * index, 90, 200)).save(path)
        image, words = [{"type": "image", "text": None}], [{"type": "text", "text": "a red 3"}]
        turns = [(image + words, words)] * spec.answers + [(words, image)] * spec.draws
        for asked, told in turns:
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            rows.append({"messages": messages, "images": [str(path)]})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("distill", [False, True])
def test_every_family_trains(base_folder, dataset, tmp_path, distill):
    arguments = {**ARGUMENTS, "stage_1_steps": 2, "caption_dropout": 0.5, "distill": distill}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "ENOUGH_PERPLEXITY", 0.0)  # two steps on four pictures
        training = {**TRAINING, "max_steps": 2, "chat_template_path": str(base_folder / "template.jinja")}
        finetune.main(
            finetune.FinetuneArguments(base=str(base_folder), dataset=[str(dataset)], **arguments),
            finetune.TrainingConfig(output_dir=str(tmp_path / "out"), **training),
        )
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out/stage1", tmp_path / "out"))
    assert all(weight.isfinite().all() for weight in second.values())
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_without_a_dataset_a_base_that_only_reads_trains_on_scenes_to_read(spec, base_folder, tmp_path):
    """Half of the digit scenes are drawn by default."""
    if spec.draws:
        pytest.skip(f"{spec.name} draws")
    training = {**TRAINING, "max_steps": 2, "chat_template_path": str(base_folder / "template.jinja")}
    finetune.main(
        finetune.FinetuneArguments(base=str(base_folder), **{**ARGUMENTS, "stage_1_steps": 2, "num_global_tokens": 0}),
        finetune.TrainingConfig(output_dir=str(tmp_path / "out"), **training),
    )
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
