"""The outputs of a pipeline as torch tensors, which may be kept, dropped and used like any others.

On the CPU they share DALI's buffers: DALI does not use a buffer again while a tensor made from it lives. On a GPU they
are copies. If they shared buffers there, too, each tensor that is dropped would make a thread of DALI wait for all work
queued on the device (its DLPack deleter calls cudaDeviceSynchronize), which holds buffers back, and may keep a core
busy and break the capture of a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from nvidia.dali import Pipeline
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor

__all__ = ["Runner", "shut_down"]


AfterGraph = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def _stream(device_id: int) -> torch.cuda.Stream:
    """The stream that all loaders of a GPU share: torch reuses memory freed on a stream for that stream alone."""
    return torch.cuda.Stream(device_id)


class Runner:
    """Runs pipelines of one device: the GPU device_id, or the CPU if that is None."""

    def __init__(self, device_id: int | None) -> None:
        self._stream = None if device_id is None else _stream(device_id)

    def __call__(self, pipeline: Pipeline, augment: AfterGraph | None = None) -> list[Tensor]:
        """The outputs of the pipeline's next run, which must be dense.

        On a GPU, outputs that the graph leaves on the CPU are moved to the GPU, unless they are bytes; all are ready
        for torch's current stream. augment is called with the first output, images, and the last, numbers: its result
        replaces the first, and the last is left out.
        """
        # Called without a stream, run() returns when the batch is finished: the time in it is the time spent waiting.
        outputs = pipeline.run()
        if self._stream is None:
            return _augmented([torch.from_dlpack(output.as_tensor()) for output in outputs], augment)
        # On the current stream the copies, which hold DALI's buffers, would wait for the training step before them.
        current = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            tensors = _augmented([_copy(output, self._stream) for output in outputs], augment)
        current.wait_stream(self._stream)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)
        return tensors


def _augmented(tensors: list[Tensor], augment: AfterGraph | None) -> list[Tensor]:
    if augment is None:
        return tensors
    images, *others, numbers = tensors
    return [augment(images, numbers), *others]


def _copy(output: TensorListCPU | TensorListGPU, stream: torch.cuda.Stream) -> Tensor:
    if isinstance(output, TensorListCPU):
        tensor = torch.from_numpy(output.as_array())
        # Files' bytes are inspected on the CPU; labels and uniforms are needed on the GPU. If the graph copied labels
        # and uniforms there, a thread of DALI would wait for all that the decoder has queued.
        return tensor if tensor.dtype == torch.uint8 else tensor.pin_memory().to(stream.device, non_blocking=True)
    source = output.as_tensor()
    target = torch.empty(source.shape(), dtype=to_torch_type[source.dtype], device=stream.device)
    return feed_ndarray(source, target, cuda_stream=stream)


def shut_down(pipelines: Sequence[Pipeline]) -> None:
    """Stops pipelines that are no longer needed and frees their memory, even if something still refers to them.

    An error's traceback may do so.
    """
    for pipeline in pipelines:
        getattr(pipeline, "_shutdown", lambda: None)()  # what DALI itself calls when a pipeline is freed
    ReleaseUnusedMemory()  # else DALI's pools keep memory that, on a GPU, the model may need
