"""Paths as users give them, the folder for caches, and files that are written as a whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["at_home", "cache_folder", "dead_link", "file_sha256", "flush", "make_parent", "replacing"]

_STALE = 3600.0  # seconds for which nobody pauses within the writing of a file


def at_home(path: str | Path) -> Path:
    """A path with `~` replaced by the user's home: shells do not expand it within `--flag=~/x`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no home is known for the user
        return Path(path)


def cache_folder() -> Path:
    """Where files are kept between runs: DALI_VIT_CACHE, or else `dali-vit` under XDG_CACHE_HOME or ~/.cache.

    For a user without a home, or with one where nothing can be made, as in containers and with `sudo -u`, it is
    `dali-vit-<uid>` in the folder for temporary files.
    """
    if given := os.environ.get("DALI_VIT_CACHE"):
        return at_home(given).absolute()
    folder = at_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dali-vit"
    if str(folder).startswith("~") or not (os.path.isdir(folder) or _can_be_made(folder.absolute())):
        with suppress(FileNotFoundError):  # where nothing can be written at all, reading needs no cache
            return Path(tempfile.gettempdir()).absolute() / f"dali-vit-{os.getuid()}"
    return folder.absolute()


def _can_be_made(folder: Path) -> bool:
    there = next(parent for parent in folder.parents if os.path.exists(parent))  # False for what may not be looked into
    return os.access(there, os.W_OK | os.X_OK)


def dead_link(path: str | Path) -> str | None:
    """The message about a link that leads nowhere, such as to a disk that is not mounted; None for other paths."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and os.path.islink(path):
            link = f"{path} is a link to {os.readlink(path)}"
            if error.errno == errno.ELOOP:
                return f"{link}, which leads round in a circle: remove the link"
            return f"{link}, which is not there: mount the disk or remove the link"
    return None


def make_parent(path: Path) -> None:
    """Makes the folder that a file is to lie in; NotADirectoryError naming the folder if it is something else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(error.errno, f"{path.parent} is no folder", str(path.parent)) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomic write: yields a temporary path beside the file, whose content replaces the file at the end of the body.

    It reaches the disk first, so that not even a loss of power leaves a file that is empty or cut short. If the body
    raises, it is removed. Of processes that replace a file at once, the last one's content stays. A link is replaced
    itself: what it leads to may be another set's, or another run's.
    """
    _remove_stale(path.parent)
    temporary = path.with_name(f".dali-vit-{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.filename == str(temporary):  # by a name that the user knows
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Removes what processes that were killed in `replacing` have left in a folder. Others may be writing there now."""
    for path in folder.glob(".dali-vit-*.tmp"):
        with suppress(OSError):
            if re.fullmatch(r"\.dali-vit-[0-9a-f]{32}\.tmp", path.name) and time.time() - path.stat().st_mtime > _STALE:
                path.unlink()


def flush(path: Path) -> None:
    """Makes a file, or a folder's list of names, survive a loss of power, if the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # fsync(2): there is no synchronising of this kind of file
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
