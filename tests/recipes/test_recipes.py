"""The scripts run from their arguments; what they reach is on the cards, not here."""

from pathlib import Path

import evaluate
import finetune
import pytest
import quickstart
from PIL import Image
from trl import TrlParser


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


def test_finetune_hands_the_layers_of_a_lora_to_the_config():
    parser = TrlParser(finetune.FinetuneArguments)
    (args,) = parser.parse_args_and_config(["--target_modules", "q_proj", "v_proj"])
    assert args.config().target_modules == {"q_proj", "v_proj"}
    assert finetune.FinetuneArguments().config().target_modules is None  # the family's own


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_config_is_one_of_finetunes(file):
    parser = TrlParser((finetune.FinetuneArguments, finetune.TrainingConfig))
    args, training = parser.parse_args_and_config(["--config", str(file), "--use_cpu", "true", "--bf16", "false"])
    assert args.config().decompressor == "strip"
    assert training.report_to == []  # `recipes` brings none of those that could be named
    if file.stem == "tiny":
        assert args.settings == finetune.FinetuneArguments(distill=True).settings
        assert training.to_dict() == finetune.TrainingConfig(use_cpu=True).to_dict()
