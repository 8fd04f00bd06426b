"""The command `uc-adapters`, in this process: what it prints, what it writes, and its errors of one line."""

from pathlib import Path

import pytest
from helpers import ANN, attach
from PIL import Image
from safetensors.torch import load_file

from uc_adapters.command import main

CARDS = Path(__file__).parents[1] / "model_cards"
ADAPTER, BASE = str(CARDS / "tiny-janus-uc4x"), str(CARDS / "tiny-janus")
ON_BASE = ["--base_model", BASE, "--device", "cpu"]
PROMPT = "a red 3 at the top left and a blue 7 at the bottom right"


def one_line(capsys) -> str:
    """The error, which is all that a failed command prints."""
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("uc-adapters:")]
    assert out == ""
    return line


def test_draw_writes_the_picture_and_ask_reads_it(tmp_path, capsys):
    file = tmp_path / "drawing.png"
    options = ["--output", str(file), "--guidance_scale", "2", "--temperature", "0.7", "--seed", "1"]
    assert main(["draw", ADAPTER, PROMPT, *ON_BASE, *options]) == 0
    assert capsys.readouterr().out.split() == [str(file)]
    assert Image.open(file).size == (64, 64)
    assert main(["ask", ADAPTER, str(file), "What digit is at the top left?", *ON_BASE]) == 0
    assert capsys.readouterr().out.strip() == "3"


def test_a_seed_gives_the_same_pictures_again(tmp_path, capsys):
    for name in ("a", "b"):
        options = ["--count", "2", "--seed", "5", "--output", str(tmp_path / f"{name}.png")]
        assert main(["draw", ADAPTER, PROMPT, *ON_BASE, *options]) == 0
    first, second = ([(tmp_path / f"{name}-{place}.png").read_bytes() for place in (1, 2)] for name in ("a", "b"))
    assert first == second
    assert first[0] != first[1]


def test_info_tells_an_adapter_without_its_base(capsys):
    assert main(["info", ADAPTER]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    told = {name.strip(): value.strip() for name, value in lines.items()}
    assert told["base"] == "uc-adapters/tiny-janus (janus)"
    assert told["tokens to read an image"] == "21, the base 64"
    assert told["steps of the language model to draw one"] == "16, the base 64"
    assert told["seal"] == "intact"
    weights = load_file(f"{ADAPTER}/adapter_model.safetensors")
    assert told["size"].startswith(f"{sum(weight.numel() for weight in weights.values()):,} parameters")


def test_an_adapter_of_the_hub(hub, base, base_folder, processor, tmp_path, capsys):
    hub.create("org/tiny", {path.name: path.read_bytes() for path in base_folder.iterdir()})
    attach(base).push_to_hub("org/tiny-uc4x", processor=processor, base_model="org/tiny", token=ANN)
    assert main(["info", "org/tiny-uc4x"]) == 0
    assert "org/tiny" in capsys.readouterr().out
    assert main(["draw", "org/tiny-uc4x", "a red 3", "--device", "cpu", "--output", str(tmp_path / "d.jpg")]) == 0
    assert Image.open(tmp_path / "d.jpg").size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["draw", ADAPTER, " "], "prompt is empty"),
        (["draw", ADAPTER, PROMPT, "--output", "drawing.words"], "--output drawing.words ends in '.words'"),
        (["draw", ADAPTER, PROMPT, "--output", "nowhere/d.png"], "the folder nowhere does not exist"),
        (["draw", ADAPTER, PROMPT, "--count", "0"], "--count 0; expected 1 or more"),
        (["draw", ADAPTER, PROMPT, "--seed", "-1"], "--seed -1; expected a whole number from 0"),
        (["draw", ADAPTER, PROMPT, "--negative_prompt", " "], "--negative_prompt is empty"),
        (["draw", ADAPTER, PROMPT, "--device", "toaster"], "--device toaster: "),
        (["draw", ADAPTER, "red " * 1000, *ON_BASE], "A prompt of 1006 tokens is too long for the base: expected at most 960"),
        (["draw", BASE, PROMPT], "adapter_config.json is missing"),
        (["draw", ADAPTER, PROMPT, "--base_model", "nowhere"], "base nowhere"),
        (["draw", ADAPTER, PROMPT, "--base_model", ADAPTER], "tiny-janus-uc4x holds none: config.json is missing"),
        (["draw", ADAPTER, PROMPT, *ON_BASE, "--guidance_scale", "nan"], "guidance_scale=nan"),
        (["draw", ADAPTER, PROMPT, *ON_BASE, "--temperature", "0"], "temperature"),
        (["draw", ADAPTER, PROMPT, *ON_BASE, "--dtype", "float12"], "float12"),
        (["draw", "no one/here", PROMPT], "'no one/here' is no Hub id"),
        (["info", BASE], "adapter_config.json is missing"),
        (["info", "org/nothing"], "There is no repo 'org/nothing'"),
        (["ask", ADAPTER, "none.png", "What?"], "none.png cannot be read: No such file"),
        (["ask", ADAPTER, __file__, "What?"], "is no picture that can be read"),
        (["ask", ADAPTER, f"{ADAPTER}/quickstart.png", ""], "question is empty"),
        (
            ["ask", ADAPTER, f"{ADAPTER}/quickstart.png", "what " * 2000, *ON_BASE],
            "expected fewer than 1024, the base's context",
        ),
    ],
)
def test_errors_are_one_line_and_write_nothing(arguments, told, tmp_path, monkeypatch, capsys, hub):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert told in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file_to_write(tmp_path, capsys):
    (tmp_path / "d-2.png").mkdir()
    assert main(["draw", ADAPTER, PROMPT, "--output", str(tmp_path / "d.png"), "--count", "2"]) == 1
    assert "d-2.png is a folder; expected a file to write" in one_line(capsys)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, capsys):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    assert main(["ask", ADAPTER, str(tmp_path / "huge.png"), "What?", *ON_BASE]) == 1
    assert "huge.png has 100 megapixels; expected at most 50" in one_line(capsys)


@pytest.mark.parametrize("arguments", [[], ["paint"], ["draw", ADAPTER], ["draw", ADAPTER, PROMPT, "--count", "many"]])
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: uc-adapters" in capsys.readouterr().err


def test_the_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert 'uc-adapters draw org/janus-uc4x "A fox in the snow."' in capsys.readouterr().out
