"""Small data sets and settings for runs that take a second."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# Set before torch is imported. The models are so small that a second thread makes nothing faster; and with two threads,
# on two cores that other processes used, too, a test of 9 s once took more than two minutes: probably because threads
# spin while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without this, torch.compile's first use on a machine takes 15 s to build programs that see which of the processor's
# vector instructions work.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import numpy as np
import pytest
from PIL import Image

from dali_vit.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from dali_vit.distributed import Group

gc.set_threshold(10_000, 10, 1_000)  # as in `process.run`: saves a sixth of the time of all tests

needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on the CPU"
)

CLASSES = ("ant", "bee", "cat", "dog")
TRAIN_PER_CLASS, VAL_PER_CLASS = 15, 7

TINY_MODEL = ["--model", "Ti/8", "--width", "32", "--depth", "1", "--num-heads", "2", "--mlp-dim", "64"]
TINY = [*TINY_MODEL, "--resolution", "32", "--batch-size", "8", "--warmup-steps", "2", "--randaug-magnitude", "2"]


def write_image_folder(root: Path, train: int = TRAIN_PER_CLASS, val: int = VAL_PER_CLASS) -> Path:
    """Writes JPEGs of 40 to 89 pixels a side: noise around a brightness that tells the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(40, 90, 2)
                pixels = rng.integers(0, 100, (height, width, 3)) + 50 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undoes what a test that calls the command line in this process does to the package's logger."""
    logger = logging.getLogger("dali_vit")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def cpu() -> Group:
    import torch

    return Group(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def tiny_config(image_folder: Path, tmp_path: Path) -> Config:
    """12 steps of batch 8 on the image folder, a transformer of one block, a checkpoint every 5 steps."""
    return Config(
        DataConfig(data=str(image_folder), resolution=32, minival=0.1, randaug_magnitude=2.0),
        ModelConfig(model="Ti/8", width=32, depth=1, num_heads=2, mlp_dim=64),
        OptimConfig(epochs=None, steps=12, batch_size=8, warmup_steps=2),
        RunConfig(name="tiny", runs_dir=tmp_path, gpus=0, threads=1, log_every=1, eval_every=0, checkpoint_every=5),
    )


@pytest.fixture
def hang_up_is_minded() -> Iterator[None]:
    """Makes SIGHUP effective in processes under test: under `nohup` they would inherit that it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def ctrl_c_is_minded() -> Iterator[None]:
    """Makes SIGINT effective in processes under test: in a script's background they inherit that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def environment() -> dict[str, str]:
    """Environment of a process under test: no variables of a launcher, and one thread a process."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Calls the command line in this process; returns the exit code and what was written to stdout and stderr."""
    from dali_vit import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in the repository's root; it must succeed."""
    command = [sys.executable, *map(str, arguments)]
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment(), check=False)
    assert ran.returncode == 0, ran.stderr
    return ran


def run_interpreted(name: str, timeout: float) -> int:
    """Runs a file of tests/interpreted with Triton's interpreter on the CPU; returns the number of tests, as all pass.

    It runs in a process of its own because TRITON_INTERPRET=1 must be set before torch is imported.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/interpreted/{name}"]
    tests = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**environment(), "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    passed = re.search(r"^(\d+) passed(, \d+ warnings?)? in", tests.stdout, re.MULTILINE)
    assert passed, tests.stdout + tests.stderr
    return int(passed[1])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last_scalars(run_dir: Path) -> dict[str, float]:
    """All that a run has logged at its last step, scalars by name."""
    lines = read_metrics(run_dir)
    return {name: value for line in lines if line["step"] == lines[-1]["step"] for name, value in line.items()}
