"""The listing of a large image folder, kept beside the images so that a run need not list it again.

An index is valid as long as every class folder has the times of change that it had when the index was made: adding,
removing or renaming a file changes them, and a program that copies files cannot set back the time of the last status
change. File systems that keep no such times, as those of object stores may not, get no index. The contents of files do
not matter to an index. It is a plain .npz whose checksums are verified on reading.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from dali_vit.files import cache_folder, replacing

__all__ = ["INDEX", "Listing", "load", "save", "stamps"]

INDEX = ".dali-vit-index.npz"

_VERSION = 1
# Below this many images, listing takes no longer than reading an index.
_MIN_IMAGES = 10_000
# File systems may record times this coarsely: a folder that changed so recently may change again at the same time.
_SETTLED_SECONDS = 2.0

log = logging.getLogger(__name__)
# What reading a damaged file, or something else under its name, may raise.
_DAMAGED = (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of all classes."""

    names: np.ndarray
    """`class/file` of each image, with a zero byte before each, ordered by class and name, uint8."""
    counts: np.ndarray
    """Images of each class, int64 [classes]."""


def stamps(folders: Sequence[str], pool: Executor) -> np.ndarray | None:
    """Times of the last modification and status change of each folder in ns, int64 [folders, 2]; None if stat fails."""

    def stamp(folder: str) -> tuple[int, int]:
        status = os.stat(folder)
        return status.st_mtime_ns, status.st_ctime_ns

    try:
        return np.array(list(pool.map(stamp, folders)), np.int64).reshape(-1, 2)
    except OSError:
        return None


def load(folder: Path, classes: Sequence[str], times: np.ndarray | None, suffixes: Sequence[str]) -> Listing | None:
    """The listing that was kept of a folder; None if there is none or, with a line in the log, if it is not valid."""
    if times is None:
        return None
    for path in (folder / INDEX, _elsewhere(folder)):
        try:
            with np.load(path) as arrays:
                columns = {name: arrays[name] for name in arrays.files}
            listing = Listing(columns["names"], columns["counts"])
            reason = _outdated(columns, classes, times, suffixes)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except _DAMAGED as error:
            reason = f"cannot be used ({error})"
        if reason is None:
            return listing
        log.info("%s %s: the images are listed again", path, reason)
    return None


def save(
    folder: Path, classes: Sequence[str], times: np.ndarray | None, suffixes: Sequence[str], listing: Listing
) -> None:
    """Keeps a listing beside the images or, where that is not allowed, in the user's cache.

    No index is kept of a small folder, nor of a folder that changed a moment ago, nor where times may mean nothing.
    """
    count = int(listing.counts.sum())
    if times is None or count < _MIN_IMAGES or times.max() > time.time_ns() - _SETTLED_SECONDS * 1e9:
        return
    if len(times) > 1 and (times == times[0]).all():  # each folder has its own, to the nanosecond, where they are kept
        _say(f"{folder} is listed anew each time: the times of its folders do not tell whether one was changed")
        return
    columns = {
        "rule": _bytes(_rule(suffixes)),
        "classes": _bytes("\0".join(classes)),
        "times": times,
        "counts": listing.counts,
        "names": listing.names,
    }
    fallback = _elsewhere(folder)
    try:
        before = os.stat(folder).st_mtime_ns
        _write(folder / INDEX, columns)
        if os.stat(folder).st_mtime_ns == before:
            (folder / INDEX).unlink(missing_ok=True)  # another process may have come to the same end
            _say(f"{folder} is listed anew each time: the times of its folders do not tell whether one was changed")
    except OSError as denied:
        try:
            fallback.parent.mkdir(parents=True, exist_ok=True)
            _write(fallback, columns)
        except OSError as error:
            _say(f"{folder} is listed anew each time: its index can be kept neither there nor in {fallback} ({error})")
        else:
            _say(f"the index of {folder} is kept in {fallback}, as it cannot be beside the images ({denied.strerror})")


def _outdated(
    columns: dict[str, np.ndarray], classes: Sequence[str], times: np.ndarray, suffixes: Sequence[str]
) -> str | None:
    """Why an index is not valid; None if it is."""
    if columns["rule"].tobytes() != _rule(suffixes).encode():
        return "was made by another version"
    before = os.fsdecode(columns["classes"].tobytes()).split("\0")
    if before != list(classes):
        changed = len(set(before) ^ set(classes))
        return f"is out of date ({changed} class folders came, went or were renamed)"
    if columns["times"].shape != times.shape:
        return "is of another form"
    changed = int((columns["times"] != times).any(axis=1).sum())
    if changed:
        return f"is out of date ({changed} of {len(classes)} class folders changed)"
    names, counts = columns["names"], columns["counts"]
    if names.dtype != np.uint8 or counts.shape != (len(classes),) or counts.sum() != np.count_nonzero(names == 0):
        return "is of another form"
    return None


def _rule(suffixes: Sequence[str]) -> str:
    return f"dali-vit index {_VERSION}: {' '.join(suffixes)}"


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(os.fsencode(text), np.uint8)


def _elsewhere(folder: Path) -> Path:
    name = blake2b(os.fsencode(folder.absolute()), digest_size=16).hexdigest()
    return cache_folder() / "index" / f"{name}.npz"


def _write(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Writes an index in one piece: readers see a whole one; of processes that write at once, the last one's stays."""
    with replacing(path) as temporary, temporary.open("xb") as file:
        np.savez(file, allow_pickle=False, **columns)


@functools.cache  # once a process
def _say(message: str) -> None:
    log.info("%s", message)
