"""The forms in which datasets come: image folders, ILSVRC's tars, and records (in `records`).

Every source becomes lists of files or of byte ranges, sorted by label and name as an image folder's listing is.
Nothing is decoded for that, and only parquet's images are copied.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.listing import folder_name, kind_of_archives, left_out, other_val, scan
from dali_vit.prepare.tars import images_of_tar, images_of_tars_in_tar
from pipelines.readers import FileList
from pipelines.shards import ImageList, ShardList
from pipelines.words import some, why_not_imported

__all__ = [
    "Format",
    "Row",
    "Source",
    "byte_ranges",
    "not_in_place",
    "open_source",
    "read_sample",
    "safe_name",
    "sample_names",
]

Format = Literal["auto", "folder", "ilsvrc", "tfrecord", "parquet"]
# Where an image lies and what it is: (shard, offset, length, label, file name)
Row = tuple[int, int, int, int, str]

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12"
_NUM_IMAGES = {_TRAIN_TAR: 1_281_167, _VAL_TAR: 50_000}
_KAGGLE_COLUMNS = "ImageId,PredictionString"  # of LOC_val_solution.csv; the class is the first word of the second

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset to be prepared."""

    classes: tuple[str, ...]
    """Class names, by class index."""
    splits: dict[str, ImageList]
    """`train`, and `val` where there is one."""
    resized: dict[str, int] | None = None
    """As `Dataset.resized`."""


def open_source(
    root: Path, source_format: Format, val_labels: Path | None, scratch: Path | None, *, in_place: bool = False
) -> Source:
    """Lists a source, unpacking images into the folder `scratch` if it must; UserError for an unusable source.

    in_place: the images are to be read where they lie, so nothing may be unpacked. Without `scratch` images that would
    have to be unpacked are listed, but cannot be read.
    """
    kind = _recognise(root) if source_format == "auto" else source_format
    if in_place and kind == "parquet":
        raise not_in_place()
    if val_labels is not None and kind not in ("folder", "ilsvrc"):
        raise UserError(f"--val-labels {val_labels}: only ILSVRC's tars and a flat val/ need it; leave it out")
    if kind == "folder":
        source = _open_folder(root) if val_labels is None else _open_flat_val(root, val_labels)
    elif kind == "ilsvrc":
        source = _open_ilsvrc(root, val_labels)
    else:
        from dali_vit.prepare import records

        source = records.open_tfrecords(root) if kind == "tfrecord" else records.open_parquet(root, scratch)
    counts = ", ".join(f"{name} {len(samples):,}" for name, samples in source.splits.items())
    log.info("%s (%s): %s images of %s classes", root, kind, counts, f"{len(source.classes):,}")
    folders = [root / name / class_ for name in source.splits for class_ in source.classes]
    folders += [] if val_labels is None else [root / "val"]  # a flat val/ holds the images itself
    for files in left_out(folders) if kind == "folder" else ():
        log.info("%s", files)
    return source


def not_in_place() -> UserError:
    """The error about a source whose images an index cannot lead to."""
    return UserError("--to index: images can be read in place from tars and TFRecords alone; choose --to shards")


def sample_names(samples: ImageList, classes: Sequence[str]) -> list[str]:
    """`class/file` of every sample, whose files need not lie in a folder of their class; classes: names by index."""
    if isinstance(samples, ShardList):
        return [samples.names.path(i) for i in range(len(samples))]
    folders = [folder_name(name) for name in classes]
    return [f"{folders[label]}/{os.path.basename(samples.path(i))}" for i, label in enumerate(samples.labels.tolist())]


def read_sample(samples: ImageList, index: int) -> bytes:
    """Bytes of a sample's encoded image; OSError if they cannot be read."""
    if isinstance(samples, ShardList):
        return samples.payload(np.array([index]))[0].tobytes()
    path = samples.path(index)
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
        raise OSError(errno.EINVAL, "not a regular file", path)
    with open(path, "rb") as file:
        return file.read()


def safe_name(name: str) -> str:
    """A class's name as a folder can have it: one that lies where it is put, and is not hidden."""
    return re.sub(r"[/\x00-\x1f\x7f]", "_", name).strip().lstrip(".") or "_"


def byte_ranges(shards: Sequence[str], rows: list[Row], classes: Sequence[str]) -> ShardList:
    """Samples of the given rows, sorted by label and name."""
    rows.sort(key=lambda row: (row[3], row[4]))
    shard, offsets, lengths, labels = (
        np.fromiter((row[i] for row in rows), dtype, len(rows)) for i, dtype in enumerate((np.int32,) + 3 * (np.int64,))
    )
    names = FileList.from_paths([f"{classes[row[3]]}/{row[4]}" for row in rows], labels)
    return ShardList(tuple(shards), names, shard, offsets, lengths, labels)


def _recognise(root: Path) -> Format:
    names = [path.relative_to(root).as_posix() for depth in ("*", "*/*") for path in root.glob(depth)]
    kind = kind_of_archives(names)
    unpacked = all((root / name).is_dir() for name in ("train", "val")) and not (root / _TRAIN_TAR).exists()
    return "folder" if kind in (None, "webdataset") or (kind == "ilsvrc" and unpacked) else cast(Format, kind)


def _open_folder(root: Path) -> Source:
    """An image folder, or a set that prepare made."""
    dataset = load_dataset(root, minival=0)
    if dataset.val is None and (name := other_val(root)):
        log.warning("%s has no val/, so train/ alone is prepared: if %s/ is meant, rename it to val/", root, name)
    found = {"train": dataset.train, "val": dataset.val}
    splits = {name: samples for name, samples in found.items() if samples is not None}
    return Source(dataset.classes, splits, dataset.resized)


def _open_flat_val(root: Path, val_labels: Path) -> Source:
    """An image folder whose val/ holds the images themselves, as in Kaggle's download of ImageNet.

    A class may have no image in val/.
    """
    dataset = load_dataset(root, minival=0, split="train")
    names = _flat_images(root / "val", val_labels)
    found = _read_val_labels(val_labels, names, dataset.classes)
    labels = _class_indices(found, dataset.classes, len(names), f"--val-labels {val_labels}", ("train/", "val/"))
    order = np.argsort(labels, kind="stable")  # by class and name, as the names are sorted
    val = FileList.from_paths([f"{root}/val/{names[i]}" for i in order.tolist()], labels[order])
    return Source(dataset.classes, {"train": dataset.split("train"), "val": val})


def _flat_images(folder: Path, val_labels: Path) -> list[str]:
    """Sorted names of the images that lie in val/ itself; UserError where they do not."""
    flag = f"--val-labels {val_labels}"
    if not folder.is_dir():
        raise UserError(f"{folder.parent} has no val/: put the images that {flag} is for there, or leave it out")
    names, folders = scan(folder, folders=False), scan(folder, folders=True)
    if folders and names:
        raise UserError(
            f"{folder} has images beside folders ({some(folders)}): for {flag} all images must lie in val/ itself"
        )
    if folders:
        raise UserError(f"{flag}: the folders of {folder} say already which class an image is of; leave it out")
    if not names:
        raise UserError(f"{folder} holds no images: put those that {flag} is for there")
    return names


def _open_ilsvrc(root: Path, val_labels: Path | None) -> Source:
    for name in (_TRAIN_TAR, _VAL_TAR):
        if not (root / name).is_file():
            raise UserError(f"{root} has no {name}: put it there")
    train_rows, classes = _list_train_tar(root / _TRAIN_TAR)
    members = sorted(images_of_tar(root / _VAL_TAR), key=lambda member: member[0])
    if not members:
        raise UserError(f"{root / _VAL_TAR} holds no images: download it again")
    if val_labels is None:
        wnids, where = _devkit_classes(root), f"{_DEVKIT}'s ground truth"
    else:
        wnids = _read_val_labels(val_labels, [name for name, _, _ in members], classes)
        where = f"--val-labels {val_labels}"
    labels = _class_indices(wnids, classes, len(members), where, (_TRAIN_TAR, _VAL_TAR)).tolist()
    for name, found in ((_TRAIN_TAR, len(train_rows)), (_VAL_TAR, len(members))):
        if found != _NUM_IMAGES[name]:
            log.warning("%s holds %s images, ILSVRC2012's %s", root / name, f"{found:,}", f"{_NUM_IMAGES[name]:,}")
    val_rows = [(0, at, size, label, name) for (name, at, size), label in zip(members, labels, strict=True)]
    return Source(
        tuple(classes),
        {
            "train": byte_ranges([str(root / _TRAIN_TAR)], train_rows, classes),
            "val": byte_ranges([str(root / _VAL_TAR)], val_rows, classes),
        },
    )


def _list_train_tar(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of the images in the inner tars, one a class, and the sorted class names."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name, images in images_of_tars_in_tar(path):
        class_name = os.path.basename(name).removesuffix(".tar")
        if safe_name(class_name) != class_name:
            raise UserError(f"{path} has {name!r}, which names no class: download it again")
        if class_name in found:
            raise UserError(f"{path} has two tars of the class {class_name}: leave one")
        found[class_name] = images
    empty = sorted(name for name, files in found.items() if not files)
    if not found or empty:
        raise UserError(f"{path} holds no images of {empty[0] if empty else 'any class'}: download it again")
    classes = sorted(found)
    return [(0, at, size, label, file) for label, name in enumerate(classes) for file, at, size in found[name]], classes


def _class_indices(
    found: Sequence[str], classes: Sequence[str], count: int, where: str, places: tuple[str, str]
) -> np.ndarray:
    """Labels of the validation images, int64 [count], from the class names found for them.

    where: what the class names were read from; places: what holds the images of train and of val. The UserError for
    class names that belong to another set than the images names both.
    """
    train, val = places
    if len(found) != count:
        raise UserError(f"{where} has {len(found)} lines but {val} {count} images: give that set's labels")
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in found if name not in index]
    if unknown:
        raise UserError(
            f"{len(unknown):,} of {count:,} validation images are, by {where}, of classes that {train} does not hold"
            f" ({some(sorted(set(unknown)))}): give images and labels of the same set"
        )
    return np.array([index[name] for name in found], np.int64)


def _read_val_labels(path: Path, names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Class name of each image, from a text file of classes in the images' order or of lines of image and class, which
    boxes may follow, as in Kaggle's LOC_val_solution.csv. UserError if an image has no class."""
    try:
        # Spreadsheets put a byte order mark before UTF-8.
        lines = [line for line in re.split(r"[\r\n]+", path.read_text(encoding="utf-8-sig")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--val-labels {path} cannot be read ({error}): give a text file") from error
    stems = {os.path.splitext(name)[0] for name in names}
    rows = [re.split(r"[\s,;]+", line.strip()) for line in lines]
    named: dict[str, str] = {}
    for name, label in ((row[0], row[1]) for row in rows if len(row) > 1 and row[1]):
        stem = os.path.splitext(os.path.basename(name))[0]
        if named.setdefault(stem, label) != label and stem in stems:
            raise UserError(f"--val-labels {path} has two classes for {stem}, {named[stem]} and {label}: leave one")
    missing = sorted(stems - set(named))
    if not missing:
        known = set(classes)  # which the label in a line of columns is not
        if absent := sorted(stem for stem, label in named.items() if stem not in stems and label in known):
            log.warning(
                "--val-labels %s names %s images that are not there: %s", path, f"{len(absent):,}", some(absent)
            )
        found = [named[os.path.splitext(name)[0]] for name in names]
        if set(found).isdisjoint(classes):
            _check_columns(path, lines[0])
        return found
    if any(len(row) > 1 for row in rows):
        _check_columns(path, lines[0])
        raise UserError(
            f"--val-labels {path} has no class for {some(missing)}: give a line for each image, or classes alone"
        )
    return [row[0] for row in rows]


def _check_columns(path: Path, first_line: str) -> None:
    """UserError if a file without usable labels begins with names of columns other than Kaggle's."""
    columns = first_line.strip()
    name = re.split(r"[\s,;]", columns)[0]
    # A name with a digit or a suffix is an image's, not a column's.
    if columns != _KAGGLE_COLUMNS and "," in columns and not re.search(r"\d|\.", name):
        raise UserError(
            f"--val-labels {path} has the columns {columns[:80]}: give Kaggle's LOC_val_solution.csv"
            f" ({_KAGGLE_COLUMNS}), or lines of image and class"
        )


def _devkit_classes(root: Path) -> list[str]:
    """Class name of each validation image, from the devkit's ground truth and its table of synsets."""
    archive = next((root / f"{_DEVKIT}{s}" for s in (".tar.gz", ".tar") if (root / f"{_DEVKIT}{s}").is_file()), None)
    truth, meta = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
    try:
        if (root / _DEVKIT).is_dir():
            files = [(root / _DEVKIT / name).read_bytes() for name in (truth, meta)]
        elif archive is not None:
            with tarfile.open(archive) as tar:
                members = {m.name.removeprefix("./").removeprefix(f"{_DEVKIT}/"): m for m in tar if m.isfile()}
                extracted = [tar.extractfile(members[name]) for name in (truth, meta)]
                files = [file.read() for file in extracted if file is not None]
        else:
            raise UserError(
                f"{root} has no {_DEVKIT}.tar.gz, which says what the validation images show: put it there, "
                "or give --val-labels a text file with the class of each"
            )
        ids = [int(word) for word in files[0].split()]
        synsets = _read_synsets(files[1])
        return [synsets[i] for i in ids]
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError, ValueError) as error:
        raise UserError(
            f"{archive or root / _DEVKIT} is not ILSVRC2012's devkit ({error}): download it again"
        ) from error


def _read_synsets(meta: bytes) -> dict[int, str]:
    """WordNet id of each ILSVRC2012_ID, from meta.mat."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"the devkit's meta.mat is a MATLAB file, which takes scipy, and {why_not_imported('scipy', error)};"
            " or give --val-labels a text file with the class of each validation image"
        ) from error
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy raises another type for every kind of damage
        raise ValueError(f"meta.mat: {error}") from error
