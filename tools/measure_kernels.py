"""CPU time an image of what the training graph does to its pixels: DALI's operators beside the compiled ones.

    python tools/measure_kernels.py

Every operation runs in a DALI pipeline of one thread on the same batch of smooth noise, 224 x 224 pixels, resize on
windows drawn uniformly in area from 456 x 402. The least of many runs, less that of a pipeline that only hands the
batch on.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from PIL import Image

from pipelines import compiled
from pipelines.randaugment import OPS, apply_op

SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--magnitude", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    squares = [noise(rng, SIZE, SIZE) for _ in range(arguments.batch_size)]
    windows = [noise(rng, *window(rng, 402, 456)) for _ in range(arguments.batch_size)]
    pipelines: dict[tuple[str, bool | None], Pipeline] = {
        ("resize", None): pipeline(windows, "hand on"),
        ("operation", None): pipeline(squares, "hand on"),
    }
    for made in (False, True):
        pipelines["resize", made] = pipeline(windows, "resize", made)
        for name in OPS:
            pipelines[name, made] = pipeline(squares, name, made, arguments.magnitude)
    least = dict.fromkeys(pipelines, float("inf"))
    for _ in range(arguments.repeats):
        for key, runs in pipelines.items():
            least[key] = min(least[key], seconds(runs))
    print("microseconds an image    DALI's operators   compiled")
    for name in ("resize", *OPS):
        empty = least["resize" if name == "resize" else "operation", None]
        theirs, ours = (1e6 * (least[name, made] - empty) / arguments.batch_size for made in (False, True))
        print(f"{name:24} {theirs:16.0f} {ours:10.0f}")


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def window(rng: np.random.Generator, height: int, width: int) -> tuple[int, int]:
    """Height and width of a window of 5 to 100 % of the area, ratio 0.75 to 1.33."""
    while True:
        ratio, area = rng.uniform(0.75, 1.33), rng.uniform(0.05, 1) * height * width
        h = round((area / ratio) ** 0.5)
        if h <= height and round(h * ratio) <= width:
            return h, round(h * ratio)


@pipeline_def(num_threads=1, device_id=None)
def _graph(images: list[np.ndarray], name: str, made: bool, magnitude: float) -> Any:
    node = fn.external_source(lambda _: images, layout="HWC")
    if name == "hand on":
        return node
    if name == "resize":
        if made:
            return compiled.resize(node, None, size=SIZE, antialias=True)
        return fn.resize(node, resize_y=SIZE, resize_x=SIZE, interp_type=types.INTERP_LINEAR, antialias=True)
    return apply_op(node, name, image_size=SIZE, magnitude=magnitude, compiled=made)


def pipeline(images: list[np.ndarray], name: str, made: bool = False, magnitude: float = 10) -> Pipeline:
    return _graph(images, name, made, magnitude, batch_size=len(images))


def seconds(pipeline: Pipeline) -> float:
    """CPU seconds of a batch, of all threads."""
    for _ in range(3):
        pipeline.run()
    began = time.process_time()
    for _ in range(6):
        pipeline.run()
    return (time.process_time() - began) / 6


if __name__ == "__main__":
    main()
