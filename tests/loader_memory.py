"""Python memory of the training loader, in a process of its own:

    python -m tests.loader_memory IMAGE COUNT...

Standard output is a JSON object for each count, in bytes beyond the index: `settled`, after a new epoch has begun;
`peak`, the most until then; and `grown`, the increase over 40 further steps.

Tracing begins after the imports, whose time it would double, and lasts to the end of the process: stopping it while a
thread of DALI waits for the GIL in an allocation causes a segmentation fault in CPython before 3.13 (gh-128679).
"""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np

from pipelines import order
from pipelines.loader import TrainLoader
from pipelines.readers import FileList

BATCH = 16


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def used(image: Path, count: int) -> dict[str, int]:
    """The loader's memory for a training set that is one image, count times."""
    path = np.frombuffer(str(image).encode(), np.uint8)
    lengths = np.full(count, len(path), np.int32)
    files = FileList(path, np.zeros(count, np.int64), lengths, np.zeros(count, np.int64))
    options = {"batch_size": BATCH, "image_size": 16, "seed": 0, "rank": 0, "world_size": 1}
    order._permutation.cache_clear()
    before = traced()
    tracemalloc.reset_peak()
    train = TrainLoader(files, device="cpu", num_threads=1, start_step=count // BATCH - 10, **options)
    for _ in range(30):
        next(train)
    settled, peak = traced() - before, tracemalloc.get_traced_memory()[1] - before
    for _ in range(40):
        next(train)
    grown = traced() - before - settled
    train.close()
    return {"settled": settled, "peak": peak, "grown": grown}


if __name__ == "__main__":
    tracemalloc.start()
    for number in sys.argv[2:]:
        print(json.dumps(used(Path(sys.argv[1]), int(number))))
