import pytest
from helpers import rng
from tiny_world.digits import DESCRIBE, random_scene
from tiny_world.scenes_dataset import scene_row, scenes_dataset


def roles_of_images(row: dict) -> list[str]:
    return [message["role"] for message in row["messages"] for part in message["content"] if part["type"] == "image"]


@pytest.mark.parametrize(("seed", "role"), [(0, "user"), (1, "assistant")])
def test_even_rows_are_read_and_odd_rows_are_drawn(seed, role):
    row = scene_row(seed, "train")
    assert roles_of_images(row) == [role]
    assert len(row["images"]) == 1


def test_a_reading_row_asks_and_describes_what_its_scene_shows():
    row, scene = scene_row(4, "train"), random_scene(rng(4), "train")
    words = [part["text"] for message in row["messages"] for part in message["content"] if part["type"] == "text"]
    assert words[-2:] == [DESCRIBE, scene.caption()]
    assert row["images"][0].tobytes() == scene.image("train").tobytes()


def test_a_drawing_rows_prompt_says_what_its_image_shows():
    row, scene = scene_row(5, "train"), random_scene(rng(5), "train")
    prompt = row["messages"][0]["content"][0]["text"]
    assert sorted(prompt.split(" and ")) == sorted(scene.caption().split(" and "))


def test_rows_are_rendered_when_asked_for_and_depend_on_the_seed_alone():
    first, again, other = (scenes_dataset(6, seed) for seed in (1, 1, 2))
    assert len(first) == 6
    assert first[3]["messages"] == again[3]["messages"] != other[3]["messages"]
    assert first[3]["images"][0].tobytes() == again[3]["images"][0].tobytes()
