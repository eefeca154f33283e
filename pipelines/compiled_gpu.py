"""RandAugment on a GPU: `kernels.randaugment_gpu`, two launches a layer, instead of 340 nodes of a DALI graph.

It works on the batches that a graph outputs, which include RandAugment's uniforms. As a node of the graph the kernels
would have to be a Python function, to which DALI hands a GPU's memory only by DLPack: each batch that is dropped would
then make a thread of DALI wait for all work queued on the device (see `handover`).
"""

from __future__ import annotations

import functools
import logging
import threading

import numpy as np
import torch
from torch import Tensor

from pipelines.words import one_line

__all__ = ["RandAugment", "available", "try_out"]

log = logging.getLogger("dali_vit.data")  # among the training's own messages

_PATIENCE = 180.0  # seconds, which on the first run include Triton's compilation


class RandAugment:
    """RandAugment of one policy, for batches on a device; settings as `kernels.randaugment` takes them.

    Called with images uint8 [N, S, S, 3] and uniforms float32 [N, layers * 4] it returns new images, on torch's current
    stream. On the CPU it needs Triton's interpreter (TRITON_INTERPRET=1).
    """

    def __init__(self, settings: np.ndarray, device: torch.device) -> None:
        from pipelines.kernels import randaugment_gpu  # imported here, as Triton may not be installed

        self._kernels = randaugment_gpu
        self._settings = torch.from_numpy(settings.astype(np.float32)).to(device)

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return self._kernels.rand_augment(images, uniforms, self._settings)


@functools.cache
def available(size: int) -> bool:
    """Whether the kernels run on the GPU here. Without them the graph augments, more slowly; a warning says so, once.

    The kernels are tried out, because much has to fit together: Triton, which comes with torch but needs a C compiler,
    and the GPU's driver. The trial also compiles the kernels for images of this size.
    """
    if not torch.cuda.is_available():
        return False
    device_id = torch.cuda.current_device()
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            try_out(size, device_id)
        except Exception as error:  # whatever it is, the graph can augment instead
            errors.append(error)

    # In a daemon thread, which does not keep the program from ending if the kernels or their compiler hang.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if thread.is_alive():
        reason = f"they have not run after {_PATIENCE:g} s"
    elif errors:
        reason = one_line(f"{type(errors[0]).__name__}: {errors[0]}")
    else:
        return True
    log.warning("RandAugment runs as DALI's own operators, as its Triton kernels fail here (%s)", reason)
    return False


def try_out(size: int, device_id: int | None) -> None:
    """Inverts black images on the GPU device_id, on the CPU if that is None; raises if they do not become white."""
    if device_id is not None:
        torch.cuda.set_device(device_id)  # a new thread is set to the first GPU, and would make a context there
    device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
    black = torch.zeros(2, size, size, 3, dtype=torch.uint8, device=device)
    invert = torch.full((2, 4), 2.5 / 16, device=device)
    if not bool((RandAugment(np.zeros(44), device)(black, invert) == 255).all()):
        raise RuntimeError("black inverted is not white")
