"""The evaluation graph: file -> whole image -> smaller side resized -> central crop, uint8 [S, S, 3]."""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipelines import crop
from pipelines.crop import Decoder
from pipelines.order import EvalOrder
from pipelines.readers import NUM_LAST_BYTES, EvalSource, Samples, read

__all__ = ["MAX_ASPECT_RATIO", "eval_pipeline"]

# A JPEG of 65,000 x 1 pixels would be scaled up to 256 times its sides, 12 GB.
MAX_ASPECT_RATIO = 100
"""Longer / shorter side up to which `eval_pipeline` resizes as it should; from 256 / 224 times as much on it fails."""


@pipeline_def
def _eval_graph(source: EvalSource, image_size: int, decoder: Decoder, device: str) -> Any:
    encoded, labels = read(source)
    images = crop.decode(encoded, crop.image_size(encoded), device=device, decoder=decoder)
    shorter = round(image_size * 256 / 224)
    images = fn.resize(
        images,
        resize_shorter=shorter,
        max_size=shorter * MAX_ASPECT_RATIO,  # a longer image ends up too small for the crop, which then fails
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        subpixel_scale=False,  # the reference stretches to whole pixels
    )
    images = fn.crop(images, crop=(image_size, image_size), rounding="truncate")
    return images, labels, encoded[-NUM_LAST_BYTES:]


def eval_pipeline(
    samples: Samples,
    order: EvalOrder,
    *,
    image_size: int,
    decoder: Decoder,
    device_id: int | None,
    num_threads: int,
    start_batch: int = 0,
    bad: np.ndarray | None = None,
    prefetch_queue_depth: int = 2,
) -> Pipeline:
    """The evaluation pipeline, not built yet: run k gives batch start_batch + k, then StopIteration.

    It runs on the GPU device_id, on the CPU if that is None, with num_threads CPU threads either way, and gives
    images uint8 [b, image_size, image_size, 3] and, on the CPU, labels int64 [b] and the last bytes of the encoded
    images uint8 [b, NUM_LAST_BYTES], with b = order.batch_size; label -1 marks padding, and the grey images that
    replace the samples marked in bad, bool [N]. The smaller side is resized to image_size * 256 / 224. Tested against
    tests/reference/eval_preprocess.npz.
    """
    return _eval_graph(
        EvalSource(samples, order, start_batch, bad),
        image_size,
        decoder,
        "cpu" if device_id is None else "gpu",
        batch_size=order.batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch_queue_depth,
    )
