import numpy as np
import pytest
from helpers import rng
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_world.digits import (
    COLOURS,
    PLACES,
    QUESTION_KINDS,
    Quarter,
    Scene,
    judge,
    load_scans,
    random_scene,
    right_by_aspect,
    right_quarters,
)

SEEDS = st.integers(0, 2**31)


def scene_of(quarters: dict[int, Quarter]) -> Scene:
    return Scene(tuple(quarters.get(place) for place in range(4)))


def test_the_split_is_complete_and_of_the_stated_sizes():
    assert [len(load_scans(split)[0]) for split in ("train", "held-out")] == [1437, 360]


def test_no_held_out_scan_is_trained_on():
    train, held_out = ({scan.tobytes() for scan in load_scans(split)[0]} for split in ("train", "held-out"))
    assert train.isdisjoint(held_out)


def test_every_digit_is_in_both_splits():
    assert all(set(load_scans(split)[1]) == set(range(10)) for split in ("train", "held-out"))


def test_a_scene_depends_on_its_seed_alone():
    first, again, other = (random_scene(rng(seed), "held-out") for seed in (1, 1, 2))
    assert first == again != other
    assert np.array_equal(first.render("held-out"), again.render("held-out"))


@given(SEEDS)
@settings(max_examples=25)
def test_a_scene_has_one_to_four_digits_and_says_what_it_shows(seed):
    scene = random_scene(rng(seed), "held-out")
    filled = [(place, quarter) for place, quarter in zip(PLACES, scene.quarters, strict=True) if quarter]
    assert 1 <= len(filled) <= 4
    assert scene.caption() == " and ".join(f"a {quarter.colour} {quarter.digit} at the {place}" for place, quarter in filled)
    assert sorted(scene.shuffled_caption(rng(seed)).split(" and ")) == sorted(scene.caption().split(" and "))
    assert scene.render("held-out").shape == (64, 64, 3)
    assert scene.render("held-out").dtype == np.uint8


@given(SEEDS)
@settings(max_examples=25)
def test_every_question_has_its_right_answer(seed):
    generator = rng(seed)
    scene = random_scene(generator, "held-out")
    filled = [quarter for quarter in scene.quarters if quarter]
    for kind in QUESTION_KINDS:
        pair = scene.question(kind, generator)
        if pair is None:
            assert kind == "colour"
            assert all([quarter.digit for quarter in filled].count(quarter.digit) > 1 for quarter in filled)
            continue
        question, told = pair
        if kind == "count":
            assert told == str(len(filled))
        elif kind == "digit":
            place = question.removeprefix("What digit is at the ").removesuffix("?")
            assert told == str(scene.quarters[PLACES.index(place)].digit)
        else:
            digit = int(question.removeprefix("What colour is the ").removesuffix("?"))
            assert [quarter.colour for quarter in filled if quarter.digit == digit] == [told]


def test_the_judge_reads_real_held_out_scenes():
    scenes = [random_scene(rng(seed), "held-out") for seed in range(150)]
    seen = judge(np.stack([scene.render("held-out") for scene in scenes]))
    assert sum(right_quarters(asked, drawn) for asked, drawn in zip(scenes, seen, strict=True)) / 600 > 0.97


def test_the_judge_tells_colours_and_empty_quarters_without_a_mistake():
    scenes = [random_scene(rng(seed), "held-out") for seed in range(150)]
    seen = judge(np.stack([scene.render("held-out") for scene in scenes]))
    for asked, drawn in zip(scenes, seen, strict=True):
        assert [quarter and quarter.colour for quarter in asked.quarters] == [
            quarter and quarter.colour for quarter in drawn.quarters
        ]


def test_an_empty_picture_is_empty():
    assert judge(np.full((1, 64, 64, 3), 16, np.uint8)) == [Scene((None,) * 4)]


@pytest.mark.parametrize("noise", [0, 8])
def test_the_judge_does_not_mind_a_little_noise(noise):
    scene = random_scene(rng(3), "held-out")
    pixels = scene.render("held-out") + rng(0).integers(0, noise + 1, (64, 64, 3))
    assert right_quarters(scene, judge(pixels.clip(0, 255).astype(np.uint8)[None])[0]) == 4


def test_right_quarters():
    red_3, blue_3, red_4 = Quarter(3, "red"), Quarter(3, "blue"), Quarter(4, "red")
    asked = scene_of({0: red_3, 1: red_4})
    assert right_quarters(asked, asked) == 4
    assert right_quarters(asked, scene_of({0: Quarter(3, "red", scan=9), 1: red_4})) == 4  # which scan does not matter
    assert right_quarters(asked, scene_of({0: blue_3, 1: red_4})) == 3
    assert right_quarters(asked, scene_of({0: red_4, 1: red_4})) == 3
    assert right_quarters(asked, scene_of({1: red_4})) == 3
    assert right_quarters(asked, scene_of({0: red_3, 1: red_4, 3: red_3})) == 3
    assert right_quarters(asked, scene_of({0: red_4, 1: red_3})) == 2


ALL = {"digit", "colour", "position", "emptiness", "count", "quarters", "scenes"}


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        ({0: Quarter(3, "red"), 1: Quarter(4, "blue")}, set()),
        ({0: Quarter(8, "red"), 1: Quarter(4, "blue")}, {"digit", "quarters", "scenes"}),
        ({0: Quarter(3, "cyan"), 1: Quarter(4, "blue")}, {"colour", "quarters", "scenes"}),
        ({0: Quarter(3, "blue"), 1: Quarter(4, "red")}, {"colour", "quarters", "scenes"}),
        ({0: Quarter(4, "red"), 1: Quarter(3, "blue")}, {"digit", "quarters", "scenes"}),
        ({0: Quarter(3, "red")}, ALL - {"emptiness"}),
        (
            {0: Quarter(3, "red"), 1: Quarter(4, "blue"), 3: Quarter(1, "red")},
            {"position", "emptiness", "count", "quarters", "scenes"},
        ),
        ({0: Quarter(3, "red"), 2: Quarter(4, "blue")}, ALL - {"count"}),
        ({}, ALL - {"emptiness"}),
    ],
    ids=["all right", "digit", "colour", "colours swapped", "digits swapped", "one missing", "one more", "moved", "blank"],
)
def test_each_confusion_shows_in_its_own_aspects(drawn, wrong):
    right = right_by_aspect(scene_of({0: Quarter(3, "red"), 1: Quarter(4, "blue")}), scene_of(drawn))
    assert right.keys() == ALL
    assert {aspect for aspect, values in right.items() if not all(values)} == wrong


SCENES = st.tuples(*[st.none() | st.builds(Quarter, st.integers(0, 9), st.sampled_from(list(COLOURS)))] * 4).map(Scene)


@given(asked=SCENES, drawn=SCENES)
def test_what_the_aspects_owe_each_other(asked, drawn):
    right = right_by_aspect(asked, drawn)
    filled = [place for place in range(4) if asked.quarters[place] is not None]
    assert len(right["digit"]) == len(right["colour"]) == len(filled) == 4 - len(right["emptiness"])
    for place, digit, colour in zip(filled, right["digit"], right["colour"], strict=True):
        assert right["quarters"][place] == (digit and colour)
        assert right["position"][place] or not (digit or colour)
    assert sum(right["position"]) == sum(right["emptiness"]) + sum(right["position"][place] for place in filled)
    assert right["scenes"] == [all(right["quarters"])]
    assert right["count"] == [True] or not all(right["position"])
    assert right_quarters(asked, drawn) == sum(right["quarters"])


def test_colours_are_told_apart_by_hue():
    assert len(COLOURS) == 6
