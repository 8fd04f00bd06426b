import json
import shutil

import evaluate_dataset
import numpy as np
import pytest
import torch
from finetune_runs import say, turn, write_captioned, write_rows
from helpers import rng
from PIL import Image
from rows.captions import is_drawn
from rows.conversations import REFERENCED_FORMS, DatasetError, conversations
from scoring.contenders import Contender, answer, contenders, draw, sampling_of
from scoring.digit_features import digit_features
from scoring.geneval import read_prompts
from scoring.picture_metrics import PictureMetrics, load_clip, score_pictures
from scoring.vqa import questions_of
from tiny_world.digits import random_scene
from tiny_world.tiny_words import DIGITS_AND_WORDS, word_tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from uc_adapters.errors import InputError

FEATURES = "scoring.digit_features:digit_features"
QUESTION = "What digit is at the top left?"
PROMPTS = [
    {"prompt": "a red 3", "tag": "colors", "include": [{"class": "3", "count": 1, "color": "red"}]},
    {"prompt": "a 1", "tag": "single_object", "include": [{"class": "1", "count": 1}], "exclude": [{"class": "1", "count": 2}]},
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of random weights, and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = word_tokenizer({}, DIGITS_AND_WORDS)
    width = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **width,
        },
        vision_config={"image_size": 64, "patch_size": 16, **width},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 64, "width": 64}
    CLIPProcessor(CLIPImageProcessorPil(size=side, crop_size=side), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six scenes with captions."""
    return write_captioned(tmp_path_factory.mktemp("data") / "pictures", 6)


@pytest.fixture(scope="module")
def models(base_folder, plain_folder):
    return {"base": str(base_folder), "adapter": str(plain_folder)}


@pytest.fixture
def questions(tmp_path, images):
    """Four scenes with a question; what is the right answer is for the test to say."""

    def write(**columns) -> str:
        for index, image in enumerate(images):
            image.save(tmp_path / f"{index}.png")
        rows = [{"image": f"{index}.png", "question": QUESTION} for index in range(len(images))]
        rows = [row | {name: values[index] for name, values in columns.items()} for index, row in enumerate(rows)]
        return write_rows(tmp_path / "questions.jsonl", rows)

    return write


def run(**arguments) -> dict:
    return evaluate_dataset.main(evaluate_dataset.EvaluateDatasetArguments(**arguments))


def scenes(count: int, seed: int) -> list[Image.Image]:
    return [random_scene(rng(seed + index), "held-out").image("held-out") for index in range(count)]


def fid(drawn: list[Image.Image], real: list[Image.Image]) -> float:
    metrics = PictureMetrics(digit_features(), None, "cpu")
    metrics.update([""] * len(drawn), drawn, real)
    return metrics.compute()["fid"]


def test_fid_of_images_with_themselves_is_zero_and_of_blanks_large():
    real = scenes(300, 0)
    same, others = fid(real, real), fid(scenes(300, 1000), real)
    blanks = fid([Image.new("RGB", (64, 64))] * 300, real)
    assert same == pytest.approx(0, abs=0.01)
    assert same < others < blanks / 10


def test_real_images_of_any_size_are_compared_at_the_size_of_the_drawings():
    real = scenes(10, 0)
    larger = [image.resize((128, 128), Image.Resampling.NEAREST) for image in real]
    assert fid(real, larger) < fid([Image.new("RGB", (64, 64))] * 10, real) / 10


def test_clip_score_is_100_times_the_cosine_of_the_clip_model(clip_folder):
    drawn, captions = scenes(3, 0), ["a red 3", "a blue 7 at the top left", "a cyan 9"]
    metrics = PictureMetrics(None, load_clip(str(clip_folder)), "cpu")
    metrics.update(captions, drawn, drawn)
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        output = model(**processor(text=captions, images=drawn, padding=True, return_tensors="pt"))
    cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds).mean()
    assert cosine > 0  # torchmetrics cuts a mean below 0
    assert metrics.compute() == {"clip_score": pytest.approx(100 * cosine.item(), abs=1e-3)}


def test_captions_are_drawn_and_scored_by_both(models, pictures, clip_folder, tmp_path, capsys):
    file = tmp_path / "scores.json"
    run(**models, dataset=str(pictures), features=FEATURES, clip=str(clip_folder), batch_size=4, json=str(file))
    drawing = json.loads(file.read_text())["drawing"]
    assert drawing["n"] == 6
    for what in ("fid", "clip_score", "seconds"):
        assert drawing[what].keys() == {"base", "adapter"}
    assert min(drawing["seconds"].values()) > 0
    assert drawing["fid"]["base"] != drawing["fid"]["adapter"]
    table = capsys.readouterr().out
    assert "| | base | adapter |" in table
    assert f"| drawing: FID | {drawing['fid']['base']:.3g} | {drawing['fid']['adapter']:.3g} |" in table


def test_further_adapters_have_columns_of_their_own(models, pictures, plain_folder, tmp_path, capsys):
    other = shutil.copytree(plain_folder, tmp_path / "other")
    scores = run(**models, also=[str(other)], dataset=str(pictures), features=FEATURES, clip="none", batch_size=4)
    assert list(scores["drawing"]["fid"]) == ["base", "adapter", "other"]
    assert scores["drawing"]["fid"]["other"] == scores["drawing"]["fid"]["adapter"]
    assert "| | base | adapter | other |" in capsys.readouterr().out


def test_swapping_base_and_adapter_swaps_the_columns(models, pictures):
    rows = conversations(str(pictures))
    rows = rows.select([index for index, row in enumerate(rows) if is_drawn(row)])
    base, adapter = contenders(models["base"], models["adapter"])
    swapped = [Contender("base", adapter.model, adapter.processor), Contender("adapter", base.model, base.processor)]
    sampling = {"seed": 3, "batch_size": 4, "do_sample": True, "guidance_scale": 2.0}
    one = score_pictures([base, adapter], rows, digit_features(), None, **sampling)["fid"]
    other = score_pictures(swapped, rows, digit_features(), None, **sampling)["fid"]
    assert one["base"] != one["adapter"]
    assert other == {"base": one["adapter"], "adapter": one["base"]}


def test_guidance_is_the_base_s_own_unless_one_is_named(models):
    for contender in contenders(models["base"], models["adapter"]):
        contender.model.generation_config.guidance_scale = 3.0
        drawings = []
        for guidance in (None, 3.0, 1.1):
            torch.manual_seed(0)
            drawings += draw(contender, ["a red 3"], **sampling_of(1.0, guidance))[0]
        assert drawings[0] == drawings[1] != drawings[2]


def test_answers_are_scored_by_both_and_what_the_base_says_is_right_for_the_base(models, questions, images):
    base, adapter = contenders(models["base"], models["adapter"])
    told = {c.name: answer(c, images, [QUESTION] * len(images), max_new_tokens=3) for c in (base, adapter)}
    assert told["base"] != told["adapter"]
    source = questions(answer=told["base"])
    reading = run(**models, dataset=source, max_new_tokens=3, batch_size=3)["reading"]
    right = sum(a == b for a, b in zip(told["base"], told["adapter"], strict=True))
    assert reading["exact_match"]["base"]["value"] == 1
    assert reading["exact_match"]["adapter"]["value"] == right / 4
    assert reading["vqa_accuracy"]["base"]["value"] == 1
    assert 0 < reading["exact_match"]["base"]["low"] < 1


def test_several_reference_answers_count_as_vqa_counts_them(models, questions, images):
    (base,) = contenders(models["base"], None)
    told = answer(base, images, [QUESTION] * len(images), max_new_tokens=3)
    source = questions(answers=[[right] * 2 + ["unseen"] * 8 for right in told])
    reading = run(base=models["base"], dataset=source, max_new_tokens=3)["reading"]
    assert reading["exact_match"] == {"base": {"value": 1, "low": pytest.approx(0.51, abs=0.01), "high": 1, "n": 4}}
    assert reading["vqa_accuracy"]["base"]["value"] == pytest.approx(0.6)


def test_limit_takes_as_many_rows(base_folder, pictures):
    scores = run(base=str(base_folder), dataset=str(pictures), limit=3, features="none", clip="none")
    assert scores["drawing"]["n"] == 3


def test_ratios_that_the_adapter_is_not_trained_for_are_refused_before_it_draws(models, pictures):
    given = {**models, "dataset": pictures, "clip": "none", "features": "none"}
    for ratio, told in (({"codes_per_step": 5}, "codes_per_step=5"), ({"stride": 3}, "stride=3")):
        with pytest.raises(InputError, match=told):
            run(**given, **ratio)
    with pytest.raises(SystemExit, match="without --adapter"):
        run(**{**given, "adapter": None}, stride=2)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"codes_per_step": 4}, SystemExit, "without --adapter"),
        ({"adapter": "not-there"}, ValueError, "not-there"),
        ({"also": ["not-there"]}, ValueError, "not-there"),
    ],
)
def test_adapters_are_looked_at_before_the_data(models, given, error, told):
    with pytest.raises(error, match=told):
        run(base=models["base"], dataset="no-such-dataset", **given)


def test_prompts_are_drawn_into_the_folders_that_geneval_reads(models, tmp_path):
    file, folder = write_rows(tmp_path / "prompts.jsonl", PROMPTS), tmp_path / "drawn"
    scores = run(**models, prompts=file, output_dir=str(folder), samples=3, batch_size=4)
    assert scores["geneval"]["seconds"].keys() == {"base", "adapter"}
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]
    for name in ("base", "adapter"):
        for index, prompt in enumerate(PROMPTS):
            place = folder / name / f"{index:05}"
            assert json.loads((place / "metadata.jsonl").read_text()) == prompt
            drawn = sorted((place / "samples").iterdir())
            assert [path.name for path in drawn] == ["0000.png", "0001.png", "0002.png"]
            assert {Image.open(path).size for path in drawn} == {(64, 64)}
    pixels = [np.asarray(Image.open(folder / name / "00000" / "samples" / "0000.png")) for name in ("base", "adapter")]
    assert not np.array_equal(*pixels)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (json.dumps(PROMPTS[0]) + "\n{'prompt': 'a dog'}\n", "line 2 is not JSON"),
        ('["a dog"]\n', "line 1 is a list"),
        ('{"tag": "x", "include": [{"class": "dog", "count": 1}]}', "line 1 has prompt = None"),
        ('{"prompt": "a dog", "tag": "x"}', "line 1 has include"),
        ('{"prompt": "a dog", "tag": "x", "include": [{"class": "dog", "count": "1"}]}', "line 1 has include"),
    ],
)
def test_a_bad_prompt_file_is_named_before_anything_is_loaded(tmp_path, lines, message):
    (tmp_path / "prompts.jsonl").write_text(lines)
    with pytest.raises(SystemExit, match=message):
        run(base="not-there", prompts=str(tmp_path / "prompts.jsonl"), output_dir=str(tmp_path / "drawn"))
    assert not (tmp_path / "drawn").exists()


def test_a_prompt_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(json.dumps(PROMPTS[0], ensure_ascii=False).encode("utf-16"))
    with pytest.raises(SystemExit, match=r"prompts\.jsonl is not UTF-8"):
        run(base="not-there", prompts=str(tmp_path / "prompts.jsonl"), output_dir=str(tmp_path / "drawn"))


def test_drawings_are_not_mixed_with_what_is_there(tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    with pytest.raises(SystemExit, match="expected a new one"):
        run(base="not-there", prompts=file, output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"features": "inception", "clip": "none"}, "--features inception .*pip install torch-fidelity"),
        ({"features": "not_there:factory", "clip": "none"}, "--features not_there:factory.*module:factory"),
        (
            {"features": "tiny_world.digits:load_digits", "clip": "none"},
            "--features tiny_world.digits:load_digits returned .*expected an nn.Module",
        ),
        ({"features": "json:dumps", "clip": "none"}, "--features json:dumps: .*missing 1 required.*module:factory"),
        ({"features": "none", "clip": "not/there"}, "--clip not/there cannot be loaded"),
    ],
)
def test_a_missing_metric_model_is_named_before_a_model_is_loaded(pictures, metric, message):
    with pytest.raises(SystemExit, match=message):
        run(base="not-there", dataset=str(pictures), **metric)


def test_what_is_no_clip_is_not_scored_with_random_weights(base_folder):
    with pytest.raises(SystemExit, match=f"--clip {base_folder} cannot be loaded"):
        load_clip(str(base_folder))


def test_other_columns_are_named_beside_those_that_are_wanted(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [{"picture": "0.png", "label": "3"}] * 2)
    with pytest.raises(DatasetError, match=r"(?s)columns picture, label; .*image \+ question \+ answers.*image \+ text"):
        run(base="not-there", dataset=source)


def test_columns_with_other_names_are_named(tmp_path):
    rows = [{"image": "0.png", "frage": "How many?", "antwort": "3"}]
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    arguments = {"dataset": write_rows(tmp_path / "rows.jsonl", rows), "columns": ["question=frage", "answer=antwort"]}
    (question,) = questions_of(evaluate_dataset.checked_rows(evaluate_dataset.EvaluateDatasetArguments(**arguments)))
    assert question.references == ["3"]


def test_a_damaged_image_is_named_before_a_model_is_loaded(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    source = write_rows(tmp_path / "rows.jsonl", [{"image": "0.png", "text": "a red 3"}] * 2)
    with pytest.raises(DatasetError, match=r"row 0 \(0.png\).*PIL cannot read an image"):
        run(base="not-there", dataset=source)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "0.png", "text": "a red 3"}], r"1 caption\(s\).* and 0 question\(s\)"),
        ([{"image": "0.png", "question": "?", "answer": "3"}], r"0 caption\(s\).* and 1 question\(s\)"),
        ([{"image": "0.png", "text": " "}] * 2, "a caption without words"),
        ([{"messages": [turn("user", say("hello"))], "images": ["0.png"]}] * 2, r"row 0 .*: 1 image\(s\) for 0 image part"),
    ],
)
def test_too_few_rows_and_incomplete_ones_are_refused(tmp_path, images, rows, message):
    images[0].save(tmp_path / "0.png")
    with pytest.raises(DatasetError, match=message):
        run(base="not-there", dataset=write_rows(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to score"),
        ({"prompts": "prompts.jsonl"}, "--prompts prompts.jsonl with --output_dir None; expected both"),
        ({"dataset": "rows", "output_dir": "drawn"}, "--prompts None with --output_dir drawn; expected both"),
        ({"dataset": "rows", "batch_size": 0}, "--batch_size 0: expected 1 or more"),
        ({"dataset": "rows", "limit": 1}, "--limit 1: expected 2 or more"),
        ({"dataset": "rows", "temperature": 0.0}, r"--temperature 0\.0: expected a number above 0"),
        ({"dataset": "rows", "also": ["a/twin", "b/twin"]}, "--also a/twin b/twin: expected adapters in folders of different"),
        ({"dataset": "rows", "device": "cuda:99"}, "--device 'cuda:99': expected cpu"),
        ({"dataset": "rows", "json": "not/there/scores.json"}, "--json .*make it first"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(base="not-there", **arguments)


def test_a_caption_beyond_clips_context_is_cut_behind_its_first_words(clip_folder):
    pictures = [Image.new("RGB", (64, 64), "red")] * 2

    def score(*captions: str) -> float:
        metrics = PictureMetrics(None, load_clip(str(clip_folder)), "cpu")
        metrics.update(list(captions), pictures[: len(captions)], pictures[: len(captions)])
        return metrics.compute()["clip_score"]

    long, other = "red 3 " * 60, "blue 7 " * 60
    assert score(long) == pytest.approx(score(long + "blue 9"))
    assert score(long) != pytest.approx(score(other))


def test_a_row_without_a_reference_answer_is_refused(pictures, tmp_path):
    rows = [{"image": str(pictures / f"{i}.png"), "question": QUESTION, "answers": [["3"], ["5"], []][i]} for i in range(3)]
    file = write_rows(tmp_path / "asked.jsonl", rows)
    with pytest.raises(DatasetError, match=r"row 2.*without words"):
        questions_of(conversations(file, forms=REFERENCED_FORMS))


def test_a_prompt_file_may_begin_with_a_mark_and_hold_any_line_separator(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps(PROMPTS[0] | {"prompt": "a\u2028red 3"}, ensure_ascii=False), json.dumps(PROMPTS[1])]
    file.write_text("\n".join(lines), "utf-8-sig")
    assert [prompt["prompt"] for prompt in read_prompts(str(file))] == ["a\u2028red 3", "a 1"]


def test_running_out_of_memory_names_the_batch(models, pictures, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(evaluate_dataset, "score_pictures", full)
    asked = {"dataset": str(pictures), "features": FEATURES, "clip": "none", "batch_size": 6}
    with pytest.raises(SystemExit, match=r"--batch_size 6 ran out of memory; expected one that fits"):
        evaluate_dataset.main(evaluate_dataset.EvaluateDatasetArguments(**models, **asked))
