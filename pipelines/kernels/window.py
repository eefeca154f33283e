"""Windows of random crops: `crop`'s samplers, one image at a time."""

from __future__ import annotations

import functools

import numba
import numpy as np

from pipelines.kernels.calls import SAMPLE, address, jit

__all__ = ["window_sample", "window_tensorflow", "window_torchvision"]

F = np.float32


@jit
def _round(x):
    return np.floor(x + F(0.5))


@jit
def window_tensorflow(size, ratio_uniforms, height_uniforms, position_uniforms, ranges, start, window):
    """`crop.sample_window_tensorflow` of one image; ranges: of the area and of the ratio, float32 [4]."""
    height, width = size[0], size[1]
    area = height * width
    smallest, largest = area * ranges[0], area * ranges[1]
    window[0], window[1] = height, width
    for i in range(ratio_uniforms.shape[0] - 1, -1, -1):
        ratio = ratio_uniforms[i] * (ranges[3] - ranges[2]) + ranges[2]
        highest = min((width + F(0.5)) / ratio, height)
        if ranges[1] < F(1):
            highest = min(highest, np.sqrt(largest / ratio) + F(0.5))
        highest = np.floor(highest)
        lowest = min(_round(np.sqrt(smallest / ratio)), highest)
        h = lowest + np.floor(height_uniforms[i] * (highest - lowest + F(1)))
        if h * _round(h * ratio) < smallest:
            h += F(1)
        if ranges[1] < F(1) and h * _round(h * ratio) > largest:
            h -= F(1)
        w = _round(h * ratio)
        fits = h <= height and w <= width and h * w >= smallest
        if fits and (ranges[1] >= F(1) or h * w <= largest):
            window[0], window[1] = h, w
            break
    start[0] = np.floor((height - window[0]) * position_uniforms[0])
    start[1] = np.floor((width - window[1]) * position_uniforms[1])


@jit
def window_torchvision(size, area_uniforms, ratio_uniforms, position_uniforms, ranges, start, window):
    """`crop.sample_window_torchvision` of one image; ranges: of the area and of the ratio, float32 [4]."""
    height, width = size[0], size[1]
    low, high = np.log(ranges[2]), np.log(ranges[3])
    window[0] = min(height, _round(width / ranges[2]))
    window[1] = min(width, _round(height * ranges[3]))
    drawn = False
    for i in range(area_uniforms.shape[0] - 1, -1, -1):
        area = (area_uniforms[i] * (ranges[1] - ranges[0]) + ranges[0]) * (height * width)
        ratio = np.exp(ratio_uniforms[i] * (high - low) + low)
        h, w = _round(np.sqrt(area / ratio)), _round(np.sqrt(area * ratio))
        if F(0) < h <= height and F(0) < w <= width:
            window[0], window[1] = h, w
            drawn = True
            break
    for axis in range(2):
        free = size[axis] - window[axis]
        start[axis] = min(np.floor(position_uniforms[axis] * (free + F(1))), free) if drawn else np.floor(free / F(2))


# The same code twice: Numba could not cache a function on disk that takes the sampler as a value.


def _tensorflow(outs, out_shapes, out_ranks, num_outs, ins, in_shapes, in_ranks, num_ins):
    window_tensorflow(
        numba.carray(ins[0], 2, np.float32),
        numba.carray(ins[1], in_shapes[1][0], np.float32),
        numba.carray(ins[2], in_shapes[2][0], np.float32),
        numba.carray(ins[3], 2, np.float32),
        numba.carray(ins[4], 4, np.float32),
        numba.carray(outs[0], 2, np.float32),
        numba.carray(outs[1], 2, np.float32),
    )


def _torchvision(outs, out_shapes, out_ranks, num_outs, ins, in_shapes, in_ranks, num_ins):
    window_torchvision(
        numba.carray(ins[0], 2, np.float32),
        numba.carray(ins[1], in_shapes[1][0], np.float32),
        numba.carray(ins[2], in_shapes[2][0], np.float32),
        numba.carray(ins[3], 2, np.float32),
        numba.carray(ins[4], 4, np.float32),
        numba.carray(outs[0], 2, np.float32),
        numba.carray(outs[1], 2, np.float32),
    )


@functools.cache
def window_sample(sampler: str) -> int:
    """Address of `window_tensorflow` or `window_torchvision`: the inputs are their first five arguments."""
    return address(SAMPLE, {"tensorflow": _tensorflow, "torchvision": _torchvision}[sampler])
