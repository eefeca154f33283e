"""The forms in which datasets come: image folders, ILSVRC's tars, and records (in `records`).

Every source becomes lists of files or of byte ranges, sorted by label and name as an image folder's listing is;
nothing is copied or decoded for that.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from tqdm import tqdm

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.listing import is_image, left_out
from pipelines.readers import FileList
from pipelines.shards import ImageList, ShardList

__all__ = ["Format", "Row", "Source", "byte_ranges", "open_source", "read_sample", "sample_names"]

Format = Literal["auto", "folder", "ilsvrc", "tfrecord", "parquet"]
# Where an image lies and what it is: (shard, offset, length, label, file name)
Row = tuple[int, int, int, int, str]

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_DEVKIT = "ILSVRC2012_devkit_t12"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset to be prepared."""

    classes: tuple[str, ...]
    """Class names, by class index."""
    splits: dict[str, ImageList]
    """`train`, and `val` where there is one."""


def open_source(root: Path, source_format: Format, val_labels: Path | None, scratch: Path) -> Source:
    """Lists a source; scratch is a folder for what has to be unpacked for that. UserError for an unusable source."""
    kind = _recognise(root) if source_format == "auto" else source_format
    if val_labels is not None and kind != "ilsvrc":
        raise UserError(f"--val-labels {val_labels}: only ILSVRC's tars need it; leave it out")
    if kind == "folder":
        dataset = load_dataset(root, minival=0)
        found = {"train": dataset.train, "val": dataset.val}
        source = Source(dataset.classes, {name: samples for name, samples in found.items() if samples is not None})
    elif kind == "ilsvrc":
        source = _open_ilsvrc(root, val_labels)
    else:
        from dali_vit.prepare import records

        source = records.open_tfrecords(root) if kind == "tfrecord" else records.open_parquet(root, scratch)
    counts = ", ".join(f"{name} {len(samples):,}" for name, samples in source.splits.items())
    _log.info("%s (%s): %s images of %s classes", root, kind, counts, f"{len(source.classes):,}")
    folders = [root / name / class_ for name in source.splits for class_ in source.classes]
    for files in left_out(folders) if kind == "folder" else ():
        _log.info("%s", files)
    return source


def sample_names(samples: ImageList) -> list[str]:
    """`class/file` of every sample."""
    if isinstance(samples, ShardList):
        return [samples.names.path(i) for i in range(len(samples))]
    return ["/".join(samples.path(i).rsplit("/", 2)[1:]) for i in range(len(samples))]


def read_sample(samples: ImageList, index: int) -> bytes:
    """The encoded image, whatever it is; OSError where it cannot be read."""
    if isinstance(samples, ShardList):
        return samples.payload(np.array([index]))[0].tobytes()
    path = samples.path(index)
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe waits for its writer
        raise OSError(errno.EINVAL, "not a regular file", path)
    with open(path, "rb") as file:
        return file.read()


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
    if _TRAIN_TAR in names or _VAL_TAR in names:
        return "ilsvrc"
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    if any(re.search(r"\.tfrecords?(-|$)|(train|val|validation)-\d+-of-\d+$", name) for name in names):
        return "tfrecord"
    return "folder"


def _open_ilsvrc(root: Path, val_labels: Path | None) -> Source:
    for name in (_TRAIN_TAR, _VAL_TAR):
        if not (root / name).is_file():
            raise UserError(f"{root} has no {name}: put it there")
    train_rows, classes = _list_train_tar(root / _TRAIN_TAR)
    members = sorted(_members(root / _VAL_TAR), key=lambda member: member[0])
    if not members:
        raise UserError(f"{root / _VAL_TAR} holds no images: download it again")
    wnids = _val_classes(root, val_labels, [name for name, _, _ in members])
    index = {name: i for i, name in enumerate(classes)}
    unknown = sorted(set(wnids) - set(index))
    if unknown:
        raise UserError(
            f"validation images are of classes that {_TRAIN_TAR} does not hold ({', '.join(unknown[:3])}): "
            "give the tars and the labels of the same set"
        )
    val_rows = [(0, at, size, index[wnid], name) for (name, at, size), wnid in zip(members, wnids, strict=True)]
    return Source(
        tuple(classes),
        {
            "train": byte_ranges([str(root / _TRAIN_TAR)], train_rows, classes),
            "val": byte_ranges([str(root / _VAL_TAR)], val_rows, classes),
        },
    )


def _list_train_tar(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of the images in the tars of the classes, and the sorted classes."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as outer, tqdm(desc=path.name, unit=" classes", disable=None) as bar:
            for member in outer:
                name = os.path.basename(member.name)
                if not (member.isfile() and name.endswith(".tar")):
                    continue
                inner = outer.extractfile(member)
                assert inner is not None
                start = member.offset_data
                found[name.removesuffix(".tar")] = [
                    (file, start + offset, size) for file, offset, size in _members(path, inner)
                ]
                bar.update()
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole tar file ({error}): download it again") from error
    empty = sorted(name for name, files in found.items() if not files)
    if not found or empty:
        raise UserError(f"{path} holds no images of {empty[0] if empty else 'any class'}: download it again")
    classes = sorted(found)
    return [(0, at, size, label, file) for label, name in enumerate(classes) for file, at, size in found[name]], classes


def _members(path: Path, fileobj: IO[bytes] | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the images in a tar that is not compressed."""
    try:
        with tarfile.open(path if fileobj is None else None, "r:", fileobj=fileobj) as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if member.isfile() and is_image(name):
                    yield name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole tar file ({error}): download it again") from error


def _val_classes(root: Path, val_labels: Path | None, names: list[str]) -> list[str]:
    """Class of each validation image, in the order of the sorted names."""
    if val_labels is None:
        wnids, where = _devkit_classes(root), f"{_DEVKIT}'s ground truth"
    else:
        wnids, where = _read_val_labels(val_labels, names), str(val_labels)
    if len(wnids) != len(names):
        raise UserError(f"{where} has {len(wnids)} lines but {_VAL_TAR} {len(names)} images: give that set's labels")
    return wnids


def _read_val_labels(path: Path, names: list[str]) -> list[str]:
    """Classes of a text file: one a line in the order of the images, or lines of image and class."""
    try:
        lines = [line for line in re.split(r"[\r\n]+", path.read_text(encoding="utf-8")) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--val-labels {path} cannot be read ({error}): give a text file") from error
    stems = {os.path.splitext(name)[0] for name in names}
    rows = [re.split(r"[\s,;]+", line.strip()) for line in lines]
    named = {os.path.splitext(os.path.basename(row[0]))[0]: row[1] for row in rows if len(row) > 1}
    if stems <= set(named):
        return [named[os.path.splitext(name)[0]] for name in names]
    if any(len(row) > 1 for row in rows):
        missing = sorted(stems - set(named))
        raise UserError(f"--val-labels {path} does not name {missing[0]}: give a line for each image, or classes alone")
    return [row[0] for row in rows]


def _devkit_classes(root: Path) -> list[str]:
    """Classes by the devkit's ground truth, one a validation image, and its table of synsets."""
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
    except ImportError:
        raise UserError(
            "the devkit's meta.mat is a MATLAB file: pip install 'dali-vit[ilsvrc]', "
            "or give --val-labels a text file with the class of each validation image"
        ) from None
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except Exception as error:  # scipy has one for every way in which a file can be damaged
        raise ValueError(f"meta.mat: {error}") from error
