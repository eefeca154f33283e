"""What commands print: lines on stdout and stderr that survive full disks and closed pipes, and predictions."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dali_vit.config import mendable

__all__ = ["say", "show_json", "show_table", "stdout_may_be_full", "tell"]


def tell(line: str) -> None:
    """Prints a line on stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def say(what: object) -> None:
    """Prints on stdout. UserError where that is a file on a full disk."""
    with stdout_may_be_full():
        print(what, flush=True)


@contextlib.contextmanager
def stdout_may_be_full() -> Iterator[None]:
    """A refusal of what is printed meanwhile as a UserError, where the user can mend it."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # of --help, else the end of the process would
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # keeps the end from writing to it again
        error.filename = "stdout"
        raise mendable(error) or error from None


def show_json(predictions: Iterable[tuple[Path, list[dict[str, Any]]]]) -> None:
    """All at once, as half an array is no JSON; until then as text, which is a fraction of the size of the objects."""
    from dali_vit.data import DecodeError

    images = []
    try:
        for path, found in predictions:
            images.append(json.dumps({"image": str(path), "predictions": found}))
    except DecodeError:  # after the last of them
        say(f"[{', '.join(images)}]")
        raise
    say(f"[{', '.join(images)}]")


def show_table(predictions: Iterable[tuple[Path, list[dict[str, Any]]]]) -> None:
    for path, found in predictions:
        lines = [f"  {100 * one['probability']:6.2f} %  {_class_shown(one)}" for one in found] or ["  cannot be used"]
        say("\n".join([str(path), *lines]))


def _class_shown(prediction: dict[str, Any]) -> str:
    """The class's name, with the first of its words where it has any."""
    first_word = prediction.get("description", "").partition(", ")[0]
    return f"{prediction['class']} {first_word}".rstrip()
