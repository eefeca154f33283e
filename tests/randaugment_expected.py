"""Images that are hard for RandAugment's operations, and the results expected of the operations, in plain numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def photo(size: int, seed: int = 0) -> np.ndarray:
    """Structure at several scales, with another range and brightness in each channel, and partly saturated."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(40, 200, 3) + np.zeros((size, size, 3))
    for cells in (4, 8, 16, size):
        coarse = rng.normal(0, 40, (cells, cells, 3))
        index = np.arange(size) * cells // size
        image += coarse[index][:, index]
    return image.clip(0, 255).astype(np.uint8)


def awkward_images(size: int) -> dict[str, np.ndarray]:
    """Images on which histograms and stretches go wrong."""
    rng = np.random.default_rng(1)
    few = rng.choice(np.array([3, 90, 91, 200], np.uint8), (size, size, 3))
    nearly_white = np.full((size, size, 3), 255, np.uint8)
    nearly_white[:3, :40, 0] = rng.integers(0, 255, (3, 40))  # fewer than 255 other values: the step is 0
    nearly_white[:6, :50, 1] = rng.integers(0, 255, (6, 50))  # a step of 1, the coarsest scale
    nearly_white[:9, :, 2] = rng.integers(0, 255, (9, size))
    constant_channel = photo(size, 2)
    constant_channel[..., 1] = 77
    saturated = (photo(size, 3).astype(int) * 2).clip(0, 255).astype(np.uint8)
    return {
        "photo": photo(size),
        "few values": few,
        "nearly white": nearly_white,
        "nearly black": 255 - nearly_white,
        "constant channel": constant_channel,
        "constant": np.full((size, size, 3), 130, np.uint8),
        "black": np.zeros((size, size, 3), np.uint8),
        "saturated": saturated,
        "saturated at 180": np.minimum(saturated, 180),
        "dark": photo(size, 4) // 16,
        "noise": rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
    }


# The operations in plain numpy.


def blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    d, v = degenerate.astype(np.float32), image.astype(np.float32)
    return (d + np.float32(factor) * (v - d)).clip(0, 255).astype(np.uint8)


def luminance(image: np.ndarray) -> np.ndarray:
    grey = image.astype(np.float32) @ np.array([0.2989, 0.587, 0.114], np.float32)
    return np.repeat((grey / 255 * 255.5).astype(np.uint8)[..., None], 3, axis=-1)


def expected_auto_contrast(image: np.ndarray, s: float) -> np.ndarray:
    lowest, highest = (f(image, axis=(0, 1)).astype(np.float32) for f in (np.min, np.max))
    scale = np.float32(255) / np.maximum(highest - lowest, 1)
    stretched = ((image - lowest) * scale).clip(0, 255).astype(np.uint8)
    return np.where(highest > lowest, stretched, image)


def expected_equalize(image: np.ndarray, s: float) -> np.ndarray:
    output = image.copy()
    for c in range(3):
        histogram = np.bincount(image[..., c].ravel(), minlength=256)
        step = int(histogram.sum() - histogram[histogram > 0][-1]) // 255
        if step > 0:
            below = np.cumsum(histogram) - histogram
            table = ((below + step // 2) // step).clip(0, 255)
            output[..., c] = table[image[..., c]]
    return output


def expected_posterize(image: np.ndarray, s: float) -> np.ndarray:
    shift = min(8 - int(4 * s), 7)
    return image >> shift << shift


def expected_solarize(image: np.ndarray, s: float) -> np.ndarray:
    return np.where(image < int(256 * s) % 256, image, 255 - image)


def expected_solarize_add(image: np.ndarray, s: float) -> np.ndarray:
    return np.where(image < 128, image + int(110 * s), image).astype(np.uint8)


def expected_contrast(image: np.ndarray, s: float) -> np.ndarray:
    return blend(np.full_like(image, min(image.shape[0] ** 2 / 256, 255)), image, 1.8 * s + 0.1)


def expected_sharpness(image: np.ndarray, s: float) -> np.ndarray:
    size = len(image)
    smooth = sum(
        (5.0 if (y, x) == (1, 1) else 1.0) * image[y : y + size - 2, x : x + size - 2].astype(np.float64)
        for y in range(3)
        for x in range(3)
    )
    degenerate = image.copy()
    degenerate[1:-1, 1:-1] = np.floor(smooth / 13 + 1e-9)
    return blend(degenerate, image, 1.8 * s + 0.1)


def expected_geometric(image: np.ndarray, name: str, s: float, sign: int) -> np.ndarray:
    """Each pixel is the nearest to its source position (float32, halves away from zero), or 128 outside the image."""
    size, f = len(image), np.float32
    y, x = np.mgrid[:size, :size].astype(f)
    source_y, source_x = y, x
    if name == "rotate":
        angle, middle = math.radians(sign * 30 * s), (size - 1) / 2
        source_x = (math.cos(angle) * (x - middle) - math.sin(angle) * (y - middle) + middle).astype(f)
        source_y = (math.sin(angle) * (x - middle) + math.cos(angle) * (y - middle) + middle).astype(f)
    elif name == "shear_x":
        source_x = x + f(sign * 0.3 * s) * y
    elif name == "shear_y":
        source_y = y + f(sign * 0.3 * s) * x
    elif name == "translate_x":
        source_x = x + f(sign * 100 * s)
    else:
        source_y = y + f(sign * 100 * s)
    column, row = (np.trunc(p + np.copysign(f(0.5), p)).astype(int) for p in (source_x, source_y))
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    output = np.full_like(image, 128)
    output[inside] = image[row[inside], column[inside]]
    return output


EXPECTED: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "auto_contrast": expected_auto_contrast,
    "equalize": expected_equalize,
    "invert": lambda image, s: 255 - image,
    "posterize": expected_posterize,
    "solarize": expected_solarize,
    "color": lambda image, s: blend(luminance(image), image, 1.8 * s + 0.1),
    "contrast": expected_contrast,
    "brightness": lambda image, s: blend(np.zeros_like(image), image, 1.8 * s + 0.1),
    "sharpness": expected_sharpness,
    "solarize_add": expected_solarize_add,
}
