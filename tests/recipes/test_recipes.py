"""The scripts run from their arguments; what they reach is on the cards, not here."""

import re
from pathlib import Path

import evaluate_scenes
import finetune
import pytest
import quickstart
from helpers import attach
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


def test_quickstart_reads_and_draws_at_the_ratios_that_are_asked_for(base_folder, fresh, processor, tmp_path, images, capsys):
    adapter, picture = str(tmp_path / "dial"), tmp_path / "mine.png"
    attach(fresh(), stride=(1, 2, 4), codes_per_step=(4, 8)).save_pretrained(adapter, processor=processor)
    images[0].save(picture)
    given = {"base": str(base_folder), "adapter": adapter, "device": "cpu", "output": str(tmp_path / "picture.png")}
    asked = {"image": str(picture), "question": "How many digits are there?", "prompt": "a red 3"}
    quickstart.main(quickstart.QuickstartArguments(**given, **asked, codes_per_step=4, stride=4))
    table = capsys.readouterr().out
    assert re.search(r"tokens an image, read +64 +9 ", table)
    assert re.search(r"steps an image, drawn +64 +16 ", table)
    for ratio, told in (({"codes_per_step": 5}, "codes_per_step=5.*4 or 8"), ({"stride": 3}, "stride=3.*1 or 2 or 4")):
        with pytest.raises(SystemExit, match=told):
            quickstart.main(quickstart.QuickstartArguments(**given, **asked, **ratio))


def test_quickstart_reads_an_image_of_the_users(base_folder, plain_folder, tmp_path, images, capsys):
    picture, file = tmp_path / "mine.png", tmp_path / "picture.png"
    images[0].convert("RGBA").save(picture)
    quickstart.main(
        quickstart.QuickstartArguments(
            base=str(base_folder),
            adapter=str(plain_folder),
            image=str(picture),
            question="How many digits are there?",
            device="cpu",
            output=str(file),
        )
    )
    assert "How many digits are there?" in capsys.readouterr().out
    assert file.is_file()


def test_quickstart_reads_an_image_as_the_recipes_train_on_it(tmp_path):
    """Upright, and white where it is transparent."""
    turned = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    turned.putpixel((0, 0), (0, 0, 255, 255))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    image = quickstart.load_image(str(tmp_path / "turned.png"))
    assert (image.mode, image.size) == ("RGB", (2, 4))
    assert image.getpixel((1, 0)) == (0, 0, 255)
    assert image.getpixel((0, 3)) == (255, 255, 255)


@pytest.fixture
def loads_nothing(monkeypatch):
    def refuse(*args):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(quickstart, "contenders", refuse)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"image": "words.txt", "question": "What?"}, r"--image .*words\.txt is no picture that can be read"),
        ({"image": "scan.png", "question": "What?"}, r"--image .*scan\.png cannot be read: No such file"),
        ({"prompt": " "}, "--prompt is empty; expected a text"),
        ({"image": ".", "question": "What?"}, r"--image .* cannot be read: Is a directory"),
        ({"output": "far/away.png"}, r"--output .*away\.png: the folder .* does not exist"),
        ({"output": "picture.words"}, r"--output .*picture\.words: expected a file that ends in one of .*\.png"),
        ({"output": "."}, "--output .*: expected a file that ends in"),
        ({"guidance_scale": -3.0}, r"--guidance_scale -3\.0: expected a number above 1"),
        ({"guidance_scale": float("nan")}, "--guidance_scale nan: expected"),
        ({"temperature": 0.0}, r"--temperature 0\.0: expected a number above 0"),
        ({"seed": -1}, "--seed -1: expected 0 or more"),
        ({"prompt": "red " * 2000}, "--prompt has 2000 tokens; expected at most 768"),
        ({"prompt": "a red 3", "base": "no/such"}, "--base no/such: "),
        ({"device": "cuda:99"}, "--device cuda:99: .*Expected cpu"),
        ({"device": "toaster"}, "--device toaster: .*Expected cpu"),
    ],
)
def test_quickstart_tells_what_is_wrong_in_one_line_before_it_loads(tmp_path, loads_nothing, given, told):
    (tmp_path / "words.txt").write_text("a red 3")
    paths = {name: str(tmp_path / given[name]) for name in ("image", "output") if name in given}
    with pytest.raises(SystemExit, match=told) as stop:
        quickstart.main(
            quickstart.QuickstartArguments(**{"device": "cpu", "output": str(tmp_path / "a.png"), **given, **paths})
        )
    assert "\n" not in str(stop.value)


def test_quickstart_tells_what_it_cannot_load(tmp_path, base_folder):
    for given in ({"base": "no/such/base"}, {"base": str(base_folder), "adapter": str(tmp_path)}):
        with pytest.raises(SystemExit, match=r"--base .*: "):
            quickstart.main(
                quickstart.QuickstartArguments(device="cpu", output=str(tmp_path / "a.png"), prompt="a red 3", **given)
            )


def test_quickstart_starts_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    defaults = quickstart.QuickstartArguments()
    assert all(Path(folder).is_dir() for folder in (defaults.base, defaults.adapter))


def test_quickstart_names_words_that_the_model_does_not_know_before_it_loads_any(tmp_path, loads_nothing, capsys):
    with pytest.raises(AssertionError, match="something was loaded"):
        quickstart.main(
            quickstart.QuickstartArguments(prompt="a red fox in the snow", device="cpu", output=str(tmp_path / "picture.png"))
        )
    assert "does not know a, in, snow; it reads each as the same unknown word" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"image": "x.png"}, {"question": "What?"}])
def test_quickstart_wants_image_and_question_together(given):
    with pytest.raises(SystemExit, match="expected both"):
        quickstart.main(quickstart.QuickstartArguments(**given))


def test_a_recipe_takes_its_arguments_from_a_yaml_file_and_the_command_line(tmp_path):
    (tmp_path / "scores.yaml").write_text("scenes: 7\nseed: 4\n")
    parser = TrlParser(evaluate_scenes.EvaluateArguments)
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
