"""`kernels.randaugment_gpu` as an operator of a DALI graph: all of RandAugment in one node instead of 340.

DALI calls a Python function with the addresses of a batch on the device, which queues the kernels on DALI's own stream.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode
from torch import Tensor

__all__ = ["available", "rand_augment"]

log = logging.getLogger("dali_vit.data")  # among the training's own messages


@functools.cache
def available(size: int) -> bool:
    """Whether Triton's kernels run here, on a GPU. The graph does without, more slowly, which is said once.

    Triton comes with torch, but needs a C compiler. The kernels for images of this size are compiled on the way, which
    takes seconds the first time, rather than in a thread of the pipeline.
    """
    if not torch.cuda.is_available():
        return False
    try:
        images = torch.zeros(1, size, size, 3, dtype=torch.uint8, device="cuda")
        uniforms, settings = torch.zeros(1, 4, device="cuda"), torch.zeros(44, device="cuda")
        _apply(list(images), list(uniforms), settings, size=size, layers=1)
        torch.cuda.synchronize()
    except Exception as error:  # of Triton's compiler, of a missing one, of the driver: all mean the same
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning("RandAugment runs as DALI's own operators, as its Triton kernels fail here (%s)", reason)
        return False
    return True


def rand_augment(images: DataNode, uniforms: DataNode, settings: np.ndarray, *, size: int, layers: int) -> DataNode:
    """RandAugment of images uint8 [size, size, 3]; uniforms and settings as `kernels.randaugment` takes them.

    The images are on a GPU; on the CPU they may be where Triton's interpreter is on (TRITON_INTERPRET=1).
    """
    if images.device == "gpu":
        uniforms = uniforms.gpu()
    return fn.dl_tensor_python_function(
        images,
        uniforms,
        function=_Function(settings, size, layers),
        batch_processing=True,
        synchronize_stream=False,  # the kernels are queued on DALI's own
        output_layouts="HWC",
    )


class _Function:
    """What DALI calls with a batch, for images of one size and one policy."""

    def __init__(self, settings: np.ndarray, size: int, layers: int) -> None:
        self._settings = torch.from_numpy(settings.astype(np.float32))
        self._size, self._layers = size, layers

    def __call__(self, images: Sequence[Any], uniforms: Sequence[Any]) -> list[Any]:
        """The batch, a list of DLPack capsules of uint8 [S, S, 3], augmented."""
        tensors = [torch.from_dlpack(capsule) for capsule in images]
        with _stream_of_dali(tensors[0].device):
            self._settings = self._settings.to(tensors[0].device, non_blocking=True)
            draws = [torch.from_dlpack(capsule) for capsule in uniforms]
            augmented = _apply(tensors, draws, self._settings, size=self._size, layers=self._layers)
            return [torch.utils.dlpack.to_dlpack(image) for image in augmented.unbind()]


def _stream_of_dali(device: torch.device) -> Any:
    if device.type != "cuda":
        return nullcontext()
    from nvidia.dali.python_function_plugin import current_dali_stream

    return torch.cuda.stream(torch.cuda.ExternalStream(current_dali_stream(), device))


def _apply(images: list[Tensor], uniforms: list[Tensor], settings: Tensor, *, size: int, layers: int) -> Tensor:
    from pipelines.kernels.randaugment_gpu import rand_augment as run

    addresses = torch.tensor([[t.data_ptr() for t in images], [t.data_ptr() for t in uniforms]])  # int64 [2, N]
    if settings.is_cuda:
        addresses = addresses.pin_memory().to(settings.device, non_blocking=True)
    return run(addresses[0], addresses[1], settings, size=size, layers=layers)
