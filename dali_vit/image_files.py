"""The image files that arguments name: the files themselves, and those in folders."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dali_vit.config import UserError
from dali_vit.files import at_home, dead_link
from dali_vit.listing import IMAGE_SUFFIXES, scan
from dali_vit.validation import check_local
from pipelines.readers import FileList

__all__ = ["list_images", "other_images"]

# Suffixes of images that are not among IMAGE_SUFFIXES; photos of phones have some of them.
_OTHER_SUFFIXES = (".gif", ".heic", ".heif", ".avif", ".jxl", ".jfif", ".jpe")


def list_images(arguments: Sequence[Path]) -> FileList:
    """The files, with each folder replaced by all images below it, sorted by name; labels are indices, int64 [N].

    Links are followed; hidden files and folders, and folders that systems put there, are left out. A link that leads
    nowhere counts as an image unless its name has another suffix: without any it may stand for a folder. UserError for
    a path that is not there or cannot be listed, and for a folder without images.
    """
    paths, lengths = bytearray(), array("i")  # Python strings of all paths would take several times as much
    for given in arguments:
        check_local(given)
        argument = at_home(given)
        before = len(lengths)
        for path in _images_of(argument):
            encoded = os.fsencode(path)
            paths += encoded
            lengths.append(len(encoded))
        if len(lengths) == before:
            raise UserError(
                f"{argument}: no image files in this folder ({', '.join(IMAGE_SUFFIXES)}); name another, or files"
            )
    bytes_of = np.frombuffer(lengths, np.int32)
    starts = np.cumsum(bytes_of, dtype=np.int64) - bytes_of
    return FileList(np.frombuffer(paths, np.uint8), starts, bytes_of, np.arange(len(lengths)))


def other_images(folder: Path) -> list[str]:
    """Paths of the images below a folder that `list_images` leaves out for their suffix, none of them hidden."""
    found = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        chosen = (name for name in names if name.lower().endswith(_OTHER_SUFFIXES) and not name.startswith("."))
        found += [os.path.join(parent, name) for name in sorted(chosen)]
    return found


def _images_of(argument: Path) -> Iterator[str]:
    if argument.is_dir():
        return _walk(str(argument), ())
    if not argument.is_file():
        if fault := dead_link(argument):
            raise UserError(fault)
        fault = "not a regular file; name an image or a folder" if argument.exists() else "no such image file"
        raise UserError(f"{argument}: {fault}")
    return iter((str(argument),))  # whatever its suffix


def _walk(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Images below a folder; above: real paths of the folders around it, as a link may lead back to one of them."""
    here = os.path.realpath(folder)
    if here in above:
        return
    subfolders = frozenset(scan(folder, folders=True, dead_links=True))
    for name in sorted(subfolders.union(scan(folder, folders=False), _lost_folders(folder))):
        path = os.path.join(folder, name)
        if name in subfolders:
            yield from _walk(path, (*above, here))
        else:
            yield path


def _lost_folders(folder: str) -> Iterator[str]:
    """Names of the links that lead nowhere and may have led to a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and "." not in entry.name and dead_link(entry.path):
                yield entry.name
