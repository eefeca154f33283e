#!/usr/bin/env python3
"""Time an image takes in the training graph's operations on pixels: DALI's operators beside the compiled ones.

    tools/measure_kernels.py                             CPU time, on one thread
    tools/measure_kernels.py --gpu --batch-size 1024     time on a GPU
    tools/measure_kernels.py --size 8                    what RandAugment costs besides its pixels: the graph itself

Every operation, and the policy of two layers, runs in a DALI pipeline of its own on the same batch of smooth noise.
Resize is measured on the CPU alone, on windows drawn uniformly in area from images of 456 x 402 pixels. A figure is the
shortest time of many runs, less that of a pipeline that only hands the batch on. The kernels compiled for a GPU, which
run behind a pipeline, are timed by themselves.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

from benchmark import command  # first, see there

# isort: split

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from PIL import Image

from dali_vit.config import UserError
from dali_vit.validation import check_range
from pipelines import compiled
from pipelines.compiled_gpu import RandAugment
from pipelines.randaugment import (
    MAX_MAGNITUDE,
    NUM_UNIFORMS_PER_LAYER,
    OPS,
    apply_op,
    behind_graph,
    draw_of,
    rand_augment,
)

LAYERS = 2
POLICY = f"RandAugment, {LAYERS} layers"
WARM_UP, RUNS = 3, 6  # batches in a repetition: untimed, then timed
AHEAD = 2  # batches begun before the first is waited for


@command.telling_mistakes("measure_kernels.py")
def main() -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--gpu", action="store_true", help="on a GPU, by the clock; default: the CPU, by its own time")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels; default: %(default)s")
    parser.add_argument("--magnitude", type=float, default=10, help="of RandAugment, 0 to 10; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=8, help="runs of which the least counts; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        raise UserError("--gpu: no GPU is visible here; leave it out for the CPU")
    for flag in ("size", "batch_size", "repeats"):
        check_range(f"--{flag.replace('_', '-')}", getattr(arguments, flag), 1)
    if not 0 <= arguments.magnitude <= MAX_MAGNITUDE:
        raise UserError(f"--magnitude {arguments.magnitude:g}: must be from 0 to 10")
    rng = np.random.default_rng(0)
    squares = [noise(rng, arguments.size, arguments.size) for _ in range(arguments.batch_size)]
    names = [POLICY, *OPS] if arguments.size > 8 else [POLICY]

    def graph(name: str, made: bool, images: list[np.ndarray] = squares) -> Callable[[int], None]:
        shared: dict[str, Any] = {"batch_size": len(images), "device_id": 0 if arguments.gpu else None}
        pipeline = _graph(images, name, made, arguments.size, arguments.magnitude, arguments.gpu, **shared)
        return functools.partial(run, pipeline)

    def compiled_for_gpu(name: str) -> Callable[[int], None]:
        settings = {"image_size": arguments.size, "magnitude": arguments.magnitude, "contrast": "paper"}
        augment = behind_graph(0, layers=LAYERS, **settings)
        if augment is None:
            raise SystemExit(1)  # a warning has said why
        draws = policy_draws(len(squares)) if name == POLICY else np.tile(draw_of(name), (len(squares), 1))
        images, uniforms = (torch.from_numpy(array).cuda() for array in (np.stack(squares), draws))
        return functools.partial(run_on_gpu, augment, images, uniforms)

    empty: dict[str, Callable[[int], None]] = {name: graph("hand on", False) for name in names}
    pipelines: dict[tuple[str, bool], Callable[[int], None]] = {}
    for name in names:
        pipelines[name, False] = graph(name, False)
        pipelines[name, True] = compiled_for_gpu(name) if arguments.gpu else graph(name, True)
    if not arguments.gpu and arguments.size > 8:
        windows = [noise(rng, *window(rng, 402, 456)) for _ in range(arguments.batch_size)]
        empty["resize"] = graph("hand on", False, windows)
        pipelines |= {("resize", made): graph("resize", made, windows) for made in (False, True)}
        names.insert(0, "resize")

    clock = time.perf_counter if arguments.gpu else time.process_time
    least = {key: float("inf") for key in [*empty, *pipelines]}
    for _ in range(arguments.repeats):
        for key, batches in itertools.chain(empty.items(), pipelines.items()):
            least[key] = min(least[key], seconds(batches, clock))
    print("microseconds an image    DALI's operators   compiled")
    for name in names:
        handing_on = (least[name], 0.0 if arguments.gpu else least[name])
        rates = (1e6 * (least[name, made] - handing_on[made]) / arguments.batch_size for made in (False, True))
        print("{:24} {:16.2f} {:10.2f}".format(name, *rates))


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


def policy_draws(count: int) -> np.ndarray:
    return np.random.default_rng(1).random((count, LAYERS * NUM_UNIFORMS_PER_LAYER), np.float32)


@pipeline_def(num_threads=1, enable_conditionals=True)
def _graph(images: list[np.ndarray], name: str, made: bool, size: int, magnitude: float, on_gpu: bool) -> Any:
    # Copying all images to a GPU would take longer than what is measured: there the first image stands for all.
    node = (
        types.Constant(images[0], device="gpu", layout="HWC")
        if on_gpu
        else fn.external_source(lambda _: images, layout="HWC")
    )
    draws = policy_draws(len(images))
    uniforms = fn.external_source(lambda _: draws)
    if name == "hand on":
        return node, uniforms
    if name == "resize":
        if made:
            return compiled.resize(node, None, size=size, antialias=True), uniforms
        return fn.resize(node, resize_y=size, resize_x=size, interp_type=types.INTERP_LINEAR, antialias=True), uniforms
    if name == POLICY:
        return rand_augment(
            node, uniforms, image_size=size, magnitude=magnitude, layers=LAYERS, compiled=made
        ), uniforms
    return apply_op(node, name, image_size=size, magnitude=magnitude, compiled=made), uniforms


def seconds(batches: Callable[[int], None], clock: Callable[[], float]) -> float:
    """Seconds a batch, by `clock`, from an idle device to an idle one: no work is left for the next measurement."""
    batches(WARM_UP)
    began = clock()
    batches(RUNS)
    return (clock() - began) / RUNS


def run_on_gpu(augment: RandAugment, images: torch.Tensor, uniforms: torch.Tensor, times: int) -> None:
    for _ in range(times):
        augment(images, uniforms)
    torch.cuda.synchronize()


def run(pipeline: Pipeline, times: int) -> None:
    for begun in range(times + AHEAD):
        if begun >= AHEAD:
            pipeline.outputs()
        if begun < times:
            pipeline.schedule_run()


if __name__ == "__main__":
    command.run(main)
