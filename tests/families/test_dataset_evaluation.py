"""A family that only reads answers a dataset's questions, and is not asked to draw."""

import json
from types import SimpleNamespace

import pytest
import torch
from evaluate_dataset import EvaluateDatasetArguments, main
from finetuning import write_captioned, write_rows
from helpers import attach
from tiny_chameleon import make_model, make_processor


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory):
    """A base that only reads, and an adapter of it, as folders."""
    folder, adapter = tmp_path_factory.mktemp("chameleon"), tmp_path_factory.mktemp("chameleon-adapter")
    torch.manual_seed(0)
    processor = make_processor()
    base = make_model(processor).eval()
    base.save_pretrained(folder)
    processor.save_pretrained(folder)
    base.name_or_path = str(folder)
    attach(base).save_pretrained(adapter, processor=processor)
    return SimpleNamespace(base=str(folder), adapter=str(adapter))


def test_its_questions_are_answered(chameleon, images, tmp_path):
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    rows = [{"image": f"{index}.png", "question": "What digit is at the top left?", "answer": "3"} for index in range(4)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    scores = main(EvaluateDatasetArguments(base=chameleon.base, adapter=chameleon.adapter, dataset=source, max_new_tokens=2))
    assert scores["reading"]["exact_match"].keys() == {"base", "adapter"}
    assert scores["drawing"] == {}


def test_it_is_not_asked_to_draw(chameleon, tmp_path):
    pictures = write_captioned(tmp_path / "pictures", 2)
    models = {"base": chameleon.base, "adapter": chameleon.adapter}
    with pytest.raises(SystemExit, match=r"chameleon-adapter0 cannot draw: transformers' Chameleon .*a dataset of questions"):
        main(EvaluateDatasetArguments(**models, dataset=str(pictures), features="none", clip="none"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a 3", "tag": "x", "include": [{"class": "3", "count": 1}]}))
    with pytest.raises(SystemExit, match="cannot draw"):
        main(EvaluateDatasetArguments(**models, prompts=str(prompts), output_dir=str(tmp_path / "drawn")))
    assert not (tmp_path / "drawn").exists()
