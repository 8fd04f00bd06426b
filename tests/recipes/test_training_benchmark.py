"""The two sides of a training step: as large, on the same weights, each with its own method's loss."""

import json
from functools import partial

import benchmark
import pytest
import torch
import torch.nn.functional as F
from helpers import CAPTIONS, DENSE, DRAWN, SHORT, assert_same, attach, base_weights, drawing_inputs
from PIL import Image
from scoring import contenders, likelihood
from timing.training import ANSWER_TOKENS, Trainee, activation_bytes, trainees

from uc_adapters import UniCompressCollator
from uc_adapters.families import family_of


def make_sides(base, gradient_checkpointing: bool = False) -> dict[str, Trainee]:
    return trainees({"base": base, "adapter": attach(contenders.twin_of(base))}, gradient_checkpointing)


@pytest.fixture
def sides(base):
    return make_sides(base)


@pytest.fixture(scope="module")
def words(processor):
    """A prompt longer than an answer, (1, W)."""
    return drawing_inputs(processor, CAPTIONS[1:2])["input_ids"]


@pytest.fixture(scope="module")
def pixels(processor, images):
    return processor.image_processor(images[:1], return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="module")
def shown(pristine, pixels):
    """What each loss takes of the image."""
    with torch.no_grad():
        return {"drawing_loss": family_of(pristine).latents(pixels), "reading_loss": pixels}


def with_image(words, count: int, image_token_id: int):
    """Ids with an image behind the first word, and labels of the answer."""
    ids = torch.cat([words[:, :1], torch.full((1, count), image_token_id), words[:, 1:]], 1)
    return {"input_ids": ids, "labels": F.pad(words[:, -ANSWER_TOKENS:], (ids.shape[1] - ANSWER_TOKENS, 0), value=-100)}


def test_both_sides_train_the_same_lora_on_shared_weights(sides):
    def trained(side: Trainee) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in side.model.named_parameters() if parameter.requires_grad}

    dense, compact = sides["base"], sides["adapter"]
    lora = trained(dense)
    assert lora == {name: shape for name, shape in trained(compact).items() if ".lora_A." in name or ".lora_B." in name}
    assert sum("language_model.layers.0." in name for name in lora) == 2 * 7
    assert base_weights(dense.model).keys() == base_weights(compact.model).keys()
    assert dense.model.get_input_embeddings().weight is compact.model.get_input_embeddings().weight


@pytest.mark.parametrize("what", ["drawing_loss", "reading_loss"])
@pytest.mark.parametrize("name", ["base", "adapter"])
def test_steps_lower_the_loss_and_leave_the_base_alone(sides, words, shown, name, what):
    side, base_before = sides[name], base_weights(sides[name].model)

    def loss() -> torch.Tensor:
        return getattr(side, what)(words, shown[what])

    before = loss().item()
    for _ in range(3):
        side.step(loss)
    assert loss().item() < before
    assert_same(base_weights(side.model), base_before)


def test_the_dense_drawing_loss_is_the_nats_of_the_dense_codes(fresh, processor, images, words, shown):
    nats = likelihood.dense_nats(contenders.Contender("base", fresh(), processor), images[:1], CAPTIONS[1:2])
    loss = make_sides(fresh())["base"].drawing_loss(words, shown["drawing_loss"])
    assert loss.item() == pytest.approx(nats.item() / DENSE, rel=1e-5)


def test_the_dense_reading_loss_is_the_bases_own(fresh, words, pixels):
    stock = fresh()
    expected = stock(**with_image(words, DENSE, stock.config.image_token_id), pixel_values=pixels).loss
    assert make_sides(fresh())["base"].reading_loss(words, pixels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_compact_drawing_loss_is_that_of_the_collators_batch(sides, short_processor, images, shown):
    side = sides["adapter"]
    collate = UniCompressCollator(short_processor, side.model.active_peft_config, caption_dropout=0.0)
    turns = [("user", {"type": "text", "text": CAPTIONS[1]}), ("assistant", {"type": "image"})]
    messages = [{"role": role, "content": [part]} for role, part in turns]
    batch = collate([{"messages": messages, "images": images[:1]}])
    drawn = batch["gen_mask"]
    expected = -(side.model(**batch).log_probs * drawn[:, 1:]).sum() / (DRAWN - 1)  # the separator is not predicted
    prompt = batch["input_ids"][:, : drawn[0].nonzero()[0]]
    assert side.drawing_loss(prompt, shown["drawing_loss"]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_compact_reading_loss_is_that_of_the_adapters_forward(sides, words, pixels):
    side = sides["adapter"]
    inputs = with_image(words, SHORT, side.model.config.image_token_id)
    expected = side.model(**inputs, pixel_values=pixels).loss
    assert side.reading_loss(words, pixels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_activation_bytes_count_what_backward_needs_once_and_no_weights(sides):
    weight = sides["base"].model.get_input_embeddings().weight
    x = torch.randn(len(weight), requires_grad=True)  # 4 bytes a number

    def loss() -> torch.Tensor:
        x.sin().sum()  # saves x, but its graph is gone at once
        y = x.exp()  # saves y
        z = y * y.view(-1)  # saves y twice more
        return (z @ weight.detach()).sum()  # saves the weight alone: it is not trained

    assert activation_bytes(sides["base"], loss) == 4 * len(weight)


@pytest.mark.parametrize("what", ["drawing_loss", "reading_loss"])
def test_gradient_checkpointing_keeps_less_of_the_same_loss(fresh, words, shown, what):
    plain, checkpointed = make_sides(fresh()), make_sides(fresh(), gradient_checkpointing=True)
    for name in plain:
        pair = [side[name] for side in (plain, checkpointed)]
        losses = [partial(getattr(side, what), words, shown[what]) for side in pair]
        assert losses[0]().item() == pytest.approx(losses[1]().item(), rel=1e-5)
        kept = [activation_bytes(side, loss) for side, loss in zip(pair, losses, strict=True)]
        assert kept[1] < 0.7 * kept[0]


def test_benchmark_trains_base_and_adapter_side_by_side(tmp_path, capsys):
    files = {"json": str(tmp_path / "figures.json"), "chart": str(tmp_path / "figures.png")}
    benchmark.main(benchmark.BenchmarkArguments(train=True, repeats=1, warm_up=False, batch_sizes=[2], **files))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["training"].keys() == {"drawing", "reading"}
    for found in figures["training"].values():
        for name in ("base", "adapter"):
            assert found["images_per_second"][name] * found["seconds"][name] == pytest.approx(2)
        assert 0 < found["activation_bytes"]["adapter"] < found["activation_bytes"]["base"]
    assert "| training, reading, kept for backward (MB) |" in capsys.readouterr().out
    assert min(Image.open(files["chart"]).size) > 200


def test_gradient_checkpointing_is_refused_where_nothing_trains():
    with pytest.raises(SystemExit, match="expected both"):
        benchmark.main(benchmark.BenchmarkArguments(gradient_checkpointing=True))
