"""Predictions of images as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dali_vit.parsing import without_control_characters

__all__ = ["as_json", "as_table"]

Predictions = Iterable[tuple[Path, list[dict[str, Any]]]]
"""Images and the likeliest classes of each (none for an unusable image); may raise a DecodeError after the last one."""


def as_json(predictions: Predictions) -> Iterator[str]:
    """One array, yielded at the end, as half an array is no JSON; kept as text, which is smaller than the objects."""
    from pipelines.bad_samples import DecodeError  # here, because --help must not wait for DALI

    images = []
    failed = None
    try:
        for path, found in predictions:
            images.append(json.dumps({"image": str(path), "predictions": found}))
    except DecodeError as error:  # raised after the last image
        failed = error
    yield f"[{', '.join(images)}]"
    if failed is not None:
        raise failed


def as_table(predictions: Predictions) -> Iterator[str]:
    """A few lines for each image."""
    for path, found in predictions:
        lines = [f"  {100 * one['probability']:6.2f} %  {_class_shown(one)}" for one in found] or ["  cannot be used"]
        yield "\n".join(map(without_control_characters, [str(path), *lines]))


def _class_shown(prediction: dict[str, Any]) -> str:
    """The class's name and, where it has a description, the first of the words there."""
    first_word = prediction.get("description", "").partition(", ")[0]
    return f"{prediction['class']} {first_word}".rstrip()
