"""What a run's log lines and scalars say is what happened: times, rates, MFU, epochs, and the time left."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dali_vit.milestones
from dali_vit import metrics, progress, report
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group
from dali_vit.model import flops_per_image
from dali_vit.plan import plan
from dali_vit.progress import Progress
from dali_vit.saving import Saver
from dali_vit.train import train
from tests.conftest import read_metrics

SLOW = 3.0  # seconds that the first checkpoint and the first evaluation take


@pytest.mark.timeout(120)
def test_what_a_run_says_of_its_steps(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint after 5 steps, an evaluation after 7: an epoch is 6.75 steps."""
    run = dataclasses.replace(tiny_config.run, log_every=1, eval_every=1)
    config = dataclasses.replace(tiny_config, run=run)
    slow = {"save": SLOW, "evaluation": SLOW}
    save = Saver.save

    def slow_save(*arguments: Any, **options: Any) -> None:
        time.sleep(slow.pop("save", 0.0))
        save(*arguments, **options)

    def slow_evaluation(*_: Any) -> dict[str, float]:
        time.sleep(slow.pop("evaluation", 0.0))
        return {"val/top1": 1.0, "val/top5": 2.0, "val/loss": 3.0}

    monkeypatch.setattr(Saver, "save", slow_save)
    monkeypatch.setattr(dali_vit.milestones, "evaluate_splits", slow_evaluation)
    monkeypatch.setattr(metrics, "peak_flops", lambda _: 1e9)
    planned = plan(config, 1)
    flops = 3 * flops_per_image(planned.model, 32)  # the backward pass takes twice the forward pass's
    with caplog.at_level(logging.INFO):
        train(config, cpu, planned)

    lines = [line for line in read_metrics(config.run_dir) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["train/epoch"] for line in lines] == pytest.approx([step / 6.75 for step in range(1, 13)])
    for line in lines:
        rate = line["perf/images_per_sec"]
        assert line["perf/step_ms"] == pytest.approx(1e3 * 8 / rate)
        assert line["perf/mfu_pct"] == pytest.approx(100 * rate * flops / 1e9)
    # Neither counts among the steps: they would make them slower.
    assert max(line["perf/step_ms"] for line in lines[1:]) < 1e3 * SLOW * 0.8

    lines = read_metrics(config.run_dir)
    saving, evaluating = (
        {line["step"]: line[name] for line in lines if name in line}
        for name in ("perf/checkpoint_stall_ms", "perf/evaluation_s")
    )
    assert list(saving) == [5, 7, 10, 12]
    assert 1e3 * SLOW <= saving[5] < 1e3 * 10 * SLOW
    assert list(evaluating) == [7, 12]
    assert SLOW <= evaluating[7] < 10 * SLOW

    said = re.findall(r"step +(\d+)/12 \| epoch (\S+) \|", caplog.text)
    assert said == [(str(step), f"{step / 6.75:.2f}") for step in range(1, 13)]


@pytest.mark.timeout(60)
def test_a_checkpoint_stalls_the_training_until_its_copy_is_made(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For which, on a GPU, the timer waits as it begins anew."""
    reset = metrics.StepTimer.reset
    monkeypatch.setattr(metrics.StepTimer, "reset", lambda timer: (time.sleep(0.2), reset(timer)))
    train(tiny_config, cpu, plan(tiny_config, 1))
    name = "perf/checkpoint_stall_ms"
    stalls = {line["step"]: line[name] for line in read_metrics(tiny_config.run_dir) if name in line}
    assert list(stalls) == [5, 10, 12]
    assert min(stalls.values()) >= 200


def test_the_time_left_of_a_run_that_goes_on_is_of_the_steps_it_took(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would seem near its end if the steps before counted, which took this process no time."""
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(progress.report, "TimeLeft", lambda *given: made.append(given))
    loader: Any = SimpleNamespace(step=5)
    saver: Any = None
    Progress(tiny_config, cpu, plan(tiny_config, 1), loader, saver, None, forward_flops=1.0, bad_samples=[])
    assert made == [(12, 5)]


@pytest.mark.parametrize(("share", "refused"), [(0.01, True), (0.05, False)])
def test_the_images_that_all_processes_left_out_are_counted_against_the_share(
    share: float, refused: bool, tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has left one out, of which one is allowed in any case."""
    config = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, max_bad_share=share))
    monkeypatch.setattr(progress, "gather_objects", lambda own: [own, {"bad_samples": [7]}])
    loader: Any = SimpleNamespace(step=0, bad_samples=(3,), state_dict=lambda: {"bad_samples": [3]})
    logged: dict[str, float] = {}
    writer: Any = SimpleNamespace(scalars=lambda step, scalars: logged.update(scalars))
    saver: Any = None
    steps = Progress(config, cpu, plan(config, 1), loader, saver, writer, forward_flops=1.0, bad_samples=[])
    with steps.timer.waiting():
        pass
    steps.window.add(torch.tensor(1.0), torch.tensor(2.0))
    if not refused:
        steps.log_line(1, 0.1)
        assert logged["data/bad_samples"] == 2
        return
    with pytest.raises(UserError, match=r"^2 of 54 images of train cannot be read, .*\(--max-bad-share 0\.01\)"):
        steps.log_line(1, 0.1)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (36_000, "10:00:00")]
)
def test_a_duration_is_in_hours_minutes_and_seconds(seconds: float, said: str) -> None:
    assert report.duration(seconds) == said
