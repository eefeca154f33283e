"""The evaluation graph: file -> whole image -> smaller side resized -> central crop, uint8 [S, S, 3]."""

from __future__ import annotations

from typing import Any

from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipelines import crop
from pipelines.crop import Decoder
from pipelines.order import EvalOrder
from pipelines.readers import EvalSource, FileList

__all__ = ["eval_pipeline"]


@pipeline_def
def _eval_graph(source: EvalSource, image_size: int, decoder: Decoder, device: str) -> Any:
    paths, labels = fn.external_source(source, num_outputs=2, batch=True, batch_info=True)
    images = crop.decode(fn.io.file.read(paths), device=device, decoder=decoder)
    images = fn.resize(
        images,
        resize_shorter=round(image_size * 256 / 224),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        subpixel_scale=False,  # the reference stretches to whole pixels
    )
    images = fn.crop(images, crop=(image_size, image_size), rounding="truncate")
    return images, labels.gpu() if device == "gpu" else labels


def eval_pipeline(
    samples: FileList,
    order: EvalOrder,
    *,
    image_size: int,
    decoder: Decoder,
    device_id: int | None,
    num_threads: int,
    prefetch_queue_depth: int = 2,
) -> Pipeline:
    """The evaluation pipeline, not built yet: run k gives batch k, then StopIteration after the last one.

    It runs on the GPU device_id, on the CPU if that is None, with num_threads CPU threads either way, and gives
    images uint8 [b, image_size, image_size, 3] and labels int64 [b] with b = order.batch_size; label -1 marks
    padding. The smaller side is resized to image_size * 256 / 224. Held to reference/eval_preprocess.npz.
    """
    return _eval_graph(
        EvalSource(samples, order),
        image_size,
        decoder,
        "cpu" if device_id is None else "gpu",
        batch_size=order.batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch_queue_depth,
    )
