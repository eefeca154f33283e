"""Words of messages: names, counts and other programs' errors, as a line has room for them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["counted", "one_line", "some"]


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
