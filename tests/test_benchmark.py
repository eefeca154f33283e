"""What tools/bench_throughput.py measures, against numbers worked out by hand."""
# ruff: noqa: E402

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where Python looks when the tool is run as a script

from benchmark import compare, modes, report, sweep, windows
from benchmark.windows import Measurement, measure

from dali_vit import data as datasets
from dali_vit import loaders
from dali_vit.config import DataConfig
from dali_vit.distributed import Group
from dali_vit.metrics import StepTimer
from dali_vit.model import create_model
from pipelines.bad_samples import DecodeError
from pipelines.train import Decoder

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")


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


def test_cores_that_others_keep_busy(tmp_path, monkeypatch):
    """Of those that this process may use, 0 and 2; the load that an earlier command has left is not counted."""
    stat = tmp_path / "stat"
    before = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 0 0 900 0 0 0 0 50 0\ncpu1 0 0 0 5 0 0 0 0 0 0\n"
    before += "cpu2 10 0 0 10 0 0 0 0 0 0\n"
    # Of 100 ticks core 0 is busy for 1 + 2 + 3 + 4 + 5 + 6, core 2 for 59; core 1 for all of its own.
    after = "cpu0 101 2 3 970 9 4 5 6 51 0\ncpu1 100 0 0 5 0 0 0 0 0 0\ncpu2 69 0 0 51 0 0 0 0 0 0\nctxt 1\n"
    stat.write_text(before)
    monkeypatch.setattr(windows, "usable_cores", lambda: {0, 2})
    monkeypatch.setattr(windows.time, "sleep", lambda seconds: stat.write_text(after))
    assert windows.busy_cores(1.0, stat) == pytest.approx((21 + 59) / 100)
    assert windows.busy_cores(1.0, stat) == 0.0  # the ticks stand still
    monkeypatch.setattr(windows, "usable_cores", lambda: {7})
    assert windows.busy_cores(1.0, stat) == 0.0
    monkeypatch.setattr(windows.time, "sleep", lambda seconds: stat.unlink(missing_ok=True))
    assert windows.busy_cores(1.0, stat) == 0.0


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
    waited_for_the_device: list[int] = []
    monkeypatch.setattr(timer, "_synchronize", lambda: waited_for_the_device.append(steps))

    def step() -> None:
        nonlocal steps
        steps += 1
        with timer.waiting():
            clock.sleep(1 / 256)
        clock.sleep({3: 50.0, 250: 0.5}.get(steps, 3 / 256))  # one step is slow while warming up, one later

    measured = measure(step, timer, images=8, seconds=2.5, group=cpu)
    # 5 steps of warm-up, 155 to find that 64 last a second, then as many windows as 2.5 s have.
    assert steps == 5 + (5 + 10 + 20 + 40 + 80) + 3 * 64
    assert waited_for_the_device[-2:] == [160, 160 + 3 * 64]  # not between the windows
    assert measured.window_seconds == (1.0, 1.0 + 0.5 - 3 / 256, 1.0)
    assert measured.window_images == 64 * 8
    assert measured.images_per_sec == 512.0
    assert measured.worst_batch_ms == 1e3 * (1 / 256 + 0.5)
    assert measured.wait_fraction == (3 * 64 / 256) / (3.5 - 3 / 256)


def test_a_step_that_becomes_faster_is_measured_in_more_windows(monkeypatch, cpu):
    """All of them count in the worst batch and in the wait for data: here a quarter of each step."""
    clock = Clock(monkeypatch)
    timer = StepTimer(CPU)
    steps = iter([1 / 64] * 160 + [1 / 128] * 4 + [0.25] + [1 / 128] * 251)

    def step() -> None:
        took = next(steps)
        with timer.waiting():
            clock.sleep(took / 4)
        clock.sleep(3 * took / 4)

    measured = measure(step, timer, images=8, seconds=2, group=cpu)
    assert (measured.window_images, measured.window_seconds) == (64 * 8, (0.75 - 1 / 128, 0.5, 0.5, 0.5))
    assert measured.worst_batch_ms == 250.0
    assert measured.wait_fraction == 0.25


def test_a_window_lasts_as_long_as_on_the_slowest_rank(monkeypatch, cpu):
    clock = Clock(monkeypatch)
    timer = StepTimer(CPU)

    def with_a_slower_rank(value):
        durations, waited = value
        return [(durations, waited), ([2 * d for d in durations], 0.8 * sum(durations))]

    monkeypatch.setattr(windows, "gather_objects", with_a_slower_rank)

    def step() -> None:
        with timer.waiting():
            clock.sleep(0.03)
        clock.sleep(0.07)

    measured = measure(step, timer, images=16, seconds=1, group=cpu)
    assert measured.images_per_sec == pytest.approx(16 / 0.2)
    assert measured.worst_batch_ms == pytest.approx(200)
    assert measured.wait_fraction == pytest.approx(0.4)  # of the rank that waits longest


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


def test_a_comparison_adds_up_rates_and_workers_of_all_processes(tiny_config, monkeypatch):
    """Of two processes here, the other of which is as fast."""
    dataset = datasets.load_dataset(tiny_config.data.data, minival=0)
    config = replace(tiny_config, run=replace(tiny_config.run, threads=3))
    batches = iter(lambda: (torch.empty(0), torch.empty(0)), None)
    others = {name: compare._Ours(batches) for name in (*compare.TORCHVISION.values(), compare.TIMM)}
    monkeypatch.setattr(compare, "others", lambda config, files, group, workers: others)
    monkeypatch.setattr(loaders, "train_loader", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(compare, "_rate", lambda *_: 50.0)
    monkeypatch.setattr(compare, "gather_objects", lambda rate: [rate, rate])
    result = compare.compare(config, dataset, lambda: None, Group(0, 2, 0, 2, CPU), 1.0)
    assert result["workers"] == 6
    assert {values["images_per_sec"] for values in result["loaders"].values()} == {100.0}


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
    preallocated = report.sweep_table([as_is, hints := trial(1200, 10, preallocate_width_hint=1)], hints)
    assert preallocated.endswith(" the settings as they are (training does not try preallocate_width_hint).")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), DecodeError("too many", ["x.jpg"])])
def test_a_setting_that_fails_is_said_and_passed_over(
    error, dataset_of_folder, tiny_config, cpu, monkeypatch, short_windows
):
    def loader(settings, *arguments):
        if settings.decoder.region == "full":
            raise error
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


@pytest.mark.parametrize("region", ["window", "full"])
def test_windows_are_swept_only_where_they_are_the_default(region, dataset_of_folder, tiny_config, cpu, monkeypatch):
    default = loaders.LoaderSettings(1, decoder=Decoder(region=region))
    monkeypatch.setattr(sweep.loaders, "default_settings", lambda *_: default)
    monkeypatch.setattr(sweep, "_working_loader", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(sweep, "measure_batches", lambda *_: Measurement((1.0,), 1.0, 1.0, 0.0))
    trials, _ = sweep.sweep(tiny_config, dataset_of_folder, cpu, 0.1, lambda *_: None)
    assert trials[0].settings.decoder == default.decoder
    assert {trial.settings.decoder.region for trial in trials} == {region, "full"}


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


@pytest.mark.parametrize(("threshold", "left_out"), [(10.0, True), (modes.NEVER, False)])
def test_no_step_of_a_benchmark_is_left_out_for_the_loss_of_a_batch_unlike_the_one_learned_by_heart(
    threshold, left_out, tiny_config, cpu, monkeypatch
):
    norms = []

    class Recorder:
        def __init__(self, group):
            pass

        def add(self, loss, norm):
            norms.append(float(norm))

    monkeypatch.setattr(modes, "Window", Recorder)
    monkeypatch.setattr(modes, "NEVER", threshold)
    torch.manual_seed(0)
    optim = replace(tiny_config.optim, lr=0.01, steps=10**6, mixup_alpha=0.0)
    model = create_model(tiny_config.model, num_classes=4, resolution=32)
    train_on, _ = modes.training_step(replace(tiny_config, optim=optim), model, 10**6, cpu)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    for _ in range(200):
        train_on(images, torch.zeros(8, dtype=torch.int64))
    train_on(images, torch.ones(8, dtype=torch.int64))
    assert not any(map(math.isnan, norms[:200]))
    assert math.isnan(norms[200]) == left_out


def test_batches_that_the_other_loaders_made_ahead_do_not_count() -> None:
    """Of three workers: two batches ahead and one at work each."""
    taken = 0

    def batches():
        nonlocal taken
        while True:
            taken += 1
            time.sleep(0 if taken <= 9 else 0.01)
            yield torch.zeros(4), None

    assert compare._rate(batches(), 3, 0.1, CPU) <= 4 / 0.01


def test_the_step_is_that_of_training_not_of_evaluation(tiny_config, cpu) -> None:
    model = create_model(tiny_config.model, num_classes=4, resolution=32).eval()
    modes.training_step(tiny_config, model, 10, cpu)
    assert model.training


def test_the_other_loaders_crop_as_the_recipe_does_and_change_no_colours_by_themselves() -> None:
    data = DataConfig(resolution=32)
    ours, timms = compare._torchvision_transform(data), compare._timm_transform(data)
    crops = [transforms.transforms[0] for transforms in (ours, timms)]  # type: ignore[attr-defined]
    assert [(crop.scale, list(crop.size)) for crop in crops] == [((0.05, 1.0), [32, 32])] * 2
    assert [type(step).__name__ for step in ours.transforms[1:]] == [  # type: ignore[attr-defined]
        *("RandomHorizontalFlip", "RandAugment", "PILToTensor")
    ]
    without = replace(data, randaug_layers=0)
    plain = str(compare._torchvision_transform(without)) + str(compare._timm_transform(without))
    assert "RandAugment" not in plain
    assert "ColorJitter" not in str(timms)
    assert plain.count("ColorJitter(brightness=None, contrast=None") == plain.count("ColorJitter") == 1


@pytest.mark.parametrize("of_others", [True, False])
def test_a_setting_that_fails_on_one_rank_is_tried_by_none(of_others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for it in the measurement."""

    class Loader:
        closed = False

        def __next__(self) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    loader = Loader()
    monkeypatch.setattr(sweep, "_loader", lambda *_: loader)
    monkeypatch.setattr(sweep, "gather_objects", lambda own: [own, of_others])
    group = Group(0, 2, 0, 2, CPU)
    settings: Any = SimpleNamespace(prefetch=2)
    found = sweep._working_loader(settings, settings, settings, group)
    assert (found is loader, loader.closed) == (of_others, not of_others)


def test_each_rank_has_a_trace_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Profiler:
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text("{}")

    closed: list[int] = []
    loader = SimpleNamespace(close=lambda: closed.append(1))
    monkeypatch.setattr(modes.loaders, "train_loader", lambda *_, **__: loader)
    monkeypatch.setattr(modes, "profile_steps", lambda *_: (Profiler(), {"kernels": 1}))
    monkeypatch.setattr(modes, "barrier", lambda: None)
    arguments: Any = (None, None, None, None, Group(1, 2, 1, 2, CPU))
    found = modes.profile_joint(*arguments, steps=3, folder=tmp_path / "profile")
    assert found == (tmp_path / "profile/rank1.pt.trace.json", {"kernels": 1})
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank1.pt.trace.json"]
    assert closed == [1]
