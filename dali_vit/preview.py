"""`dali-vit preview`: the images of a training step, each below the whole image that it was made from."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dali_vit import data as datasets
from dali_vit.config import Config, UserError, total_steps
from dali_vit.distributed import Group
from dali_vit.files import at_home, make_parent, replacing
from dali_vit.loaders import train_loader
from dali_vit.prepare.sources import read_sample
from dali_vit.prepare.targets import as_8_bits
from dali_vit.report import augmentation
from dali_vit.validation import check_range, given_data
from dali_vit.variants import check_config
from pipelines.order import TrainOrder

__all__ = ["preview"]

_COLUMNS = 8
_CELL = 96  # pixels: smaller images are enlarged to at least this side, else the class would not fit below them
_TEXT = 16  # pixels: the height of a line of text
_BLANK = (128, 128, 128)


def preview(config: Config, group: Group, out: Path, *, step: int = 0, count: int = 32) -> str:
    """Writes the first `count` images of a step, as the training graph gives them, as a labelled grid.

    A run of this config trains on the same images at that step (before Mixup): on the CPU pixel for pixel; on a GPU
    they may be rounded differently, if the run has found other decoder settings to be faster. Above each image is the
    whole image it was made from, below it the class. Returns one line to print.
    Raises UserError for a config that no run could use, and for an `out` that exists or is no .png.
    """
    out = at_home(out)
    check_config(config)
    data = given_data(config)
    _check(out, count)
    dataset = datasets.load_dataset(data, minival=config.data.minival)
    samples = dataset.split("train")
    datasets.check_images(samples, config.data.max_bad_share)
    check_range("--at-step", step, 0, total_steps(config.optim, len(samples)) - 1)
    # As rank 0 of many, this process loads the first rows of the batch and nothing else.
    total = config.optim.batch_size
    local = next(n for n in range(min(count, total), total + 1) if total % n == 0)
    alone = dataclasses.replace(group, rank=0, world_size=total // local)
    loader = train_loader(dataset, config, alone, start_step=step)
    try:
        augmented, labels = next(loader)
        pixels = augmented[:count].cpu().numpy()
        names = [dataset.classes[label] if label >= 0 else "cannot be decoded" for label in labels[:count].tolist()]
    finally:
        loader.close()
    indices = TrainOrder(len(samples), total, 0, alone.world_size, config.run.seed).indices(step)[:count]
    originals = [_open(samples, index) for index in indices.tolist()]
    title = f"{dataset.name}: step {step}, seed {config.run.seed}, {augmentation(config.data)}, before Mixup"
    grid = _grid(originals, pixels, names, title)
    try:
        make_parent(out)
        with replacing(out) as temporary:
            grid.save(temporary, "PNG")
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror or error})") from error
    return f"{out}: {len(names)} images of step {step}, {grid.width} x {grid.height} pixels"


def _check(out: Path, count: int) -> None:
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the name must end in .png")
    if out.exists():
        raise UserError(f"--out {out}: exists; choose another name or remove it")
    check_range("--images", count, 1)


def _open(samples: datasets.ImageList, index: int) -> Image.Image | None:
    """The whole image as RGB; None where it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(read_sample(samples, index))) as image:
            return as_8_bits(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _grid(originals: list[Image.Image | None], augmented: np.ndarray, names: list[str], title: str) -> Image.Image:
    """A title, and rows of cells: an original, its augmented image [S, S, 3] uint8, its class."""
    count, resolution = len(names), augmented.shape[1]
    scale = -(-_CELL // resolution)
    side, columns = scale * resolution, min(_COLUMNS, count)
    height = 2 * side + _TEXT
    grid = Image.new("RGB", (columns * side, _TEXT + -(-count // columns) * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(_TEXT - 5)
    draw.text((2, 1), _fit(title, grid.width - 4, draw, font), "black", font)
    for i, (original, pixels, name) in enumerate(zip(originals, augmented, names, strict=True)):
        x, y = i % columns * side, _TEXT + i // columns * height
        grid.paste(_BLANK, (x, y, x + side, y + side))
        if original is not None:
            original.thumbnail((side, side))
            grid.paste(original, (x + (side - original.width) // 2, y + (side - original.height) // 2))
        grid.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y + side))
        draw.text((x + 2, y + 2 * side + 1), _fit(name, side - 4, draw, font), "black", font)
    return grid


def _fit(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as fits on one line of `width` pixels."""
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."
