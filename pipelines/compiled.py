"""The loops of `kernels` as operators of a DALI graph on the CPU: its threads run them, one sample at a time."""

from __future__ import annotations

import functools
import importlib.util
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode

__all__ = ["available", "rand_augment", "resize"]

log = logging.getLogger("dali_vit.data")  # among the training's own messages


@functools.cache
def available() -> bool:
    """Whether Numba is installed. The graph does without, in more time."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def _operator(name: str, run: Callable[[], int], num_numbers: int, size: int) -> Any:
    """DALI operator for an address of `kernels`, of an image and arrays float32 [n] to an image uint8 [size, size, 3].

    One instance serves all graphs. DALI's own way from a Python function to such an address takes 2 seconds of
    compilation in every process.
    """
    from nvidia.dali.plugin.numba import NumbaFunction

    from pipelines import kernels

    class PerSample(NumbaFunction):
        def _get_run_fn_cpu(self, run_fn: int, *_: Any) -> int:
            return run_fn

        def _get_setup_fn_cpu(self, setup_fn: int) -> int:
            return setup_fn

    began = time.perf_counter()
    addresses: dict[str, Any] = {"run_fn": run(), "setup_fn": kernels.square_shape(size)}
    if time.perf_counter() - began > 1:
        log.info("compiled %s for the CPU in %.0f s", name, time.perf_counter() - began)
    return PerSample(
        **addresses,
        out_types=[types.UINT8],
        in_types=[types.UINT8, *[types.FLOAT] * num_numbers],
        outs_ndim=[3],
        ins_ndim=[3] + [1] * num_numbers,
        device="cpu",
    )


def resize(images: DataNode, mirror: DataNode | None, *, size: int, antialias: bool) -> DataNode:
    """Images uint8 [h, w, 3] resized bilinearly to [size, size, 3], flipped horizontally where mirror is true."""
    from pipelines import kernels

    smooth = types.Constant(np.array([antialias], np.float32))
    flip = (
        types.Constant(np.zeros(1, np.float32))
        if mirror is None
        else fn.reshape(fn.cast(mirror, dtype=types.FLOAT), shape=[1])
    )
    resized = _operator("resize", kernels.resize_sample, 1, size)(images, fn.cat(flip, smooth))
    return fn.reshape(resized, layout="HWC")


def rand_augment(images: DataNode, uniforms: DataNode, settings: np.ndarray, *, size: int) -> DataNode:
    """RandAugment of images uint8 [size, size, 3]; uniforms and settings as `kernels.rand_augment` takes them."""
    from pipelines import kernels

    numbers = types.Constant(settings.astype(np.float32))
    augmented = _operator("RandAugment", kernels.rand_augment_sample, 2, size)(images, uniforms, numbers)
    return fn.reshape(augmented, layout="HWC")
