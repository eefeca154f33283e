"""Files by the names that users give them, and files that are there as a whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["at_home", "make_parent", "replacing"]


def at_home(path: str | Path) -> Path:
    """A path whose `~` is the user's home: shells do not see to that within `--flag=~/x`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of a user that nobody knows
        return Path(path)


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
