"""Memory of the data path: that of the index and ten bytes a sample, however long a run lasts."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import pipeline_def

from pipelines import readers
from pipelines.order import EvalOrder
from pipelines.readers import EvalSource, FileList
from tests.conftest import environment, python
from tests.datasets import encode


@pytest.mark.timeout(120)
def test_memory_beyond_the_index_does_not_depend_on_the_number_of_samples(tmp_path: Path) -> None:
    """Two permutations of four bytes where epochs meet, two marks of a byte: all that is held for each sample."""
    image = tmp_path / "image.jpg"
    image.write_bytes(encode(np.zeros((20, 30, 3), np.uint8)))
    counts = ["1000", "10000", "1010000"]  # the first makes what is made once a process
    ran = python("-m", "tests.loader_memory", image, *counts)
    _, few, many = map(json.loads, ran.stdout.splitlines())
    assert abs((many["settled"] - few["settled"]) / 1_000_000 - 10) < 0.2
    assert (many["peak"] - few["peak"]) / 1_000_000 < 12.2
    assert abs(many["grown"]) < 100_000


CLOSED = """
import gc, sys, weakref
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.readers import FileList

gc.disable()
files = FileList.from_paths(sys.argv[1:] * 8, range(8))
shared = {"batch_size": 4, "image_size": 16, "rank": 0, "world_size": 1, "device": "cpu", "num_threads": 2}
train, evaluation = TrainLoader(files, seed=0, **shared), EvalLoader(files, **shared)
next(train), list(evaluation)
pipelines = [weakref.ref(pipeline) for pipeline in [*train._pipelines, evaluation._idle]]
train.close(), evaluation.close()
print([pipeline() for pipeline in pipelines])
"""


@pytest.mark.timeout(120)
def test_nothing_keeps_the_pipelines_of_closed_loaders(tmp_path: Path) -> None:
    """On a GPU the next one wants their memory at once, before Python looks for cycles. In a process of its own, as
    the first loader imports what others find imported."""
    image = tmp_path / "image.jpg"
    image.write_bytes(encode(np.zeros((20, 30, 3), np.uint8)))
    command = [sys.executable, "-c", CLOSED, str(image)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "[None, None, None]\n"


@pytest.mark.timeout(120)
def test_what_was_read_is_forgotten(tmp_path: Path) -> None:
    """DALI keeps a note of each file that it has mapped into memory, which for 1.3 million are 330 MiB a process."""
    (tmp_path / "image").write_bytes(encode(np.zeros((8, 8, 3), np.uint8)))
    paths = [str(tmp_path / f"{i:05d}") for i in range(50_000)]
    for path in paths:
        os.link(tmp_path / "image", path)

    @pipeline_def(batch_size=50, num_threads=1, device_id=None)
    def graph(source: EvalSource):
        return tuple(readers.read(source))

    def resident_after(some: Sequence[str]) -> int:
        files = FileList.from_paths(some, np.zeros(len(some), np.int64))
        pipeline = graph(EvalSource(files, EvalOrder(len(files), 50, 0, 1)))
        for _ in range(len(files) // 50):
            pipeline.run()
        del pipeline
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    resident_after(paths[:10_000] * 5)
    before = resident_after(paths[:10_000] * 5)
    assert (resident_after(paths) - before) / 40_000 < 60  # bytes a file; memory maps take 265
