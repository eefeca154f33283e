"""`kernels.randaugment_gpu` as an operator of a DALI graph: all of RandAugment in one node instead of 340.

DALI calls a Python function with a batch that stays where it lies on the device; the function queues kernels on DALI's
own stream and hands their result over likewise.
"""

from __future__ import annotations

import atexit
import functools
import logging
import threading
from typing import Any

import numpy as np
import nvidia.dali.python_function_plugin  # noqa: F401  (registers the operator of _BatchFunction)
import torch
from nvidia.dali import fn, ops, pipeline_def
from nvidia.dali import pipeline as dali_pipeline
from nvidia.dali.data_node import DataNode

from pipelines.handover import shut_down

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
        return rand_augment(images, uniforms, np.zeros(44, np.float32))

    if device_id is not None:
        torch.cuda.set_device(device_id)  # a new thread is on the first GPU, where it would make a context of its own
    pipeline = graph()
    try:
        for _ in range(3):
            (output,) = pipeline.run()
            if not (output.as_cpu().as_array() == 255).all():
                raise RuntimeError("black inverted is not white")
    finally:
        shut_down([pipeline])


def rand_augment(images: DataNode, uniforms: DataNode, settings: np.ndarray) -> DataNode:
    """RandAugment of images uint8 [S, S, 3]; uniforms and settings as `kernels.randaugment` takes them.

    The images are on a GPU; on the CPU they may be where Triton's interpreter is on (TRITON_INTERPRET=1).
    """
    augment = _RandAugment(settings)
    if images.device == "gpu":
        return _BatchFunction(augment.on_gpu, "gpu", output_layouts="HWC")(images, uniforms.gpu())
    return _BatchFunction(augment.on_cpu, "cpu", output_layouts="HWC")(images, uniforms)


class _BatchFunction(ops.python_op_factory("_JaxFunction", "_JaxFunction", "_JaxFunction", generated=False)):  # type: ignore[misc]
    """An operator that calls a function with whole batches, which are handed over and taken back without a copy.

    DALI has it for its plugin for JAX, with which it has nothing to do itself. `fn.dl_tensor_python_function` hands
    images over one by one and copies the results likewise, all the while keeping every other thread from Python.
    """

    def __init__(self, function: Any, device: str, **arguments: Any) -> None:
        self.function = function  # DALI knows it by its address alone
        super().__init__(device=device, function_id=id(function), **arguments)


class _RandAugment:
    """What DALI calls with a batch, for one policy: objects with `__dlpack__` come, a DLPack capsule goes."""

    def __init__(self, settings: np.ndarray) -> None:
        self._settings = torch.from_numpy(settings.astype(np.float32))

    def on_gpu(self, stream: int, images: Any, uniforms: Any) -> tuple[Any]:
        device = torch.device("cuda", images.__dlpack_device__()[1])
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device)):
            self._settings = self._settings.to(device, non_blocking=True)
            return self._run(images.__dlpack__(stream=stream), uniforms.__dlpack__(stream=stream))

    def on_cpu(self, images: Any, uniforms: Any) -> tuple[Any]:
        return self._run(images.__dlpack__(stream=None), uniforms.__dlpack__(stream=None))

    def _run(self, images: Any, uniforms: Any) -> tuple[Any]:
        from pipelines.kernels.randaugment_gpu import rand_augment as run

        augmented = run(torch.from_dlpack(images), torch.from_dlpack(uniforms), self._settings)
        return (torch.utils.dlpack.to_dlpack(augmented),)
