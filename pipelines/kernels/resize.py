"""Bilinear resize of one image."""

from __future__ import annotations

import functools

import numba
import numpy as np

from pipelines.kernels.calls import SAMPLE, address, jit

__all__ = ["resize", "resize_sample"]

F, U = np.float32, np.uintp


@jit
def _taps(size_in, size_out, mirror, antialias):
    """For each output place along an axis, its first source [size_out] and its weights [size_out, an even number].

    Sources beyond the image count as its outermost; weights beyond the last source are 0.
    """
    scale = F(size_in) / F(size_out)
    radius = max(scale, F(1)) if antialias else F(1)
    count = int(np.ceil(F(2) * radius))
    first = np.empty(size_out, np.int64)
    weights = np.zeros((size_out, count + count % 2), np.float32)
    for i in range(size_out):
        center = (F(i) + F(0.5)) * scale
        lowest = int(np.floor(center - radius + F(0.5)))
        place = size_out - 1 - i if mirror else i
        first[place] = min(max(lowest, 0), max(size_in - count, 0))
        total = F(0)
        for source in range(lowest, lowest + count + 1):
            weight = F(1) - abs(F(source) + F(0.5) - center) / radius
            if weight > 0:
                tap = min(max(source, 0), size_in - 1) - first[place]
                weights[place, min(tap, count - 1)] += weight
                total += weight
        for tap in range(count):
            weights[place, tap] /= total
    return first, weights


@jit
def _weighted_rows(rows, weights, out):
    """out = the sum of the rows [k, n] times their weights [k]."""
    weight = weights[0]
    for j in range(rows.shape[1]):
        out[j] = weight * rows[0, j]
    for k in range(1, rows.shape[0]):
        weight = weights[k]
        for j in range(rows.shape[1]):
            out[j] += weight * rows[k, j]


@jit
def _weighted_pixels(row, first, weights, out):
    """out [3 n] = n weighted sums of pixels of a row, each over the neighbours from its `first` on, plus 1/2."""
    # Numba checks whether an index is negative, unless its type is unsigned.
    one, two, three, four, five, six = U(1), U(2), U(3), U(4), U(5), U(6)
    for i in range(first.shape[0]):
        p = U(3 * first[i])
        a, b = weights[i, 0], weights[i, 1]
        red = F(0.5) + a * row[p] + b * row[p + three]
        green = F(0.5) + a * row[p + one] + b * row[p + four]
        blue = F(0.5) + a * row[p + two] + b * row[p + five]
        for k in range(2, weights.shape[1], 2):
            p += six
            a, b = weights[i, k], weights[i, k + 1]
            red += a * row[p] + b * row[p + three]
            green += a * row[p + one] + b * row[p + four]
            blue += a * row[p + two] + b * row[p + five]
        out[3 * i], out[3 * i + 1], out[3 * i + 2] = red, green, blue


@jit
def _truncate(values, out):
    for j in range(values.shape[0]):
        out[j] = np.uint8(np.int32(values[j]))


@jit
def resize(image, mirror, antialias, out):
    """An image uint8 [h, w, 3] resized bilinearly to out, uint8 [S, S, 3]; where mirror is set, flipped horizontally.

    Antialiasing widens the triangle filter where the image is scaled down. The result is that of `fn.resize` to within
    a level, in a fifth of the time: rows are summed first, as the compiler vectorises that pass, and each summed row is
    resized along its width straight away.
    """
    height, width, _ = image.shape
    size = out.shape[0]
    rows, results = image.reshape(height, 3 * width), out.reshape(size, 3 * size)
    top, row_weights = _taps(height, size, False, antialias)
    left, weights = _taps(width, size, mirror, antialias)
    num_rows = min(row_weights.shape[1], height)
    row = np.zeros(3 * (width + weights.shape[1]), np.float32)
    sums = np.empty(3 * size, np.float32)
    for i in range(size):
        _weighted_rows(rows[top[i] : min(top[i] + num_rows, height)], row_weights[i], row)
        _weighted_pixels(row, left, weights, sums)
        _truncate(sums, results[i])


def _run(outs, out_shapes, out_ranks, num_outs, ins, in_shapes, in_ranks, num_ins):
    image = numba.carray(ins[0], (in_shapes[0][0], in_shapes[0][1], 3), np.uint8)
    flags = numba.carray(ins[1], 2, np.float32)
    out = numba.carray(outs[0], (out_shapes[0][0], out_shapes[0][1], 3), np.uint8)
    resize(image, flags[0] != F(0), flags[1] != F(0), out)


@functools.cache
def resize_sample() -> int:
    """Address of `resize` for inputs image and (mirror, antialias), float32 [2], 0 or 1."""
    return address(SAMPLE, _run)
