"""Crop windows of the training graph against TensorFlow's sampler.

Every pixel of the images here encodes its own coordinates. Resized to at least the window's size, the corners of
the output are exactly the corners of the window, which so is read off what the trainer would get.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.loader import TrainLoader
from pipelines.readers import FileList
from pipelines.train import Augment
from tests.parity.conftest import Reference
from tests.statistical import kolmogorov_smirnov_p

pytestmark = pytest.mark.timeout(300)

DRAWS = {"tensorflow": 5000, "torchvision": 1000}
BATCH = 50
COLUMNS = ("top", "left", "height", "width")


def coordinate_image(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: the row's low byte, the column's low byte, and both high ones."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y & 255, x & 255, (y >> 8) << 4 | x >> 8], axis=-1).astype(np.uint8)


def coordinates(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of pixels [N, 3] of a coordinate image."""
    low_y, low_x, high = pixels.astype(np.int64).T
    return (high >> 4) << 8 | low_y, (high & 15) << 8 | low_x


def trained_windows(height: int, width: int, folder: Path, augment: Augment) -> np.ndarray:
    """Windows (top, left, height, width) that samples of the training graph got, [DRAWS, 4]."""
    path = folder / f"{height}x{width}.bmp"  # lossless, and decoded three times as fast as PNG
    Image.fromarray(coordinate_image(height, width)).save(path)
    loader = TrainLoader(
        FileList.from_paths([str(path)], [0]),
        batch_size=BATCH,
        image_size=max(height, width),
        seed=0,
        rank=0,
        world_size=1,
        device="cpu",
        num_threads=2,
        augment=augment,
    )
    batches = (next(loader)[0].numpy() for _ in range(DRAWS[augment.crop] // BATCH))
    corners = np.concatenate([images[:, [0, -1], [0, -1]] for images in batches])  # [DRAWS, 2, 3]
    (top, left), (bottom, right) = coordinates(corners[:, 0]), coordinates(corners[:, 1])
    return np.stack([top, left, bottom - top + 1, right - left + 1], axis=1)


def p_values(windows: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    return {name: kolmogorov_smirnov_p(windows[:, i], expected[:, i]) for i, name in enumerate(COLUMNS)}


@pytest.mark.parametrize("crop", ["tensorflow", "torchvision"])
def test_windows_of_the_training_graph(crop: Any, crop_windows_reference: Reference, tmp_path: Path) -> None:
    """TensorFlow's sampler cannot be told from the reference; torchvision's is, by the same test."""
    meta = crop_windows_reference.meta
    augment = Augment(
        crop=crop,
        area_range=tuple(meta["area"]),
        ratio_range=tuple(meta["aspect_ratio"]),
        flip=False,
        randaug_layers=0,
    )
    assert crop_windows_reference.arrays
    for size, expected in crop_windows_reference.arrays.items():
        height, width = map(int, size.split("x"))
        p = p_values(trained_windows(height, width, tmp_path, augment), expected)
        if crop == "tensorflow":
            assert min(p.values()) > 0.001, (size, p)
        else:
            assert min(p["height"], p["width"]) < 1e-9, (size, p)
