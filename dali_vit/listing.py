"""Image folders: their classes, and the images of each, listed once and then kept in an index."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np

from dali_vit import index_cache
from dali_vit.config import UserError
from dali_vit.files import dead_link
from dali_vit.index_cache import Listing
from pipelines.readers import FileList
from pipelines.words import some

__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "IO_THREADS",
    "LEFT_OUT",
    "LeftOut",
    "check_no_empty",
    "check_root",
    "check_same_classes",
    "class_names",
    "folder_name",
    "is_image",
    "kind_of_archives",
    "left_out",
    "list_split",
    "other_val",
    "scan",
    "utf8_name",
    "without_images",
]

# Formats that DALI decodes on both devices (not GIF), as Pillow calls them; suffixes count in upper and lower case.
FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm", ".pnm", ".pbm"), "PPM"),
    ".jp2": "JPEG2000",
}
IMAGE_SUFFIXES = tuple(FORMATS)

LEFT_OUT = {
    "in a subfolder": "move images into the class folder itself",
    "other suffix": "save images as JPEG or PNG",
}
"""Why files of a class folder are not taken, and what to do about it."""

# Where train/ and val/ lie in Kaggle's archive of ImageNet, as seen from outside and from its top folder ILSVRC/.
_KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")

# What network storage and macOS's archives put beside the folders of users, not hidden.
_NOT_THE_USERS = ("@eaDir", "__MACOSX")

# Threads that list folders and look at files: they wait for the file system, and a network's answers many at once.
IO_THREADS = 16


def is_image(name: str) -> bool:
    """Whether a file of this name in a class folder is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def utf8_name(name: str) -> str:
    """The class name for a folder's name: its bytes read as UTF-8, whatever encoding the locale gives to file names.

    Otherwise a model trained in one locale would have other classes than its data in another locale.
    """
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def folder_name(name: str) -> str:
    """The inverse of `utf8_name`: the name of a class's folder, in a path that this process is to open."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def scan(folder: Path | str, *, folders: bool, dead_links: bool = False) -> list[str]:
    """Sorted names of a folder's subfolders or of its images; UserError if it cannot be listed.

    Hidden ones are left out, and folders that systems put there.

    dead_links: skip links that lead nowhere when listing subfolders; else UserError, as each may be a subfolder.
    """
    try:
        with os.scandir(folder) as entries:
            if folders:
                return sorted(e.name for e in entries if _is_the_users(e.name) and _is_folder(e, dead_links))
            # Symbolic links are not followed: that would be a stat for each.
            return sorted(e.name for e in entries if is_image(e.name) and not e.is_dir(follow_symlinks=False))
    except OSError as error:
        lost = isinstance(error, FileNotFoundError)
        remedy = "copy the set again, with its empty folders" if lost else "check its permissions"
        raise UserError(f"{folder} cannot be listed ({error.strerror}): {remedy}") from error


def _is_the_users(folder: str) -> bool:
    return not folder.startswith(".") and folder not in _NOT_THE_USERS


def _is_folder(entry: os.DirEntry[str], dead_links: bool) -> bool:
    fault = dead_link(entry.path) if entry.is_symlink() else None
    if fault and not dead_links:
        raise UserError(fault)
    return not fault and entry.is_dir()


def class_names(folder: Path) -> list[str]:
    """Sorted names of the class folders, in UTF-8; UserError if there are none."""
    names = sorted(map(utf8_name, scan(folder, folders=True)))
    if not names:
        if any(folder.glob("shard-*.tar")):  # a set that `prepare` made, without the manifest that is read first
            lost = f"{folder} has shards, but {folder.parent / 'dataset.json'} is not there"
            raise UserError(f"{lost}: copy the set again with all its files, or prepare it again")
        flat = scan(folder, folders=False)
        what = "images but no class folders" if flat else "no class folders"
        remedy = f"put the images into {folder.name}/<class>/"
        if folder.name == "val" and not any(folder.iterdir()):
            remedy += ", or remove the empty folder"
        if flat and folder.name == "val" and (folder.parent / "train").is_dir():  # as Kaggle has ImageNet
            command = f"dali-vit prepare {quote(str(folder.parent))} OUT --val-labels LOC_val_solution.csv"
            remedy += f", or make a set by the file of their labels: `{command}`"
        raise UserError(f"{folder} has {what}: {remedy}")
    return names


def other_val(root: Path) -> str | None:
    """Name of the folder that may be meant where there is no val/: `Val`, `validation`, `valid` or `test`; else None.

    `test` counts only if it has folders: ImageNet's test images have no classes.
    """
    if (root / "val").exists():
        return None
    with suppress(OSError):
        names = sorted(os.listdir(root), key=str.lower)
        for meant, name in itertools.product(("val", "validation", "valid", "test"), names):
            if name.lower() == meant:
                with suppress(OSError), os.scandir(root / name) as entries:
                    if any((entry.is_dir() and _is_the_users(entry.name)) or meant != "test" for entry in entries):
                        return name
    return None


def list_split(folder: Path, classes: Sequence[str], *, some_empty: bool = False) -> FileList:
    """Images of `folder/<class>/`, ordered by class and name; UserError of `check_no_empty` unless some_empty."""
    names = [folder_name(name) for name in classes]
    with ThreadPoolExecutor(IO_THREADS) as pool:
        paths = [os.path.join(folder, name) for name in names]
        stamps = index_cache.stamps(paths, pool)  # before the listing, so a change in between shows the next time
        listing = index_cache.load(folder, names, stamps, IMAGE_SUFFIXES)
        if listing is None:
            listed = pool.map(_list_class, paths)
            listing = _collect(classes, listed)
            index_cache.save(folder, names, stamps, IMAGE_SUFFIXES, listing)
    if not some_empty:
        check_no_empty(folder, classes, listing.counts)
    return _file_list(folder, listing)


@dataclass(frozen=True)
class LeftOut:
    """Files in class folders that no split takes, all for the same reason."""

    kind: str
    """One of LEFT_OUT."""
    count: int
    example: str
    """Path of the first one."""

    def __str__(self) -> str:
        return f"{self.kind} (left out; {LEFT_OUT[self.kind]}): {self.count:,}, such as {self.example}"


def left_out(classes: Iterable[Path]) -> tuple[LeftOut, ...]:
    """Files in class folders that `list_split` leaves out.

    Hidden and linked folders in them, and those that systems put there, are not looked into.

    classes: paths of the class folders, with the class name in place of the folder's name.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for folder in (str(path.with_name(folder_name(path.name))) for path in classes):
        for parent, subfolders, files in os.walk(folder):
            subfolders[:] = sorted(name for name in subfolders if _is_the_users(name))
            for name in sorted(name for name in files if not name.startswith(".")):
                if name.lower().endswith(IMAGE_SUFFIXES) and parent == folder:
                    continue
                kind = "in a subfolder" if name.lower().endswith(IMAGE_SUFFIXES) else "other suffix"
                counts[kind] += 1
                examples.setdefault(kind, os.path.join(parent, name))
    return tuple(LeftOut(kind, counts[kind], examples[kind]) for kind in LEFT_OUT if counts[kind])


def _list_class(path: str) -> tuple[bytes, int]:
    """`\\0class/file` for each image of a class, and their number."""
    files = scan(path, folders=False)
    prefix = f"\0{os.path.basename(path)}/"
    return os.fsencode(prefix + prefix.join(files)) if files else b"", len(files)


def _collect(classes: Sequence[str], listed: Iterable[tuple[bytes, int]]) -> Listing:
    counts = np.zeros(len(classes), np.int64)
    pieces = []
    for i, (names, count) in enumerate(listed):
        pieces.append(names)
        counts[i] = count
    return Listing(np.frombuffer(b"".join(pieces), np.uint8), counts)


def _file_list(folder: Path, listing: Listing) -> FileList:
    root = os.fsencode(folder) + b"/"
    begins = np.flatnonzero(listing.names == 0)
    lengths = np.diff(begins, append=len(listing.names)) - 1 + len(root)
    buffer = np.frombuffer(listing.names.tobytes().replace(b"\0", root), np.uint8)
    labels = np.repeat(np.arange(len(listing.counts)), listing.counts)
    return FileList(buffer, np.cumsum(lengths) - lengths, lengths.astype(np.int32), labels)


def check_root(root: Path, folder: str) -> None:
    """Raises UserError, with the likeliest remedy, unless `root/folder` is a folder."""
    # A set that prepare makes gets its name as a whole: what has `folder` is not unfinished, whatever lies beside it.
    if root.name and not (root / folder).is_dir() and root.with_name(root.name + ".partial").exists():
        raise UserError(f"{root} is still being prepared, or was cut short: run prepare to its end")
    if not root.exists():
        absent = f"{root}: no such folder; give one that holds train/<class>/* and val/<class>/*, or 'demo'"
        raise UserError(dead_link(root) or absent)
    if not root.is_dir():
        raise UserError(f"{root} is a file: give the folder that holds train/<class>/* and val/<class>/*")
    for place in (root / folder, root / "val"):  # a run must not do without val because a disk is not mounted
        if fault := dead_link(place):
            raise UserError(fault)
    if (root / folder).is_dir():
        return
    subfolders = scan(root, folders=True, dead_links=True)
    places = (*subfolders, *_KAGGLE_FOLDERS)
    nested = next((name for name in places if (root / name / folder).is_dir()), None)
    if root.name in ("train", "val") and (root.parent / folder).is_dir():
        remedy = f"give its parent, {root.parent}"
    elif folder == "val" and (other := other_val(root)):
        remedy = f"if {other}/ is meant, rename it to val/"
    elif nested is not None:
        remedy = f"did you mean {root / nested}?"
    elif folder == "train" and (named := next((n for n in subfolders if n.lower() in ("train", "training")), None)):
        remedy = f"if {named}/ is meant, rename it to train/"
    elif folder == "train" and "val" in subfolders:
        remedy = "training needs train/<class>/* beside val/"
    elif any(scan(root / name, folders=False) for name in subfolders[:3]):
        remedy = f"its class folders belong in {folder}/"
    elif not (root / "train").is_dir() and (unpack := _how_to_unpack(root, subfolders)):
        remedy = unpack
    else:
        remedy = f"give a folder that holds {folder}/<class>/*"
    state = "is empty" if not any(root.iterdir()) else f"has no {folder}/"
    raise UserError(f"{root} {state}: {remedy}")


def kind_of_archives(names: Iterable[str]) -> str | None:
    """Kind of the files that hold a data set's images, from file names relative to its root: `ilsvrc` (tars in the root
    itself), `parquet`, `tfrecord` or `webdataset`; None if there are none, as in an image folder."""
    names = list(names)
    if any(re.fullmatch(r"ILSVRC2012_img_(train|val)\.tar", name) for name in names):
        return "ilsvrc"
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    if any(re.search(r"\.tfrecords?(-|$)|(train|val|validation)-\d+-of-\d+$", name) for name in names):
        return "tfrecord"
    return "webdataset" if any(name.endswith(".tar") for name in names) else None


def _how_to_unpack(root: Path, subfolders: Sequence[str]) -> str | None:
    """The remedy for archives of images in a folder or its first three subfolders; None if there are none."""
    names = []
    source = root
    for subfolder in ("", *subfolders[:3]):
        with suppress(OSError):
            inside = os.listdir(root / subfolder)
            names += [os.path.join(subfolder, name) for name in inside]
            if kind_of_archives(inside) == "ilsvrc":  # which `prepare` looks for in the folder itself
                source, names = root / subfolder, inside
                break
    kind = kind_of_archives(names)
    if kind == "webdataset":
        return "tar files are not read; unpack them into train/<class>/, or get the set as parquet or TFRecords"
    return kind and f"make a set of what it holds first: `dali-vit prepare {quote(str(source))} TARGET`"


def check_no_empty(folder: Path, classes: Sequence[str], counts: np.ndarray) -> None:
    """Raises UserError, with their names, if classes have no images; counts: images of each class, int64 [classes].

    In val/ a class may have an empty folder, as long as another class has images.
    """
    empty = without_images(classes, counts)
    if not empty:
        return
    fault = f"{folder} has classes without images ({some(empty)})"
    for files in left_out(folder / name for name in empty):  # users must not be told to remove what may be images
        where = files.kind.replace("other", "of another")
        raise UserError(f"{fault} but with files {where}, such as {files.example}: {LEFT_OUT[files.kind]}")
    if folder.name != "val" or not counts.any():
        raise UserError(f"{fault}: add images or remove the folders")


def without_images(classes: Sequence[str], counts: np.ndarray) -> list[str]:
    """Names of the classes without images; counts: images of each class, int64 [classes]."""
    return [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]


def check_same_classes(root: Path, train: list[str], val: list[str]) -> None:
    """Raises UserError, with the names, if one split has classes that the other lacks."""
    faults = [
        f"{len(names)} missing from {where}/ ({some(sorted(names))})"
        for names, where in [(set(train) - set(val), "val"), (set(val) - set(train), "train")]
        if names
    ]
    if faults:
        missing = next((name for name in train if name not in val), None)
        remedy = f"; for a class without images in val, make an empty val/{missing}/" if missing else ""
        differing = f"{root}: train/ and val/ differ in their classes, {'; '.join(faults)}: make them equal"
        raise UserError(differing + remedy)
