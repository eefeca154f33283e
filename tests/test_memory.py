"""Memory of the data path: the index and ten bytes a sample, however long a run lasts."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import pipeline_def

from pipelines import order, readers
from pipelines.loader import TrainLoader
from pipelines.order import EvalOrder
from pipelines.readers import EvalSource, FileList
from tests.datasets import encode

BATCH = 16


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def used(image: Path, count: int) -> tuple[int, int, int]:
    """Bytes beyond the index when epochs meet, at the most on the way there, and what 40 further steps add."""
    path = np.frombuffer(str(image).encode(), np.uint8)
    lengths = np.full(count, len(path), np.int32)
    files = FileList(path, np.zeros(count, np.int64), lengths, np.zeros(count, np.int64))
    options = {"batch_size": BATCH, "image_size": 16, "seed": 0, "rank": 0, "world_size": 1}
    order._permutation.cache_clear()
    tracemalloc.start()
    before = traced()
    train = TrainLoader(files, device="cpu", num_threads=1, start_step=count // BATCH - 10, **options)
    for _ in range(30):
        next(train)
    settled, peak = traced() - before, tracemalloc.get_traced_memory()[1] - before
    for _ in range(40):
        next(train)
    grown = traced() - before - settled
    tracemalloc.stop()
    train.close()
    return settled, peak, grown


@pytest.mark.timeout(120)
def test_memory_beyond_the_index_does_not_depend_on_the_number_of_samples(tmp_path: Path) -> None:
    """Two permutations of four bytes where epochs meet, two marks of a byte: all that is held for each sample."""
    image = tmp_path / "image.jpg"
    image.write_bytes(encode(np.zeros((20, 30, 3), np.uint8)))
    used(image, 1000)  # what is made once a process
    few, most_few, _ = used(image, 10_000)
    many, most_many, grown = used(image, 1_010_000)
    assert abs((many - few) / 1_000_000 - 10) < 0.2
    assert (most_many - most_few) / 1_000_000 < 12.2
    assert abs(grown) < 100_000


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
