"""What a run says of itself before it begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dali_vit.config import Config, OptimConfig
from dali_vit.data import Dataset, FileList
from dali_vit.report import remarks


def dataset(*, minival: int, val: int) -> Dataset:
    def files(count: int) -> FileList | None:
        return FileList.from_paths([f"{i}.jpg" for i in range(count)], np.zeros(count, int)) if count else None

    return Dataset("set", Path("/set"), ("a",), files(9), files(minival), files(val))


@pytest.mark.parametrize(
    ("minival", "val", "said"),
    [
        (0, 3, []),
        (2, 3, []),
        (2, 0, ["/set has no val/: minival alone is evaluated"]),
        (0, 0, ["/set has no val/, and --minival leaves none: nothing is evaluated"]),
    ],
)
def test_what_is_evaluated_is_said_where_it_is_less_than_usual(minival: int, val: int, said: list[str]) -> None:
    assert remarks(Config(), dataset(minival=minival, val=val), 112_603) == said


def test_another_name_for_val_is_remarked_on(tmp_path: Path) -> None:
    (tmp_path / "validation" / "a").mkdir(parents=True)
    (tmp_path / "validation" / "a" / "1.jpg").touch()
    named = replace(dataset(minival=1, val=0), root=tmp_path)
    assert remarks(Config(), named, 112_603) == [
        f"{tmp_path} has no val/: minival alone is evaluated; if validation/ is meant, rename it to val/"
    ]


def test_other_images_in_val_are_remarked_on() -> None:
    assert remarks(Config(), dataset(minival=1, val=1), 112_603, other_val_images=True) == [
        "/set: val has other images than before; what is measured on it is not to be compared"
    ]


def test_a_warm_up_of_most_of_the_run_is_remarked_on() -> None:
    """ImageNet-100 under the default recipe: 126,689 images, 99 % of them 90 times in batches of 1,024."""
    total = round(90 * 0.99 * 126_689 / 1024)
    (said,) = remarks(Config(), dataset(minival=1, val=1), total)
    assert said == (
        "--warmup-steps 10000: 91 % of the run's 11023 steps are at a rate below --lr; ImageNet's 90 epochs have 9 %,"
        " here 1002"
    )
    half = replace(Config(), optim=OptimConfig(warmup_steps=5511))
    assert remarks(half, dataset(minival=1, val=1), total) == []
