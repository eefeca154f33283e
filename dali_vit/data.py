"""Which images there are and which split each belongs to.

An image folder holds `train/<class>/*` and `val/<class>/*`; the class index is the place of the folder's name
among the sorted names. Nothing is opened or stat'ed while listing: 1.3 million files take seconds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from dali_vit.config import Config, UserError
from dali_vit.demo import demo_folder
from dali_vit.distributed import Group
from dali_vit.environment import cpu_count
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.readers import FileList
from pipelines.train import Augment

__all__ = ["IMAGE_SUFFIXES", "Dataset", "check_images", "load_dataset", "load_eval_folder", "load_real_labels"]

# What DALI's decoders take on both devices (GIF is not among them); any case.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2")

# First bytes of the same formats.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|BM|II\*\0|MM\0\*|P[1-6][\s#]|\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    re.DOTALL,
)

# Listing and peeking wait for the file system, which on a network answers many requests at once.
_IO_THREADS = 16


@dataclass(frozen=True, eq=False)
class Dataset:
    """An indexed dataset; a split that is absent or was not asked for is None."""

    name: str
    """`demo`, or the folder's name."""
    root: Path
    """The folder that holds the splits."""
    classes: tuple[str, ...]
    """Class names, by class index."""
    train: FileList | None
    """Training images, without minival."""
    minival: FileList | None
    """Images held out of the training set."""
    val: FileList | None
    """Validation images."""

    @property
    def counts(self) -> dict[str, int]:
        """Images of each split that is there."""
        splits = {"train": self.train, "minival": self.minival, "val": self.val}
        return {name: len(files) for name, files in splits.items() if files is not None}

    def split(self, name: str) -> FileList:
        """Files of `train`, `minival` or `val`; UserError if the dataset does not have that split."""
        assert name in ("train", "minival", "val"), name
        files: FileList | None = getattr(self, name)
        if files is not None:
            return files
        if name == "minival":
            raise UserError(f"{self.root} has no minival: give a --minival that leaves it at least one image")
        raise UserError(f"{self.root} has no {name}/: add {name}/<class>/* or choose another --split")


def load_dataset(data: str | Path, *, minival: float = 0.01, split: str | None = None) -> Dataset:
    """Index of an image folder, or of the demo dataset (`demo`, made on first use).

    minival: share of the training images held out, in [0, 1); exactly round(minival x images) of them.
    split: read only the folder of this split (`train`, `minival` or `val`), and need no other; by default
    `train/` must be there and `val/` may be.
    Raises UserError for anything the user can mend, such as a class without images.
    """
    assert split in (None, "train", "minival", "val"), split
    if not 0 <= minival < 1:
        raise UserError(f"--minival {minival:g}: must be a share from 0 to below 1")
    root = demo_folder() if str(data) == "demo" else Path(data).expanduser().absolute()
    name = "demo" if str(data) == "demo" else root.name
    folder = "val" if split == "val" else "train"
    _check_root(root, folder)

    train = held_out = val = None
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    classes = _class_names(root / folder)
    if has_train and has_val and split in (None, "val"):
        _check_same_classes(root, _class_names(root / "train"), _class_names(root / "val"))
    if split != "val":
        train, held_out = _split_minival(root / "train", _list_split(root / "train", classes), minival)
    if split in (None, "val") and has_val:
        val = _list_split(root / "val", classes)
    return Dataset(name, root, tuple(classes), train, held_out, val)


def load_eval_folder(path: str | Path, classes: Sequence[str]) -> FileList:
    """Images of a further evaluation set, `path/<class>/*`, labelled with the given class names' indices.

    Folders named by numbers alone, as in ImageNet-V2 (`0` to `999`), are class indices themselves unless the
    classes bear those names. Classes may be missing. Raises UserError for a folder that is no class.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give one that holds <class>/* or, as ImageNet-V2, 0/* to 999/*")
    names = _class_names(root)
    index = {name: i for i, name in enumerate(classes)}
    if not set(names) <= set(index) and all(name.isdecimal() for name in names):
        index = {name: int(name) for name in names if int(name) < len(classes)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise UserError(
            f"{root} has folders that are none of the model's {len(classes)} classes ({_some(unknown)}): "
            "name them as the training set's, or by class index"
        )
    files = _list_split(root, names)
    return replace(files, labels=np.array([index[name] for name in names], np.int64)[files.labels])


def load_real_labels(path: str | Path, val: FileList) -> np.ndarray:
    """Acceptable labels of each validation image, int64 [len(val), most labels of an image], padded with -1.

    Source: ReaL's `real.json` (arXiv 2006.07159), one list an image in the order of the sorted file names,
    whatever the class folders; the rows here are in the order of `val`. An image of an empty list (a row of -1)
    is left out of the score. File names that repeat between classes are taken in the order of the paths.
    Raises UserError for a file of another layout or another number of images.
    """
    try:
        lists = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give ReaL's real.json") from error
    if not (isinstance(lists, list) and all(_is_label_list(labels) for labels in lists)):
        raise UserError(f"{path} is not a list of label lists, one an image: give ReaL's real.json")
    if len(lists) != len(val):
        raise UserError(f"{path} has labels for {len(lists)} images but val has {len(val)}: give that set's file")
    names = [os.path.basename(val.path(i)) for i in range(len(val))]
    order = sorted(range(len(val)), key=names.__getitem__) if len(set(names)) == len(names) else range(len(val))
    labels = np.full((len(val), max(map(len, lists), default=0) or 1), -1, np.int64)
    for i, acceptable in zip(order, lists, strict=True):
        labels[i, : len(acceptable)] = acceptable
    return labels


def check_images(samples: FileList) -> None:
    """Raises UserError if a file is empty, unreadable or, by its first bytes, no image.

    Up to 4,096 files are all looked at, of more files 256 spread evenly: enough to notice a folder of something
    else before training starts, at no cost on a network file system.
    """
    indices = range(len(samples)) if len(samples) <= 4096 else np.linspace(0, len(samples) - 1, 256, dtype=int)
    paths = [samples.path(i) for i in indices]
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        faults = list(pool.map(_fault, paths))
    bad = [(path, fault) for path, fault in zip(paths, faults, strict=True) if fault]
    if bad:
        path, fault = bad[0]
        more = f" ({len(bad) - 1} more of the {len(paths)} files looked at)" if len(bad) > 1 else ""
        raise UserError(f"{path} {fault}{more}: remove it or put an image in its place")


def _fault(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not head:
        return "is an empty file"
    return None if _MAGIC.match(head) else f"is no image (it begins with {head!r})"


def _is_label_list(labels: object) -> bool:
    return isinstance(labels, list) and all(type(label) is int and label >= 0 for label in labels)


def _scan(folder: Path | str, *, folders: bool) -> list[str]:
    """Sorted names of the subfolders, or of the images, that are not hidden."""
    try:
        with os.scandir(folder) as entries:
            if folders:
                return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
            # Symbolic links are not followed: that would be a stat for each.
            return sorted(
                e.name
                for e in entries
                if e.name.lower().endswith(IMAGE_SUFFIXES)
                and not e.name.startswith(".")
                and not e.is_dir(follow_symlinks=False)
            )
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}): check its permissions") from error


def _class_names(folder: Path) -> list[str]:
    names = _scan(folder, folders=True)
    if not names:
        what = "images but no class folders" if _scan(folder, folders=False) else "no class folders"
        raise UserError(f"{folder} has {what}: put the images into {folder.name}/<class>/")
    return names


def _list_split(folder: Path, classes: list[str]) -> FileList:
    """The images of `folder/<class>/`, ordered by class and name; UserError if a class has none."""
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        names = list(pool.map(lambda name: _scan(os.path.join(folder, name), folders=False), classes))
    empty = [name for name, files in zip(classes, names, strict=True) if not files]
    if empty:
        raise UserError(f"{folder} has classes without images ({_some(empty)}): add images or remove the folders")
    paths = [f"{folder}/{name}/{file}" for name, files in zip(classes, names, strict=True) for file in files]
    return FileList.from_paths(paths, np.repeat(np.arange(len(classes)), [len(files) for files in names]))


def _split_minival(folder: Path, files: FileList, share: float) -> tuple[FileList, FileList | None]:
    """Training images and minival: the round(share x N) images whose hashed `class/file` is smallest.

    So it is random over the whole set, the same on every machine and in every run, and adding or losing
    a few files moves hardly any other image across.
    """
    count = round(share * len(files))
    if count == 0:
        return files, None
    if count == len(files):
        raise UserError(f"--minival {share:g} of the {len(files)} images of {folder} leaves none to train on: lower it")
    paths = files.buffer.tobytes()
    starts = (files.starts + len(os.fsencode(folder)) + 1).tolist()
    ends = (files.starts + files.lengths).tolist()
    hashes = b"".join(blake2b(paths[i:j], digest_size=8).digest() for i, j in zip(starts, ends, strict=True))
    held_out = np.zeros(len(files), bool)
    held_out[np.argsort(np.frombuffer(hashes, ">u8"), kind="stable")[:count]] = True
    return files.subset(np.flatnonzero(~held_out)), files.subset(np.flatnonzero(held_out))


def _check_root(root: Path, folder: str) -> None:
    """Raises UserError, with the likeliest remedy, unless `root/folder` is a folder."""
    if not root.exists():
        raise UserError(f"{root}: no such folder; give one that holds train/<class>/* and val/<class>/*, or 'demo'")
    if not root.is_dir():
        raise UserError(f"{root} is a file: give the folder that holds train/<class>/* and val/<class>/*")
    if (root / folder).is_dir():
        return
    subfolders = _scan(root, folders=True)
    nested = next((name for name in subfolders if (root / name / folder).is_dir()), None)
    if root.name in ("train", "val") and (root.parent / folder).is_dir():
        remedy = f"give its parent, {root.parent}"
    elif nested is not None:
        remedy = f"did you mean {root / nested}?"
    elif folder == "train" and "val" in subfolders:
        remedy = "training needs train/<class>/* beside val/"
    elif any(_scan(root / name, folders=False) for name in subfolders[:3]):
        remedy = f"its class folders belong into {folder}/"
    else:
        remedy = f"give a folder that holds {folder}/<class>/*"
    state = "is empty" if not any(root.iterdir()) else f"has no {folder}/"
    raise UserError(f"{root} {state}: {remedy}")


def _check_same_classes(root: Path, train: list[str], val: list[str]) -> None:
    faults = [
        f"{len(names)} missing from {where}/ ({_some(sorted(names))})"
        for names, where in [(set(train) - set(val), "val"), (set(val) - set(train), "train")]
        if names
    ]
    if faults:
        raise UserError(f"{root}: train/ and val/ differ in their classes, {'; '.join(faults)}: make them equal")


def _some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def num_threads(config: Config, group: Group) -> int:
    """DALI's CPU threads for this process."""
    return config.run.threads or default_threads(group)


def default_threads(group: Group) -> int:
    """This machine's cores divided by the processes on it, at least 1."""
    return max(1, cpu_count() // group.local_world_size)


def train_loader(
    dataset: Dataset, config: Config, group: Group, *, start_step: int = 0, bad_samples: Sequence[int] = ()
) -> TrainLoader:
    """The training stream of this process from a step on, as the config has it; `bad_samples` are left out."""
    data = config.data
    return TrainLoader(
        dataset.split("train"),
        batch_size=config.optim.batch_size,
        image_size=data.resolution,
        seed=config.run.seed,
        rank=group.rank,
        world_size=group.world_size,
        device=group.device,
        num_threads=num_threads(config, group),
        start_step=start_step,
        augment=Augment(
            crop=data.crop,
            antialias=data.antialias,
            randaug_layers=data.randaug_layers,
            randaug_magnitude=data.randaug_magnitude,
            randaug_contrast=data.randaug_contrast,
        ),
    )


def eval_loader(files: FileList, *, batch_size: int, resolution: int, group: Group, threads: int) -> EvalLoader:
    """Evaluation batches of this process's share of the files; batch_size is that of one process."""
    return EvalLoader(
        files,
        batch_size=batch_size,
        image_size=resolution,
        rank=group.rank,
        world_size=group.world_size,
        device=group.device,
        num_threads=threads,
    )


def with_labels(files: FileList, labels: np.ndarray) -> FileList:
    """The same files under other labels, int64 [len(files)]."""
    return replace(files, labels=labels)
