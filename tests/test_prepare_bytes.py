"""What prepare makes of rare images and names: Exif data, suffixes, the longest names, and shards of unlike images."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dali_vit.data import load_dataset
from dali_vit.prepare import PrepareArguments, prepare, targets
from dali_vit.prepare.targets import shrink
from tests.datasets import IMAGES, write_source
from tests.test_verify import png_of


def encoded(height: int, width: int, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(out, "JPEG", **options)
    return out.getvalue()


def test_a_resized_image_keeps_its_orientation() -> None:
    """Its pixels lie as they did, so a viewer has to turn them as before."""
    exif = Image.Exif()
    exif[0x0112] = 6
    small = Image.open(io.BytesIO(shrink(encoded(80, 60, exif=exif), 40, 90)))
    assert (small.size, small.getexif()[0x0112]) == ((40, 53), 6)


def test_an_image_too_large_for_pillow_is_left_to_verify() -> None:
    huge = png_of(60_000, 60_000)
    assert shrink(huge, 40, 90) == huge


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.JPEG", "jpg"),
        ("a.jpg", "jpg"),
        ("a.PNG", "png"),
        ("a", "jpg"),
        ("a.", "jpg"),
        ("a.of a camera", "jpg"),
        ("a." + "b" * 100, "jpg"),
    ],
)
def test_a_member_of_a_shard_has_a_short_suffix_without_blanks(name: str, suffix: str) -> None:
    """The index for DALI parts its fields by blanks, and a tar's header has room for 100 bytes."""
    assert targets._extension(name) == suffix


@pytest.mark.parametrize(
    ("name", "possible"), [("a" * 255, True), ("a" * 256, False), ("é" * 127 + "a", True), ("é" * 128, False)]
)
def test_the_longest_name_of_a_folder_is_of_255_bytes(name: str, possible: bool) -> None:
    assert targets._is_name(name) is possible


@pytest.mark.timeout(60)
def test_shards_have_the_size_asked_for_though_the_images_of_a_class_are_larger(tmp_path: Path) -> None:
    """All small ones come before the large ones."""
    ((small, _, data), *_, (large, _, _)) = IMAGES["train"]
    images = {"train": [(small, f"{i}.jpg", data[:200] + bytes([i])) for i in range(256)]}
    images["train"] += [(large, f"{i}.jpg", data + bytes(20_000) + bytes([i])) for i in range(256)]
    made = prepare(replace(write_source("folder", tmp_path / "source", images), target=tmp_path / "set", shard_mb=1))
    sizes = [path.stat().st_size for path in made.glob("train/*.tar")]
    assert 0.6e6 < min(sizes) <= max(sizes) < 1.5e6


def test_what_was_resized_is_known_to_be_in_another_layout_too(tmp_path: Path) -> None:
    arguments = write_source("folder", tmp_path / "source")
    small = prepare(replace(arguments, target=tmp_path / "small", shorter_side=24, quality=80))
    folder = prepare(PrepareArguments(small, tmp_path / "set", to="folder"))
    assert load_dataset(folder, minival=0).resized == {"shorter_side": 24, "quality": 80}
