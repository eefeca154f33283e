#!/usr/bin/env python3
"""What the CPU does for a training image besides decoding: the order, reading the file, its size, the crop's window.

    tools/measure_input.py --data PATH --batch-size 128 --threads 8

With a GPU this is what is left to the CPU, so its rate bounds the loader's; measuring it takes no GPU. Not included is
the Huffman decoding that nvJPEG does on the CPU, for JPEGs that the GPU's own engine does not take.
Files are in the page cache once they have been read. Of an image in a shard only the two ends are read here, as the
decoder would read the rest: the rates of shards and of files are not to be compared.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmark import command  # first, see there

from pipelines.words import one_line

# isort: split

import numpy as np
from benchmark import report
from nvidia.dali import Pipeline, pipeline_def

from dali_vit import data as datasets
from dali_vit.config import UserError
from dali_vit.environment import cpu_count, describe_environment
from dali_vit.loaders import allow_open_files
from dali_vit.validation import MAX_THREADS, check_range
from pipelines import crop
from pipelines.handover import shut_down
from pipelines.order import TrainOrder
from pipelines.readers import NUM_LAST_BYTES, TrainSource
from pipelines.train import Augment, draw, numbers_drawn

WINDOW_SECONDS = 1.0
IMAGE_SIZE = 224


@pipeline_def
def _graph(source: TrainSource, augment: Augment, region: str) -> Any:
    drawn = draw(source, augment)
    if region == "window":
        to_decoder = crop.start_unless_too_large(drawn.start, drawn.size)
    else:
        to_decoder = crop.refuse_too_large(drawn.encoded, drawn.size, "gpu")
    width = crop.width_to_resize_to(drawn.mirror, IMAGE_SIZE)
    last_bytes = drawn.encoded[-NUM_LAST_BYTES:]
    return drawn.labels, drawn.start, drawn.window, width, drawn.uniforms, last_bytes, to_decoder


@command.telling_mistakes("measure_input.py")
def main() -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--data", required=True, help="as for dali-vit train")
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=cpu_count(), help="DALI's; default: the machine's cores")
    parser.add_argument(
        "--region", choices=crop.REGIONS, default="window", help="what the GPU decodes; default: %(default)s"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="time measured; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    check_range("--batch-size", arguments.batch_size, 1)
    check_range("--threads", arguments.threads, 1, MAX_THREADS)
    report.check_seconds(arguments.seconds)
    report.check_json(arguments.json)
    samples = datasets.load_dataset(arguments.data, minival=0.0).split("train")
    allow_open_files(samples, arguments.batch_size)
    augment = Augment()
    source = TrainSource(samples, TrainOrder(len(samples), arguments.batch_size, 0, 1, seed=0), numbers_drawn(augment))
    pipeline = _graph(
        source,
        augment,
        arguments.region,
        batch_size=arguments.batch_size,
        num_threads=arguments.threads,
        device_id=None,
    )
    try:
        measured = measure(pipeline, arguments.batch_size, arguments.seconds)
    except RuntimeError as error:  # of DALI, most likely at an image's size
        shut_down([pipeline])  # its threads may be at other images still, and print what is wrong with them
        cause = str(error).rpartition("encountered:")[2].partition("Current pipeline object")[0]
        reason = one_line(cause or error)[:200]
        raise UserError(
            f"--data {arguments.data}: cannot be loaded ({reason}); if an image is at fault,"
            f" `dali-vit verify {arguments.data}` names it"
        ) from error
    result = {
        "environment": describe_environment(),
        "threads": arguments.threads,
        "region": arguments.region,
        **measured,
    }
    print(
        f"{result['images_per_sec']:,.0f} images/s; {result['cpu_us']:.1f} us of CPU time an image,"
        f" {result['python_us']:.1f} of them in Python's thread"
    )
    if arguments.json is not None:
        report.write_json(arguments.json, result)


def measure(pipeline: Pipeline, batch_size: int, seconds: float) -> dict[str, float]:
    """Images/s, and microseconds of CPU time an image, of all threads and of this one: medians over 1 s windows."""
    clocks = (time.perf_counter, time.process_time, time.thread_time)
    windows: list[list[float]] = []
    while len(windows) < 1 + max(1, round(seconds / WINDOW_SECONDS)):
        began, count = [clock() for clock in clocks], 0
        while time.perf_counter() - began[0] < WINDOW_SECONDS:
            pipeline.run()
            count += batch_size
        windows.append([(clock() - start) / count for clock, start in zip(clocks, began, strict=True)])
    wall, cpu, python = np.median(windows[1:], axis=0).tolist()  # the first warms up
    return {"images_per_sec": 1 / wall, "cpu_us": 1e6 * cpu, "python_us": 1e6 * python}


if __name__ == "__main__":
    command.run(main)
