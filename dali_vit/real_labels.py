"""ReaL's labels: the classes that people accept for each validation image (arXiv 2006.07159)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from dali_vit.config import UserError
from dali_vit.manifest import is_made_up
from pipelines.readers import Samples

__all__ = ["load_real_labels"]

NUM_VAL = 50_000
"""Number of images of ImageNet-1k's val, which real.json is for."""
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


def load_real_labels(path: str | Path, val: Samples, *, num_classes: int, split: str = "val") -> np.ndarray:
    """Acceptable labels of each validation image, int64 [len(val), most labels of an image], padded with -1.

    Source: ReaL's `real.json` (arXiv 2006.07159), one list per image in the order of the sorted file names, whatever
    the class folders; the rows here are in the order of `val`. An image with an empty list (a row of -1) is left out of
    the score. ImageNet's 50,000 images are ordered by the number in their ILSVRC names; in other sets where file names
    repeat between classes, images are taken in the order of paths. Raises UserError for a file of another layout or
    another number of images, for labels that are no class, and for images whose names do not tell which list is theirs;
    `split` is the name of `val` in these errors.
    """
    try:
        lists = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--real {path}: {error.strerror}; give ReaL's real.json") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give ReaL's real.json") from error
    if not (isinstance(lists, list) and all(_is_label_list(labels) for labels in lists)):
        raise UserError(f"{path} is not a list of label lists, one an image: give ReaL's real.json")
    if len(lists) != len(val):
        raise UserError(f"{path} has labels for {len(lists)} images but {split} has {len(val)}: give that set's file")
    largest = max((max(labels) for labels in lists if labels), default=None)
    if largest is None or largest >= num_classes:
        fault = "labels no image" if largest is None else f"has label {largest}, the model {num_classes} classes"
        raise UserError(f"--real {path}: {fault}: give that set's file")
    names = [os.path.basename(val.path(i)) for i in range(len(val))]
    if len(val) == NUM_VAL:
        names = [match[1] for match in map(_NUMBER.search, names) if match]
        known = len(set(names)) == NUM_VAL
    else:
        known = not any(map(is_made_up, names))
    if not known:
        raise UserError(
            f"--real {path}: {split} has lost ILSVRC's file names (ILSVRC2012_val_00000001.JPEG), which tell the images"
            " of its lists: give --data a set with these names"
        )
    order = sorted(range(len(val)), key=names.__getitem__) if len(set(names)) == len(names) else range(len(val))
    labels = np.full((len(val), max(map(len, lists), default=0) or 1), -1, np.int64)
    for i, acceptable in zip(order, lists, strict=True):
        labels[i, : len(acceptable)] = acceptable
    return labels


def _is_label_list(labels: object) -> bool:
    return isinstance(labels, list) and all(type(label) is int and label >= 0 for label in labels)
