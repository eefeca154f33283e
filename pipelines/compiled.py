"""The functions of `kernels` as operators of a DALI graph on the CPU: DALI's threads run them, sample by sample."""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode

__all__ = ["available", "rand_augment", "resize", "sample_window"]

log = logging.getLogger("dali_vit.data")  # among the training's own messages


@functools.cache
def available() -> bool:
    """Whether Numba can be used. Without it the graph takes more than twice as long on a CPU, which is logged once."""
    try:
        importlib.import_module("nvidia.dali.plugin.numba")
    except ImportError as error:
        words = "without Numba (%s) the CPU's part takes more than twice the time: pip install numba"
        log.warning(words, error, extra={"of_machine": True})
        return False
    return True


@functools.cache
def _operator(
    name: str,
    run: Callable[..., int],
    run_with: tuple[Any, ...],
    setup: Callable[..., int],
    setup_with: tuple[Any, ...],
    ins: str,
    outs: str,
) -> Any:
    """DALI operator of two compiled functions: one processes a sample, the other sets the shapes of the outputs.

    run, setup: functions of `kernels` that return their addresses. ins, outs: a letter for each input and output, `i`
    for an image uint8 [h, w, 3], `n` for numbers float32 [n]. One instance serves all graphs. DALI's own way from a
    Python function to such an address takes 2 seconds of compilation in every process.
    """
    from nvidia.dali.plugin.numba import NumbaFunction

    class PerSample(NumbaFunction):
        def _get_run_fn_cpu(self, run_fn: int, *_: Any) -> int:
            return run_fn

        def _get_setup_fn_cpu(self, setup_fn: int) -> int:
            return setup_fn

    began, worked = time.perf_counter(), time.thread_time()
    addresses: dict[str, Any] = {"run_fn": run(*run_with), "setup_fn": setup(*setup_with)}
    if time.thread_time() - worked > 1:  # what is kept from before is loaded in less
        log.info("compiled %s for the CPU in %.0f s", name, time.perf_counter() - began)
    dtypes, ranks = {"i": types.UINT8, "n": types.FLOAT}, {"i": 3, "n": 1}
    return PerSample(
        **addresses,
        out_types=[dtypes[kind] for kind in outs],
        in_types=[dtypes[kind] for kind in ins],
        outs_ndim=[ranks[kind] for kind in outs],
        ins_ndim=[ranks[kind] for kind in ins],
        device="cpu",
    )


def sample_window(
    sampler: str,
    size: DataNode,
    uniforms: tuple[DataNode, DataNode, DataNode],
    area_range: tuple[float, float],
    ratio_range: tuple[float, float],
) -> tuple[DataNode, DataNode]:
    """The window that a sampler of `crop` draws, by one operator instead of 45 that each take 1 us an image."""
    from pipelines.kernels import calls, window

    ranges = types.Constant(np.array([*area_range, *ratio_range], np.float32))
    operator = _operator("the crop", window.window_sample, (sampler,), calls.pairs_shape, (), "nnnnn", "nn")
    return tuple(operator(size, *uniforms, ranges))


def resize(images: DataNode, mirror: DataNode | None, *, size: int, antialias: bool) -> DataNode:
    """Images uint8 [h, w, 3] resized bilinearly to [size, size, 3], flipped horizontally where mirror is true."""
    from pipelines.kernels import calls
    from pipelines.kernels.resize import resize_sample

    smooth = types.Constant(np.array([antialias], np.float32))
    if mirror is None:
        flip = types.Constant(np.zeros(1, np.float32))
    else:
        flip = fn.reshape(fn.cast(mirror, dtype=types.FLOAT), shape=[1])
    operator = _operator("resize", resize_sample, (), calls.square_shape, (size,), "in", "i")
    return fn.reshape(operator(images, fn.cat(flip, smooth)), layout="HWC")


def rand_augment(images: DataNode, uniforms: DataNode, settings: np.ndarray, *, size: int) -> DataNode:
    """RandAugment of images uint8 [size, size, 3]; uniforms and settings as `kernels.randaugment` takes them."""
    from pipelines.kernels import calls
    from pipelines.kernels.randaugment import rand_augment_sample

    numbers = types.Constant(settings.astype(np.float32))
    operator = _operator("RandAugment", rand_augment_sample, (), calls.square_shape, (size,), "inn", "i")
    return fn.reshape(operator(images, uniforms, numbers), layout="HWC")
