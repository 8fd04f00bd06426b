"""A family that only reads is scored for what it reads."""

from types import SimpleNamespace

import pytest
import quickstart
import torch
from evaluate_dataset import EvaluateDatasetArguments
from evaluate_dataset import main as score_dataset
from evaluate_scenes import EvaluateArguments, main
from finetune_runs import write_captioned, write_rows
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
    model = attach(base)
    model.save_pretrained(adapter, processor=processor)
    return SimpleNamespace(base=str(folder), adapter=str(adapter))


def test_an_adapter_that_cannot_draw_is_scored_for_what_it_reads(chameleon, capsys):
    scores = main(EvaluateArguments(base=chameleon.base, adapter=chameleon.adapter, scenes=2))
    assert scores["tokens"] == {"read": {"base": 64, "adapter": 21}}
    assert scores["reading"].keys() == {"base", "adapter"}
    assert not {"drawing", "nats", "reconstruction"} & scores.keys()
    printed = capsys.readouterr().out
    assert f"Only reading is scored: {chameleon.base} cannot draw" in printed
    assert "reading: colour" in printed
    assert "drawing" not in printed.split("|", 1)[1]


def test_a_picture_of_drawings_is_refused_where_there_are_none(chameleon, tmp_path):
    arguments = EvaluateArguments(base=chameleon.base, adapter=chameleon.adapter, grid=str(tmp_path / "drawings.png"))
    with pytest.raises(SystemExit, match=r"--grid .*cannot draw: transformers' Chameleon .*Leave --grid out"):
        main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_cannot_draw_answers_a_datasets_questions(chameleon, images, tmp_path):
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    rows = [{"image": f"{index}.png", "question": "What digit is at the top left?", "answer": "3"} for index in range(4)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    models = {"base": chameleon.base, "adapter": chameleon.adapter}
    scores = score_dataset(EvaluateDatasetArguments(**models, dataset=source, max_new_tokens=2))
    assert scores["reading"]["exact_match"].keys() == {"base", "adapter"}
    assert scores["drawing"] == {}


def test_an_adapter_that_cannot_draw_is_not_asked_to_by_a_dataset_or_prompts(chameleon, tmp_path):
    pictures = str(write_captioned(tmp_path / "pictures", 2))
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a 3", "tag": "x", "include": [{"class": "3", "count": 1}]}])
    models = {"base": chameleon.base, "adapter": chameleon.adapter}
    with pytest.raises(
        SystemExit, match=r"chameleon-adapter\d cannot draw: transformers' Chameleon .*a dataset of questions to read"
    ):
        score_dataset(EvaluateDatasetArguments(**models, dataset=pictures, features="none", clip="none"))
    with pytest.raises(SystemExit, match="cannot draw"):
        score_dataset(EvaluateDatasetArguments(**models, prompts=prompts, output_dir=str(tmp_path / "drawn")))
    assert not (tmp_path / "drawn").exists()


def test_the_quickstart_does_not_load_a_base_that_cannot_draw(tmp_path):
    """There are no weights in this folder."""
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    make_model(processor).config.save_pretrained(tmp_path)
    given = {"base": str(tmp_path), "device": "cpu", "output": str(tmp_path / "picture.png")}
    with pytest.raises(SystemExit, match="cannot draw: transformers' Chameleon has no decoder"):
        quickstart.main(quickstart.QuickstartArguments(prompt="a red 3", **given))
