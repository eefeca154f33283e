"""The outputs of a pipeline as torch tensors, which may be kept, dropped and used like any others.

On the CPU they share DALI's buffers: DALI does not use a buffer again while a tensor made from it lives. On a GPU they
are copies, or computed from DALI's buffers. If they shared buffers there, too, each tensor that is dropped would make a
thread of DALI wait for all work queued on the device (its DLPack deleter calls cudaDeviceSynchronize), which holds
buffers back, and may keep a core busy and break the capture of a CUDA graph. DALI's own copy (`feed_ndarray`) would
wait for all that DALI has queued by then, the next batches included, and DALI would wait for the copy.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from nvidia.dali import Pipeline
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor

__all__ = ["Runner", "shut_down"]


AfterGraph = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def _stream(device_id: int) -> torch.cuda.Stream:
    """The stream that all loaders of a GPU share: torch reuses memory freed on a stream for that stream alone.

    Its few short kernels go before those of a training step, behind which DALI's buffers would wait for them.
    """
    return torch.cuda.Stream(device_id, priority=-1)


class Runner:
    """Runs pipelines of one device: the GPU device_id, or the CPU if that is None."""

    def __init__(self, device_id: int | None) -> None:
        self._stream = None if device_id is None else _stream(device_id)
        self._in_use: deque[tuple[torch.cuda.Event, Any]] = deque()  # DALI's buffers, until their event has come

    def __call__(self, pipeline: Pipeline, augment: AfterGraph | None = None) -> list[Tensor]:
        """The outputs of the pipeline's next run, which must be dense; all but the first, images, are on the CPU.

        On a GPU, outputs that the graph leaves on the CPU are moved to the GPU, unless they are bytes; all are ready
        for torch's current stream. augment is called with the first output, images, and the last, numbers: its result
        replaces the first, and the last is left out.
        """
        while self._in_use and self._in_use[0][0].query():
            self._in_use.popleft()
        # Called without a stream, run() returns when the batch is finished: the time in it is the time spent waiting.
        outputs = pipeline.run()
        if self._stream is None:
            return _augmented([torch.from_dlpack(output.as_tensor()) for output in outputs], augment)
        # On the current stream what reads DALI's buffers, and so holds them, would wait for the training step before.
        current = torch.cuda.current_stream(self._stream.device)
        try:
            with torch.cuda.stream(self._stream):
                images, *others = (_moved(output, self._stream.device) for output in outputs)
                tensors = [images.clone(), *others] if augment is None else _augmented([images, *others], augment)
                del images
        finally:  # what is queued reads them even if something fails
            with suppress(RuntimeError):  # of a GPU that has failed, whose error is on its way
                self._in_use.append((self._stream.record_event(), outputs))
        current.wait_stream(self._stream)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)
        return tensors

    def release(self) -> None:
        """Gives DALI's buffers back; waits for what reads them."""
        held, self._in_use = self._in_use, deque()
        with suppress(RuntimeError):  # a GPU that has failed says so to whoever uses it next
            for end, _ in held:
                end.synchronize()

    def shut_down(self, pipelines: Sequence[Pipeline]) -> None:
        """Stops pipelines whose outputs this has handed over, and frees their memory."""
        self.release()
        shut_down(pipelines)


def _augmented(tensors: list[Tensor], augment: AfterGraph | None) -> list[Tensor]:
    if augment is None:
        return tensors
    images, *others, numbers = tensors
    return [augment(images, numbers), *others]


def _moved(output: TensorListCPU | TensorListGPU, device: torch.device) -> Tensor:
    """An output on the device, in DALI's memory if it is there already."""
    if isinstance(output, TensorListGPU):
        return torch.as_tensor(output.as_tensor(), device=device)  # by __cuda_array_interface__: nothing is copied
    tensor = torch.from_numpy(output.as_array())
    # Files' bytes are inspected on the CPU; labels and uniforms are needed on the GPU. If the graph copied labels
    # and uniforms there, a thread of DALI would wait for all that the decoder has queued.
    return tensor if tensor.dtype == torch.uint8 else tensor.pin_memory().to(device, non_blocking=True)


def shut_down(pipelines: Sequence[Pipeline]) -> None:
    """Stops pipelines that are no longer needed and frees their memory, even if something still refers to them.

    An error's traceback may do so.
    """
    for pipeline in pipelines:
        with suppress(RuntimeError):  # as in `Runner.release`
            getattr(pipeline, "_shutdown", lambda: None)()  # what DALI itself calls when a pipeline is freed
    with suppress(RuntimeError):
        ReleaseUnusedMemory()  # else DALI's pools keep memory that, on a GPU, the model may need
