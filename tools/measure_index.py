#!/usr/bin/env python3
"""Start-up time and memory of the data path on a made-up image folder of as many files as asked for.

    python tools/measure_index.py --folder /data/scratch --images 130000 1300000

The files are hard links to a few small JPEGs, so a million of them take no disk space but that of folders; they are
removed afterwards. Times are with a warm page cache. Each measurement is made in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark import command  # first, see there

# isort: split

import numpy as np
from benchmark import report
from PIL import Image

from dali_vit.config import UserError
from dali_vit.validation import check_range

_SOURCES = 40  # JPEGs to link to, as ext4 allows a file 65,000 links


@command.telling_mistakes("measure_index.py")
def main() -> None:
    parser = command.Parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to make the files; default: %(default)s"
    )
    parser.add_argument(
        "--images", type=int, nargs="+", default=[130_000, 1_300_000], help="sizes to measure; default: 130000 1300000"
    )
    parser.add_argument("--classes", type=int, default=1000, help="class folders; default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="training batches to load; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    check_range("--classes", arguments.classes, 1)
    check_range("--steps", arguments.steps, 1)
    for images in arguments.images:
        check_range("--images", images, arguments.classes, 60_000 * _SOURCES)
    check_range("--batch-size", arguments.batch_size, 1, min(arguments.images))
    report.check_json(arguments.json)
    results = []
    for images in arguments.images:
        try:
            root = Path(tempfile.mkdtemp(prefix="measure-index-", dir=arguments.folder))
        except OSError as error:
            raise UserError(f"--folder {arguments.folder}: {error.strerror}; choose another") from error
        try:
            _link(root, images, arguments.classes)
            time.sleep(3)  # an index is kept only of folders that have not changed for a while
            result: dict[str, float] = {"images": images}
            result |= {"start s, listing the images": _alone(_start, root)}
            result |= {"start s, reading the index": _alone(_start, root)}
            result |= _alone(_load, root, arguments.steps, arguments.batch_size)
        finally:
            shutil.rmtree(root)
        results.append(result)
        for name, value in result.items():
            print(f"{name:<34} {value:>14,}" if isinstance(value, int) else f"{name:<34} {value:>14.2f}")
        print(flush=True)
    if arguments.json:
        report.write_json(arguments.json, results)


def _link(root: Path, images: int, classes: int) -> None:
    """Makes `train/<class>/*`, links that take turns in pointing to small JPEGs of noise."""
    rng = np.random.default_rng(0)
    for i in range(_SOURCES):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(root / f"{i}.jpg")
    for c, numbers in enumerate(np.array_split(np.arange(images), classes)):
        folder = root / "train" / f"n{c:08d}"
        folder.mkdir(parents=True)
        for i in numbers.tolist():
            os.link(root / f"{i % _SOURCES}.jpg", folder / f"{folder.name}_{i}.JPEG")


def _alone(function: Any, *arguments: Any) -> Any:
    """The function's result, from a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _start(root: Path) -> float:
    """Seconds to load a data set, split it, check its images and hash its names, as a run does when it starts."""
    from dali_vit import data, names

    began = time.perf_counter()
    train = data.load_dataset(root).split("train")
    data.check_images(train)
    names.fingerprint(train, root / "train")
    return time.perf_counter() - began


def _load(root: Path, steps: int, batch_size: int) -> dict[str, float]:
    """The index's bytes an image; resident MiB added by it, and by the loader after 1/3 and all of the steps."""
    from dali_vit import data
    from pipelines.loader import TrainLoader
    from pipelines.readers import FileList

    before = _resident()
    train = data.load_dataset(root).split("train")
    assert isinstance(train, FileList)
    indexed = _resident()
    options: dict[str, Any] = {"image_size": 32, "rank": 0, "world_size": 1, "device": "cpu", "num_threads": 1}
    loader = TrainLoader(train, batch_size=batch_size, seed=0, **options)
    for _ in range(steps // 3):
        next(loader)
    first = _resident()
    for _ in range(steps - steps // 3):
        next(loader)
    last = _resident()
    return {
        "index bytes an image": sum(c.nbytes for c in (train.buffer, train.starts, train.lengths, train.labels))
        / len(train),
        "index MiB": indexed - before,
        f"loader MiB after {steps // 3} steps": first - indexed,
        f"loader MiB after {steps} steps": last - indexed,
    }


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the files are removed
    command.run(main)
