"""Which images there are, which split each belongs to, and whether they look like images.

An image folder holds `train/<class>/*` and `val/<class>/*`; the class index is the place of the folder's name
among the sorted names. Nothing is opened while listing, and the listing of a large folder is kept. Of a set that
`prepare` made the manifest says what it holds.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dali_vit.config import UserError
from dali_vit.demo import demo_folder
from dali_vit.files import at_home
from dali_vit.listing import (
    IMAGE_SUFFIXES,
    IO_THREADS,
    check_root,
    check_same_classes,
    class_names,
    list_split,
    some,
)
from dali_vit.manifest import MANIFEST, Manifest, load_shards, read_manifest
from dali_vit.minival import split_minival
from dali_vit.real_labels import load_real_labels
from dali_vit.remote import fetch, is_remote
from pipelines import open_files
from pipelines.bad_samples import most_allowed
from pipelines.open_files import TooManyFiles
from pipelines.readers import FileList
from pipelines.shards import ImageList, ShardList

__all__ = [
    "IMAGE_SUFFIXES",
    "Dataset",
    "ImageList",
    "ShardList",
    "check_images",
    "load_dataset",
    "load_eval_folder",
    "load_real_labels",
    "with_labels",
]

# First bytes of the formats of IMAGE_SUFFIXES.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM|II\*\0|MM\0\*|P[1-6][\s#]|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)
_NOT_REGULAR = "is not a regular file"


@dataclass(frozen=True, eq=False)
class Dataset:
    """An indexed dataset; a split that is absent or was not asked for is None."""

    name: str
    """`demo`, or the folder's name."""
    root: Path
    """The folder that holds the splits."""
    classes: tuple[str, ...]
    """Class names, by class index."""
    train: ImageList | None
    """Training images, without minival."""
    minival: ImageList | None
    """Images held out of the training set."""
    val: ImageList | None
    """Validation images."""
    resized: dict[str, int] | None = None
    """The `shorter_side` and `quality` that `prepare` made images smaller with; None where it left their bytes."""

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split that is there."""
        splits = {"train": self.train, "minival": self.minival, "val": self.val}
        return {name: len(files) for name, files in splits.items() if files is not None}

    def split(self, name: str) -> ImageList:
        """Images of `train`, `minival` or `val`; UserError if the dataset does not have that split."""
        assert name in ("train", "minival", "val"), name
        files: ImageList | None = getattr(self, name)
        if files is not None:
            return files
        if name == "minival":
            raise UserError(f"{self.root} has no minival: give a --minival that leaves it at least one image")
        raise UserError(f"{self.root} has no {name}/: add {name}/<class>/* or choose another --split")


def load_dataset(data: str | Path, *, minival: float = 0.01, split: str | None = None) -> Dataset:
    """Index of an image folder, of a set made by prepare, or of the demo dataset (`demo`, made on first use).

    Shards at s3://bucket/prefix or gs://bucket/prefix are copied to this machine first.

    minival: share of the training images held out, in [0, 1); exactly round(minival x images) of them.
    split: read only the folder of this split (`train`, `minival` or `val`), and need no other; by default
    `train/` must be there and `val/` may be.
    Raises UserError for anything the user can mend, such as a class without images.
    """
    assert split in (None, "train", "minival", "val"), split
    if data == "":  # of a shell's variable that is not set; as a path it would be the working directory
        raise UserError("--data: empty; give the folder of a dataset, or 'demo'")
    if not 0 <= minival < 1:
        raise UserError(f"--minival {minival:g}: must be a share from 0 to below 1")
    if is_remote(data):
        needed = {None: ("train", "val"), "val": ("val",)}.get(split, ("train",))
        data = fetch(str(data), needed)
    root = demo_folder() if str(data) == "demo" else at_home(data).absolute()
    name = "demo" if str(data) == "demo" else root.name
    folder = "val" if split == "val" else "train"
    manifest = read_manifest(root)
    if manifest is not None:
        return _load_prepared(root, manifest, minival, split)
    check_root(root, folder)

    train: ImageList | None = None
    held_out = val = None
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    classes = class_names(root / folder)
    if has_train and has_val and split in (None, "val"):
        check_same_classes(root, class_names(root / "train"), class_names(root / "val"))
    if split != "val":
        train, held_out = split_minival(list_split(root / "train", classes), root / "train", minival)
    if split in (None, "val") and has_val:
        val = list_split(root / "val", classes)
    return Dataset(name, root, tuple(classes), train, held_out, val)


def _load_prepared(root: Path, manifest: Manifest, minival: float, split: str | None) -> Dataset:
    """A set that prepare made, in the layout and with the classes and counts of its manifest."""
    loaded: dict[str, ImageList | None] = {"train": None, "minival": None, "val": None}
    needed = ("train", "val") if split is None else ("val",) if split == "val" else ("train",)
    for name in needed:
        count = manifest.splits[name].count if name in manifest.splits else 0
        if not count:
            if split is not None or name == "train":
                raise UserError(f"{root / MANIFEST} has no {name}: prepare the set from a source that has one")
            continue
        files: ImageList
        if manifest.layout == "folder":
            files = list_split(root / name, manifest.classes, some_empty=True)
        else:
            files = load_shards(root, manifest, name)
            try:  # before any is mapped, deep in a loader
                open_files.allow_shards(len(files.shards))
            except TooManyFiles as error:
                raise UserError(f"{root}: {error}") from error
        if len(files) != count:
            raise UserError(
                f"{root / name} has {len(files)} images but {MANIFEST} {count}: copy or prepare the set again, "
                f"or remove {MANIFEST} to take the folder as it is"
            )
        loaded[name] = files
    if loaded["train"] is not None:
        loaded["train"], loaded["minival"] = split_minival(loaded["train"], root / "train", minival)
    resized: dict[str, int] = {
        name: manifest.settings[name] for name in ("shorter_side", "quality") if name in manifest.settings
    }
    return Dataset(root.name, root, manifest.classes, **loaded, resized=resized or None)


def load_eval_folder(path: str | Path, classes: Sequence[str]) -> FileList:
    """Images of a further evaluation set, `path/<class>/*`, labelled with the given class names' indices.

    Folders named by numbers alone, as in ImageNet-V2 (`0` to `999`), are class indices themselves unless the
    classes bear those names. Classes may be missing. Raises UserError for a folder that is no class, and where two
    stand for the same.
    """
    root = at_home(path).absolute()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give one that holds <class>/* or, as ImageNet-V2, 0/* to 999/*")
    names = class_names(root)
    index = {name: i for i, name in enumerate(classes)}
    if not set(names) <= set(index) and all(name.isdecimal() for name in names):
        index = {name: int(name) for name in names if int(name) < len(classes)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise UserError(
            f"{root} has folders that are none of the model's {len(classes)} classes ({some(unknown)}): "
            "name them as the training set's, or by class index"
        )
    folders: dict[int, str] = {}
    for name in names:
        if (other := folders.setdefault(index[name], name)) != name:
            raise UserError(f"{root} has two folders of one class, {other} and {name}: remove one")
    files = list_split(root, names)
    return replace(files, labels=np.array([index[name] for name in names], np.int64)[files.labels])


def check_images(samples: ImageList, max_bad_share: float | None = None) -> None:
    """Raises UserError if more than a share of the samples is empty, unreadable or, by the first bytes, no image.

    max_bad_share: training's --max-bad-share; above 0, one image may be bad whatever the share. None: there is no such
    flag, and all must be good.
    Up to 4,096 are all looked at, of more 256 spread evenly: enough to notice a folder of something
    else before training starts, at no cost on a network file system.
    """
    indices = range(len(samples)) if len(samples) <= 4096 else np.linspace(0, len(samples) - 1, 256, dtype=int)
    if isinstance(samples, ShardList):
        heads = replace(samples, lengths=np.minimum(samples.lengths, 16)).payload(np.asarray(indices))
        faults = [_fault_of(head.tobytes()) for head in heads]
    else:
        with ThreadPoolExecutor(IO_THREADS) as pool:
            faults = list(pool.map(_fault, [samples.path(i) for i in indices]))
    bad = [(samples.path(i), fault) for i, fault in zip(indices, faults, strict=True) if fault]
    for path, fault in bad:
        if fault == _NOT_REGULAR:  # DALI would wait for a pipe's writer for ever, where it leaves other bad files out
            raise UserError(f"{path} {fault}: remove it or put an image in its place")
    if len(bad) > most_allowed(max_bad_share or 0.0, len(indices)):
        first = "; ".join(f"{path} {fault}" for path, fault in bad[:3])
        found = f"unusable images: {len(bad)} of {len(indices)} looked at"
        limit = "" if max_bad_share is None else f", more than --max-bad-share {max_bad_share:g} allows"
        it, image = ("it", "an image in its") if len(bad) == 1 else ("them", "images in their")
        every = "; `dali-vit verify` names all" if max_bad_share is not None and len(bad) > 3 else ""
        raise UserError(f"{first} ({found}{limit}): remove {it} or put {image} place{every}")


def _fault(path: str) -> str | None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return _NOT_REGULAR
        with open(path, "rb") as file:
            return _fault_of(file.read(16))
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _fault_of(head: bytes) -> str | None:
    if not head:
        return "is an empty file"
    if head.startswith(b"GIF8"):
        return "is a GIF, which cannot be decoded"
    return None if _MAGIC.match(head) else f"is no image (it begins with {head!r})"


def with_labels(files: ImageList, labels: np.ndarray) -> ImageList:
    """The same files under other labels, int64 [len(files)]."""
    return replace(files, labels=labels)
