"""RandAugment of one image, bit for bit equal to big_vision's, except that sharpness may differ by one level."""

from __future__ import annotations

import functools

import numba
import numpy as np

from pipelines.kernels.calls import SAMPLE, address, jit

__all__ = ["rand_augment", "rand_augment_sample"]

F, U = np.float32, np.uintp
FILL = np.uint8(128)

# Assigning slices would do the same as `_copy` and `_fill`, but each assignment takes half a second to compile.


@jit
def _copy(values, out):
    for i in range(out.shape[0]):
        out[i] = values[i]


@jit
def _fill(out):
    for i in range(out.shape[0]):
        out[i] = FILL


@jit
def _blend(degenerate, value, factor):
    """degenerate + factor (value - degenerate), clipped and truncated."""
    blended = F(degenerate) + factor * (F(value) - F(degenerate))
    return np.uint8(np.int32(min(max(blended, F(0)), F(255))))


@jit
def _luminance(red, green, blue):
    scale = F(1 / 255)
    grey = F(red) * scale * F(0.2989) + F(green) * scale * F(0.587) + F(blue) * scale * F(0.114)
    return np.uint8(np.int32(grey * F(255.5)))


@jit
def _look_up(image, tables, out):
    """Maps each channel by its own table, uint8 [3, 256]."""
    values, results = image.ravel(), out.ravel()
    for i in range(0, values.shape[0], 3):
        results[i] = tables[0, values[i]]
        results[i + 1] = tables[1, values[i + 1]]
        results[i + 2] = tables[2, values[i + 2]]


@jit
def _auto_contrast(image, out):
    size = image.shape[0]
    rows = image.reshape(size, 3 * size)
    lows, highs = np.full(3 * size, 255, np.uint8), np.zeros(3 * size, np.uint8)
    for y in range(size):
        for j in range(3 * size):
            lows[j] = min(lows[j], rows[y, j])
            highs[j] = max(highs[j], rows[y, j])
    tables = np.empty((3, 256), np.uint8)
    for channel in range(3):
        low, high = lows[channel], highs[channel]
        for x in range(1, size):
            low, high = min(low, lows[3 * x + channel]), max(high, highs[3 * x + channel])
        scale = F(255) / F(max(high - low, 1))
        for value in range(256):
            stretched = F(value) * scale - F(low) * scale
            stretched = min(max(stretched, F(0)), F(255))
            tables[channel, value] = value if high == low else np.uint8(np.int32(stretched))
    _look_up(image, tables, out)


@jit
def _equalize(image, out):
    values = image.ravel()
    # Neighbouring pixels are often equal: counted in two histograms, they do not wait for each other.
    counts = np.zeros((2, 3, 256), np.int32)
    for i in range(0, values.shape[0] - 5, 6):
        for j in range(6):
            counts[j // 3, j % 3, values[i + j]] += 1
    for i in range(values.shape[0] - values.shape[0] % 6, values.shape[0]):
        counts[0, i % 3, values[i]] += 1
    tables = np.empty((3, 256), np.uint8)
    for channel in range(3):
        histogram, highest = counts[0, channel], 255
        for value in range(256):
            histogram[value] += counts[1, channel, value]
        while histogram[highest] == 0:
            highest -= 1
        step = (values.shape[0] // 3 - histogram[highest]) // 255
        below = 0
        for value in range(256):
            tables[channel, value] = value if step == 0 else min((below + step // 2) // max(step, 1), 255)
            below += histogram[value]
    _look_up(image, tables, out)


@jit
def _invert_from(image, threshold, out):
    values, results = image.ravel(), out.ravel()
    for i in range(values.shape[0]):
        results[i] = values[i] if values[i] < threshold else 255 - values[i]


@jit
def _posterize(image, mask, out):
    values, results = image.ravel(), out.ravel()
    for i in range(values.shape[0]):
        results[i] = values[i] & mask


@jit
def _solarize_add(image, addend, out):
    values, results = image.ravel(), out.ravel()
    for i in range(values.shape[0]):
        results[i] = values[i] + addend if values[i] < 128 else values[i]  # at most 127 + 110


@jit
def _blend_with(degenerate, image, factor, out):
    values, results = image.ravel(), out.ravel()
    for i in range(values.shape[0]):
        results[i] = _blend(degenerate, values[i], factor)


@jit
def _color(image, factor, out):
    size = image.shape[0]
    rows, results = image.reshape(size, 3 * size), out.reshape(size, 3 * size)
    greys, spread = np.empty(size, np.float32), np.empty(3 * size, np.float32)
    for y in range(size):
        row = rows[y]
        for x in range(size):
            greys[x] = F(_luminance(row[3 * x], row[3 * x + 1], row[3 * x + 2]))
        for x in range(size):
            spread[3 * x] = spread[3 * x + 1] = spread[3 * x + 2] = greys[x]
        for j in range(3 * size):
            results[y, j] = _blend(spread[j], row[j], factor)


@jit
def _mean_luminance(image):
    values = image.ravel()
    total = 0
    for i in range(0, values.shape[0], 3):
        total += _luminance(values[i], values[i + 1], values[i + 2])
    return total // (values.shape[0] // 3)


@jit
def _sharpness(image, factor, out):
    """Blend with the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the outermost pixels stay."""
    size = image.shape[0]
    rows, results = image.reshape(size, 3 * size), out.reshape(size, 3 * size)
    columns = np.empty(3 * size, np.float32)
    left, middle, right = columns[:-6], columns[3:-3], columns[6:]  # Numba would check if an index j - 3 is negative
    _copy(rows[0], results[0])
    _copy(rows[size - 1], results[size - 1])
    for y in range(1, size - 1):
        above, row, below, result = rows[y - 1], rows[y], rows[y + 1], results[y]
        for j in range(3 * size):
            columns[j] = F(above[j]) + F(row[j]) + F(below[j])
        inner, sharp = row[3:-3], result[3:-3]
        for j in range(3 * size - 6):
            total = left[j] + middle[j] + right[j] + F(4) * F(inner[j])
            # A little is added to the sum, so that multiples of 13 are not truncated to one less.
            sharp[j] = _blend(np.int32((total + F(0.25)) * F(1 / 13)), inner[j], factor)
        _copy(row[:3], result[:3])
        _copy(row[-3:], result[-3:])


@jit
def _warp(image, matrix, out):
    """Samples the pixel nearest to (a x + b y + c, d x + e y + f), halves away from zero, for matrix = (a, ..., f)."""
    size = image.shape[0]
    a, b, c, d, e, f = matrix
    values, rows = image.ravel(), out.reshape(size, 3 * size)
    sources = np.empty(size, np.int32)
    for y in range(size):
        row = rows[y]
        for x in range(size):
            from_x = F(x) * a + F(y) * b + c
            from_y = F(x) * d + F(y) * e + f
            i, j = np.int32(from_y + F(0.5)), np.int32(from_x + F(0.5))
            inside = (from_y > F(-0.5)) & (from_x > F(-0.5)) & (i < size) & (j < size)
            sources[x] = 3 * (i * np.int32(size) + j) if inside else -1
        for x in range(size):
            if sources[x] < 0:
                row[3 * x] = row[3 * x + 1] = row[3 * x + 2] = FILL
            else:
                source = U(sources[x])
                row[3 * x], row[3 * x + 1], row[3 * x + 2] = (
                    values[source],
                    values[source + U(1)],
                    values[source + U(2)],
                )


@jit
def _translate(image, shift, along_x, out):
    """Moves an image left or up by shift pixels, right or down where shift is negative."""
    size = image.shape[0]
    start, stop = min(max(-shift, 0), size), max(min(size - shift, size), 0)
    rows, results = image.reshape(size, 3 * size), out.reshape(size, 3 * size)
    for y in range(size):
        if along_x:
            _fill(results[y][: 3 * start])
            _copy(rows[y][3 * (start + shift) : 3 * (stop + shift)], results[y][3 * start : 3 * stop])
            _fill(results[y][3 * stop :])
        elif start <= y < stop:
            _copy(rows[y + shift], results[y])
        else:
            _fill(results[y])


@jit
def _cutout(image, half, row, column, out):
    size = image.shape[0]
    rows, results = image.reshape(size, 3 * size), out.reshape(size, 3 * size)
    for y in range(size):
        _copy(rows[y], results[y])
        if row - half <= y < row + half:
            _fill(results[y][3 * max(column - half, 0) : 3 * min(column + half, size)])


@jit
def _apply(op, sign, row, column, settings, image, out):
    """Operation number `op` of randaugment.OPS; sign: 0 negative, 1 positive."""
    factor, contrast, shift = settings[0], settings[1], int(settings[6 + sign])
    if op == 0:
        _auto_contrast(image, out)
    elif op == 1:
        _equalize(image, out)
    elif op == 2:
        _invert_from(image, 0, out)
    elif op == 3 or op == 10 or op == 11:
        start = 8 + 12 * (0 if op == 3 else op - 9) + 6 * sign
        _warp(image, settings[start : start + 6], out)
    elif op == 4:
        _posterize(image, np.uint8(settings[2]), out)
    elif op == 5:
        _invert_from(image, np.uint8(settings[3]), out)
    elif op == 6:
        _color(image, factor, out)
    elif op == 7:
        grey = contrast if contrast >= 0 else F(_mean_luminance(image))
        _blend_with(grey, image, factor, out)
    elif op == 8:
        _blend_with(F(0), image, factor, out)
    elif op == 9:
        _sharpness(image, factor, out)
    elif op == 12 or op == 13:
        _translate(image, shift, op == 12, out)
    elif op == 14:
        _cutout(image, int(settings[5]), row, column, out)
    else:
        _solarize_add(image, np.uint8(settings[4]), out)


@jit
def rand_augment(image, uniforms, settings, out):
    """Applies one operation for every four uniforms, in turn: image uint8 [S, S, 3] -> out uint8 [S, S, 3].

    uniforms: float32 [layers * 4], as `randaugment.rand_augment` takes them; settings: float32 [44], the numbers that
    the magnitude decides, as `randaugment._settings` returns them.
    """
    layers, size = uniforms.shape[0] // 4, F(image.shape[0])
    spare = np.empty(out.shape, np.uint8)
    source = image
    for layer in range(layers):
        draw = uniforms[4 * layer : 4 * layer + 4]
        op, sign = int(draw[0] * F(16)), int(draw[1] * F(2))
        target = spare if (layers - layer) % 2 == 0 else out
        _apply(op, sign, int(draw[2] * size), int(draw[3] * size), settings, source, target)
        source = target


def _run(outs, out_shapes, out_ranks, num_outs, ins, in_shapes, in_ranks, num_ins):
    image = numba.carray(ins[0], (in_shapes[0][0], in_shapes[0][1], 3), np.uint8)
    uniforms = numba.carray(ins[1], in_shapes[1][0], np.float32)
    settings = numba.carray(ins[2], in_shapes[2][0], np.float32)
    out = numba.carray(outs[0], (out_shapes[0][0], out_shapes[0][1], 3), np.uint8)
    rand_augment(image, uniforms, settings, out)


@functools.cache
def rand_augment_sample() -> int:
    """Address of `rand_augment` for inputs image, uniforms and settings."""
    return address(SAMPLE, _run)
