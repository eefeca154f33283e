"""RandAugment of a batch on a GPU: two Triton kernels a layer, which follow `randaugment` number by number.

The first kernel makes a table for each channel, where an image's operation maps each value by itself; the second writes
the pixels. The kernels read from the uniforms which operation an image drew, so the host tells them nothing. Products
and sums are rounded one by one (`enable_fp_fusion=False`), as on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK", "OPTIONS", "make_tables", "rand_augment", "write_pixels"]

FILL = tl.constexpr(128)
# Bit i: whether operation i of randaugment.OPS maps each value by itself (_BY_TABLE) or moves pixels (_GEOMETRIC).
_BY_TABLE = tl.constexpr(sum(1 << op for op in (0, 1, 2, 4, 5, 7, 8, 15)))
_GEOMETRIC = tl.constexpr(sum(1 << op for op in (3, 10, 11, 12, 13)))

# Values that a program works on at a time: four per thread, which then uses 50 registers and spills none (sm_90).
# The interpreter on the CPU takes as long for 10 values as for 10,000.
BLOCK = 1 << 14 if triton.knobs.runtime.interpret else 1 << 10
# One compiled variant serves every layer and number of layers.
_SPECIALIZE: dict[str, Any] = {"do_not_specialize": ["layer", "layers"]}
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 8}


@triton.jit
def _blend(degenerate, value, factor):
    """degenerate + factor (value - degenerate), clipped and truncated to int32; all float32."""
    blended = degenerate + factor * (value - degenerate)
    return tl.minimum(tl.maximum(blended, 0.0), 255.0).to(tl.int32)


@triton.jit
def _luminance(image, pixel, is_inside):
    """Luminance of the pixels with these numbers, int32."""
    red = tl.load(image + 3 * pixel, mask=is_inside, other=0).to(tl.float32)
    green = tl.load(image + 3 * pixel + 1, mask=is_inside, other=0).to(tl.float32)
    blue = tl.load(image + 3 * pixel + 2, mask=is_inside, other=0).to(tl.float32)
    scale: tl.constexpr = 1 / 255
    grey = red * scale * 0.2989 + green * scale * 0.587 + blue * scale * 0.114
    return (grey * 255.5).to(tl.int32)


@triton.jit(**_SPECIALIZE)
def make_tables(images, uniforms, settings, tables, layer, layers, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes one channel's table of one image into tables, uint8 [N, 3, 256], if its operation has one; grid [N, 3].

    images: uint8 [N, SIZE, SIZE, 3]; uniforms: float32 [N, layers * 4].
    """
    number, channel = tl.program_id(0), tl.program_id(1)
    image = images + number.to(tl.int64) * (3 * SIZE * SIZE)
    draw = uniforms + 4 * (number * layers + layer)
    op = (tl.load(draw) * 16).to(tl.int32)
    if ((_BY_TABLE >> op) & 1) == 0:
        return
    count: tl.constexpr = SIZE * SIZE
    values = tl.arange(0, 256)
    factor, grey = tl.load(settings), tl.load(settings + 1)

    if op == 0:  # auto_contrast
        lows, highs = tl.full([BLOCK], 255, tl.int32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, count, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            found = tl.load(image + 3 * pixel + channel, mask=pixel < count, other=0).to(tl.int32)
            lows = tl.minimum(lows, tl.where(pixel < count, found, 255))
            highs = tl.maximum(highs, found)
        low, high = tl.min(lows, 0), tl.max(highs, 0)
        scale = tl.div_rn(255.0, tl.maximum(high - low, 1).to(tl.float32))
        stretched = values.to(tl.float32) * scale - low.to(tl.float32) * scale
        stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
        table = tl.where(high == low, values, stretched)
    elif op == 1:  # equalize
        counts = tl.zeros([256], tl.int32)
        for start in range(0, count, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            found = tl.load(image + 3 * pixel + channel, mask=pixel < count, other=0).to(tl.int32)
            counts += tl.histogram(found, 256)
        counts -= tl.where(values == 0, tl.cdiv(count, BLOCK) * BLOCK - count, 0)  # the zeros read past the end
        highest = tl.max(tl.where(counts > 0, values, 0), 0)
        step = (count - tl.sum(tl.where(values == highest, counts, 0), 0)) // 255
        below = tl.cumsum(counts, 0) - counts
        equalized = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
        table = tl.where(step == 0, values, equalized)
    elif op == 2:  # invert
        table = 255 - values
    elif op == 4:  # posterize
        table = values & tl.load(settings + 2).to(tl.int32)
    elif op == 5:  # solarize
        table = tl.where(values < tl.load(settings + 3).to(tl.int32), values, 255 - values)
    elif op == 15:  # solarize_add
        table = tl.where(values < 128, values + tl.load(settings + 4).to(tl.int32), values)
    else:  # contrast and brightness, which blends with black
        if op == 8:
            grey = 0.0
        elif grey < 0:
            total = tl.zeros([BLOCK], tl.int32)
            for start in range(0, count, BLOCK):
                pixel = start + tl.arange(0, BLOCK)
                total += _luminance(image, pixel, pixel < count)
            grey = (tl.sum(total.to(tl.int64), 0) // count).to(tl.float32)
        table = _blend(grey, values.to(tl.float32), factor)
    tl.store(tables + (number * 3 + channel) * 256 + values, table.to(tl.uint8))


@triton.jit(**_SPECIALIZE)
def write_pixels(images, uniforms, settings, tables, out, layer, layers, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes BLOCK values of an image to out, uint8 [N, SIZE, SIZE, 3]; grid [N * blocks an image]; see `make_tables`.

    The grid has one dimension, as CUDA allows no more than 65,535 programs in the others.
    """
    blocks: tl.constexpr = (3 * SIZE * SIZE + BLOCK - 1) // BLOCK
    number = tl.program_id(0) // blocks
    image = images + number.to(tl.int64) * (3 * SIZE * SIZE)
    draw = uniforms + 4 * (number * layers + layer)
    op, sign = (tl.load(draw) * 16).to(tl.int32), (tl.load(draw + 1) * 2).to(tl.int32)
    factor = tl.load(settings)

    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_inside = place < 3 * SIZE * SIZE
    pixel, channel = place // 3, place % 3
    y, x = pixel // SIZE, pixel % SIZE

    if (_GEOMETRIC >> op) & 1:
        # Pixel (x, y) of the result comes from (a x + b y + c, d x + e y + f) of the image, halves away from zero.
        if op >= 12:
            a, b, d, e = 1.0, 0.0, 0.0, 1.0
            shift = tl.load(settings + 6 + sign)
            c = tl.where(op == 12, shift, 0.0)
            f = tl.where(op == 12, 0.0, shift)
        else:
            matrix = settings + 8 + 12 * tl.where(op == 3, 0, op - 9) + 6 * sign
            a, b, c = tl.load(matrix), tl.load(matrix + 1), tl.load(matrix + 2)
            d, e, f = tl.load(matrix + 3), tl.load(matrix + 4), tl.load(matrix + 5)
        from_x = x.to(tl.float32) * a + y.to(tl.float32) * b + c
        from_y = x.to(tl.float32) * d + y.to(tl.float32) * e + f
        i, j = (from_y + 0.5).to(tl.int32), (from_x + 0.5).to(tl.int32)
        is_found = is_inside & (from_y > -0.5) & (from_x > -0.5) & (i < SIZE) & (j < SIZE)
        result = tl.load(image + 3 * (i * SIZE + j) + channel, mask=is_found, other=FILL).to(tl.int32)
    else:
        value = tl.load(image + place, mask=is_inside, other=0).to(tl.int32)
        if (_BY_TABLE >> op) & 1:
            table = tables + number * 3 * 256
            result = tl.load(table + channel * 256 + value, mask=is_inside, other=0).to(tl.int32)
        elif op == 6:  # color
            result = _blend(_luminance(image, pixel, is_inside).to(tl.float32), value.to(tl.float32), factor)
        elif op == 9:  # sharpness: [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13, but for the outermost pixels
            is_inner = is_inside & (y > 0) & (y < SIZE - 1) & (x > 0) & (x < SIZE - 1)
            total = 4 * value
            for row in tl.static_range(-1, 2):
                for column in tl.static_range(-1, 2):
                    beside = image + place + 3 * (row * SIZE + column)
                    total += tl.load(beside, mask=is_inner, other=0).to(tl.int32)
            # A little is added to the sum, so that multiples of 13 are not truncated to one less.
            smooth = ((total.to(tl.float32) + 0.25) * (1 / 13)).to(tl.int32)
            result = tl.where(is_inner, _blend(smooth.to(tl.float32), value.to(tl.float32), factor), value)
        else:  # cutout
            half = tl.load(settings + 5).to(tl.int32)
            row, column = (tl.load(draw + 2) * SIZE).to(tl.int32), (tl.load(draw + 3) * SIZE).to(tl.int32)
            is_cut = (y >= row - half) & (y < row + half) & (x >= column - half) & (x < column + half)
            result = tl.where(is_cut, FILL, value)
    tl.store(out + number.to(tl.int64) * (3 * SIZE * SIZE) + place, result.to(tl.uint8), mask=is_inside)


def rand_augment(images: Tensor, uniforms: Tensor, settings: Tensor) -> Tensor:
    """Applies one operation for every four uniforms, in turn, to images uint8 [N, S, S, 3]; returns new images.

    uniforms: float32 [N, layers * 4], of at least one layer; settings: float32 [44], as `randaugment` takes them. All
    tensors are dense and on one device. Runs on torch's current stream.
    """
    count, size = images.shape[:2]
    layers, length = uniforms.shape[1] // 4, 3 * size * size
    tables = torch.empty(count, 3, 256, dtype=torch.uint8, device=images.device)
    for layer in range(layers):
        out = torch.empty_like(images)
        arguments = (images, uniforms, settings, tables)
        make_tables[(count, 3)](*arguments, layer, layers, SIZE=size, BLOCK=BLOCK, **OPTIONS)
        write_pixels[(count * triton.cdiv(length, BLOCK),)](
            *arguments, out, layer, layers, SIZE=size, BLOCK=BLOCK, **OPTIONS
        )
        images = out
    return images
