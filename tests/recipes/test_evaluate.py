"""The evaluator on those whose scores are known: a perfect drawer, a blank one, a random one, and two that change places."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluate_scenes import EvaluateArguments, main, score_scenes
from helpers import attach, rng
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scoring import score_report
from scoring.contenders import Contender, contenders
from scoring.likelihood import image_nats
from scoring.scene_scores import ReadingScore, feature_distance, judge_drawings, render, score_reading, with_other_scans
from tiny_world.digits import QUESTION_KINDS, Quarter, Scene, check_scene_size, random_scene

PAIRS = ("reading", "drawing", "whole_scenes", "nats_per_image", "feature_distance", "seconds_per_image")
CHANCE = {  # of a drawer of `random_scene`s that are not what was asked: 1 to 4 digits, so that 5/8 of the quarters are filled
    "digit": 5 / 8 / 10,
    "colour": 5 / 8 / 6,
    "position": (5 / 8) ** 2 + (3 / 8) ** 2,
    "emptiness": 3 / 8,
    "count": 1 / 4,
    "quarters": (5 / 8) ** 2 / 60 + (3 / 8) ** 2,
}


def random_scenes(seed: int, count: int, split: str = "held-out") -> list[Scene]:
    random = rng(seed)
    return [random_scene(random, split) for _ in range(count)]


def judged(scenes: list[Scene], images: np.ndarray) -> dict[str, float]:
    return {aspect: estimate.value for aspect, estimate in judge_drawings(scenes, images, 1.0).estimates.items()}


@pytest.fixture(scope="module")
def scores(base_folder, adapter_folder, tmp_path_factory):
    """Of four scenes, in every form that they are written in."""
    folder = tmp_path_factory.mktemp("scores")
    adapter = shutil.copytree(adapter_folder, folder / "adapter")
    files = {"json": str(folder / "scores.json"), "grid": str(folder / "drawings.png"), "card": True}
    main(EvaluateArguments(base=str(base_folder), adapter=str(adapter), scenes=4, seed=1, batch_size=3, **files))
    drawn_globals = {"strip": 0, "phase": 4}[json.loads((adapter / "adapter_config.json").read_text())["decompressor"]]
    return SimpleNamespace(
        written=json.loads((folder / "scores.json").read_text()),
        grid=folder / "drawings.png",
        card=adapter / "README.md",
        steps=drawn_globals + 16,
    )


def test_an_adapter_is_scored_at_the_ratios_that_are_asked_for(base_folder, fresh, processor, tmp_path):
    model, adapter = attach(fresh(), stride=(1, 2, 4), codes_per_step=(4, 8)), str(tmp_path / "dial")
    model.save_pretrained(adapter, processor=processor)
    arguments = {"base": str(base_folder), "adapter": adapter, "scenes": 2, "seed": 1, "batch_size": 2}
    found = main(EvaluateArguments(**arguments, codes_per_step=4, stride=4))
    assert found["tokens"] == {"read": {"base": 64, "adapter": 9}, "drawn": {"base": 64, "adapter": 16}}
    scenes = random_scenes(1, 2)
    images, prompts = [scene.image("held-out") for scene in scenes], [scene.caption() for scene in scenes]
    contender = Contender("adapter", model, model.compact_processor(processor), codes_per_step=4)
    assert found["nats_per_image"]["adapter"] == pytest.approx(image_nats(contender, images, prompts).mean().item())
    with pytest.raises(SystemExit, match="without --adapter"):
        main(EvaluateArguments(base=str(base_folder), stride=4))


def test_a_perfect_drawer_scores_one():
    scenes = random_scenes(0, 200, "train")  # train scans: the judge's own mistakes on others must not count
    images = np.stack([scene.render("train") for scene in scenes])
    assert judged(scenes, images) == dict.fromkeys([*CHANCE, "scenes"], 1.0)


def test_a_blank_drawer_scores_what_was_to_be_empty():
    scenes = random_scenes(1, 200)
    empty = np.mean([[quarter is None for quarter in scene.quarters] for scene in scenes])
    assert judged(scenes, np.full((200, 64, 64, 3), 16, np.uint8)) == {
        **dict.fromkeys(["digit", "colour", "count", "scenes"], 0.0),
        **dict.fromkeys(["position", "quarters"], pytest.approx(empty)),
        "emptiness": 1.0,
    }


def test_a_random_drawer_scores_near_chance():
    n = 1000
    found = judged(random_scenes(2, n), render(random_scenes(3, n)))
    for aspect, chance in CHANCE.items():  # four standard errors, as if the quarters of a scene were one trial
        assert abs(found[aspect] - chance) < 4 * math.sqrt(chance * (1 - chance) / n), aspect
    assert found["scenes"] < 0.05


def test_scenes_without_an_empty_quarter_have_no_score_of_emptiness():
    full = [scene for scene in random_scenes(4, 40) if None not in scene.quarters]
    assert judged(full, render(full)).keys() == {*CHANCE, "scenes"} - {"emptiness"}


@given(right=arrays(float, (len(QUESTION_KINDS), 30), elements=st.sampled_from([0.0, 1.0, math.nan])))
def test_what_scenes_give_to_the_reading_score_adds_up_to_it(right):
    right[:, 0] = 1  # some scene settles each kind
    score = ReadingScore(dict(zip(QUESTION_KINDS, right, strict=True)))
    assert score.by_scene.mean() == pytest.approx(score.estimates["mean"].value)
    assert [score.estimates[kind].n for kind in QUESTION_KINDS] == [(~np.isnan(row)).sum() for row in right]


def test_a_kind_of_question_that_no_scene_settles_has_no_score(base_folder):
    twice = Scene((Quarter(3, "red", 0), Quarter(3, "blue", 1), None, None))  # which 3 has which colour?
    (base,) = contenders(str(base_folder), None)
    score = score_reading(base, [twice, twice], seed=0)
    assert score.estimates.keys() == {"mean", "digit", "count"}
    assert score.by_scene.mean() == pytest.approx(score.estimates["mean"].value)


def test_what_scenes_give_to_the_drawing_score_adds_up_to_it():
    scenes = random_scenes(5, 60)
    score = judge_drawings(scenes, render(random_scenes(6, 60)), 1.0)
    assert score.by_scene.mean() == pytest.approx(score.estimates["quarters"].value)


def test_other_scans_of_the_same_digits_are_the_same_scene_and_near_it():
    scenes = random_scenes(7, 200)
    others = with_other_scans(scenes, 0)
    assert [scene.caption() for scene in others] == [scene.caption() for scene in scenes]
    assert others != scenes
    real = render(scenes)
    unasked = render(random_scenes(8, 200))
    assert feature_distance(real, real) < feature_distance(real, render(others)) < feature_distance(real, unasked)


def test_the_scores_that_are_written(scores):
    written = scores.written
    for what in PAIRS:
        assert written[what].keys() == {"base", "adapter"}
    assert written["tokens"] == {"read": {"base": 64, "adapter": 21}, "drawn": {"base": 64, "adapter": scores.steps}}
    for name in ("base", "adapter"):
        kinds, aspects = written["reading_by_kind"][name], written["drawing_by_aspect"][name]
        assert kinds.keys() == {"mean", *QUESTION_KINDS}
        assert aspects.keys() <= {*CHANCE, "scenes"}
        for estimate in (*kinds.values(), *aspects.values()):
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
        assert (kinds["mean"]["value"], aspects["quarters"]["value"]) == (written["reading"][name], written["drawing"][name])
        nats = written["nats"][name]
        assert nats["low"] <= nats["value"] == written["nats_per_image"][name] <= nats["high"]
        assert nats["standard_error"] > 0
        assert written["reconstruction"][name].keys() == {"quarters", "psnr", "ssim", "feature_distance"}
    assert written["differences"].keys() == {"reading", "drawing", "nats_per_image"}
    for what, difference in written["differences"].items():
        assert difference["value"] == pytest.approx(written[what]["adapter"] - written[what]["base"])
    assert min(Image.open(scores.grid).size) > 200


def test_the_table_tells_what_is_written(scores):
    table = score_report.markdown(scores.written)
    lines = [[quarter.strip() for quarter in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    assert lines[0] == ["", "base", "adapter", "adapter - base"]
    assert {len(line) for line in lines} == {4}
    assert ["steps of the language model to draw one", "64", str(scores.steps), ""] in lines
    quarters = next(line for line in lines if line[0] == "drawing: quarters right")
    for shown, name in zip(quarters[1:3], ("base", "adapter"), strict=True):
        assert shown.startswith(f"{100 * scores.written['drawing'][name]:.1f} % (")
    assert quarters[3].startswith(f"{100 * scores.written['differences']['drawing']['value']:.1f} (")


def test_changing_places_swaps_the_columns(base_folder, plain_folder):
    base, adapter = contenders(str(base_folder), str(plain_folder))
    scenes, args = random_scenes(9, 3), EvaluateArguments(seed=5, batch_size=2)
    first, _ = score_scenes([base, adapter], scenes, args)
    swapped, _ = score_scenes(
        [Contender("base", adapter.model, adapter.processor), Contender("adapter", base.model, base.processor)], scenes, args
    )
    for scores in (first, swapped):
        del scores["seconds_per_image"]
    names = ["base", "adapter"]
    tokens, turned = first.pop("tokens"), swapped.pop("tokens")
    for what in ("read", "drawn"):
        assert [tokens[what][name] for name in names] == [turned[what][name] for name in reversed(names)]
    differences, opposite = first.pop("differences"), swapped.pop("differences")
    for what, difference in differences.items():
        bounds = [difference[part] for part in ("value", "low", "high")]
        assert [-opposite[what][part] for part in ("value", "high", "low")] == pytest.approx(bounds)
    assert first.pop("feature_distance_of_real") == swapped.pop("feature_distance_of_real")
    for what in first:
        assert [first[what][name] for name in names] == [swapped[what][name] for name in reversed(names)], what


def test_an_images_nats_do_not_depend_on_the_batch_that_it_is_in(base_folder, adapter_folder):
    scenes = random_scenes(10, 3)
    images, prompts = [scene.image("held-out") for scene in scenes], [scene.caption() for scene in scenes]
    for contender in contenders(str(base_folder), str(adapter_folder)):
        together = image_nats(contender, images, prompts)
        alone = [image_nats(contender, [image], [prompt]) for image, prompt in zip(images, prompts, strict=True)]
        assert together.shape == (3,)
        assert torch.allclose(together, torch.cat(alone), rtol=1e-4)


def test_a_base_alone(base_folder, capsys):
    scores = main(EvaluateArguments(base=str(base_folder), scenes=2, batch_size=2))
    assert scores["drawing"].keys() == {"base"}
    assert "differences" not in scores
    assert capsys.readouterr().out.startswith("|  | base |\n")


def test_a_second_adapter_has_a_column_of_its_own_and_differs_from_nobody(base_folder, plain_folder, tmp_path):
    other = shutil.copytree(plain_folder, tmp_path / "other")
    own = shutil.copytree(plain_folder, tmp_path / "own")
    files = {"base": str(base_folder), "adapter": str(own), "also": [str(other)]}
    scores = main(EvaluateArguments(**files, scenes=3, grid=str(tmp_path / "drawings.png"), card=True))
    for what in ("reading", "drawing", "nats_per_image", "reconstruction"):
        assert list(scores[what]) == ["base", "adapter", "other"]
        assert scores[what]["other"] == scores[what]["adapter"]
    assert "| base | adapter | other | adapter - base |" in score_report.markdown(scores)
    assert (tmp_path / "drawings.png").exists()
    [nats] = [
        result for result in ModelCard.load(own / "README.md").data.eval_results if result.metric_type == "nats_per_image"
    ]
    assert nats.metric_value == scores["nats_per_image"]["adapter"]


def test_the_scores_enter_the_card_and_its_model_index(scores):
    results = ModelCard.load(scores.card).data.eval_results
    expected = {what: scores.written[what]["adapter"] for what in PAIRS}
    assert {result.metric_type: result.metric_value for result in results} == expected
    assert {result.dataset_name for result in results} == {"digit scenes of held-out scans, n = 4, seed 1"}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"scenes": 0}, r"--scenes 0: expected 2 or more"),
        ({"scenes": -5}, r"--scenes -5: expected 2 or more"),
        ({"scenes": 1}, r"--scenes 1: expected 2 or more"),
        ({"batch_size": 0}, r"--batch_size 0: expected 1 or more"),
        ({"card": True}, r"--card writes into the folder of --adapter, and that is None; expected a folder"),
        ({"card": True, "adapter": "org/on-the-hub"}, r"that is 'org/on-the-hub'; expected a folder"),
        ({"json": "nowhere/scores.json"}, r"--json nowhere/scores\.json: the folder nowhere does not exist"),
        ({"also": ["a/twin", "b/twin"]}, r"--also a/twin b/twin: expected adapters in folders of different names"),
        ({"also": ["work/adapter"]}, r"--also work/adapter: .* none of them base or adapter"),
        ({"guidance_scale": 1.0}, r"--guidance_scale 1\.0: expected a number above 1"),
        ({"guidance_scale": float("nan")}, r"--guidance_scale nan"),
        ({"seed": -1}, r"--seed -1: expected 0 or more"),
        ({"json": "/tmp"}, r"--json /tmp is a folder; expected a file"),
        ({"temperature": 0.0}, r"--temperature 0\.0: expected a number above 0"),
        ({"temperature": float("nan")}, r"--temperature nan: expected a number above 0"),
        ({"grid": "drawings.txt"}, r"--grid drawings\.txt: expected a file that ends in \.png"),
        ({"grid": "nowhere/drawings.png"}, r"--grid nowhere/drawings\.png: the folder nowhere does not exist"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(given, match):
    with pytest.raises(SystemExit, match=match):
        main(EvaluateArguments(base="nowhere", **given))


def test_an_adapter_that_does_not_exist(base_folder, tmp_path):
    with pytest.raises(ValueError, match="missing-adapter"):
        main(EvaluateArguments(base=str(base_folder), adapter=str(tmp_path / "missing-adapter"), scenes=2))


def test_a_processor_without_a_chat_template_is_told_of(base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match=r"has no chat template; expected a file chat_template\.jinja"):
        main(EvaluateArguments(base=str(folder), scenes=2))


@pytest.mark.parametrize("size", [32, 384])
def test_a_base_whose_pictures_are_no_scenes_is_refused_ahead(size):
    with pytest.raises(SystemExit, match=rf"have {size} pixels a side, digit scenes 64; expected a tiny base, or a --dataset"):
        check_scene_size(size)
    check_scene_size(64)
    check_scene_size(None)
