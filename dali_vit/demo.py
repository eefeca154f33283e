"""The demo dataset: 10 classes of drawn textures, as JPEGs of ImageNet's spread of sizes, made on first use.

The classes differ in shape alone: colours, lighting, scale, angle and noise are drawn from the same distribution
for all of them. A texture fills its image, so that nearly every crop shows the class.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from dali_vit.config import UserError
from dali_vit.files import cache_folder

__all__ = ["CLASSES", "demo_folder", "draw_image", "make_demo"]

# Part of the folder's name and of every seed: raise it when the drawing changes.
_VERSION = 1
_TRAIN_PER_CLASS, _VAL_PER_CLASS = 200, 50
# Written last, so a folder that has it is whole.
_MANIFEST = "manifest.json"

log = logging.getLogger(__name__)

# A texture: coordinates u, v in periods (float32 [H, W]) -> signed distance to its outline, positive inside.
Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def demo_folder() -> Path:
    """Folder of the demo dataset, drawn on first use (seconds): 2,000 training and 500 validation images.

    It lies in the cache folder (`files.cache_folder`).
    Raises UserError if the dataset cannot be written there.
    """
    folder = cache_folder() / f"demo-v{_VERSION}"
    try:
        make_demo(folder)
    except OSError as error:
        raise UserError(
            f"the demo dataset cannot be written to {folder} ({error.strerror}): "
            "set DALI_VIT_CACHE to a folder with 200 MB free"
        ) from error
    return folder


def make_demo(folder: Path, train_per_class: int = _TRAIN_PER_CLASS, val_per_class: int = _VAL_PER_CLASS) -> None:
    """Draws the dataset into `folder`, in place of anything there, unless the whole dataset is there already.

    The folder appears complete or not at all, whatever kills the process; of processes that start at the same time one
    draws and the others wait. An image depends on its place alone (split, class, number), not on how many are drawn.
    """
    per_class = {"train": train_per_class, "val": val_per_class}
    if _is_whole(folder, per_class):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if _is_whole(folder, per_class):  # drawn by the process that held the lock
            return
        log.info("drawing the demo dataset into %s", folder)
        for remains in [folder, *folder.parent.glob(f"{folder.name}.partial-*")]:
            shutil.rmtree(remains, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        partial.chmod(0o755)
        try:
            _draw_files(partial, per_class)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def draw_image(class_index: int, seed: tuple[int, ...]) -> np.ndarray:
    """One image of a class, uint8 [H, W, 3] with sides of 200 to 700 pixels, a pure function of its arguments."""
    rng = np.random.default_rng([_VERSION, class_index, *seed])
    height, width = _draw_size(rng)
    # 4 to 8 periods along the shorter side: still several pixels each when the image is resized to 64 pixels.
    period = min(height, width) / rng.uniform(4, 8)
    angle = np.deg2rad(rng.uniform(-8, 8))
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    cos, sin = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
    phase_u, phase_v = rng.uniform(0, 64, 2).astype(np.float32)
    u = x * cos + y * sin + phase_u
    v = y * cos - x * sin + phase_v
    distance = _TEXTURES[class_index](u, v, rng)
    # Share of each pixel that the shape covers; the shape's edge is about two pixels wide.
    inside = np.clip(distance * np.float32(period / 2) + np.float32(0.5), 0, 1)

    colours = _draw_colours(rng)
    slope = rng.uniform(-0.15, 0.15, 2).astype(np.float32)
    light = (x / width - 0.5) * slope[0] + (y / height - 0.5) * slope[1]
    light = light + rng.standard_normal((height, width), np.float32) * np.float32(rng.uniform(0.004, 0.03))
    image = np.empty((height, width, 3), np.uint8)
    for channel, (ground, shape) in enumerate(colours.T):
        values = inside * (shape - ground) + light
        image[..., channel] = np.clip(values * np.float32(255) + (ground * 255 + np.float32(0.5)), 0, 255)
    return image


def _draw_files(folder: Path, per_class: dict[str, int]) -> None:
    for split in per_class:
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
    items = [
        (split, class_index, number)
        for split, count in per_class.items()
        for class_index in range(len(CLASSES))
        for number in range(count)
    ]

    def draw_file(item: tuple[str, int, int]) -> int:
        split, class_index, number = item
        image = draw_image(class_index, (int(split == "val"), number))
        path = folder / split / CLASSES[class_index] / f"{number:05d}.jpg"
        Image.fromarray(image).save(path, quality=80 + number % 16)
        return path.stat().st_size

    # Threads suffice: NumPy and Pillow's encoder release the GIL while they work.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        num_bytes = sum(pool.map(draw_file, items))
    (folder / _MANIFEST).write_text(json.dumps({"per_class": per_class, "bytes": num_bytes}))


def _is_whole(folder: Path, per_class: dict[str, int]) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    num_bytes = sum(path.stat().st_size for path in folder.glob("*/*/*.jpg"))
    return bool(manifest == {"per_class": per_class, "bytes": num_bytes})


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: about 3 in 4 landscape, on average 415 x 370, as spread as ImageNet's."""
    long = np.clip(rng.normal(430, 90), 260, 700)
    short = np.clip(long * rng.uniform(0.6, 1.0), 200, 700)
    height, width = (short, long) if rng.random() < 0.75 else (long, short)
    return round(height), round(width)


def _draw_colours(rng: np.random.Generator) -> np.ndarray:
    """Colours of ground and shape in [0, 1], float32 [2, 3], told apart by luminance too (Rec. 601 weights)."""
    while True:
        colours = rng.uniform(0.05, 0.95, (2, 3)).astype(np.float32)
        luminance = colours @ np.array([0.299, 0.587, 0.114], np.float32)
        if abs(luminance[0] - luminance[1]) > 0.3:
            return colours


def _cell(u: np.ndarray) -> np.ndarray:
    """Position within the period, in [-0.5, 0.5)."""
    return u - np.floor(u) - np.float32(0.5)


def _stagger(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """u, moved by half a period in every second row of v."""
    return u + np.float32(0.5) * (np.floor(v) % 2)


def _blobs(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    rows, columns = (int(np.ptp(axis) * 1.6) + 3 for axis in (v, u))
    noise = Image.fromarray(rng.standard_normal((rows, columns), np.float32))
    smooth = noise.resize((u.shape[1], u.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth) * np.float32(0.3)


def _bricks(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    u, v = u * np.float32(0.8), v * np.float32(1.6)
    to_joint = np.minimum(0.5 - np.abs(_cell(_stagger(u, v))), 0.25 - 0.5 * np.abs(_cell(v)))
    return to_joint - np.float32(rng.uniform(0.05, 0.08))


def _checkerboard(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    a, b = np.abs(_cell(u)) - np.float32(0.25), np.abs(_cell(v)) - np.float32(0.25)
    return np.sign(a) * np.sign(b) * np.minimum(np.abs(a), np.abs(b))


def _crosses(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    thick, long = np.float32(rng.uniform(0.09, 0.14)), np.float32(rng.uniform(0.35, 0.42))
    a, b = np.abs(_cell(u)), np.abs(_cell(v))
    return np.maximum(np.minimum(long - a, thick - b), np.minimum(thick - a, long - b))


def _dots(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.float32(rng.uniform(0.24, 0.36)) - np.hypot(_cell(_stagger(u, v)), _cell(v))


def _honeycomb(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Hexagons are the Voronoi cells of two interleaved lattices of 1 x sqrt(3).
    root3 = np.float32(3**0.5)
    v = v / root3
    candidates = []
    for shift in (0, np.float32(0.5)):
        a, b = np.abs(_cell(u + shift)), np.abs(_cell(v + shift)) * root3
        candidates.append(np.maximum(a, 0.5 * a + 0.5 * root3 * b))
    return np.float32(rng.uniform(0.38, 0.43)) - np.minimum(*candidates)


def _rings(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    radius = np.hypot(_cell(u * np.float32(0.5)), _cell(v * np.float32(0.5)))
    return (np.abs(_cell(radius * 4)) - np.float32(rng.uniform(0.2, 0.3))) * np.float32(0.5)


def _stripes(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.float32(rng.uniform(0.17, 0.33)) - np.abs(_cell(v))


def _weave(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Basket weave: squares of three straws, lying and standing in turn.
    u, v = u * np.float32(0.6), v * np.float32(0.6)
    lying = (np.floor(u) + np.floor(v)) % 2 == 0
    across = np.abs(_cell(np.where(lying, v, u) * 3))
    return (np.float32(rng.uniform(0.22, 0.34)) - across) * np.float32(0.5)


def _zigzag(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height = v + np.float32(rng.uniform(1.5, 2.2)) * np.abs(_cell(u * np.float32(0.7)))
    return (np.float32(rng.uniform(0.2, 0.3)) - np.abs(_cell(height))) * np.float32(0.6)


_TEXTURES: tuple[Texture, ...] = (
    _blobs,
    _bricks,
    _checkerboard,
    _crosses,
    _dots,
    _honeycomb,
    _rings,
    _stripes,
    _weave,
    _zigzag,
)
CLASSES = tuple(texture.__name__.lstrip("_") for texture in _TEXTURES)
