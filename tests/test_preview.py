"""preview draws what training sees: the very pixels of a step, the images they were made from, and the classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dali_vit import preview as previews
from dali_vit.data import load_dataset
from pipelines.loader import TrainLoader
from pipelines.readers import FileList
from pipelines.train import Augment
from tests.conftest import CLASSES, TINY, run, write_image_folder
from tests.test_launcher import second_of_two

CELL, TEXT = 96, 16  # images of 32 pixels are drawn three times as large

pytestmark = pytest.mark.timeout(120)


def preview(data: Path, out: Path, *more: str, capsys: Any) -> tuple[int, str, str]:
    return run("preview", "--data", str(data), "--out", str(out), "--gpus", "0", *TINY, *more, capsys=capsys)


def cell(grid: np.ndarray, number: int, columns: int, *, augmented: bool) -> np.ndarray:
    """One image of the grid, [96, 96, 3]."""
    top = TEXT + number // columns * (2 * CELL + TEXT) + CELL * augmented
    left = number % columns * CELL
    return grid[top : top + CELL, left : left + CELL]


@pytest.mark.parametrize("count", [3, 8, 20])
def test_it_shows_the_images_of_a_training_step(count, image_folder, tmp_path, capsys, monkeypatch):
    drawn: list[str] = []
    fit = previews._fit
    monkeypatch.setattr(previews, "_fit", lambda text, *rest: (drawn.append(text), fit(text, *rest))[1])
    flags = ["--at-step", "5", "--seed", "4", "--minival", "0.1", "--images", str(count), "--batch-size", "24"]
    code, out, err = preview(image_folder, tmp_path / "grid.png", *flags, capsys=capsys)
    assert code == 0, err
    columns, rows = min(count, 8), -(-count // 8)
    width, height = columns * CELL, TEXT + rows * (2 * CELL + TEXT)
    said = out.splitlines()
    assert said[-1] == f"{tmp_path}/grid.png: {count} images of step 5, {width} x {height} pixels"
    assert all(line.startswith("compiled ") for line in said[:-1])  # which a slow machine says, too

    samples = load_dataset(image_folder, minival=0.1).split("train")
    loader = TrainLoader(
        samples,
        batch_size=24,
        image_size=32,
        seed=4,
        rank=0,
        world_size=1,
        device="cpu",
        num_threads=1,
        start_step=5,
        augment=Augment(randaug_magnitude=2),
    )
    images, labels = next(loader)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (height, width, 3)
    for i in range(count):
        shown = cell(grid, i, columns, augmented=True)
        assert np.array_equal(shown[1::3, 1::3], images[i].numpy())
        # The brightness of an image tells its class: the one above is of the same.
        original = cell(grid, i, columns, augmented=False)[40:56, 40:56].mean()
        assert abs(original - (49.5 + 50 * labels[i].item())) < 10
    assert drawn[1:] == [CLASSES[label] for label in labels[:count].tolist()]
    assert drawn[0] == f"{image_folder.name}: step 5, seed 4, tensorflow crop, RandAugment(2, 2), before Mixup"
    assert (grid[-TEXT:, :CELL] < 128).any()


def test_what_cannot_be_decoded_says_so(tmp_path, capsys, monkeypatch):
    drawn: list[str] = []
    monkeypatch.setattr(previews, "_fit", lambda text, *_: (drawn.append(text), text)[1])
    data = write_image_folder(tmp_path / "data", train=2, val=1)
    (data / "train" / "ant" / "001.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(300))
    flags = ["--minival", "0", "--max-bad-share", "0.2", "--randaug-layers", "0"]
    assert preview(data, tmp_path / "grid.png", *flags, capsys=capsys)[0] == 0
    assert sorted(drawn[1:]) == sorted([*CLASSES, *CLASSES[1:], "cannot be decoded"])
    assert drawn[0] == "data: step 0, seed 0, tensorflow crop, no RandAugment, before Mixup"
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    bad = drawn.index("cannot be decoded") - 1
    for augmented in (False, True):
        assert (cell(grid, bad, 8, augmented=augmented) == 128).all()


def test_long_class_names_are_cut_to_the_room_there_is():
    draw = previews.ImageDraw.Draw(Image.new("RGB", (10, 10)))
    font = previews.ImageFont.load_default(11)
    name = "tench, Tinca tinca, and everything else that swims"
    shown = previews._fit(name, 92, draw, font)
    assert shown.endswith("...")
    assert name.startswith(shown[:-3])
    assert 70 < draw.textlength(shown, font) <= 92
    assert previews._fit("bee", 92, draw, font) == "bee"
    assert previews._fit("a\nline", 92, draw, font) == "a line"


def test_images_of_16_bits_are_shown_in_8(tmp_path):
    pixels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    files = FileList.from_paths([str(tmp_path / "deep.png")], [0])
    shown = np.asarray(previews._open(files, 0))
    assert np.array_equal(shown, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))


def test_a_pipe_among_the_images_is_named_and_not_waited_for(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", train=3, val=1)
    pipe = data / "train" / "bee" / "001.jpg"
    pipe.unlink()
    os.mkfifo(pipe)
    code, out, err = preview(data, tmp_path / "grid.png", capsys=capsys)
    told = f"dali-vit: {pipe} is not a regular file: remove it or put an image in its place\n"
    assert (code, out, err) == (2, "", told)
    assert not (tmp_path / "grid.png").exists()


def test_of_several_processes_the_main_one_writes(image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dali_vit.distributed.connect", second_of_two)
    assert preview(image_folder, tmp_path / "grid.png", capsys=capsys) == (0, "", "")
    assert not (tmp_path / "grid.png").exists()


def test_mistakes_are_named(image_folder, tmp_path, capsys):
    (tmp_path / "there.png").write_bytes(b"mine")
    good = tmp_path / "new.png"
    for out, flags, words in [
        (tmp_path / "there.png", [], "there.png: exists"),
        (tmp_path / "grid.jpg", [], "must end in .png"),
        (good, ["--at-step", "-1"], "--at-step -1"),
        (good, ["--images", "0"], "--images 0"),
        (good, ["--at-step", str(10**11)], "--at-step 100000000000: must be from 0 to"),
        (good, ["--epochs", "2", "--batch-size", "10", "--at-step", "12"], "--at-step 12: must be from 0 to 11\n"),
        (good, ["--resolution", "33"], "--resolution 33: not divisible by the patch"),
        (good, ["--randaug-magnitude", "11"], "--randaug-magnitude 11"),
        (good, ["--data", str(tmp_path / "absent")], "no such folder"),
        (tmp_path / "there.png" / "below.png", [], "cannot write there"),
    ]:
        code, _, err = preview(image_folder, out, *flags, capsys=capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err
    flags = ("--model", "timm:nope", "--data", str(image_folder), "--out", str(good), "--gpus", "0")
    code, _, err = run("preview", *flags, capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "dali-vit: --model timm:nope: " in err
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]
    assert (tmp_path / "there.png").read_bytes() == b"mine"
