"""What all tools have in common as commands: how mistakes in flags are told, and what becomes of what they print.

Tools import it first, because the other imports take seconds, in which Ctrl-C is to end them, and because it sets how
OpenMP waits, which torch reads.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dali_vit import process
from dali_vit.config import LocalUserError, UserError, mendable

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:  # not where a test imports a tool
    process.end_at_ctrl_c()


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line on stderr, without the usage; exit code 2."""

    def __init__(self, description: str | None, formatter_class: Any = argparse.RawDescriptionHelpFormatter) -> None:
        super().__init__(description=description, formatter_class=formatter_class)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def tells(error: Exception) -> bool:
    """Whether this process is to print an error: where a launcher has started several, all ranks raise most of them."""
    other = os.environ.get("WORLD_SIZE") and os.environ.get("RANK", "0") not in ("", "0")
    return not other or isinstance(error, LocalUserError)


@contextmanager
def telling_mistakes(program: str) -> Iterator[None]:
    """Makes of a UserError, and of what the user can mend of the system's refusals, one line on stderr and exit code 2.

    Of several processes rank 0 alone prints what all raise. Also as the decorator of a tool's `main`.
    """
    try:
        yield
    except (UserError, OSError) as error:
        told = mendable(error) if isinstance(error, OSError) else error
        if told is None:
            raise
        if tells(error):
            print(f"{program}: {' '.join(str(told).split())}", file=sys.stderr)
        sys.exit(2)


class _Stream(io.FileIO):
    """Drops what cannot be written, and remembers why: a measurement of minutes is not to end with it."""

    lost: OSError | None = None

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def _dropping(given: io.TextIOWrapper) -> tuple[io.TextIOWrapper, _Stream]:
    stream = _Stream(given.fileno(), "w", closefd=False)
    options: dict[str, Any] = {"encoding": given.encoding, "errors": given.errors}
    return io.TextIOWrapper(io.BufferedWriter(stream), line_buffering=True, write_through=True, **options), stream


def run(main: Callable[[], object]) -> NoReturn:
    """Runs a tool as `process.run` does, to its end even where stdout or stderr can no longer be written.

    What was to go to a pipe that nobody reads any more is dropped. A full disk under stdout is told of at the end, in
    one line on stderr, and makes of exit code 0 a 2.
    """
    process.tidy_up_at_ctrl_c()
    stdout: _Stream | None = None
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where it was closed from the start
        sys.stdout, stdout = _dropping(sys.stdout)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr, _ = _dropping(sys.stderr)

    def to_its_end() -> None:
        code: object = 0
        try:
            main()
        except SystemExit as request:
            code = request.code
        finally:  # any other error goes on
            sys.stdout.flush()
            if stdout is not None and stdout.lost and stdout.lost.errno not in process.NOBODY_READS:
                name = Path(sys.argv[0]).name
                print(f"{name}: stdout: {stdout.lost.strerror}; what was printed is incomplete", file=sys.stderr)
                code = code or 2
        sys.exit(code)  # type: ignore[arg-type]

    process.run(to_its_end, Path(sys.argv[0]).name)


__all__ = ["Parser", "run", "telling_mistakes"]
