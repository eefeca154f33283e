"""Runs that are killed and started again end with the very bits of a run that was not."""

from __future__ import annotations

import errno
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dali_vit import checkpoint, saving
from dali_vit.config import Config, OptimConfig
from dali_vit.distributed import Group
from dali_vit.optim import create_optimizer
from dali_vit.plan import plan
from dali_vit.saving import restore
from dali_vit.train import train
from tests.conftest import TINY, read_metrics
from tests.processes import dali_vit, logged_steps, running, wait_for

STEPS, EPOCH_STEPS = 90, 54 / 8  # 60 images less 6 of minival, batch 8
KILLED_PAST = (random.Random(1).randrange(1, 6), *sorted(random.Random(2).sample(range(12, 70), 2)))


def command(image_folder: Path, runs_dir: Path) -> list[str]:
    return [
        *("train", "--data", str(image_folder), "--runs-dir", str(runs_dir), "--name", "run", "--gpus", "0", *TINY),
        *("--steps", str(STEPS), "--minival", "0.1", "--threads", "1", "--log-every", "1"),
        *("--checkpoint-every", "4", "--eval-every", "3"),
    ]


def run_and_kill(arguments: list[str], run_dir: Path, past_step: int) -> int:
    """Starts a run, SIGKILLs it as soon as it has logged a step past `past_step`; returns the last logged step."""
    with running("-m", "dali_vit", *arguments, output=subprocess.DEVNULL) as process:
        wait_for(lambda: logged_steps(run_dir) > past_step or process.poll() is not None, f"step {past_step}", 120)
        assert process.poll() is None, "the run ended before it was killed"
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


@pytest.mark.timeout(300)
def test_killed_runs_end_with_the_bits_of_an_uninterrupted_one(image_folder, tmp_path):
    whole = dali_vit(*command(image_folder, tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    arguments, run_dir = command(image_folder, tmp_path / "killed"), tmp_path / "killed" / "run"
    killed_at = [run_and_kill(arguments, run_dir, past) for past in KILLED_PAST]
    assert killed_at[0] < EPOCH_STEPS * 2 < killed_at[-1] < STEPS
    last = dali_vit(*arguments, anew=True)  # with another seed of Python's hashes, which all forks share
    assert last.returncode == 0, last.stderr

    expected, actual = (checkpoint.newest(tmp_path / name / "run") for name in ("whole", "killed"))
    assert expected.step == actual.step == STEPS
    assert expected.metrics == actual.metrics
    for name, tensor in expected.model_state().items():
        assert torch.equal(tensor, actual.model_state()[name]), name
    for group in (0, 1):
        assert (
            expected.trainer_state()["optimizer"]["param_groups"][group]["lr"]
            == (actual.trainer_state()["optimizer"]["param_groups"][group]["lr"])
        )
    for index, state in expected.trainer_state()["optimizer"]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, actual.trainer_state()["optimizer"]["state"][index][key]), (index, key)

    # The log reads as if nothing had happened: each step once, the same losses.
    losses = [
        [(m["step"], m["train/loss"]) for m in read_metrics(tmp_path / name / "run") if "train/loss" in m]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))


@pytest.mark.timeout(120)
def test_a_finished_run_is_left_as_it_is(image_folder, tmp_path):
    arguments = [*command(image_folder, tmp_path), "--steps", "5"]
    assert dali_vit(*arguments).returncode == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = dali_vit(*arguments)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_each_rank_gets_its_own_random_state_back():
    states = [{"cpu": torch.Generator().manual_seed(seed).get_state()} for seed in (1, 2)]
    model = torch.nn.Linear(2, 2)
    optimizer = create_optimizer(model, OptimConfig())
    saved: Any = SimpleNamespace(
        model_state=model.state_dict,
        trainer_state=lambda: {"optimizer": optimizer.state_dict(), "rng": states},
    )
    for rank, world_size, expected in ((0, 2, states[0]["cpu"]), (1, 2, states[1]["cpu"]), (1, 3, None)):
        torch.manual_seed(7)
        anew = torch.get_rng_state()
        restore(saved, model, optimizer, Group(rank, world_size, rank, world_size, torch.device("cpu")))
        assert torch.equal(torch.get_rng_state(), anew if expected is None else expected)


@pytest.mark.timeout(60)
def test_a_finished_run_that_may_only_be_read_says_how_it_ended(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = train(tiny_config, cpu, plan(tiny_config, 1))

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(saving, "remove_unfinished", refuse)
    assert train(tiny_config, cpu, plan(tiny_config, 1)) == metrics
