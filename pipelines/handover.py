"""What a pipeline gives, as torch tensors that may be kept, dropped and used like others.

On the CPU they share DALI's buffers: DALI hands none out again while a tensor lives that was made from it. On a GPU
they are copies. Shared there, too, each tensor that is dropped would make a thread of DALI wait for all that is queued
on the device (its DLPack deleter calls cudaDeviceSynchronize), which holds buffers back, and may keep a core busy and
break the capture of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nvidia.dali import Pipeline
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from nvidia.dali.tensors import TensorListCPU, TensorListGPU
from torch import Tensor

__all__ = ["Runner", "shut_down"]


class Runner:
    """Runs pipelines of one device, of the GPU device_id or of the CPU if that is None."""

    def __init__(self, device_id: int | None) -> None:
        self._stream = None if device_id is None else torch.cuda.Stream(device_id)

    def __call__(self, pipeline: Pipeline) -> list[Tensor]:
        """The outputs of the next run, which must be dense; on a GPU they are ready for torch's current stream."""
        # Without a stream run() returns when the batch is finished, so that the time in it is the time spent waiting.
        outputs = pipeline.run()
        if self._stream is None:
            return [torch.from_dlpack(output.as_tensor()) for output in outputs]
        # What RandAugment's node wrote is freed on the pipeline's stream, which waits for the copy. There is one by
        # default; with stream_policy=PER_OPERATOR it might be written to while it is read.
        # In the current stream the copies, and with them DALI's buffers, would wait for the training step before.
        current = torch.cuda.current_stream(self._stream.device)
        with torch.cuda.stream(self._stream):
            tensors = [_copy(output, self._stream) for output in outputs]
        current.wait_stream(self._stream)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(current)
        return tensors


def _copy(output: TensorListCPU | TensorListGPU, stream: torch.cuda.Stream) -> Tensor:
    if isinstance(output, TensorListCPU):
        return torch.from_numpy(output.as_array())
    source = output.as_tensor()
    target = torch.empty(source.shape(), dtype=to_torch_type[source.dtype], device=stream.device)
    return feed_ndarray(source, target, cuda_stream=stream)


def shut_down(pipelines: Sequence[Pipeline]) -> None:
    """Stops pipelines that are of no use any more and frees their memory, whoever still holds them.

    An error's traceback may; and one that the garbage collector frees in a thread of another pipeline, within
    RandAugment's node, waits there for a thread of its own that waits for that node.
    """
    for pipeline in pipelines:
        getattr(pipeline, "_shutdown", lambda: None)()  # what DALI itself calls when a pipeline is freed
    ReleaseUnusedMemory()  # else DALI's pools keep it, on a GPU from the model
