import numpy as np
import pytest
from helpers import rng
from make_scenes_folder import ScenesFolderArguments, main
from rows.captions import caption_of, is_drawn
from rows.conversations import conversations, samples
from scoring.vqa import questions_of
from tiny_world.digits import judge, random_scene


def test_questions_are_those_of_the_scenes(tmp_path):
    main(ScenesFolderArguments(output_dir=str(tmp_path / "new"), scenes=4, seed=2))
    questions = questions_of(conversations(str(tmp_path / "new")))
    asked = {(question.messages[0]["content"][1]["text"], *question.references) for question in questions}
    scene = random_scene(rng(2), "held-out")
    assert ("How many digits are there?", str(sum(quarter is not None for quarter in scene.quarters))) in asked
    assert 8 <= len(questions) <= 12


def test_captions_say_what_is_on_the_images(tmp_path):
    main(ScenesFolderArguments(output_dir=str(tmp_path / "new"), scenes=4, captions=True))
    rows = [row for row in samples(conversations(str(tmp_path / "new"))) if is_drawn(row)]
    seen = judge(np.stack([np.asarray(row["images"][0]) for row in rows]))
    assert [scene.caption() for scene in seen] == [caption_of(row) for row in rows]


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    with pytest.raises(SystemExit, match="expected a new folder"):
        main(ScenesFolderArguments(output_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
