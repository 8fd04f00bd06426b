import json
from functools import partialmethod

import ablate
import pytest
import torch
from ablation import costs as ablation_costs
from ablation.variants import AXES, START, ClsToken, GatedPool, MaxPool, MeanToken, StridedConv, TopK, pool_drawn_with, strip
from helpers import attach
from safetensors.torch import load_file
from scoring.contenders import Contender, contenders, draw
from tiny_world.scenes_dataset import scene_row

from uc_adapters import UniCompressCollator
from uc_adapters.layers import average_pool
from uc_adapters.training.reconstruction import ReconstructionStage

GRID, STRIDE, WIDTH = (4, 6), 2, 16
RUNS = ablate.runs_of(list(AXES))  # each variant once, on however many axes it stands
POOLS = {"max": MaxPool, "strided conv": StridedConv, "gated": GatedPool, "top-k selection": TopK}


@pytest.fixture
def features():
    return torch.randn(3, 24, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", POOLS)
def test_a_pooling_gives_one_token_a_window_and_learns(features, name):
    pool = POOLS[name](STRIDE, WIDTH)
    pooled = pool(features.requires_grad_(), GRID)
    assert pooled.shape == (3, 6, WIDTH)
    pooled.square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in pool.parameters())


@pytest.mark.parametrize("pool", [StridedConv, GatedPool])
def test_a_learned_pooling_starts_as_the_average(features, pool):
    torch.testing.assert_close(pool(STRIDE, WIDTH)(features, GRID), average_pool(features, STRIDE, GRID))


def test_top_k_keeps_the_best_tokens_in_their_order():
    features = torch.zeros(1, 24, WIDTH)
    features[0, [3, 5, 8, 13, 17, 22], 0] = torch.arange(1.0, 7.0)
    pool = TopK(STRIDE, WIDTH)
    with torch.no_grad():
        pool.score.zero_()[0] = 1.0
    kept = pool(features, GRID)[0, :, 0]
    assert (kept.diff() > 0).all()  # larger scores scale up
    assert (kept > 0).all()


def test_stage_1_trains_a_learned_pooling_of_what_is_drawn_and_stage_2_leaves_it(base, processor):
    model = attach(base, decompressor="raster")
    pool_drawn_with(StridedConv, model)
    stage = ReconstructionStage(model)
    pool = model.code_head.module.pool
    assert pool in stage.trained.values()
    stage(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))["loss"].backward()
    assert pool.weight.grad.abs().sum() > 0
    model.train_only("language model")
    assert not pool.weight.requires_grad


@pytest.mark.parametrize("token", [MeanToken, ClsToken])
def test_another_global_token_sees_every_dense_token(features, token):
    features.requires_grad_()
    token(WIDTH)(features, GRID)[..., 0].sum().backward()
    assert (features.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("run", RUNS)
def test_every_variant_fits_an_adapter_which_then_scores_and_draws(base, processor, run):
    variant = RUNS[run]
    model = attach(base, **{name: value for name, value in variant.options.items() if name != "distill"})
    if variant.change is not None:
        variant.change(model)
    variant.begin_stage_2(model)
    compact = model.compact_processor(processor)
    batch = UniCompressCollator(compact, model.active_peft_config, caption_dropout=0.0)(
        [scene_row(0, "train"), scene_row(1, "train")]
    )
    model.train_only("language model")
    model(**batch).loss.backward()
    assert model.read_layer.active_module().separator.grad.abs().sum() > 0
    (images, _) = draw(Contender("adapter", model.eval(), compact), ["a red 3 at the top left"], do_sample=False)
    assert images[0].size == (64, 64)


def test_where_all_axes_start_is_on_each():
    assert all(list(variants.values()).count(START) == 1 for variants in AXES.values())


def test_a_variant_that_stands_on_several_axes_runs_once():
    assert AXES["stride"]["1, no global tokens"] is AXES["drawing"]["the dense base, trained as long"]
    runs = ablate.runs_of(list(AXES))
    assert set(map(id, runs.values())) == {id(variant) for variants in AXES.values() for variant in variants.values()}
    assert all(ablate.run_of(variant) == name for name, variant in runs.items())
    assert "stride, 1, no global tokens" in ablate.runs_of(["drawing"])


def test_ablate_scores_variants_goes_on_where_it_stopped_and_refuses_another_budget(base_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation_costs, "TURNS", 1)
    few_images = partialmethod(ReconstructionStage.least_perplexity, images=8)
    monkeypatch.setattr(ReconstructionStage, "least_perplexity", few_images)
    for axis, few in (("stride", ("2", "4")), ("LoRA rank", ("64",))):
        monkeypatch.setitem(AXES, axis, {name: AXES[axis][name] for name in few})
        for variant in AXES[axis].values():
            monkeypatch.setitem(variant.options, "decompressor_width", 64)
    work, file = tmp_path / "work", tmp_path / "ablation.json"
    options = {
        "base": str(base_folder),
        "axes": ["stride"],
        "seeds": [1],
        "stage_1_steps": 1,
        "max_steps": 1,
        "batch_size": 2,
        "scenes": 2,
        "output_dir": str(work),
        "json": str(file),
    }
    first = ablate.main(ablate.AblateArguments(**options))
    assert json.loads(file.read_text()) == first
    assert first["runs"].keys() == {"base", "default", "stride, 4"}
    assert "\n| 2 |" in capsys.readouterr().out
    assert all(path.suffix == ".json" for path in work.iterdir())  # no adapter that nobody could load
    (work / "stride--4-seed-1.json").unlink()
    kept = (work / "default-seed-1.json").stat().st_mtime_ns
    again = ablate.main(ablate.AblateArguments(**options))
    assert (work / "default-seed-1.json").stat().st_mtime_ns == kept
    assert {**again, "costs": None} == {**first, "costs": None}  # timed anew, all of them
    fewer = ablate.main(ablate.AblateArguments(**options | {"axes": ["LoRA rank"], "seeds": [2]}))
    assert fewer["axes"] == ["stride", "LoRA rank"]
    assert fewer["runs"]["stride, 4"] == first["runs"]["stride, 4"]  # what is not asked for is kept
    assert fewer["runs"]["default"].keys() == {"1", "2"}
    assert fewer["costs"].keys() == fewer["runs"].keys()
    assert all(of_run["milliseconds"] > 0 for of_run in fewer["costs"].values())
    with pytest.raises(SystemExit, match="scenes"):
        ablate.main(ablate.AblateArguments(**options | {"scenes": 3}))


def test_a_variant_costs_what_its_repo_holds(base_folder, tmp_path):
    (dense,) = contenders(str(base_folder), None)
    model = ablation_costs.fresh("strip", dense, strip()).model
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert ablation_costs.megabytes(model) == sum(weight.nbytes for weight in stored.values()) / 1e6


def test_the_file_of_another_recipe_is_not_written_over(tmp_path):
    for text in ('{"drawing": {}}', "[]"):
        (tmp_path / "speed.json").write_text(text)
        with pytest.raises(SystemExit, match=r"speed\.json exists and holds no scores of ablate\.py"):
            ablate.main(ablate.AblateArguments(base="not-there", json=str(tmp_path / "speed.json")))
        assert (tmp_path / "speed.json").read_text() == text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"axes": ["flavour"]}, "flavour.*expected one or more of global tokens"),
        ({"axes": []}, "none.*expected one or more"),
        ({"seeds": []}, "--seeds"),
        ({"seeds": [1, -1]}, "--seeds -1: expected 0 or more"),
        ({"max_steps": 0}, "--max_steps 0: expected 1 or more"),
        ({"scenes": 1}, "--scenes 1: expected 2 or more"),
        ({"json": "nowhere/ablation.json"}, "nowhere does not exist"),
    ],
)
def test_ablate_refuses_before_it_trains_anything(given, told):
    with pytest.raises(SystemExit, match=told):
        ablate.main(ablate.AblateArguments(**given))
