"""Several processes (gloo, on the CPU) train like one with the same global batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dali_vit import checkpoint
from tests.conftest import TINY, dali_vit, environment, read_metrics


def arguments(image_folder, runs_dir, name):
    return [
        *("train", "--data", str(image_folder), "--runs-dir", str(runs_dir), "--name", name, "--gpus", "0", *TINY),
        *("--steps", "20", "--threads", "1", "--log-every", "1", "--mixup-alpha", "0", "--randaug-layers", "0"),
        *("--eval-every", "0"),
    ]


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, "-m", "dali_vit", *command],
        capture_output=True,
        text=True,
        timeout=150,
        env=environment(),
        check=False,
    )


@pytest.mark.timeout(300)
def test_two_processes_train_like_one(image_folder, tmp_path):
    one = dali_vit(*arguments(image_folder, tmp_path, "one"))
    assert one.returncode == 0, one.stderr
    two = torchrun(2, *arguments(image_folder, tmp_path, "two"))
    assert two.returncode == 0, two.stderr

    losses = [[m["train/loss"] for m in read_metrics(tmp_path / n) if "train/loss" in m] for n in ("one", "two")]
    assert len(losses[0]) == len(losses[1]) == 20
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-5)
    finals = [checkpoint.newest(tmp_path / n) for n in ("one", "two")]
    # Counts of right answers do not depend on how the images are spread over processes.
    assert finals[0].metrics["val/top1"] == finals[1].metrics["val/top1"]
    assert finals[0].metrics["val/loss"] == pytest.approx(finals[1].metrics["val/loss"], abs=1e-5)


@pytest.mark.timeout(150)
def test_a_mistake_is_said_once_by_the_workers(image_folder, tmp_path):
    result = torchrun(2, *arguments(image_folder, tmp_path, "odd"), "--batch-size", "7")
    assert result.returncode != 0
    assert result.stderr.count("dali-vit: --batch-size 7: not divisible by 2 processes; use 8") == 1
    assert not (tmp_path / "odd").exists()
