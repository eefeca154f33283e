"""Figures of the benchmarks are what they are called, and of what they say."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from benchmark import command, compare, modes, sweep, windows
from benchmark import report as bench
from benchmark.goals import Row
from benchmark.sweep import Settings, Trial
from benchmark.windows import Measurement

from dali_vit.config import Config, UserError
from pipelines.crop import Decoder
from pipelines.readers import FileList


def test_the_shares_of_mode_all_are_told_in_percent() -> None:
    found = {"joint_to_model": 0.975, "stall_fraction": 0.031, "mfu": 0.456}
    assert bench.details(found) == "joint / model 97.5 %, data wait 3.1 %, MFU 45.6 %"
    assert bench.details(found | {"mfu": None}) == "joint / model 97.5 %, data wait 3.1 %"


def test_a_row_has_its_figures_below_their_names() -> None:
    row = bench.row("loader", Measurement((1.0, 2.0, 4.0), 100, 30.0, 0.25))
    assert row.split() == ["loader", "50", "25", "100", "38", "30.0", "ms"]
    assert bench.HEADER.split() == ["images/s", "min", "max", "spread", "worst", "batch"]
    assert len(row) == len(bench.HEADER)


def test_a_trial_of_other_pixels_says_so() -> None:
    settings = Settings(2, 2, True, Decoder())
    other = replace(settings, antialias=False)
    assert bench.trial(Trial(other, None, False), settings).endswith("   antialias False   (other pixels)")
    assert bench.trial(Trial(settings, None, True), settings).endswith("   as it is")


@pytest.mark.parametrize("antialias", [False, True])
def test_a_sweep_measures_the_antialiasing_that_it_names(
    antialias: bool, tiny_config: Config, cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    monkeypatch.setattr(
        sweep.loaders, "train_loader", lambda dataset, config, group, **_: given.append(config.data.antialias)
    )
    dataset: Any = None
    sweep._loader(sweep.Settings(2, 2, antialias, Decoder()), tiny_config, dataset, cpu)
    assert given == [antialias]


def test_who_measures_steps_that_are_slow_is_told_how_to_sooner(
    cpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the third step: the first compiles."""
    now = 0.0
    monkeypatch.setattr(windows.time, "perf_counter", lambda: now)
    for slow, told in (({0, 1}, ""), ({2}, "a step takes 9 s: a smaller --batch-size answers sooner\n")):
        steps = iter(range(windows.WARMUP_STEPS))

        def step(steps: Any = steps, slow: Any = slow) -> None:
            nonlocal now
            now += 9.0 if next(steps) in slow else 1.0

        windows.warm_up(step, cpu)
        assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [ImportError("no torchcodec"), MemoryError("no memory")])
def test_what_is_no_fault_of_an_image_is_not_laid_to_it(error: Exception) -> None:
    def load(path: str) -> None:
        raise error

    with pytest.raises(type(error)):
        compare._Files(FileList.from_paths(["x.jpg"], [0]), load, lambda image: image)[0]
    with pytest.raises(compare.Unreadable, match=r"^x.jpg: no such$"):
        compare._Files(FileList.from_paths(["x.jpg"], [0]), lambda _: (_ for _ in ()).throw(OSError("no such")), str)[0]


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 0.0, -1.0])
def test_seconds_must_be_above_0_and_finite(seconds: float) -> None:
    with pytest.raises(UserError, match=rf"^--seconds {seconds:g}: must be above 0 and finite$"):
        bench.check_seconds(seconds)


def test_a_rank_that_is_empty_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("", True), ("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert command.tells(UserError("x")) == told


def test_nothing_is_loaded_while_the_step_alone_is_measured(
    tiny_config: Config, cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loader:
        closed = False

        def __next__(self) -> tuple[str, str]:
            return "images", "labels"

        def close(self) -> None:
            self.closed = True

    loader = Loader()
    trained: list[Any] = []

    def measure(step: Any, *_: Any, **__: Any) -> None:
        assert loader.closed
        step()

    monkeypatch.setattr(modes.loaders, "train_loader", lambda *_, **__: loader)
    monkeypatch.setattr(modes, "measure", measure)
    unused: Any = None
    modes.measure_model(lambda *batch: trained.append(batch), tiny_config, unused, unused, cpu, 1.0)
    assert trained == [("images", "labels")]


def test_a_ratio_that_just_misses_its_goal_does_not_look_like_it() -> None:
    assert Row("x", 1.59, "times", 1.6).cells() == ["x", ">= 1.6", "1.59 times", "missed", ""]
    assert Row("x", 14_999.6, "images/s", 15_000).cells()[2:4] == ["15,000 images/s", "missed"]
    assert Row("x", 3.04, "%", None, 3).cells()[1:4] == ["<= 3", "3.0 %", "missed"]
