"""A dress rehearsal on a thin Janus-Pro as published: trained by its config, pushed, pulled, asked, and scored."""

import re
from pathlib import Path

import evaluate_dataset
import finetune
import numpy as np
import published_janus
import pytest
import quickstart
from finetune_runs import say, turn, write_rows
from finetuning.arguments import FinetuneParser
from helpers import ANN
from PIL import Image
from scoring.contenders import contenders, reply
from transformers import AutoModelForImageTextToText, AutoProcessor

from uc_adapters import UniCompressModel, push_folder

CONFIG = Path(finetune.__file__).parent / "configs" / "janus_pro_1b.yaml"
IMAGE = {"type": "image"}
EOS = published_janus.SPECIAL[published_janus.EOS]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return published_janus.write(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A row of each kind, of pictures of several sizes and modes."""
    folder = tmp_path_factory.mktemp("rows")
    for index, (mode, size) in enumerate([("RGB", (500, 300)), ("RGBA", (64, 384)), ("L", (384, 384)), ("P", (20, 20))]):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (*size, 3), np.uint8)).convert(mode).save(
            folder / f"{index}.png"
        )
    conversations = [
        ([turn("user", IMAGE, say("What is it?")), turn("assistant", say("Noise."))], [0]),
        ([turn("user", say("Noise.")), turn("assistant", IMAGE)], [1]),
        ([turn("user", IMAGE, say("Make it grey.")), turn("assistant", IMAGE)], [0, 2]),
        (
            [
                turn("user", say("One?")),
                turn("assistant", say("Two.")),
                turn("user", say("Three?")),
                turn("assistant", say("4.")),
            ],
            [],
        ),
        (
            [
                turn("user", IMAGE, say("What?")),
                turn("assistant", say("It.")),
                turn("user", say("Draw.")),
                turn("assistant", IMAGE),
            ],
            [3, 1],
        ),
    ]
    return write_rows(
        folder / "rows.jsonl",
        [{"messages": messages, "images": [f"{index}.png" for index in images]} for messages, images in conversations],
    )


@pytest.fixture(scope="module")
def adapter(base, rows, tmp_path_factory):
    """What the config makes of it, as thin as the base: two steps of each stage."""
    folder = tmp_path_factory.mktemp("adapter") / "out"
    thin = {"--decompressor_width": 32, "--decompressor_layers": 1, "--r": 2, "--stage_1_steps": 2, "--stage_1_batch_size": 2}
    thin |= {"--max_steps": 2, "--per_device_train_batch_size": 5, "--gradient_accumulation_steps": 1, "--sample_steps": 0}
    here = {"--dtype": "float32", "--bf16": "false", "--use_cpu": "true", "--base": base, "--base_id": "org/janus-pro"}
    options = here | thin | {"--config": CONFIG, "--dataset": rows, "--output_dir": folder, "--save_strategy": "no"}
    arguments = [str(word) for option in options.items() for word in option]
    finetune.main(*FinetuneParser().parse_args_and_config(arguments))
    return folder


def test_it_is_trained_by_its_config(base, adapter):
    pristine = AutoModelForImageTextToText.from_pretrained(base)
    model = UniCompressModel.from_pretrained(pristine, adapter)
    assert all(weight.isfinite().all() for name, weight in model.named_parameters() if "lora_" in name)
    assert AutoProcessor.from_pretrained(adapter).num_image_tokens == 4 + 1 + 144


def test_it_is_pushed_pulled_and_its_cards_snippet_runs(hub, base, adapter, tmp_path, monkeypatch):
    hub.create("org/janus-pro", {path.name: path.read_bytes() for path in base.iterdir()})
    push_folder(adapter, "org/janus-uc4x", token=ANN)
    card = hub.repos["org/janus-uc4x"].files()["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert Image.open(tmp_path / "drawing.png").size == (384, 384)


def test_the_quickstart_reads_and_draws(base, adapter, rows, tmp_path, capsys):
    output = tmp_path / "quickstart.png"
    picture = Path(rows).parent / "1.png"
    options = {"base": str(base), "adapter": str(adapter), "prompt": "A fox.", "device": "cpu", "output": str(output)}
    quickstart.main(quickstart.QuickstartArguments(image=str(picture), question="What is it?", **options))
    told = capsys.readouterr().out
    assert re.search(r"tokens an image, read +576 +149", told)
    assert re.search(r"model steps an image, drawn +576 +144", told)
    assert output.is_file()


def test_it_is_scored_on_a_dataset(base, adapter, rows, tmp_path):
    folder = Path(rows).parent
    asked = [{"image": str(folder / f"{index}.png"), "question": "What is it?", "answer": "Noise."} for index in range(2)]
    source = write_rows(tmp_path / "asked.jsonl", asked)
    options = {"base": str(base), "adapter": str(adapter), "dataset": source, "device": "cpu", "max_new_tokens": 4}
    scores = evaluate_dataset.main(evaluate_dataset.EvaluateDatasetArguments(**options))
    assert scores


def test_it_is_asked_as_the_harness_asks(base, adapter, rows):
    """lmms-eval's plugin and `contenders.reply` make the same calls."""
    dense, short = contenders(str(base), str(adapter))
    image = Image.open(Path(rows).parent / "0.png").convert("RGB")
    for contender in (dense, short):
        [answer] = reply(contender, [[turn("user", IMAGE, say("What is it?"))]], [image], max_new_tokens=4)
        assert isinstance(answer, str)
