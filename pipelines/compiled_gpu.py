"""`kernels.randaugment_gpu` as an operator of a DALI graph: all of RandAugment in one node instead of 340.

DALI calls a Python function with a batch that stays on the device; the function queues kernels on DALI's own stream.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali import pipeline as dali_pipeline
from nvidia.dali.data_node import DataNode
from torch import Tensor

__all__ = ["available", "rand_augment", "try_out"]

log = logging.getLogger("dali_vit.data")  # among the training's own messages

_PATIENCE = 180.0  # seconds, of which Triton's compiler takes its share on the first run


@functools.cache
def available(size: int) -> bool:
    """Whether RandAugment's node runs here, on a GPU. The graph does without, more slowly, which is said once.

    It is tried out, because much has to fit together: Triton, which comes with torch but needs a C compiler, the GPU's
    driver, DALI. The kernels for images of this size are compiled on the way.
    """
    if not torch.cuda.is_available():
        return False
    device_id = torch.cuda.current_device()
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            try_out(size, device_id)
        except Exception as error:  # whatever it is, there is another way
            errors.append(error)

    # In a thread of its own, as this one is in the middle of the definition of another pipeline; and one that does not
    # keep the program from ending, should the kernels or their compiler hang.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        # At the program's end DALI would wait for the pipeline that never returns.
        atexit.unregister(getattr(dali_pipeline, "_shutdown_pipelines", attempt))
        reason = f"they have not run after {_PATIENCE:g} s"
    elif errors:
        reason = " ".join(f"{type(errors[0]).__name__}: {errors[0]}".split())
    else:
        return True
    log.warning("RandAugment runs as DALI's own operators, as its Triton kernels fail here (%s)", reason)
    return False


def try_out(size: int, device_id: int | None) -> None:
    """Inverts black images in a pipeline on a GPU, on the CPU if that is None; raises if they do not become white."""
    black = np.zeros((2, size, size, 3), np.uint8)
    invert = np.full((2, 4), 2.5 / 16, np.float32)

    @pipeline_def(batch_size=len(black), num_threads=1, device_id=device_id)
    def graph() -> DataNode:
        images, uniforms = fn.external_source(lambda: (black, invert), num_outputs=2, layout=["HWC", ""])
        images = images if device_id is None else images.gpu()
        return rand_augment(images, uniforms, np.zeros(44, np.float32), size=size, layers=1)

    if device_id is not None:
        torch.cuda.set_device(device_id)  # a new thread is on the first GPU, where it would make a context of its own
    pipeline = graph()
    for _ in range(3):
        (output,) = pipeline.run()
        if not (output.as_cpu().as_array() == 255).all():
            raise RuntimeError("black inverted is not white")


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
