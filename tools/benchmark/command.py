"""What all tools have in common as commands: how mistakes in flags are told, and what becomes of what they print."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dali_vit import process


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line on stderr, without the usage; exit code 2."""

    def __init__(self, description: str | None, formatter_class: Any = argparse.RawDescriptionHelpFormatter) -> None:
        super().__init__(description=description, formatter_class=formatter_class)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


class _Stdout(io.FileIO):
    """Drops what cannot be written, and remembers why: a measurement of minutes is not to end with it."""

    lost: OSError | None = None

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def run(main: Callable[[], object]) -> NoReturn:
    """Runs a tool as `process.run` does, to its end even where stdout is a pipe that nobody reads, or a full disk.

    For the full disk the exit code is then 2, after one line on stderr.
    """
    stdout: _Stdout | None = None
    if isinstance(given := sys.stdout, io.TextIOWrapper):  # None where it was closed from the start
        stdout = _Stdout(given.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(stdout), given.encoding, given.errors, line_buffering=True, write_through=True
        )

    def to_its_end() -> None:
        try:
            main()
        finally:
            sys.stdout.flush()
            if stdout is not None and stdout.lost and stdout.lost.errno not in process.NOBODY_READS:
                name = Path(sys.argv[0]).name
                print(f"{name}: stdout: {stdout.lost.strerror}; what was printed is incomplete", file=sys.stderr)
                sys.exit(2)

    process.run(to_its_end)


__all__ = ["Parser", "run"]
