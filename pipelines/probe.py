"""Which samples cannot be decoded: each is tried alone, as a pipeline's error does not always name the sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, pipeline_def

from pipelines import crop
from pipelines.crop import Decoder
from pipelines.handover import shut_down
from pipelines.order import EvalOrder
from pipelines.readers import PLACEHOLDER, EvalSource, FileList, Samples, read

__all__ = ["LackOfMemory", "MakePipeline", "check_memory", "decode_pipeline", "decodes_good_images", "try_samples"]

MakePipeline = Callable[[Samples, EvalOrder], Pipeline]

# Messages of DALI's allocators, of CUDA, of nvJPEG and, where RandAugment runs behind the graph, of torch and Triton.
_LACK_OF_MEMORY = re.compile(
    r"Can't allocate \d+ bytes on device|CUDA allocation failed|cudaErrorMemoryAllocation|ALLOCATOR_FAIL"
    r"|CUDA (error: )?out of memory|\[CUDA\]: out of memory"
)

# Samples tried at once; those of a batch that fails are then tried one by one. A failed pipeline cannot be used again,
# and making a new one takes as long as decoding about this many images.
_BATCH_SIZE = 16


class LackOfMemory(RuntimeError):
    """A GPU's memory is too small for a batch and the buffers that it takes to make it."""


def check_memory(error: RuntimeError) -> None:
    """Raises LackOfMemory if a pipeline failed for lack of memory, so that none of its samples is to blame."""
    if _LACK_OF_MEMORY.search(str(error)):
        raise LackOfMemory(str(error)) from error


@pipeline_def
def _decode_graph(source: EvalSource, decoder: Decoder, device: str) -> Any:
    encoded, labels = read(source)
    return crop.decode(encoded, crop.image_size(encoded), device=device, decoder=decoder)[0, 0], labels


def decode_pipeline(
    samples: Samples, order: EvalOrder, *, decoder: Decoder, device_id: int | None, num_threads: int
) -> Pipeline:
    """A pipeline that reads and decodes whole images; it gives one pixel and the label of each."""
    return _decode_graph(
        EvalSource(samples, order),
        decoder,
        "cpu" if device_id is None else "gpu",
        batch_size=order.batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,
    )


def decodes_good_images(make: MakePipeline) -> bool:
    """Whether a good image decodes; if not, failed samples are not to blame, but a lost device or a lack of threads."""
    good = FileList.from_paths([str(PLACEHOLDER)], [0])
    return all(decodes for _, decodes in try_samples(good, make))


def try_samples(samples: Samples, make: MakePipeline, batch_size: int = _BATCH_SIZE) -> Iterator[tuple[int, bool]]:
    """Yields each sample's place in the collection and whether its pipeline runs, in order; may raise LackOfMemory."""
    start = 0
    while start < len(samples):
        rest = samples.subset(np.arange(start, len(samples)))
        pipeline = make(rest, EvalOrder(len(rest), batch_size, 0, 1))
        try:
            failed = False
            while start < len(samples) and not failed:
                tried = np.arange(start, min(start + batch_size, len(samples)))
                try:
                    pipeline.run()
                except RuntimeError as error:
                    check_memory(error)
                    failed = True
                if failed and batch_size > 1:
                    alone = try_samples(samples.subset(tried), make, batch_size=1)
                    yield from ((start + i, decodes) for i, decodes in alone)
                else:
                    yield from ((int(i), not failed) for i in tried)
                start += len(tried)
        finally:
            shut_down([pipeline])
