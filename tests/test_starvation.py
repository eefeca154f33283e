"""A run that waits for its data says so once, with what helps; a run that does not wait says nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dali_vit.step
import dali_vit.train
from dali_vit import progress
from dali_vit.plan import plan
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.report import StarvationWarning
from dali_vit.train import train
from tests.conftest import read_metrics


def waits(config: Any, group: Any) -> list[float]:
    """Trains and returns `perf/data_wait_pct` of every step but the first, whose window fills the queues."""
    train(config, group, plan(config, 1))
    return [m["perf/data_wait_pct"] for m in read_metrics(config.run_dir) if "perf/data_wait_pct" in m][1:]


@pytest.mark.timeout(120)
def test_a_slow_reader_is_warned_of_once_with_the_remedies(tiny_config, cpu, tmp_path, caplog, monkeypatch):
    """Photographs of five megapixels, decoded by one thread, for a step that does nothing."""

    def build_update(*_: Any) -> Any:
        return lambda *batch: (torch.ones(()), torch.ones(())), {}

    monkeypatch.setattr(dali_vit.train, "build_update", build_update)
    pixels = np.random.default_rng(0).integers(0, 256, (1600, 3200, 3), np.uint8)
    for split, name in (("train", "ant"), ("train", "bee"), ("val", "ant"), ("val", "bee")):
        folder = tmp_path / "large" / split / name
        folder.mkdir(parents=True)
        for i in range(4 if split == "train" else 1):
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    config = replace(tiny_config, data=replace(tiny_config.data, data=str(tmp_path / "large"), minival=0.0))
    with caplog.at_level("WARNING", logger="dali_vit"):
        found = waits(config, cpu)
    assert len(found) == 11
    assert sorted(found)[5] > 60
    warnings = [r.getMessage() for r in caplog.records if "training waits for data" in r.getMessage()]
    assert len(warnings) == 1
    for remedy in (
        "--threads",
        "--autotune on",
        "shards on a local disk",
        "decode JPEGs in hardware",
        "--randaug-layers",
    ):
        assert remedy in warnings[0]


def test_what_is_in_use_already_is_no_remedy(caplog):
    for in_shards, autotuned in ((True, True), (False, True), (True, False)):
        warning = StarvationWarning(steps=1, in_shards=in_shards, autotuned=autotuned)
        for _ in range(3):
            warning.check(1, seconds=10.0, waited=2.0)
    said = [record.getMessage() for record in caplog.records]
    assert ["prepare" in message for message in said] == [False, True, False]
    assert ["--autotune on" in message for message in said] == [False, False, True]
    assert "(a machine with more cores), GPUs that decode" in said[0]
    assert "(a machine with more cores), shards on" in said[1]


def test_a_few_steps_after_a_checkpoint_are_no_reason_to_warn(caplog):
    """Log lines after 1 step and 49 others, in turn; of 50 steps the wait is 8 %, and the second time 12 %."""
    warning = StarvationWarning(steps=50, in_shards=True, autotuned=True)
    warning.check(50, seconds=50.0, waited=50.0)  # the first line, in which queues are filled
    for count, waited in ((1, 0.5), (49, 3.5), (1, 0.5), (49, 5.5)):
        assert caplog.text == ""
        warning.check(count, seconds=float(count), waited=waited)
    assert "training waits for data 12 % of the time" in caplog.text
    warning = StarvationWarning(steps=1, in_shards=True, autotuned=True)
    for _ in range(2):
        warning.check(1, seconds=1.0, waited=1.02)  # by the clock of another rank
    assert "training waits for data 100 % of the time" in caplog.text


@pytest.mark.timeout(120)
def test_a_fast_reader_is_not_warned_of(tiny_config, cpu, caplog, monkeypatch):
    """8 small images a step, for a step that takes 0.5 s: longer than what a busy machine keeps a process waiting."""

    def build_update(*arguments: Any) -> Any:
        update, how = dali_vit.step.build_update(*arguments)

        def slow_update(*batch: Any) -> Any:
            time.sleep(0.5)
            return update(*batch)

        return slow_update, how

    monkeypatch.setattr(dali_vit.train, "build_update", build_update)
    with caplog.at_level("WARNING", logger="dali_vit"):
        found = waits(tiny_config, cpu)
    assert max(found) < 10
    assert "training waits for data" not in caplog.text


@pytest.mark.parametrize(("shards", "tuned"), [(True, False), (False, True)])
def test_a_run_knows_what_is_in_use_already(shards, tuned, tiny_config, cpu, tmp_path, monkeypatch):
    """And that steps are judged as many together as a log line has."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(progress.report, "StarvationWarning", lambda **given: made.append(given))
    monkeypatch.setattr(progress.autotune, "is_on", lambda config, group: tuned)
    data, run = tiny_config.data, replace(tiny_config.run, log_every=7)
    if shards:
        data = replace(data, data=str(prepare(PrepareArguments(Path(data.data), tmp_path / "shards"))))
    config = replace(tiny_config, data=data, run=run)
    planned, loader = plan(config, 1), SimpleNamespace(step=0)
    progress.Progress(config, cpu, planned, loader, None, None, forward_flops=1.0, bad_samples=[])
    assert made == [{"steps": 7, "in_shards": shards, "autotuned": tuned}]
