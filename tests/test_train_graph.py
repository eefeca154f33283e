"""The training graph's own settings: its defaults, and which of an image's random numbers decide what."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import crop
from pipelines.order import TrainOrder
from pipelines.readers import FileList
from pipelines.train import Augment, numbers_drawn
from tests.test_loader import NUM_FILES, train_loader, write_images


def test_the_defaults_are_the_papers() -> None:
    """Training gives neither of the crop's ranges."""
    augment = Augment()
    assert (augment.crop, augment.area_range, augment.ratio_range, augment.flip) == (
        "tensorflow",
        (0.05, 1),
        None,
        True,
    )
    parameters = inspect.signature(crop.sample_window_tensorflow).parameters
    assert parameters["ratio_range"].default == (0.75, 1.33)
    assert crop.NUM_UNIFORMS["tensorflow"] == (100, 100, 2)
    assert (augment.randaug_layers, augment.randaug_magnitude, augment.randaug_contrast) == (2, 10, "paper")


def test_flip_and_operation_are_drawn_by_numbers_of_their_own(tmp_path: Path) -> None:
    """Of square images whose windows are the whole; the numbers of an image are those of its position in the stream."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (64, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files = FileList.from_paths([str(tmp_path / f"{i}.png") for i in range(64)], np.arange(64))
    augment = Augment(area_range=(1.0, 1.0), ratio_range=(1.0, 1.0), randaug_layers=1)
    images, labels = next(train_loader(files, batch_size=64, augment=augment))
    counts = numbers_drawn(augment)
    assert counts == [100, 100, 2, 1, 4]
    numbers = TrainOrder(64, 64, 0, 1, 1).uniforms(0, sum(counts))
    flipped, op = numbers[:, 202] < 0.5, (numbers[:, 203] * 16).astype(int)
    assert 16 <= flipped.sum() <= 48
    expected = [pixels[label][:, ::-1] if flip else pixels[label] for label, flip in zip(labels, flipped, strict=True)]
    inverted = np.flatnonzero(np.isin(op, [2, 5]))  # invert, and solarize at magnitude 10
    assert len(inverted) >= 3
    for i in inverted:
        assert np.array_equal(images[i].numpy(), 255 - expected[i])


def test_options_of_the_augmentation_reach_the_graph(tmp_path: Path) -> None:
    files = write_images(tmp_path, NUM_FILES)

    def first(batch_size: int = 6, **options: Any) -> torch.Tensor:
        augment = Augment(**({"randaug_layers": 0} | options))
        return next(train_loader(files, batch_size=batch_size, augment=augment))[0]

    usual = first()
    assert torch.equal(usual, first())
    different: list[dict[str, Any]] = [
        {"crop": "torchvision"},
        {"antialias": False},
        {"flip": False},
        {"area_range": (0.5, 1.0)},
        {"ratio_range": (1.0, 1.0)},
        {"randaug_layers": 1},
    ]
    assert [torch.equal(first(**options), usual) for options in different] == [False] * len(different)
    augmented = first(randaug_layers=2, batch_size=NUM_FILES)
    for options in ({"randaug_magnitude": 5}, {"randaug_contrast": "mean"}):
        assert not torch.equal(first(randaug_layers=2, batch_size=NUM_FILES, **options), augmented)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "center"}, "crop is 'center'"),
        ({"area_range": (0.0, 1.0)}, "area_range"),
        ({"area_range": (0.5, 1.5)}, "area_range"),
        ({"ratio_range": (2.0, 1.0)}, "ratio_range"),
        ({"ratio_range": (0.0, 1.0)}, "ratio_range"),
        ({"randaug_layers": -1}, "randaug_layers is -1"),
        ({"randaug_magnitude": 11}, "randaug_magnitude is 11"),
        ({"randaug_contrast": "none"}, "randaug_contrast is 'none'"),
    ],
)
def test_augment_rejects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**options)
