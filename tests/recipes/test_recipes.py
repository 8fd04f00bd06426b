"""The scripts run from their arguments; what they reach is on the cards, not here."""

import json
from pathlib import Path

import benchmark
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


def test_benchmark_measures_base_and_adapter_side_by_side(tmp_path):
    files = {"json": str(tmp_path / "figures.json"), "chart": str(tmp_path / "figures.png")}
    benchmark.main(benchmark.BenchmarkArguments(repeats=1, **files))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(figures["drawing"]["seconds"][name] > 0 for name in ("base", "adapter"))
    assert sum(figures["drawing"]["adapter_shares"].values()) == pytest.approx(1)
    assert min(figures["drawing"]["adapter_shares"].values()) > 0
    assert figures["reading"]["seconds"].keys() == {"prefill", "first token", "answer"}
    assert figures["memory"]["cache_bytes"]["adapter"] * 64 == figures["memory"]["cache_bytes"]["base"] * 21
    assert min(Image.open(files["chart"]).size) > 200


@pytest.mark.parametrize(("text", "figures"), [("README.md", "benchmark-*.json"), ("docs/training.md", "training-*.json")])
def test_the_docs_quote_the_committed_figures(text, figures):
    root = Path(__file__).parents[2]
    quoted, files = (root / text).read_text(), list((root / "docs").glob(figures))
    assert files
    for file in files:
        for row in benchmark.markdown(json.loads(file.read_text())).splitlines()[2:]:
            assert row.split("|", 2)[2] in quoted, row  # the figures; the text has its own words for what they are of


def test_benchmark_names_the_shapes_that_it_knows():
    with pytest.raises(SystemExit, match=r"'huge'.*tiny.*janus-pro-1b"):
        benchmark.main(benchmark.BenchmarkArguments(shape="huge"))
