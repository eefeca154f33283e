"""Words of messages: names, counts and other programs' errors, as a line has room for them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["counted", "one_line", "some", "why_not_imported"]


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def counted(count: int, one: str, several: str = "") -> str:
    """A number of things, as `1 image` or `2,000 images`."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def one_line(error: object) -> str:
    """What an error says, on one line; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def why_not_imported(package: str, error: ImportError) -> str:
    """That a package is not installed, with the remedy; of one that is, what it misses, such as a newer NumPy."""
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"it is not installed: pip install {package}"
    return f"it cannot be imported: {one_line(error)}"
