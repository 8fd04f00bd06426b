"""The scripts run from their arguments; what they reach is on the cards, not here."""

import json
from pathlib import Path

import evaluate
import finetune
import pytest
import quickstart
from helpers import attach
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import TrlParser


@pytest.fixture(scope="module", params=["cell", "phase"])
def adapter_folder(request, base_folder, short_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = AutoModelForImageTextToText.from_pretrained(base_folder)
    attach(base, decompressor=request.param).save_pretrained(folder)
    short_processor.save_pretrained(folder)
    return folder


def test_evaluate_writes_the_scores_of_base_and_adapter(base_folder, adapter_folder, tmp_path):
    file = tmp_path / "scores.json"
    arguments = {"scenes": 4, "seed": 1, "batch_size": 4, "json": str(file)}
    evaluate.main(evaluate.EvaluateArguments(base=str(base_folder), adapter=str(adapter_folder), **arguments))
    scores = json.loads(file.read_text())
    for what in ("reading", "drawing", "seconds_per_image", "nats_per_image"):
        assert scores[what].keys() == {"base", "adapter"}
    assert all(0 <= scores[what][name] <= 1 for what in ("reading", "drawing") for name in ("base", "adapter"))
    assert scores["tokens"]["read"] == {"base": 64, "adapter": 21}
    assert scores["tokens"]["drawn"] == {"base": 64, "adapter": 20}


def test_evaluate_draws_the_same_from_the_same_seed(base_folder, adapter_folder):
    arguments = evaluate.EvaluateArguments(base=str(base_folder), adapter=str(adapter_folder), scenes=3, seed=5, batch_size=3)
    first, again = evaluate.main(arguments), evaluate.main(arguments)
    for what in ("reading", "drawing", "nats_per_image"):
        assert first[what] == again[what]


def test_quickstart_writes_a_picture_and_a_table(base_folder, adapter_folder, tmp_path, capsys):
    file = tmp_path / "picture.png"
    quickstart.main(
        quickstart.QuickstartArguments(
            base=str(base_folder), adapter=str(adapter_folder), prompt="a red 3 at the top left", device="cpu", output=str(file)
        )
    )
    assert min(Image.open(file).size) > 200
    table = capsys.readouterr().out
    assert "64" in table
    assert "21" in table


def test_quickstart_reads_an_image_of_the_users(base_folder, adapter_folder, tmp_path, images, capsys):
    picture, file = tmp_path / "mine.png", tmp_path / "picture.png"
    images[0].convert("RGBA").save(picture)
    quickstart.main(
        quickstart.QuickstartArguments(
            base=str(base_folder),
            adapter=str(adapter_folder),
            image=str(picture),
            question="How many digits are there?",
            device="cpu",
            output=str(file),
        )
    )
    assert "How many digits are there?" in capsys.readouterr().out
    assert file.is_file()


@pytest.mark.parametrize("given", [{"image": "x.png"}, {"question": "What?"}])
def test_quickstart_wants_image_and_question_together(given):
    with pytest.raises(SystemExit, match="expected both"):
        quickstart.main(quickstart.QuickstartArguments(**given))


def test_a_recipe_takes_its_arguments_from_a_yaml_file_and_the_command_line(tmp_path):
    (tmp_path / "scores.yaml").write_text("scenes: 7\nseed: 4\n")
    parser = TrlParser(evaluate.EvaluateArguments)
    (arguments,) = parser.parse_args_and_config(["--config", str(tmp_path / "scores.yaml"), "--scenes", "9"])
    assert (arguments.scenes, arguments.seed) == (9, 4)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_config_is_one_of_finetunes(file):
    parser = TrlParser((finetune.FinetuneArguments, finetune.TrainingConfig))
    args, training = parser.parse_args_and_config(["--config", str(file), "--use_cpu", "true", "--bf16", "false"])
    assert args.config().decompressor == "cell"
    if file.stem == "tiny":
        assert args == finetune.FinetuneArguments()
        assert training.to_dict() == finetune.TrainingConfig(use_cpu=True).to_dict()
