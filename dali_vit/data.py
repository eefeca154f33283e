"""Which images there are and which split each belongs to.

An image folder holds `train/<class>/*` and `val/<class>/*`; the class index is the place of the folder's name
among the sorted names. Nothing is opened or stat'ed while listing: 1.3 million files take seconds. Of a set that
`prepare` made the manifest says what it holds.
"""

from __future__ import annotations

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
from dali_vit.manifest import MANIFEST, Manifest, load_shards, read_manifest
from dali_vit.real_labels import load_real_labels
from pipelines.loader import DecodeError, EvalLoader, TrainLoader
from pipelines.readers import FileList
from pipelines.shards import ImageList, ShardList
from pipelines.train import Augment

__all__ = [
    "IMAGE_SUFFIXES",
    "Dataset",
    "DecodeError",
    "ImageList",
    "check_images",
    "load_dataset",
    "load_eval_folder",
    "load_real_labels",
]

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
    train: ImageList | None
    """Training images, without minival."""
    minival: ImageList | None
    """Images held out of the training set."""
    val: ImageList | None
    """Validation images."""

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
    manifest = read_manifest(root)
    if manifest is not None:
        return _load_prepared(root, manifest, minival, split)
    _check_root(root, folder)

    train: ImageList | None = None
    held_out = val = None
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    classes = _class_names(root / folder)
    if has_train and has_val and split in (None, "val"):
        _check_same_classes(root, _class_names(root / "train"), _class_names(root / "val"))
    if split != "val":
        train, held_out = _split_minival(_list_split(root / "train", classes), root / "train", minival)
    if split in (None, "val") and has_val:
        val = _list_split(root / "val", classes)
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
            files = _list_split(root / name, manifest.classes, some_empty=True)
        else:
            files = load_shards(root, manifest, name)
        if len(files) != count:
            raise UserError(
                f"{root / name} has {len(files)} images but {MANIFEST} {count}: copy or prepare the set again, "
                f"or remove {MANIFEST} to take the folder as it is"
            )
        loaded[name] = files
    if loaded["train"] is not None:
        loaded["train"], loaded["minival"] = _split_minival(loaded["train"], root / "train", minival)
    return Dataset(root.name, root, manifest.classes, **loaded)


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


def check_images(samples: ImageList, max_bad_share: float = 0.0) -> None:
    """Raises UserError if more than a share of the samples is empty, unreadable or, by the first bytes, no image.

    Up to 4,096 are all looked at, of more 256 spread evenly: enough to notice a folder of something
    else before training starts, at no cost on a network file system.
    """
    indices = range(len(samples)) if len(samples) <= 4096 else np.linspace(0, len(samples) - 1, 256, dtype=int)
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        if isinstance(samples, ShardList):
            faults = list(pool.map(lambda i: _fault_of(samples.payload(np.array([i]))[0][:16].tobytes()), indices))
        else:
            faults = list(pool.map(_fault, [samples.path(i) for i in indices]))
    bad = [(samples.path(i), fault) for i, fault in zip(indices, faults, strict=True) if fault]
    if len(bad) > max_bad_share * len(indices):
        path, fault = bad[0]
        more = f" ({len(bad) - 1} more of the {len(indices)} files looked at)" if len(bad) > 1 else ""
        raise UserError(f"{path} {fault}{more}: remove it or put an image in its place")


def _fault(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return _fault_of(file.read(16))
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _fault_of(head: bytes) -> str | None:
    if not head:
        return "is an empty file"
    return None if _MAGIC.match(head) else f"is no image (it begins with {head!r})"


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


def _list_split(folder: Path, classes: Sequence[str], *, some_empty: bool = False) -> FileList:
    """The images of `folder/<class>/`, ordered by class and name; UserError if a class has none (unless allowed)."""
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        names = list(pool.map(lambda name: _scan(os.path.join(folder, name), folders=False), classes))
    empty = [name for name, files in zip(classes, names, strict=True) if not files]
    if empty and not some_empty:
        raise UserError(f"{folder} has classes without images ({_some(empty)}): add images or remove the folders")
    paths = [f"{folder}/{name}/{file}" for name, files in zip(classes, names, strict=True) for file in files]
    return FileList.from_paths(paths, np.repeat(np.arange(len(classes)), [len(files) for files in names]))


def _split_minival(samples: ImageList, folder: Path, share: float) -> tuple[ImageList, ImageList | None]:
    """Training images and minival: the round(share x N) images whose hashed `class/file` is smallest.

    So it is random over the whole set, the same on every machine and in every layout, and adding or losing
    a few files moves hardly any other image across.
    """
    count = round(share * len(samples))
    if count == 0:
        return samples, None
    if count == len(samples):
        raise UserError(f"--minival {share:g} of the {count} images of {folder} leaves none to train on: lower it")
    if isinstance(samples, ShardList):
        names, skipped = samples.names, 0
    else:
        names, skipped = samples, len(os.fsencode(folder)) + 1
    paths = names.buffer.tobytes()
    starts, ends = (names.starts + skipped).tolist(), (names.starts + names.lengths).tolist()
    hashes = b"".join(blake2b(paths[i:j], digest_size=8).digest() for i, j in zip(starts, ends, strict=True))
    held_out = np.zeros(len(samples), bool)
    held_out[np.argsort(np.frombuffer(hashes, ">u8"), kind="stable")[:count]] = True
    return samples.subset(np.flatnonzero(~held_out)), samples.subset(np.flatnonzero(held_out))


def _check_root(root: Path, folder: str) -> None:
    """Raises UserError, with the likeliest remedy, unless `root/folder` is a folder."""
    if root.with_name(root.name + ".partial").exists():
        raise UserError(f"{root} is still being prepared, or was cut short: run prepare to its end")
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
        bad_samples=bad_samples,
        max_bad_share=data.max_bad_share,
        augment=Augment(
            crop=data.crop,
            antialias=data.antialias,
            randaug_layers=data.randaug_layers,
            randaug_magnitude=data.randaug_magnitude,
            randaug_contrast=data.randaug_contrast,
        ),
    )


def eval_loader(files: ImageList, *, batch_size: int, resolution: int, group: Group, threads: int) -> EvalLoader:
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


def with_labels(files: ImageList, labels: np.ndarray) -> ImageList:
    """The same files under other labels, int64 [len(files)]."""
    return replace(files, labels=labels)
