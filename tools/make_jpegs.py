#!/usr/bin/env python3
"""Writes JPEGs like ImageNet's, to measure input pipelines where ImageNet itself is not at hand.

Sizes, bytes (about 110 KB on average) and spectrum follow ImageNet's: 1/f textures, occluding edges and sensor
noise; baseline JPEG, 4:2:0. The layout is `train/<class>/*.JPEG` and `val/<class>/*.JPEG`, as
`dali-vit train --data` takes it. An image depends on --seed and its number alone, not on how many are written or by how
many workers; the same command again goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmark import command  # first, see there

from pipelines.words import counted

# isort: split

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from dali_vit.files import replacing
from dali_vit.process import end_with_parent
from dali_vit.validation import MAX_THREADS

__all__ = ["draw_image", "main", "make_jpegs"]

_SETTINGS = "make_jpegs.json"
_AT_ONCE = 32  # images that a worker is given
_SIDE = 1024  # of the scenes, in pixels
_NOISE_STRENGTHS = np.geomspace(2, 14, 10)  # standard deviations, in levels of 255

# Width, height and share of common sizes: ImageNet's photographs were mostly scaled to 500 on the long side.
_COMMON_SIZES = [
    (500, 375, 0.36),
    (375, 500, 0.13),
    (500, 333, 0.12),
    (333, 500, 0.05),
    (500, 500, 0.02),
    (640, 480, 0.03),
]


class Scenes(NamedTuple):
    """What images are composed of, made once a process: an FFT for each image would be ten times slower."""

    pictures: list[Image.Image]
    """RGB: discs of all sizes that occlude each other, with 1/f texture."""
    masks: list[Image.Image]
    """L, 0 or 255: smooth random outlines."""
    noises: list[np.ndarray]
    """uint8, flat: normal about 128, one of each strength."""


class Written(NamedTuple):
    """What is known of one file."""

    is_new: bool
    num_bytes: int
    width: int
    height: int


@cache
def make_scenes(seed: int) -> Scenes:
    """The scenes of a seed (takes about a second)."""
    rng = np.random.default_rng([seed, 2])
    tints = [_field(rng, 1.3) for _ in range(3)]
    pictures = [_draw_picture(tints, rng) for _ in range(8)]
    masks = [Image.fromarray((_field(rng, 1.8) > 0).astype(np.uint8) * 255) for _ in range(4)]
    normal = rng.standard_normal(1 << 20, np.float32)
    noises = [np.clip(normal * s + 128.5, 0, 255).astype(np.uint8) for s in _NOISE_STRENGTHS]
    return Scenes(pictures, masks, noises)


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels: mostly 500 on the long side, with tails to 75 and 3,000."""
    shares = [share for *_, share in _COMMON_SIZES]
    choice = rng.choice(len(shares) + 1, p=[*shares, 1 - sum(shares)])
    if choice < len(shares):
        return _COMMON_SIZES[choice][:2]
    long = rng.uniform(1200, 3000) if rng.random() < 0.01 else np.clip(rng.lognormal(np.log(385), 0.5), 125, 2000)
    short = long * rng.uniform(0.6, 1.0)
    width, height = (long, short) if rng.random() < 0.7 else (short, long)
    return round(width), round(height)


def draw_image(scenes: Scenes, rng: np.random.Generator) -> Image.Image:
    """One RGB image: windows of two scenes on either side of an outline, then lighting and sensor noise."""
    width, height = draw_size(rng)
    zoom = rng.lognormal(0, 0.3)
    near, far, mask = (
        _window(scene[rng.integers(len(scene))], width, height, zoom, rng)
        for scene in (scenes.pictures, scenes.pictures, scenes.masks)
    )
    image = Image.composite(near, far, mask)
    levels = np.arange(256)
    contrast, brightness = rng.uniform(0.6, 1.2), rng.uniform(105, 150)
    curves = [(levels - 128) * contrast * gain + brightness for gain in rng.uniform(0.85, 1.15, 3)]
    image = image.point(np.clip(np.concatenate(curves), 0, 255).astype(int).tolist())
    noise = scenes.noises[rng.integers(len(scenes.noises))]
    noise = np.resize(noise[rng.integers(len(noise) // 3) :], (height, width, 3))
    return ImageChops.add(image, Image.fromarray(noise), scale=1, offset=-128)


def _field(rng: np.random.Generator, exponent: float) -> np.ndarray:
    """Periodic random field with amplitudes 1/f^exponent, standardised, float32 [1024, 1024]."""
    frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None, :]).astype(np.float32)
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((_SIDE, _SIDE), np.float32)) / frequency**exponent
    field = np.fft.irfft2(spectrum).astype(np.float32)
    return (field - field.mean()) / field.std()


def _draw_picture(tints: list[np.ndarray], rng: np.random.Generator) -> Image.Image:
    discs = Image.new("RGB", (_SIDE, _SIDE))
    draw = ImageDraw.Draw(discs)
    # Radii of density r^-3 give occluding discs the spectrum of photographs (the dead leaves model).
    for radius in np.clip(6 / np.sqrt(rng.random(4000)), 6, 300):
        x, y = rng.uniform(0, _SIDE, 2)
        grey = rng.normal(128, 45)
        colour = tuple(int(c) for c in np.clip(grey + rng.normal(0, 16, 3), 0, 255))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius * rng.uniform(0.5, 1)), fill=colour)
    moved = [np.roll(tint, rng.integers(_SIDE, size=2), (0, 1)) for tint in tints]
    texture = _field(rng, 1.0)[..., None] * 34 + np.stack(moved, -1) * 10
    return Image.fromarray(np.clip(np.asarray(discs) + texture, 0, 255).astype(np.uint8))


def _window(scene: Image.Image, width: int, height: int, zoom: float, rng: np.random.Generator) -> Image.Image:
    """A random window of the scene, flipped at random, resized to width x height by about `zoom`."""
    zoom = max(zoom, width / _SIDE, height / _SIDE)
    w, h = width / zoom, height / zoom
    x, y = rng.uniform(0, _SIDE - w), rng.uniform(0, _SIDE - h)
    if rng.random() < 0.5:
        scene = scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return scene.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))


_seed: int  # of this worker process


def _start_worker(seed: int) -> None:
    global _seed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone answers Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    _seed = seed


def _write(item: tuple[Path, int, int]) -> Written:
    """Writes one image unless it is there; a file is complete as soon as it bears its name."""
    path, split, number = item
    rng = np.random.default_rng([_seed, split, number])
    if path.exists():
        width, height = draw_size(rng)
        return Written(False, path.stat().st_size, width, height)
    image = draw_image(make_scenes(_seed), rng)
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, "JPEG", quality=int(rng.triangular(86, 96, 98)), subsampling="4:2:0")
    partial.rename(path)
    return Written(True, path.stat().st_size, *image.size)


def make_jpegs(out: Path, counts: dict[str, int], *, classes: int, workers: int, seed: int) -> list[Written]:
    """Writes `counts[split]` images of each split (`train`, `val`) into `out`; image i is of class i % classes.

    Raises ValueError if the folder holds something else, or images of another seed or number of classes.
    """
    _claim(out, {"classes": classes, "seed": seed})
    items = []
    for split_index, (split, count) in enumerate(counts.items()):
        folders = [out / split / f"class_{i:04d}" for i in range(classes if count else 0)]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        items += [(folders[i % classes] / f"{split}_{i:08d}.JPEG", split_index, i) for i in range(count)]
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(seed,)) as pool:
        try:
            return list(_with_progress(pool.map(_write, items, chunksize=_AT_ONCE), len(items)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _claim(out: Path, settings: dict[str, int]) -> None:
    """Makes the folder, or makes sure that its images come from the same settings."""
    note = out / _SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        if note.exists():
            try:
                found = json.loads(note.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{note} cannot be read ({error}): choose another --out folder") from error
            if found != settings:
                raise ValueError(f"--out {out} holds images of {found}, not {settings}: choose another folder")
        elif any(out.iterdir()):
            raise ValueError(f"--out {out} holds something else: choose a new or empty folder")
        else:
            with replacing(note) as temporary:
                temporary.write_text(json.dumps(settings), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}): choose another folder") from error


def _with_progress(results: Iterable[Written], total: int) -> Iterable[Written]:
    start = last = time.perf_counter()
    for done, result in enumerate(results, 1):
        yield result
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            print(f"{done:,} of {total:,} ({done / (last - start) * 60:,.0f} a minute)", file=sys.stderr)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(__doc__, argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, default=argparse.SUPPRESS, help="folder to write to")
    add("--count", type=int, default=50_000, help="training images")
    add("--val-count", type=int, default=0, help="validation images")
    add("--classes", type=int, default=1000, help="class folders in each split")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    add("--seed", type=int, default=0, help="seed of all images")
    args = parser.parse_args(argv)
    for flag, value, least in [
        ("--classes", args.classes, 1),
        ("--seed", args.seed, 0),
        ("--count", args.count, 1),
        ("--val-count", args.val_count, 0),
    ]:
        if value < least:
            parser.error(f"{flag} {value}: must be at least {least}")
    if not 1 <= args.workers <= MAX_THREADS:
        parser.error(f"--workers {args.workers}: must be from 1 to {MAX_THREADS:,}")
    for flag, value in [("--count", args.count), ("--val-count", args.val_count)]:
        if 0 < value < args.classes:
            parser.error(f"{flag} {value} leaves some of {args.classes} classes empty: raise it or lower --classes")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    counts = {"train": args.count, "val": args.val_count}
    workers = min(args.workers, -(-(args.count + args.val_count) // _AT_ONCE))  # others would get nothing to do
    start = time.perf_counter()
    # Otherwise SIGTERM would end this process alone, in the middle of its work.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        written = make_jpegs(args.out, counts, classes=args.classes, workers=workers, seed=args.seed)
    except ValueError as error:
        print(f"make_jpegs.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"make_jpegs.py: --out {args.out}: {error.strerror}; mend that, and the same command goes on",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("make_jpegs.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    seconds = time.perf_counter() - start
    new = sum(w.is_new for w in written)
    width, height, kilobytes = (
        float(np.mean(values))
        for values in ([w.width for w in written], [w.height for w in written], [w.num_bytes / 1e3 for w in written])
    )
    print(
        f"{args.out}: {args.count:,} training and {args.val_count:,} validation images of {args.classes:,} classes, "
        f"{kilobytes:.1f} KB and {width:.0f} x {height:.0f} pixels on average\n"
        f"{new:,} written in {seconds:.1f} s by {counted(workers, 'worker')},"
        f" {new / seconds * 60:,.0f} a minute"
    )
    return 0


if __name__ == "__main__":
    command.run(lambda: sys.exit(main()))
