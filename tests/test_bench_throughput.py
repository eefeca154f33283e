"""tools/bench_throughput.py: its arithmetic by hand, and whole runs on a few small images."""
# ruff: noqa: E402

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where Python looks when the tool is run as a script

import bench_throughput
from benchmark import compare, modes, report, sweep, windows
from benchmark.windows import Measurement, measure

from dali_vit import data as datasets
from dali_vit import recipes
from dali_vit.metrics import StepTimer
from pipelines.order import TrainOrder
from pipelines.train import Decoder
from tests.conftest import TINY_MODEL, environment

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")


def flags(image_folder: Path) -> list[str]:
    sizes = ["--resolution", "32", "--batch-size", "8", "--randaug-magnitude", "2", "--threads", "2"]
    return ["--data", str(image_folder), "--gpus", "0", "--seconds", "0.2", *TINY_MODEL, *sizes]


# RandAugment's graph takes a second to build, for each trial of a sweep.
QUICK = ["--randaug-layers", "0"]


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    """Calls the tool in this process."""
    with pytest.raises(SystemExit) as stopped:
        bench_throughput.main(list(arguments))
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_SECONDS", 0.1)


@pytest.fixture
def dataset_of_folder(image_folder):
    return datasets.load_dataset(image_folder, minival=0.1)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


# Arithmetic


def test_statistics_of_windows():
    measured = Measurement((1.0, 2.0, 4.0), 100, 30.0, 0.25)
    assert measured.to_json() == {
        "images_per_sec": 50.0,
        "min": 25.0,
        "max": 100.0,
        "spread": 75.0 - 37.5,
        "worst_batch_ms": 30.0,
        "windows": [100.0, 50.0, 25.0],
        "window_images": 100,
    }


def test_measure_by_a_clock_of_its_own(monkeypatch, cpu):
    clock = Clock(monkeypatch)
    timer = StepTimer(CPU)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        with timer.waiting():
            clock.sleep(1 / 256)
        clock.sleep({3: 50.0, 250: 0.5}.get(steps, 3 / 256))  # one step is slow while warming up, one later

    measured = measure(step, timer, images=8, seconds=2.5, group=cpu)
    # 5 steps of warm-up, 155 to find that 64 last a second, then windows until 2.5 s are over.
    assert steps == 5 + (5 + 10 + 20 + 40 + 80) + 3 * 64
    assert measured.window_seconds == (1.0, 1.0 + 0.5 - 3 / 256, 1.0)
    assert measured.window_images == 64 * 8
    assert measured.images_per_sec == 512.0
    assert measured.worst_batch_ms == 1e3 * (1 / 256 + 0.5)
    assert measured.wait_fraction == (3 * 64 / 256) / (3.5 - 3 / 256)


def test_a_window_lasts_as_long_as_on_the_slowest_rank(monkeypatch, cpu):
    clock = Clock(monkeypatch)
    timer = StepTimer(CPU)

    def with_a_slower_rank(value):
        durations, waited = value
        return [(durations, waited), ([2 * d for d in durations], 0.0)]

    monkeypatch.setattr(windows, "gather_objects", with_a_slower_rank)

    def step() -> None:
        with timer.waiting():
            clock.sleep(0.03)
        clock.sleep(0.07)

    measured = measure(step, timer, images=16, seconds=1, group=cpu)
    assert measured.images_per_sec == pytest.approx(16 / 0.2)
    assert measured.worst_batch_ms == pytest.approx(200)
    assert measured.wait_fraction == pytest.approx(0.3 / 3)


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        (
            (812.4, 1405.0, 806.0, 0.413),
            "The loader limits: 812 images/s against 1,405 of the step; training waits for data 41 % of the time.",
        ),
        (
            (15300.0, 12100.0, 11895.0, 0.012),
            "The step limits: 12,100 images/s against 15,300 of the loader; training runs at 98 % of the step alone"
            " and waits for data 1 % of the time.",
        ),
        (
            (600.0, 500.0, 260.0, 0.2),
            "Loader and step compete for the processors: 260 images/s together, 52 % of the step alone (500), although"
            " the loader alone reaches 600; training waits for data 20 % of the time.",
        ),
    ],
)
def test_verdict(rates, sentence):
    assert report.verdict(*rates) == sentence


def test_verdict_draws_the_line_at_97_percent():
    assert report.verdict(2000, 1000, 970, 0.03).startswith("The step limits")
    assert report.verdict(2000, 1000, 969, 0.03).startswith("Loader and step compete")
    assert report.verdict(1000, 1000, 970, 0.03).startswith("The step limits")


def test_comparison_takes_ratios_within_rounds_against_the_better_decoder():
    result = compare.summarize(
        {
            "dali-vit": [800.0, 400.0, 1000.0],
            "torchvision, PIL": [400.0, 300.0, 500.0],
            "torchvision, decode_image": [390.0, 310.0, 390.0],
            "timm": [500.0, 200.0, 400.0],
        }
    )
    assert result["torchvision_decode"] == "PIL"
    assert result["ratios"] == [800 / 500, 400 / 300, 1000 / 500]
    assert result["ratio"] == 1.6
    assert result["best_other"] in ("torchvision, PIL", "timm")
    assert result["loaders"]["timm"] == {"images_per_sec": 400.0, "rounds": [500.0, 200.0, 400.0]}
    text = report.comparison({"workers": 2, **result})
    assert "1.60 times as fast as the best of the others (1.60, 1.33, 2.00 by round)" in text
    assert [line.split("  ")[0] for line in text.splitlines()[1:3]] == ["dali-vit", "torchvision, PIL"]


def trial(rate: float, worst: float, **decoder) -> sweep.Trial:
    settings = sweep.Settings(2, 2, True, Decoder(**decoder))
    return sweep.Trial(settings, Measurement((1.0,), rate, worst, 0.0), True)  # type: ignore[arg-type]


def test_the_best_setting_has_the_shortest_worst_batch_of_those_as_fast():
    as_is, steady, slow = trial(1000, 90), trial(985, 40, hw_decoder_load=0.5), trial(900, 10, region="full")
    assert sweep.choose([as_is, steady, slow]) is steady
    table = report.sweep_table([as_is, slow, steady], steady).splitlines()
    assert [line.split("   ")[-1] for line in table[1:4]] == ["as it is", "hw_decoder_load 0.5", "region full"]
    assert table[4] == "Best: hw_decoder_load 0.5, 0.98 times the rate of the settings as they are."
    assert report.sweep_table([as_is, slow], as_is).endswith("Best: the settings as they are.")


def test_a_setting_that_fails_is_said_and_passed_over(dataset_of_folder, tiny_config, cpu, monkeypatch, short_windows):
    def loader(settings, *arguments):
        if settings.decoder.region == "full":
            raise RuntimeError("out of memory")
        return made(settings, *arguments)

    made = sweep._loader
    monkeypatch.setattr(sweep, "_loader", loader)
    monkeypatch.setattr(sweep, "_changes", lambda *_, **__: [[lambda s: replace(s, decoder=Decoder(region="full"))]])
    config = replace(tiny_config, data=replace(tiny_config.data, randaug_layers=0))
    trials, best = sweep.sweep(config, dataset_of_folder, cpu, 0.1, lambda *_: None)
    assert best is trials[0]
    assert [trial.measurement is None for trial in trials] == [False, True, False, False]
    assert "fails" in report.sweep_table(trials, best).splitlines()[-2]
    written = sweep.to_json(trials, best)["trials"][-1]
    assert (written["images_per_sec"], written["worst_batch_ms"]) == (0, None)


def test_randaugments_cost_is_a_median_over_rounds(tiny_config, cpu, monkeypatch):
    rates = iter([100.0, 99.0, 200.0, 180.0, 50.0, 49.0])
    layers = []

    def measured(train_on, config, *_):
        layers.append(config.data.randaug_layers)
        return Measurement((1.0,), next(rates), 1.0, 0.0)  # type: ignore[arg-type]

    monkeypatch.setattr(modes, "measure_joint", measured)
    cost = modes.measure_randaug_cost(None, tiny_config, None, None, cpu, 1.0)
    assert layers == [0, 2] * 3
    assert cost == {"without": [100.0, 200.0, 50.0], "with": [99.0, 180.0, 49.0], "cost": pytest.approx(0.02)}
    assert report.randaug_cost(cost).startswith("RandAugment costs training 2.0 % of its images/s (99 of 100, 180")


# Whole runs


def test_all_modes_and_a_profile(image_folder, tmp_path, capsys, short_windows):
    out, traces = tmp_path / "out.json", tmp_path / "traces"
    profile = ["--profile", "3", "--profile-dir", str(traces)]
    code, printed, err = run(*flags(image_folder), "--json", str(out), *profile, "--randaug-cost", capsys=capsys)
    assert code == 0, err
    result = json.loads(out.read_text())
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["out.json"]
    assert set(result) == {
        *("environment", "config", "loader", "model", "joint", "stall_fraction", "mfu", "joint_to_model"),
        "randaug_cost",
    }
    for mode in ("loader", "model", "joint"):
        values = result[mode]
        rates = values["windows"]
        assert values["images_per_sec"] == pytest.approx(np.median(rates))
        assert (values["min"], values["max"]) == (min(rates), max(rates))
        assert values["spread"] == pytest.approx(np.percentile(rates, 75) - np.percentile(rates, 25))
        assert sum(values["window_images"] / rate for rate in rates) >= 0.2
        assert values["window_images"] % 8 == 0
        assert values["window_images"] >= 5 * 8
        # No batch is faster than the mean of the fastest window, and so not the worst one either.
        assert values["worst_batch_ms"] >= 1e3 * 8 / values["max"]
    rates = [result[mode]["images_per_sec"] for mode in ("loader", "model", "joint")]
    assert result["joint_to_model"] == rates[2] / rates[1]
    assert 0 < result["stall_fraction"] < 1
    assert result["mfu"] is None
    assert result["config"]["model"]["width"] == 32
    assert result["config"]["optim"]["batch_size"] == 8
    assert result["config"]["benchmark"]["seconds"] == 0.2
    assert result["config"]["loader"]["threads"] == 2
    cost = result["randaug_cost"]
    assert cost["cost"] == pytest.approx(
        np.median([1 - a / b for a, b in zip(cost["with"], cost["without"], strict=True)])
    )
    assert report.randaug_cost(cost) in printed
    assert result["config"]["compiled"].startswith("off")
    assert result["environment"]["torch"] == torch.__version__.split("+")[0]
    assert report.verdict(*rates, result["stall_fraction"]) in printed

    (trace,) = traces.iterdir()
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert [names.count(f"step {i}") for i in range(4)] == [1, 1, 1, 0]
    assert str(trace) in printed


def test_one_mode_gives_its_own_keys_alone(image_folder, tmp_path, capsys, short_windows):
    for mode, keys in [("loader", {"loader"}), ("model", {"model", "mfu"})]:
        out = tmp_path / f"{mode}.json"
        code, printed, err = run(*flags(image_folder), *QUICK, "--mode", mode, "--json", str(out), capsys=capsys)
        assert code == 0, err
        assert set(json.loads(out.read_text())) == keys | {"environment", "config"}
        assert "--mode all says which stage limits" in printed


def test_compare_and_sweep(image_folder, tmp_path, capsys, short_windows):
    out = tmp_path / "out.json"
    command = [*flags(image_folder), *QUICK, "--mode", "loader", "--compare", "--sweep", "--json", str(out)]
    code, printed, err = run(*command, capsys=capsys)
    assert code == 0, err
    result = json.loads(out.read_text())

    compared = result["compare"]
    rounds = {name: values["rounds"] for name, values in compared["loaders"].items()}
    assert list(rounds) == ["dali-vit", "torchvision, PIL", "torchvision, decode_image", "timm"]
    assert all(len(rates) == 3 and min(rates) > 0 for rates in rounds.values())
    assert compared == {"workers": 2, **compare.summarize(rounds)}
    assert f"dali-vit loads {compared['ratio']:.2f} times as fast" in printed

    trials = result["sweep"]["trials"]
    assert {key for key, value in trials[0]["settings"].items() if value != result["sweep"]["best"][key]} <= {
        *("threads", "prefetch", "antialias", "region", "fast_idct"),
    }
    assert {t["settings"]["threads"] for t in trials} == {1, 2, 3, 4}
    assert {t["settings"]["region"] for t in trials} == {"window", "full"}
    assert {t["settings"]["prefetch"] for t in trials} == {2, 3, 4}
    assert sorted(t["same_images"] for t in trials)[:3] == [False, False, True]
    assert [t["images_per_sec"] for t in trials] == sorted((t["images_per_sec"] for t in trials), reverse=True)
    assert result["sweep"]["best"] in [t["settings"] for t in trials if t["same_images"]]


def test_the_other_loaders_take_our_batches_and_rest_between_rounds(image_folder, tiny_config, cpu):
    files = datasets.load_dataset(image_folder, minival=0.1).split("train")
    order = TrainOrder(len(files), 8, 0, 1, tiny_config.run.seed)
    for contestant in compare.others(tiny_config, files, cpu, workers=2).values():
        step = 0
        for _ in range(2):
            with contestant.batches() as batches:
                for _ in range(3):
                    images, labels = next(batches)
                    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (8, 3, 32, 32))
                    assert labels.tolist() == files.labels[order.indices(step)].tolist()
                    step += 1
            with pytest.raises(StopIteration):
                next(batches)
            step += 2 * 2  # what the workers had been asked for by then


def test_two_processes(image_folder, tmp_path):
    out = tmp_path / "out.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tool = [str(ROOT / "tools" / "bench_throughput.py")]
    result = subprocess.run(
        [*launcher, *tool, *flags(image_folder), *QUICK, "--mode", "joint", "--threads", "1", "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("worst batch") == 1
    measured = json.loads(out.read_text())
    assert measured["config"]["world_size"] == 2
    assert measured["joint"]["window_images"] % 8 == 0
    assert 0 < measured["stall_fraction"] < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--recipe", "nonsense"], ["--recipe nonsense"]),
        (["--mode", "everything"], ["--mode", "everything"]),
        (["--secnods", "3"], ["--secnods"]),
        (["--seconds", "0"], ["--seconds 0"]),
        (["--profile", "-1"], ["--profile -1"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--gpus", "64"], ["--gpus 64"]),
        (["--data", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--resolution", "33"], ["--resolution 33"]),
        (["--json", "/nowhere/at/all.json"], ["--json /nowhere/at/all.json"]),
        (["--randaug-layers", "-1"], ["--randaug-layers -1"]),
    ],
)
def test_a_mistake_is_one_line_and_code_2(changes, words, image_folder, capsys):
    code, out, err = run(*flags(image_folder), *changes, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("bench_throughput.py: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_recipe_supplies_the_settings():
    options, config = bench_throughput.parse(["--recipe", "b32-90ep", "--data", "x", "--width", "64", "--seed", "3"])
    assert (config.model.model, config.model.width, config.optim.batch_size) == ("B/32", 64, 1024)
    assert (config.run.recipe, config.run.seed, options.seconds) == ("b32-90ep", 3, 10.0)
    demo = bench_throughput.parse(["--recipe=demo"])[1]
    recipe = recipes.get("demo")
    assert (demo.data, demo.model) == (recipe.data, recipe.model)
    assert demo.optim.batch_size == recipe.optim.batch_size
