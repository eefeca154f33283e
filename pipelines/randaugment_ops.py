"""The 16 operations of RandAugment as DALI graph functions, on CPU and GPU alike.

Each takes a batch of uint8 [S, S, 3] images as a DALI node and returns another such batch. They follow big_vision's
TensorFlow operations (pp/autoaugment.py): nearest-neighbour sampling, grey (128) wherever a pixel is uncovered, values
truncated after a blend. `strength` is magnitude / 10, `size` is S, `sign` 1 or -1. Nothing here draws a random number.

DALI's speed on the CPU decides how they are written. DALI converts float to uint8 one number at a time (1 ms an image
at 224, half of what decoding a JPEG takes), so values stay in uint8, or in uint16 as the keys of a table. Its
arithmetic takes as long for 1 byte as for 8, so operations work on 64-bit words where they can (`_words`).
"""

from __future__ import annotations

import math

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode

FILL = 128
_TRUNCATE = -(0.5 - 1 / 64)  # added before rounding to nearest; 1/64 keeps whole numbers that float32 has a little low
_KEYS = list(range(1 << 16))


def enhancement_factor(strength: float) -> float:
    """The blend factor of color, contrast, brightness and sharpness."""
    return strength * 1.8 + 0.1


def multiply_add(images: DataNode, multiplier: DataNode, addend: DataNode) -> DataNode:
    """Each value v becomes multiplier * v + 255 * addend, rounded to nearest; each sample has its own pair."""
    return fn.brightness_contrast(images, brightness=multiplier, brightness_shift=addend)


def brightness_terms(strength: float) -> tuple[float, float]:
    """Multiplier and addend (see `multiply_add`) of brightness: a blend with black."""
    return enhancement_factor(strength), _TRUNCATE / 255


def contrast_terms(strength: float, size: int) -> tuple[float, float]:
    """Multiplier and addend (see `multiply_add`) of the published contrast.

    It blends with one grey for all images, the mean count of a histogram's bin, S * S / 256, instead of the mean pixel.
    """
    factor = enhancement_factor(strength)
    return factor, ((1 - factor) * min(size * size // 256, 255) + _TRUNCATE) / 255


def contrast_with_mean(images: DataNode, strength: float) -> DataNode:
    """Blend with the mean luminance of the image: contrast as it was meant."""
    mean = fn.reductions.mean(_luminance(images), axes=[0, 1, 2], keep_dims=True)
    row = fn.cast(dali_math.floor(mean), dtype=types.UINT16) * _uint16(256)
    means, values = np.mgrid[:256, :256]
    return _lookup(images + row, means + enhancement_factor(strength) * (values - means) + 1e-4)


def invert(images: DataNode, size: int) -> DataNode:
    """255 - v for each value v."""
    return _images(_words(images, size, types.INT32) ^ _everywhere(255, size), size)


def posterize(images: DataNode, strength: float, size: int) -> DataNode:
    """Keep the highest bits (see `posterize_mask`)."""
    return _images(_words(images, size, types.INT32) & _everywhere(posterize_mask(strength), size), size)


def posterize_mask(strength: float) -> int:
    """The int(4 strength) highest bits, at least one: TensorFlow shifts a uint8 by seven at most."""
    bits = max(1, int(strength * 4))
    return 256 - (1 << (8 - bits))


def solarize_threshold(strength: float) -> int:
    """The lowest value that solarize inverts: int(256 strength) in uint8 arithmetic, where 256 is 0."""
    return int(strength * 256) % 256


def solarize(images: DataNode, strength: float) -> DataNode:
    """Invert the values from `solarize_threshold` on."""
    values = np.arange(256)
    return _lookup(images, np.where(values < solarize_threshold(strength), values, 255 - values))


def solarize_add(images: DataNode, strength: float) -> DataNode:
    """Add int(110 strength) to the values below 128."""
    values = np.arange(256)
    return _lookup(images, np.where(values < 128, values + int(strength * 110), values))


def color(images: DataNode, strength: float, size: int) -> DataNode:
    """Blend with the grey of the same luminance."""
    factor, pixels = enhancement_factor(strength), size * size
    luminance = fn.color_space_conversion(_luminance(images), image_type=types.GRAY, output_type=types.RGB)
    white = _images(_words(images, size, types.INT32) | _everywhere(255, size), size)
    # The image, its luminance and white become the rows of one picture: a filter of one column adds them up, weighted.
    rows = fn.multi_paste(
        *(fn.reshape(node, shape=[1, pixels, 3], layout="HWC") for node in (images, luminance, white)),
        output_size=[3, pixels],
        out_anchors=_ints([[0, 0], [1, 0], [2, 0]]),
    )
    weights = np.array([[factor], [1 - factor], [_TRUNCATE / 255]], np.float32)
    return fn.reshape(fn.filter(rows, weights, mode="valid"), shape=[size, size, 3], layout="HWC")


def sharpness(images: DataNode, strength: float, size: int) -> DataNode:
    """Blend with the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the outermost pixels stay."""
    factor = enhancement_factor(strength)
    if factor == 1:
        return images
    kernel = np.full((3, 3), (1 - factor) / 13, np.float32)
    kernel[1, 1] = factor + 5 * (1 - factor) / 13
    inner = fn.filter(images, kernel, mode="valid")
    if factor < 0.5:
        # The reference truncates twice, the smooth image and the blend; these are nearly the same here, so subtracting
        # one level comes closer.
        inner = fn.brightness_contrast(inner, brightness_shift=-1 / 255)
    return fn.multi_paste(images, inner, output_size=[size, size], out_anchors=_ints([[0, 0], [1, 1]]))


def auto_contrast(images: DataNode, size: int) -> DataNode:
    """Stretch each channel so that its lowest value becomes 0 and its highest 255."""
    lowest = fn.reductions.min(images, axes=[0, 1], keep_dims=True)
    span = fn.reductions.max(images, axes=[0, 1], keep_dims=True) - lowest
    # Row `span` of the table maps v - lowest; row 0, for a channel of a single value, maps v.
    first = span * _uint16(256) - lowest * fn.cast(span > _uint8(0), dtype=types.UINT16)
    spans, offsets = np.mgrid[:256, :256].astype(np.float32)
    table = offsets * (np.float32(255) / np.maximum(spans, 1))
    table[0] = offsets[0]
    return _lookup(_keys(images, first, size), table)


def equalize(images: DataNode, size: int) -> DataNode:
    """Equalise the histogram of each channel as PIL and TensorFlow do, to within a level.

    TensorFlow maps v to (C + step // 2) // step, where C counts the values below v and step is n // 255, n the count
    of values below the highest. OpenCV's formula, applied to the inverted image, gives 255 C / n. What remains is
    to scale by n / (255 step), which is in [1, 2), and to leave alone the channels whose step is 0. (Where n is below
    2 * 255, that is in an image with almost no content, a few pixels may be two levels off.)
    """
    highest = fn.reductions.max(images, axes=[0, 1], keep_dims=True)
    is_below = _images(_words(images, size) ^ _per_channel(highest, size), size) != _uint8(0)
    exact = _count(is_below, size) / 255.0 + 1e-6
    factor = exact / dali_math.floor(exact)  # in [1, 2), infinite where the step is 0
    # Row r of the table scales by 1 + (r / 254)^2. Rows are finest near 1, where photographs are, as their step is
    # about S * S / 255. Row 255, for a step of 0, is black.
    row = fn.cast(dali_math.min(dali_math.sqrt(factor - 1.0) * 254.0, 255.0), dtype=types.UINT16)
    rows, values = np.mgrid[:256, :256]
    table = np.floor((1 + (rows / 254) ** 2) * (255 - values) + 0.5)
    table[255] = 0
    scaled = _lookup(_keys(fn.equalize(invert(images, size)), row * _uint16(256), size), table)
    is_unchanged = fn.lookup_table(row, keys=[255], values=[255], dtype=types.UINT8)
    unchanged = _words(images, size) & _per_channel(is_unchanged, size)
    return _images(_words(scaled, size) | unchanged, size)


def warp_matrix(name: str, strength: float, sign: int, size: int) -> np.ndarray:
    """The destination-to-source matrix [3, 3] of rotate, shear_x or shear_y; pixel centres are whole numbers."""
    matrix = np.eye(3)
    if name == "rotate":
        angle = sign * math.radians(30 * strength)
        matrix[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        matrix[:2, 2] = (size - 1) / 2 * (1 - matrix[:2, :2].sum(axis=1))  # the centre stays
    else:
        matrix[(0, 1) if name == "shear_x" else (1, 0)] = sign * 0.3 * strength
    return matrix


# Every few pixels a shear samples at an exact half. The excess makes halves round up, as they nearly always do in the
# reference: OpenCV would round them to even, and a GPU has fewer digits.
_EXCESS = 1e-6


def raised_warp_matrix(name: str, strength: float, sign: int, size: int) -> np.ndarray:
    """`warp_matrix` for `warp`: a shear samples a little beyond exact halves, so that they round up."""
    matrix = warp_matrix(name, strength, sign, size)
    if name != "rotate":
        matrix[:2, 2] = _EXCESS * size
    return matrix


def warp(images: DataNode, matrix: DataNode) -> DataNode:
    """Sample the pixel nearest to where `matrix` points (see `raised_warp_matrix`)."""
    # The plain warp_affine gives the same pixels, but takes three times as long on the CPU.
    return fn.experimental.warp_perspective(
        images, matrix=matrix, interp_type=types.INTERP_NN, fill_value=[FILL] * 3, pixel_origin="center"
    )


def shear_repairs(name: str, strength: float, sign: int, size: int) -> np.ndarray:
    """Pastes, int32 [from, to, extent][P][2], that repair where `warp` differs from the reference's shear_x or shear_y.

    The reference computes x + level * y in float32. In a few rows the product is a half less one digit, and the sum
    rounds down as long as it is small enough to keep that digit. There the preceding pixel is the right one. The first
    paste is the whole image; strips shorter than an eighth of the image are not repaired (0.1 % of the pixels).
    """
    along, across = np.arange(size), np.arange(size)[:, None]
    level = sign * 0.3 * strength
    exact = along.astype(np.float32) + np.float32(level) * across.astype(np.float32)
    reference = np.trunc(exact + np.copysign(np.float32(0.5), exact))
    sampled = np.floor(along + level * across + 0.5 + _EXCESS * size)
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


def translation(strength: float, sign: int) -> int:
    """The pixels by which translate_x and translate_y move an image, left or up where positive."""
    return math.floor(sign * 100 * strength + 0.5)


def translation_pastes(axis: int, shift: int, size: int) -> np.ndarray:
    """A translation along `axis` by `shift` pixels, not 0, as two pastes, int32 [from, to, extent][image, grey][2]."""
    # The GPU cannot paste nothing: where nothing of the image is left, one row or column is pasted, and grey covers it.
    kept = max(size - abs(shift), 1)
    covered = min(abs(shift), size)
    pastes = np.zeros((3, 2, 2), np.int32)
    pastes[2] = size
    pastes[2, :, axis] = kept, covered
    if shift > 0:
        pastes[0, 0, axis] = size - kept
        pastes[1, 1, axis] = size - covered
    else:
        pastes[1, 0, axis] = size - kept
    return pastes


def grey(images: DataNode, size: int) -> DataNode:
    """An image of the fill value, on the device of `images`."""
    return types.Constant(np.full((size, size, 3), FILL, np.uint8), device=images.device, layout="HWC")


def paste(sources: list[DataNode], pastes: DataNode) -> DataNode:
    """Paste a rectangle of each source, in their order: pastes is int32 [from, to, extent][source][2], none empty."""
    return fn.multi_paste(*sources, in_anchors=pastes[0], out_anchors=pastes[1], shapes=pastes[2])


def cutout(images: DataNode, strength: float, center: DataNode, size: int) -> DataNode:
    """Cover a square of half-side int(40 strength) about the pixel `center` (row, column), clipped at the border."""
    half = int(strength * 40)
    if half == 0:
        return images
    corner = dali_math.max(center - float(half), 0.0)
    extent = dali_math.min(center + float(half), float(size)) - corner
    return fn.erase(images, anchor=corner, shape=extent, axes=[0, 1], fill_value=FILL)


def _luminance(images: DataNode) -> DataNode:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _lookup(keys: DataNode, table: np.ndarray) -> DataNode:
    values = np.clip(table, 0, 255).astype(np.uint8).ravel().tolist()
    return fn.lookup_table(keys, keys=_KEYS[: len(values)], values=values, dtype=types.UINT8)


def _keys(images: DataNode, first: DataNode, size: int) -> DataNode:
    """images + first, which is uint16 [1, 1, 3]: places in a table of 256 rows of 256 values."""
    words = _words(fn.cast(images, dtype=types.UINT16), size) + _per_channel(first, size, itemsize=2)
    return fn.reinterpret(words, dtype=types.UINT16, shape=[size, size, 3], layout="HWC")


# Images as words. 8 pixels are 24 bytes, three words of 64 bits; a constant of each channel makes the same three words
# for any 8 pixels. Integer arithmetic that carries nothing from one value to the next may be done on words. Images
# whose size is no multiple of 8 stay as they are.


def _has_words(size: int) -> bool:
    return size % 8 == 0 and size <= 255 * 8  # the second condition is for _count


def _words(images: DataNode, size: int, dtype: types.DALIDataType = types.UINT64) -> DataNode:
    """uint8 or uint16 [S, S, 3] as words [S, ..., 3]."""
    if not _has_words(size):
        return images
    return fn.reinterpret(images, dtype=dtype, shape=[size, -1, 3], layout="")


def _images(words: DataNode, size: int) -> DataNode:
    """`_words` of uint8 back to [S, S, 3]."""
    return fn.reinterpret(words, dtype=types.UINT8, shape=[size, size, 3], layout="HWC")


def _per_channel(values: DataNode, size: int, itemsize: int = 1) -> DataNode:
    """Values [1, 1, 3] as the words [1, 1, 3] of an image that has them everywhere."""
    if not _has_words(size):
        return values
    return fn.reinterpret(fn.cat(*[values] * (8 // itemsize), axis=2), dtype=types.UINT64, layout="")


def _everywhere(value: int, size: int) -> DataNode:
    """A value as the words of an image that has it everywhere; of 32 bits, as DALI takes no longer constants."""
    if not _has_words(size):
        return _uint8(value)
    return types.Constant(int.from_bytes([value] * 4, "little", signed=True), dtype=types.INT32)


def _count(flags: DataNode, size: int) -> DataNode:
    """How many of the flags [S, S, 3] are set in each channel, [1, 1, 3]."""
    flags = fn.reinterpret(flags, dtype=types.UINT8)
    if _has_words(size):
        rows = fn.reductions.sum(_words(flags, size), axes=[1])  # S / 8 words a row, so that no byte overflows
        flags = fn.reinterpret(rows, dtype=types.UINT8, shape=[size, 8, 3])
    return fn.reductions.sum(flags, axes=[0, 1], keep_dims=True)


def _uint8(value: int) -> DataNode:
    return types.Constant(value, dtype=types.UINT8)


def _uint16(value: int) -> DataNode:
    return types.Constant(value, dtype=types.UINT16)


def _ints(values: list[list[int]]) -> DataNode:
    return types.Constant(np.array(values, np.int32))
