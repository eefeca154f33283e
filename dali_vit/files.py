"""Files by the names that users give them, and files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["at_home", "dead_link", "file_sha256", "flush", "make_parent", "replacing"]


def at_home(path: str | Path) -> Path:
    """A path whose `~` is the user's home: shells do not see to that within `--flag=~/x`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of a user that nobody knows
        return Path(path)


def dead_link(path: str | Path) -> str | None:
    """What is to be said of a link that leads nowhere, as to a disk that is not mounted; None of anything else."""
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
    """Makes the folder that a file is to lie in; OSError, in words about that folder, where something else is there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(error.errno, f"{path.parent} is no folder", str(path.parent)) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name beside a file, to write to: what is there when the body is done becomes the file, else it goes.

    Of processes that write at once the last one's stays.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Makes a file, or a folder's list of names, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
