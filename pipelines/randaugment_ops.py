"""The 16 operations of RandAugment as DALI graph functions, on CPU and GPU alike.

Each takes a batch of uint8 [S, S, 3] images as a DALI node and gives the same back. They follow big_vision's
TensorFlow operations (recipe.md): nearest-neighbour sampling, grey (128) wherever a pixel is uncovered, values
truncated after a blend. `strength` is magnitude / 10. What differs between samples comes as a CPU node; nothing here
draws a random number. Values never leave uint8 (uint16 for the key of a table): DALI converts float to uint8 one
number at a time on the CPU, which costs more than any of these operations.
"""

from __future__ import annotations

import math

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode

FILL = 128
_KEYS = list(range(1 << 16))


def enhancement_factor(strength: float) -> float:
    """The blend factor of color, contrast, brightness and sharpness."""
    return strength * 1.8 + 0.1


def multiply_add(images: DataNode, multiplier: DataNode, addend: DataNode) -> DataNode:
    """Each value v becomes trunc(clip(multiplier v + addend)), multiplier and addend one per sample."""
    # The operator rounds to nearest: half a level less makes that a truncation. The 1/64 keeps whole numbers that
    # float32 computes a little low.
    shift = (addend - (0.5 - 1 / 64)) * (1 / 255)
    return fn.brightness_contrast(images, brightness=multiplier, brightness_shift=shift)


def posterize(images: DataNode, strength: float) -> DataNode:
    """Keep the int(4 strength) highest bits, at least one: TensorFlow shifts a uint8 by seven at most."""
    bits = max(1, int(strength * 4))
    return images & types.Constant(256 - (1 << (8 - bits)), dtype=types.UINT8)


def solarize_threshold(strength: float) -> int:
    """The value from which solarize inverts: int(256 strength) in uint8 arithmetic, where 256 is 0."""
    return int(strength * 256) % 256


def solarize(images: DataNode, strength: float) -> DataNode:
    """Invert the values from `solarize_threshold` on."""
    threshold = solarize_threshold(strength)
    values = np.arange(256)
    return _lookup(images, np.where(values < threshold, values, 255 - values))


def solarize_add(images: DataNode, strength: float) -> DataNode:
    """Add int(110 strength) to the values below 128."""
    values = np.arange(256)
    return _lookup(images, np.where(values < 128, values + int(strength * 110), values))


def color(images: DataNode, strength: float) -> DataNode:
    """Blend with the grey of the same luminance."""
    return _blend(images, _luminance(images), enhancement_factor(strength))


def contrast_with_mean(images: DataNode, strength: float) -> DataNode:
    """Blend with the mean luminance of the image: contrast as it was meant."""
    mean = fn.reductions.mean(_luminance(images), axes=[0, 1, 2], keep_dims=True)
    return _blend(images, mean, enhancement_factor(strength))


def contrast_constant(size: int) -> int:
    """The grey that the published contrast blends with: the mean bin of the histogram, size * size / 256."""
    return min(size * size // 256, 255)


def sharpness(images: DataNode, strength: float, size: int) -> DataNode:
    """Blend with the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the outermost pixels stay."""
    factor = enhancement_factor(strength)
    if factor == 1:
        return images
    kernel = np.full((3, 3), (1 - factor) / 13, np.float32)
    kernel[1, 1] = factor + 5 * (1 - factor) / 13
    inner = fn.filter(images, kernel, mode="valid")
    if factor < 0.5:
        # The reference truncates the smooth image and the blend, here nearly the same: a level less is nearer.
        inner = fn.brightness_contrast(inner, brightness_shift=-1 / 255)
    return fn.multi_paste(
        images,
        inner,
        output_size=[size, size],
        in_anchors=_regions([[0, 0], [0, 0]]),
        out_anchors=_regions([[0, 0], [1, 1]]),
        shapes=_regions([[size, size], [size - 2, size - 2]]),
    )


def auto_contrast(images: DataNode) -> DataNode:
    """Stretch each channel so that its lowest value becomes 0 and its highest 255."""
    lowest = fn.cast(fn.reductions.min(images, axes=[0, 1], keep_dims=True), dtype=types.UINT16)
    highest = fn.cast(fn.reductions.max(images, axes=[0, 1], keep_dims=True), dtype=types.UINT16)
    span = highest - lowest
    # Row `span` of the table maps v - lowest; row 0, for a channel of a single value, maps v.
    first = span * _uint16(256) - lowest * fn.cast(span > 0, dtype=types.UINT16)
    rows, offsets = np.mgrid[:256, :256].astype(np.float32)
    table = np.minimum(offsets * (np.float32(255) / np.maximum(rows, 1)), 255)
    table[0] = offsets[0]
    return _lookup(images + first, table)


def equalize(images: DataNode) -> DataNode:
    """Equalise the histogram of each channel as PIL and TensorFlow do, to within one level.

    TensorFlow maps v to (C + step // 2) // step, where C counts the values below v and step is n // 255, n the count
    of values below the highest. OpenCV's formula, applied to the inverted image, gives 255 C / n. What remains is
    to scale by n / (255 step), which is in [1, 2), and to leave alone the channels whose step is 0.
    """
    highest = fn.reductions.max(images, axes=[0, 1], keep_dims=True)
    below = fn.reinterpret(images != highest, dtype=types.UINT8)
    n = fn.cast(fn.reductions.sum(below, axes=[0, 1], keep_dims=True), dtype=types.INT32)
    step = n // 255
    excess = (n - step * 255) / (dali_math.max(step, 1) * 255.0)
    # The rows of the table are finest near a factor of 1, where photographs are (step is about S * S / 255).
    row = fn.cast(dali_math.min(dali_math.sqrt(excess) * 255.0, 254.0), dtype=types.UINT16)
    rows, values = np.mgrid[:256, :256]
    table = np.minimum(np.floor((1 + (rows / 255) ** 2) * (255 - values) + 0.5), 255)
    table[255] = values[255]
    is_scaled = fn.cast(step > 0, dtype=types.UINT16)
    equalized = fn.equalize(images ^ types.Constant(255, dtype=types.UINT8)) + row * is_scaled * _uint16(256)
    unchanged = images + (_uint16(1) - is_scaled) * _uint16(255 * 256)
    return _lookup(dali_math.max(equalized, unchanged), table)


def warp_matrix(name: str, strength: float, sign: int, size: int) -> np.ndarray:
    """The destination-to-source matrix [2, 3] of rotate, shear_x or shear_y, for DALI's coordinates.

    TensorFlow has pixel centres at whole numbers and rounds to the nearest pixel; DALI has them at halves and takes
    the floor, which is the same.
    """
    linear, offset = np.eye(2), np.full(2, 0.5)
    if name == "rotate":
        angle = sign * math.radians(30 * strength)
        linear[:] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        offset += (size - 1) / 2 * (1 - linear.sum(1))  # the centre stays
    else:
        linear[(0, 1) if name == "shear_x" else (1, 0)] = sign * 0.3 * strength
        offset += _SHEAR_EXCESS * size
    return np.column_stack([linear, offset - linear.sum(1) / 2])


# The shears fall on exact halves every few pixels. They go up, as nearly always in the reference: DALI's CPU kernel
# adds up its coordinates along a row in float32 and must not lose that on the way.
_SHEAR_EXCESS = 1e-5


def warp(images: DataNode, matrix: DataNode) -> DataNode:
    """Sample at `matrix` (see `warp_matrix`)."""
    return fn.warp_affine(images, matrix=matrix, interp_type=types.INTERP_NN, fill_value=FILL)


def shear_strips(name: str, strength: float, sign: int, size: int) -> np.ndarray:
    """What `warp` does otherwise than the reference in shear_x or shear_y, as pastes, int32 [from, to, extent][P][2].

    The reference computes x + level * y in float32. In a few rows the product lies a digit off the half, and the
    sum rounds down as long as it is small enough to keep that digit. There the pixel before is the right one. The
    first paste is the whole image; strips shorter than an eighth of the image are left (0.1 % of the pixels).
    """
    along, across = np.arange(size), np.arange(size)[:, None]
    level = sign * 0.3 * strength
    exact = along.astype(np.float32) + np.float32(level) * across.astype(np.float32)
    reference = np.trunc(exact + np.copysign(np.float32(0.5), exact))
    sampled = np.floor(along + level * across + 0.5 + _SHEAR_EXCESS * size)
    is_before = (sampled > 0) & (reference == sampled - 1)
    pastes = [((0, 0), (0, 0), (size, size))]
    for row, before in enumerate(is_before):
        (ends,) = np.nonzero(np.diff(before, prepend=False, append=False))
        for start, stop in ends.reshape(-1, 2).tolist():
            if start > 0 and stop - start >= size // 8:
                pastes.append(((row, start - 1), (row, start), (1, stop - start)))
    table = np.array(pastes[:_MAX_PASTES], np.int32).transpose(1, 0, 2)
    return table if name == "shear_x" else table[..., ::-1]


_MAX_PASTES = 64  # the inputs that fn.multi_paste takes


def repair(images: DataNode, pastes: DataNode, count: int) -> DataNode:
    """Apply the `count` pastes of `shear_strips` to a sheared image."""
    return fn.multi_paste(*[images] * count, in_anchors=pastes[0], out_anchors=pastes[1], shapes=pastes[2])


def translation(name: str, strength: float, sign: int, size: int) -> np.ndarray:
    """translate_x or translate_y by 100 strength pixels as two pastes, int32 [from, to, extent][image, grey][2]."""
    axis = 0 if name == "translate_y" else 1
    shift = max(-size, min(size, math.floor(sign * 100 * strength + 0.5)))
    pastes = np.zeros((3, 2, 2), np.int32)
    pastes[2] = size
    pastes[0, 0, axis] = max(shift, 0)
    pastes[1, 0, axis] = max(-shift, 0)
    pastes[2, 0, axis] = size - abs(shift)
    pastes[1, 1, axis] = size - shift if shift > 0 else 0
    pastes[2, 1, axis] = abs(shift)
    return pastes


def translate(images: DataNode, pastes: DataNode, size: int) -> DataNode:
    """Move the image and fill what it leaves (see `translation`)."""
    grey = types.Constant(np.full((size, size, 3), FILL, np.uint8), device=images.device, layout="HWC")
    return fn.multi_paste(images, grey, in_anchors=pastes[0], out_anchors=pastes[1], shapes=pastes[2])


def cutout(images: DataNode, strength: float, center: DataNode, size: int) -> DataNode:
    """Cover a square of half-side int(40 strength) about the pixel floor(size center), clipped at the border."""
    half = int(strength * 40)
    if half == 0:
        return images
    corner = dali_math.floor(center * float(size)) - float(half)
    return fn.erase(images, anchor=corner, shape=[2 * half, 2 * half], axes=[0, 1], fill_value=FILL)


def _luminance(images: DataNode) -> DataNode:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _blend(images: DataNode, degenerate: DataNode, factor: float) -> DataNode:
    """trunc(clip(d + factor (v - d))) for each value v of `images` and trunc(d) of `degenerate`, which broadcasts."""
    d, v = np.mgrid[:256, :256].astype(np.float32)
    row = fn.cast(dali_math.floor(degenerate), dtype=types.UINT16)
    return _lookup(images + row * _uint16(256), d + np.float32(factor) * (v - d))


def _lookup(keys: DataNode, table: np.ndarray) -> DataNode:
    values = np.clip(table, 0, 255).astype(np.uint8).ravel().tolist()
    return fn.lookup_table(keys, keys=_KEYS[: len(values)], values=values, dtype=types.UINT8)


def _uint16(value: int) -> DataNode:
    return types.Constant(value, dtype=types.UINT16)


def _regions(corners: list[list[int]]) -> DataNode:
    return types.Constant(np.array(corners, np.int32))
