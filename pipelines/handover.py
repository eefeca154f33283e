"""What a pipeline gives, as torch tensors that may be kept, dropped and used like others.

On the CPU they share DALI's buffers: DALI hands none out again while a tensor lives that was made from it. On a GPU
they are copies. Shared there, too, each tensor that is dropped would make a thread of DALI wait for all that is queued
on the device (its DLPack deleter calls cudaDeviceSynchronize), which holds buffers back, and may keep a core busy and
break the capture of a CUDA graph.
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
    """One for all loaders of a GPU: what torch keeps of memory freed on a stream is of use to that stream alone."""
    return torch.cuda.Stream(device_id)


class Runner:
    """Runs pipelines of one device, of the GPU device_id or of the CPU if that is None."""

    def __init__(self, device_id: int | None) -> None:
        self._stream = None if device_id is None else _stream(device_id)

    def __call__(self, pipeline: Pipeline, augment: AfterGraph | None = None) -> list[Tensor]:
        """The outputs of the next run, which must be dense.

        On a GPU, all but bytes that the graph gives on the CPU are moved there, ready for torch's current stream.
        augment takes the first of them, images, and the last, numbers; what it makes of both replaces the first.
        """
        # Without a stream run() returns when the batch is finished, so that the time in it is the time spent waiting.
        outputs = pipeline.run()
        if self._stream is None:
            return _augmented([torch.from_dlpack(output.as_tensor()) for output in outputs], augment)
        # In the current stream the copies, and with them DALI's buffers, would wait for the training step before.
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
        # Files' bytes are looked at on the CPU; labels and uniforms are not. Were the graph to copy these, a thread of
        # DALI would wait for all that the decoder has queued.
        return tensor if tensor.dtype == torch.uint8 else tensor.pin_memory().to(stream.device, non_blocking=True)
    source = output.as_tensor()
    target = torch.empty(source.shape(), dtype=to_torch_type[source.dtype], device=stream.device)
    return feed_ndarray(source, target, cuda_stream=stream)


def shut_down(pipelines: Sequence[Pipeline]) -> None:
    """Stops pipelines that are of no use any more and frees their memory, whoever still holds them.

    An error's traceback may.
    """
    for pipeline in pipelines:
        getattr(pipeline, "_shutdown", lambda: None)()  # what DALI itself calls when a pipeline is freed
    ReleaseUnusedMemory()  # else DALI's pools keep it, on a GPU from the model
