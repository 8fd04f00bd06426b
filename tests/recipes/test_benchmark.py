"""Base and adapter are measured alike, and what does not fit is told."""

import json
from functools import partial
from pathlib import Path

import benchmark
import pytest
import torch
import torch._inductor.config
from helpers import attach
from PIL import Image
from timing import drawing as drawing_benchmark
from timing import models as benchmark_models
from timing import parts, stopwatch
from timing import reading as reading_benchmark
from timing import report as benchmark_report

from uc_adapters.steps import CACHE_NAME

SIDES = ("base", "adapter")
NEVER_FITS = 10**12  # prompts, whose words alone are more bytes than a process can address


@pytest.fixture(scope="module")
def tiny():
    with torch.no_grad():
        yield benchmark_models.sides("tiny", "strip", ["phase", "raster"], torch.float32, "cpu")


@pytest.fixture
def shallow_pair(fresh, monkeypatch):
    """A shallow base and adapters of random weights, in place of the shipped pair's."""

    def sides(shape, decompressor, also, dtype, device):
        kinds = {"adapter": decompressor} | {kind: kind for kind in also}
        return {"base": fresh()} | {name: attach(fresh(), decompressor=kind) for name, kind in kinds.items()}

    monkeypatch.setattr(benchmark, "sides", sides)


def test_further_adapters_draw_so_many_codes_in_a_step():
    models = benchmark_models.sides("tiny", "strip", ["8", "phase"], torch.float32, "cpu")
    steps = {name: model.active_peft_config.num_gen_steps((8, 8)) for name, model in models.items() if name != "base"}
    assert steps == {"adapter": 16, "8": 8, "phase": 20}
    with pytest.raises(SystemExit, match=r"--also \['0'\] .*numbers of codes in a step"):
        benchmark.BenchmarkArguments(also=["0"])


@pytest.mark.usefixtures("shallow_pair")
def test_benchmark_measures_base_and_adapter_side_by_side(tmp_path, capsys):
    files = {"json": str(tmp_path / "figures.json"), "chart": str(tmp_path / "figures.png")}
    arguments = {"repeats": 1, "warm_up": False, "batch_sizes": [1, 2], "alternatives": ["dynamic", "static"]}
    benchmark.main(benchmark.BenchmarkArguments(**arguments, **files))
    figures = json.loads((tmp_path / "figures.json").read_text())
    drawing, reading, memory = figures["drawing"], figures["reading"], figures["memory"]
    assert drawing["alternatives"].keys() == {"dynamic", "static"}
    for by_batch in (drawing["by_batch"], *drawing["alternatives"].values()):
        assert all(by_batch[batch][name] > 0 for batch in ("1", "2") for name in SIDES)
    assert drawing["shares"]["base"].keys() == {"language model", "code head", "image decoder", "everything else"}
    assert drawing["shares"]["adapter"].keys() == {*drawing["shares"]["base"], "decompressor"}
    for name in SIDES:
        assert sum(drawing["shares"][name].values()) == pytest.approx(1)
        assert min(drawing["shares"][name].values()) > 0
    assert reading["by_batch"]["2"].keys() == {"prefill", "first token", "answer"}
    assert all(pair.keys() == set(SIDES) for pair in reading["tokens_per_second"].values())
    assert memory["cache_bytes"]["adapter"] * 64 == memory["cache_bytes"]["base"] * 21
    assert figures["batches"]["adapter"] == {"out_of_memory": [], "largest_that_fits": 2}
    table = capsys.readouterr().out
    assert "| drawing, static caches, batch 2 (s) |" in table
    assert "| keys and values, of a drawing, batch 2 (MB) |" in table
    assert min(Image.open(files["chart"]).size) > 200


@pytest.mark.usefixtures("shallow_pair")
def test_further_decompressors_draw_in_the_same_turns_and_are_told_beside(tmp_path, capsys):
    chart = str(tmp_path / "figures.png")
    arguments = {"repeats": 1, "warm_up": False, "also": ["phase", "raster"], "alternatives": ["static"], "chart": chart}
    figures = benchmark.main(benchmark.BenchmarkArguments(**arguments))
    everyone = {*SIDES, "phase", "raster"}
    drawing = figures["drawing"]
    seconds = drawing["by_batch"]["1"]
    assert seconds.keys() == drawing["shares"].keys() == figures["batches"].keys() == everyone
    assert all(taken > 0 for taken in seconds.values())
    assert drawing["alternatives"]["static"]["1"].keys() == figures["reading"]["by_batch"]["1"]["prefill"].keys() == set(SIDES)
    kept = figures["memory"]["drawing"]["keys and values, of a drawing"]["1"]
    assert kept["adapter"] < kept["phase"] == kept["raster"] < kept["base"]  # phase and raster feed their global codes, too
    header, _, first, *rows = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert header == "| | base | adapter | gain | phase | gain | raster | gain |"
    base, adapter, gain, *_, raster, of_raster = first.strip("| ").split(" | ")[1:]
    assert float(gain) == pytest.approx(float(base) / float(adapter), rel=0.02)
    assert float(of_raster) == pytest.approx(float(base) / float(raster), rel=0.02)
    prefill = next(row for row in rows if row.startswith("| reading, prefill"))
    assert prefill.endswith(" |  |  |  |  |")  # all adapters read alike
    assert min(Image.open(chart).size) > 200


@pytest.mark.usefixtures("shallow_pair")
@pytest.mark.parametrize("fused", [False, True])
def test_the_further_adapters_are_merged_where_the_adapter_is(monkeypatch, fused):
    seen = {}
    monkeypatch.setattr(benchmark, "measure_speed", lambda models, *_: seen.update(models))
    monkeypatch.setattr(benchmark, "markdown", str)
    benchmark.main(benchmark.BenchmarkArguments(also=["phase"], fused=fused))
    assert list(seen) == ["base", "adapter", "phase", *["fused"] * fused]
    merged = {name for name, model in seen.items() if any(getattr(module, "merged", False) for module in model.modules())}
    assert merged == ({"phase", "fused"} if fused else set())


def test_the_fused_adapter_draws_as_the_adapter_and_leaves_it_alone(tiny):
    before = {name: weight.clone() for name, weight in tiny["adapter"].named_parameters()}
    fused = benchmark_models.fused(tiny["adapter"])
    pixels = [drawing_benchmark.draw(model, 1) for model in (tiny["adapter"], fused)]
    torch.testing.assert_close(*pixels)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny["adapter"].named_parameters())
    works = reading_benchmark.reading_works({"base": tiny["base"], "adapter": tiny["adapter"], "fused": fused}, 1)["prefill"]
    assert works["fused"]().last_hidden_state.shape == works["adapter"]().last_hidden_state.shape


def test_the_bytes_of_a_drawings_cache_are_those_of_the_real_one(tiny):
    found = {}
    for name, model in tiny.items():
        language_model = (model if name == "base" else model.get_base_model()).model.language_model

        def look(module, args, kwargs, name=name):
            found[name] = kwargs[CACHE_NAME]

        handle = language_model.register_forward_pre_hook(look, with_kwargs=True)
        drawing_benchmark.draw(model, 2)
        handle.remove()
    real = {name: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) for name, cache in found.items()}
    assert drawing_benchmark.drawing_cache_bytes(tiny, 2) == real


def test_the_bytes_of_a_read_image_are_those_it_adds_to_the_cache(tiny):
    expected = reading_benchmark.image_cache_bytes(tiny["adapter"])
    works = reading_benchmark.reading_works({name: tiny[name] for name in SIDES}, 1)["prefill"]
    text = benchmark_models.TEXT_TOKENS * drawing_benchmark.token_bytes(tiny["adapter"])
    for name, work in works.items():
        cache = getattr(work(), CACHE_NAME)
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) - text == expected[name]


def test_the_peak_counts_what_a_turn_needs():
    megabytes = {"little": 60, "much": 300}
    works = {name: partial(torch.ones, size * 2**18) for name, size in megabytes.items()}
    measured = stopwatch.in_turn(works, 2, "turn")
    if measured["much"].peak_bytes is None:
        pytest.skip("this system does not tell a process's peak")
    for name, size in megabytes.items():
        assert measured[name].peak_bytes == pytest.approx(size * 2**20, rel=0.1)


def test_what_runs_out_of_memory_drops_out_of_the_turns():
    turns = []
    works = {"small": lambda: turns.append("small"), "big": lambda: (turns.append("big"), torch.empty(2**50))}
    measured = stopwatch.in_turn(works, 2, "turn")
    assert measured["big"] is None
    assert measured["small"].seconds > 0
    assert turns == ["small", "big", "small", "small"]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        stopwatch.fitting(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))


@pytest.mark.usefixtures("shallow_pair")
def test_a_batch_that_does_not_fit_is_reported_and_the_others_are_measured(tmp_path, capsys):
    chart = str(tmp_path / "figures.png")
    figures = benchmark.main(benchmark.BenchmarkArguments(repeats=1, warm_up=False, batch_sizes=[NEVER_FITS, 1], chart=chart))
    for name in SIDES:
        assert figures["batches"][name] == {"out_of_memory": [NEVER_FITS], "largest_that_fits": 1}
        assert figures["drawing"]["by_batch"][str(NEVER_FITS)][name] is None
        assert figures["drawing"]["by_batch"]["1"][name] > 0
        assert figures["reading"]["by_batch"]["1"]["answer"][name] > 0
    table = capsys.readouterr().out
    assert f"batch {NEVER_FITS} (s) | out of memory | out of memory |  |" in table
    assert f"adapter, batch {NEVER_FITS}: out of memory; the largest that fits is 1." in table
    assert Path(chart).exists()


def test_models_that_do_not_fit_say_so(monkeypatch):
    monkeypatch.setattr(benchmark, "sides", lambda *_: torch.empty(2**50))
    with pytest.raises(SystemExit, match=r"--shape janus-pro-7b ran out of memory at float32.*bfloat16"):
        benchmark.main(benchmark.BenchmarkArguments(shape="janus-pro-7b"))


def test_a_disabled_adapter_that_does_not_fit_is_no_figure(tiny, monkeypatch):
    monkeypatch.setattr(reading_benchmark, "in_turn", lambda works, *_: dict.fromkeys(works))
    assert reading_benchmark.disabled_over_bare(tiny, 1) is None


def test_training_that_does_not_fit_says_so():
    with pytest.raises(SystemExit, match=r"out of memory.*smaller"):
        benchmark.main(benchmark.BenchmarkArguments(train=True, repeats=1, warm_up=False, batch_sizes=[NEVER_FITS]))


@pytest.mark.usefixtures("shallow_pair")
def test_without_a_compiler_the_compiled_row_is_left_out_with_the_reason():
    arguments = benchmark.BenchmarkArguments(repeats=1, warm_up=False, alternatives=["compiled"], measure=["drawing"])
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):  # what CXX is read into
        drawing = benchmark.main(arguments)["drawing"]
    assert drawing["alternatives"] == {}
    assert "no-such-compiler" in drawing["left_out"]["compiled"]


def test_compiled_steps_of_the_base_draw_its_codes_with_one_graph(tiny, monkeypatch):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    works = drawing_benchmark.ways_to_draw({name: tiny[name] for name in SIDES}, ["compiled"])["compiled"]
    monkeypatch.undo()
    assert torch.equal(works["base"](1), drawing_benchmark.draw(tiny["base"], 1))
    assert len(graphs) == 1


def test_a_part_that_fails_loses_nothing(tmp_path, capsys):
    file = tmp_path / "figures.json"
    found = parts.Parts({"before": 1}, str(file), limit=0.05)
    with found.part("broken"):
        found.figures["half"] = 2
        raise RuntimeError("it broke\nin two lines")
    with found.part("slow"):
        torch.cuda.is_available()
        while True:
            found.figures["turns"] = found.figures.get("turns", 0) + 1
    with found.part("good"):
        found.figures["after"] = 3
    written = json.loads(file.read_text())
    assert (written["before"], written["half"], written["after"]) == (1, 2, 3)
    assert written["turns"] > 0
    assert written["failed"] == {"broken": "RuntimeError: it broke", "slow": "TimeoutError: it took longer than 0.05 s"}


def test_a_run_with_a_part_that_failed_ends_in_an_error_behind_its_figures(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no reading today")

    monkeypatch.setattr(benchmark, "read_in_turn", broken)
    file = tmp_path / "figures.json"
    arguments = benchmark.BenchmarkArguments(repeats=1, warm_up=False, measure=["reading", "drawing"], json=str(file))
    with pytest.raises(SystemExit, match="read 1 failed: ValueError: no reading today"):
        benchmark.main(arguments)
    assert json.loads(file.read_text())["drawing"]["by_batch"]["1"]["adapter"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shape": "huge"}, r"--shape 'huge'.*tiny, janus-pro-1b, janus-pro-7b"),
        ({"decompressor": "magic"}, r"--decompressor 'magic'.*strip, phase, raster"),
        ({"decompressor": "phase"}, r"--decompressor 'phase'.*strip with --shape tiny"),
        ({"dtype": "int7"}, r"--dtype 'int7'.*float32"),
        ({"device": "cuda:99"}, r"--device 'cuda:99'.*cpu"),
        ({"device": "toaster"}, r"--device 'toaster'.*cpu"),
        ({"repeats": 0}, r"--repeats 0.*1 or more"),
        ({"batch_sizes": [1, 0]}, r"--batch_sizes \[1, 0\].*1 or more"),
        ({"batch_sizes": []}, r"--batch_sizes \[\].*1 or more"),
        ({"also": ["magic"]}, r"--also \['magic'\].*some of phase, raster"),
        ({"also": ["strip"]}, r"--also \['strip'\].*some of phase, raster"),
        ({"train": True, "also": ["phase"]}, r"--also phase with --train true; expected one"),
        ({"alternatives": ["quantum"]}, r"--alternatives \['quantum'\].*dynamic, static, compiled"),
        ({"json": "no/such/folder/figures.json"}, r"--json .*no/such/folder does not exist; make it first"),
        ({"json": "/tmp"}, r"--json /tmp is a folder; expected a file"),
        ({"chart": "figures.txt"}, r"--chart 'figures.txt'.*ends in \.png"),
        ({"measure": ["luck"]}, r"--measure \['luck'\].*reading, shares, drawing"),
        ({"limit": 0.0}, r"--limit 0.0.*above 0"),
        ({"largest": True}, "needs --device cuda and two or more --batch_sizes"),
        ({"gradient_checkpointing": True}, "expected both"),
        ({"train": True, "fused": True}, r"--fused true with --train true; expected one"),
        ({"train": True, "alternatives": ["static"]}, r"--alternatives static with --train true; expected one"),
    ],
)
def test_arguments_that_cannot_be_are_refused(given, message):
    with pytest.raises(SystemExit, match=message):
        benchmark.BenchmarkArguments(**given)


def test_the_table_has_no_powers_of_ten():
    shown = {1228.7: "1,230", 999.7: "1,000", 545.2: "545", 0.01216: "0.0122", 3.0: "3"}
    assert {value: benchmark_report._number(value) for value in shown} == shown
