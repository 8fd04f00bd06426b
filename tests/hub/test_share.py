"""From training to another machine: what is trained here, pushed and pulled there reads and draws bit for bit the same."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import ANN, CAPTIONS, attach, chat, draw, drawing_inputs, logits, question_inputs
from helpers import IMAGE as PLACEHOLDER
from hub_helpers import CARD, CONFIG, WEIGHTS, run_python, sent
from huggingface_hub import HfApi
from loopback_hub import start_for_session
from tiny_world.scenes_dataset import scenes_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from uc_adapters import CardFacts, UniCompressCollator, UniCompressModel
from uc_adapters.errors import AdapterFileError

BASE, ADAPTER = "org/shared-base", "org/shared-uc4x"
QUESTION = "What digit is at the top left?"
SEEDS = (1, 2)  # of two pictures of a prompt


@pytest.fixture(scope="module")
def hub():
    """One for the whole file: what is trained and pushed once is pulled in every test."""
    hub = start_for_session()
    hub.reset()
    hub.add_user("ann", ANN, "org")
    return hub


@pytest.fixture(scope="module")
def trained(hub, pristine, processor, short_processor, tmp_path_factory):
    """An adapter after two steps of stage 2, on a base from the Hub; both are there now."""
    pristine.push_to_hub(BASE, token=ANN)
    processor.push_to_hub(BASE, token=ANN)
    model = attach(AutoModelForImageTextToText.from_pretrained(BASE))
    model.train_only("language model")
    args = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        bf16=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=scenes_dataset(4, 1),
        processing_class=short_processor,
        data_collator=UniCompressCollator(short_processor, model.active_peft_config),
    )
    trainer.train()
    facts = CardFacts(license="apache-2.0", training={"steps": trainer.state.global_step})
    model.eval().push_to_hub(ADAPTER, token=ANN, processor=processor, card=facts)
    return model


@pytest.fixture(scope="module")
def question(short_processor, images):
    return dict(question_inputs(short_processor, [QUESTION], images[:1]))


@pytest.fixture(scope="module")
def prompts(short_processor):
    return dict(drawing_inputs(short_processor, CAPTIONS))


BEGIN = """
import torch

given, found = torch.load("given.pt", weights_only=False), {}
question, prompts = given["question"], given["prompts"]
"""
# Nothing of ours is imported by hand: the repo's pipeline.py does it
PLAIN_DIFFUSERS = f"""
from diffusers import DiffusionPipeline

plain = DiffusionPipeline.from_pretrained("{ADAPTER}", trust_remote_code=True)
generators = [torch.Generator().manual_seed(seed) for seed in {SEEDS}]
images = plain("{CAPTIONS[0]}", num_images_per_prompt=2, generator=generators, output_type="np").images
found["diffusers"] = torch.from_numpy(images)
"""
# Every way to load an adapter by its id. transformers asks for torchvision before it makes that pipeline, of which there is
# no build for every torch; the tiny world's image processor needs none, so only the question is taken out.
EVERY_WAY = f"""
import transformers.pipelines.any_to_any
from peft import AutoPeftModel, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from uc_adapters import UniCompressModel
from uc_adapters.errors import UnsupportedError

def read(name, model):
    with torch.no_grad():
        found[name] = model(**question).logits

model = UniCompressModel.from_pretrained("{ADAPTER}")
read("UniCompressModel", model)
found["drawn"] = model.generate(**prompts, generation_mode="image")
found["answer"] = model.generate(**question, max_new_tokens=6, do_sample=False)
read("AutoPeftModel", AutoPeftModel.from_pretrained("{ADAPTER}"))
base = AutoModelForImageTextToText.from_pretrained("{BASE}")
read("PeftModel", PeftModel.from_pretrained(base, "{ADAPTER}"))
base = AutoModelForImageTextToText.from_pretrained("{BASE}")
base.load_adapter("{ADAPTER}")
read("transformers", base)
transformers.pipelines.any_to_any.requires_backends = lambda *_: None
reader = pipeline("any-to-any", model="{ADAPTER}", processor=AutoProcessor.from_pretrained("{ADAPTER}"))
told = reader(text=given["text"], images=given["image"], return_tensors=True, max_new_tokens=6, do_sample=False)
found["pipeline"] = told[0]["generated_token_ids"]
try:
    reader.model.generate(**prompts, generation_mode="image")
except UnsupportedError as error:
    found["refusal"] = str(error)
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def found(trained, short_processor, images, question, prompts, tmp_path_factory):
    """What is read and drawn on another machine, in a process of its own."""
    folder, text = tmp_path_factory.mktemp("elsewhere"), chat(short_processor, PLACEHOLDER, QUESTION)
    torch.save({"question": question, "prompts": prompts, "text": text, "image": images[0]}, folder / "given.pt")
    run_python(BEGIN + (PLAIN_DIFFUSERS if find_spec("diffusers") else "") + EVERY_WAY, folder)
    return torch.load(folder / "found.pt")


def test_another_machine_reads_and_draws_bit_for_bit_the_same(trained, question, prompts, found):
    for way in ("UniCompressModel", "AutoPeftModel", "PeftModel", "transformers"):
        assert torch.equal(found[way], logits(trained, question)), way
    assert torch.equal(found["drawn"], draw(trained, prompts))
    answer = trained.generate(**question, max_new_tokens=6, do_sample=False)
    assert torch.equal(found["answer"], answer)
    assert torch.equal(found["pipeline"], answer[0])
    assert "UniCompressModel" in found["refusal"]  # what to draw with


def test_plain_diffusers_draws_on_another_machine(hub, found):
    pytest.importorskip("diffusers")
    from uc_adapters.pipeline import UniCompressPipeline

    pipe, generators = UniCompressPipeline.from_pretrained(ADAPTER), [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = pipe(CAPTIONS[0], num_images_per_prompt=2, generator=generators, output_type="pt").images
    assert torch.equal(found["diffusers"], expected.permute(0, 2, 3, 1))


def test_the_hub_knows_what_it_holds(hub, trained):
    files = hub.repos[ADAPTER].files()
    assert {CONFIG, WEIGHTS, CARD, "processor_config.json"} <= files.keys()
    card = files[CARD].decode()
    assert "| steps | 2 |" in card
    assert hub.repos[BASE].branches["main"] in card  # the base's commit
    assert len(files[WEIGHTS]) < len(hub.repos[BASE].files()["model.safetensors"]) / 5
    info = HfApi().model_info(ADAPTER)
    assert (info.library_name, info.card_data.base_model) == ("uc-adapters", BASE)


@pytest.mark.usefixtures("trained")
def test_the_command_line_downloads_a_folder_to_load(fresh, trained, question, tmp_path):
    program = Path(sys.executable).with_name("hf")
    subprocess.run(
        [program, "download", ADAPTER, "--local-dir", tmp_path / "here"], check=True, capture_output=True, timeout=60
    )
    model = UniCompressModel.from_pretrained(fresh(), tmp_path / "here")
    assert torch.equal(logits(model, question), logits(trained, question))
    assert AutoProcessor.from_pretrained(tmp_path / "here").num_image_tokens == model.num_image_tokens


@pytest.mark.usefixtures("cache")
def test_a_release_is_a_tag(hub, trained, fresh, question):
    HfApi(token=ANN).create_tag(ADAPTER, tag="v1.0")
    expected = logits(trained, question)
    hub.repos[ADAPTER].commit({WEIGHTS: b"a bad day on main", CONFIG: b"{}"})
    model = UniCompressModel.from_pretrained(fresh(), ADAPTER, revision="v1.0")
    assert torch.equal(logits(model, question), expected)


def test_xet(hub, trained, processor, fresh, question, cache, tmp_path, monkeypatch):
    """The Hub's newer storage, with the real client of it: no byte goes by LFS, and a damaged file is found here, too."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(hub, "xet_dir", tmp_path / "xet")
    monkeypatch.setattr(hub, "objects", {})
    trained.push_to_hub("org/by-xet", token=ANN, processor=processor)
    hub.requests.clear()

    def load():
        return logits(UniCompressModel.from_pretrained(fresh(), "org/by-xet"), question)

    assert torch.equal(load(), logits(trained, question))
    assert not sent(hub, "GET", "lfs")
    weights = next(cache.glob(f"models--org--by-xet/snapshots/*/{WEIGHTS}")).resolve()
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(AdapterFileError, match="was damaged during the download or in the cache"):
        load()
    assert torch.equal(load(), logits(trained, question))
