"""Faults of a set that show before any image is read: `verify` reports all at once, training stops at the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dali_vit.config import UserError
from dali_vit.data import Dataset, FileList, ImageList, load_dataset
from dali_vit.files import at_home
from dali_vit.listing import (
    LEFT_OUT,
    check_no_empty,
    check_same_classes,
    class_names,
    left_out,
    list_split,
    some,
    without_images,
)
from dali_vit.manifest import read_manifest
from dali_vit.remote import is_remote

__all__ = ["load_with_faults", "remarks_on_files", "val_without_images"]

_SMALL = 10_000  # images; of a larger set `verify` alone looks for files that are not taken, as that may take long


def load_with_faults(data: str | Path) -> tuple[Dataset, tuple[str, ...]]:
    """A set without minival, and all faults of an image folder's classes for which training refuses it.

    From a folder with such faults the classes of both splits are loaded. UserError if nothing can be listed.
    """
    try:
        return load_dataset(data, minival=0), ()
    except UserError:
        root = at_home(data).absolute()
        if is_remote(data) or read_manifest(root) is not None or not (root / "train").is_dir():
            raise
        classes = {name: class_names(root / name) for name in ("train", "val") if (root / name).is_dir()}
        every = sorted({name for names in classes.values() for name in names})
        splits = {name: list_split(root / name, names, some_empty=True) for name, names in classes.items()}
        faults: list[str] = []
        if "val" in classes:
            _note(faults, check_same_classes, root, classes["train"], classes["val"])
        for name, files in splits.items():
            counts = np.bincount(files.labels, minlength=len(classes[name]))
            _note(faults, check_no_empty, root / name, classes[name], counts)
        if not faults:
            raise
        return Dataset(root.name, root, tuple(every), splits["train"], None, splits.get("val")), tuple(faults)


def val_without_images(dataset: Dataset) -> str | None:
    """The message about classes that have no images in val; None if all have some, or if there is no val."""
    if dataset.val is None:
        return None
    classes = dataset.classes
    absent = without_images(classes, np.bincount(dataset.val.labels, minlength=len(classes)))
    if not absent:
        return None
    return f"{dataset.root}: val has no images of {len(absent)} of {len(classes)} classes ({some(absent)})"


def remarks_on_files(root: Path, files: ImageList, folders: Iterable[Path]) -> list[str]:
    """Remarks on what lies in class folders and is not taken, by why it is not.

    root: the folder that the remarks name; files: the images that are taken, from 10,000 of which on nothing is looked
    for; folders: as for `left_out`.
    """
    if not isinstance(files, FileList) or len(files) >= _SMALL:
        return []
    return [
        f"{root}: files {found.kind.replace('other', 'of another')} are left out ({found.count:,}, such as"
        f" {found.example}): {LEFT_OUT[found.kind]}"
        for found in left_out(folders)
    ]


def _note(faults: list[str], check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except UserError as error:
        faults.append(str(error))
