"""The process around a command.

The environment variables that libraries read when they are imported, Ctrl-C, the standard streams, and an exit that
neither takes seconds nor waits for other processes.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import ctypes
import errno
import faulthandler
import gc
import io
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from dali_vit.config import LocalUserError
from dali_vit.files import cache_folder

NOBODY_READS = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe that nobody reads, and to a terminal that was closed."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_RAW_OR_ESCAPED = "dali_vit.raw_or_escaped"

# OpenMP's threads, which torch uses on the CPU, spin for long before they sleep, on cores that DALI's threads or other
# processes need. OpenMP reads this variable as it is loaded, so programs import this module before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# CUDA reads this one in the same way. By default the kernels of all streams share 8 queues, and DALI's decoder alone
# has a stream a thread: a training step's kernel would wait behind a decoder's in the same queue. 32 is the maximum.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def _keep_what_numba_compiles() -> None:
    """Tells Numba of our cache folder where it may not write beside the source.

    By itself it would take ~/.cache, and for a user without a home make a folder called `~`. What it finds there it
    runs, so a folder of another user's is not taken.
    """
    kernels = Path(__file__).parents[1] / "pipelines" / "kernels"
    compiled = kernels / "__pycache__"
    if os.access(compiled if compiled.exists() else kernels, os.W_OK):
        return
    with suppress(OSError):  # the folder may be relative to one that is there no more
        user, folder = os.getuid(), cache_folder()
        kept = folder / f"numba-{user}"
        trusted = os.environ.get("DALI_VIT_CACHE") or _owner(folder) in (None, user, 0)
        if trusted and _owner(kept) in (None, user):
            os.environ["NUMBA_CACHE_DIR"] = str(kept)


def _owner(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except OSError:
        return None


if "NUMBA_CACHE_DIR" not in os.environ:  # Numba reads it when it is imported
    _keep_what_numba_compiles()


def end_at_ctrl_c() -> None:
    """Makes Ctrl-C end the process at once, with 130, until `tidy_up_at_ctrl_c`; if it is ignored, it stays ignored.

    A KeyboardInterrupt that is raised during an import may be swallowed, and leaves half of a module behind.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def tidy_up_at_ctrl_c() -> None:
    """For use after the imports: Ctrl-C raises KeyboardInterrupt again, if `end_at_ctrl_c` has changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """For libraries that wait where no handler of Python's runs: Ctrl-C kills the process, unless it is ignored."""
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def held_signals() -> Iterator[Callable[[], bool]]:
    """Holds back Ctrl-C, SIGTERM and SIGHUP, unless they are ignored, until the block is done.

    Yields whether one has come, for the block to ask where it may stop; the first takes effect after the block, and
    later ones not at all.
    """
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    in_main = threading.current_thread() is threading.main_thread()
    held = [number for number, handler in before.items() if in_main and handler not in (signal.SIG_IGN, None)]
    try:
        for number in held:
            signal.signal(number, lambda received, _: came.append(received))
        yield lambda: bool(came)
    finally:
        for number in held:
            signal.signal(number, before[number])
        if came:
            os.kill(os.getpid(), came[0])


def _end(*_: object) -> NoReturn:
    os._exit(130)


def run(main: Callable[[], object], name: str) -> NoReturn:
    """Runs the program of that name and ends the process with its exit code.

    The code is 1, after a traceback, where it raises anything, and 2 instead of 0, after a line on stderr, where a full
    disk has not taken what it printed.
    """
    # Python searches all objects for cycles whenever their number has grown by a quarter. This takes a quarter of the
    # time of importing torch, and later 0.4 s in which a GPU runs dry. Cycles hold little: 24 small objects of DALI a
    # step.
    gc.set_threshold(10_000, 10, 1_000)
    _open_standard_streams()
    faulthandler.enable()  # a crash in a library, or a shard that is cut short under its memory map, is told of
    # The name of a file or class may have characters that stdout cannot encode: Python would raise an error, so they
    # are escaped. In the POSIX locale Python prints bytes that it could not decode as they were, and this is kept.
    codecs.register_error(_RAW_OR_ESCAPED, _raw_or_escaped)
    errors = {"strict": "backslashreplace", "surrogateescape": _RAW_OR_ESCAPED}
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in errors:
        sys.stdout.reconfigure(errors=errors[sys.stdout.errors])
    logging.raiseExceptions = False  # if nobody reads the log any more, the run goes on, without a traceback a line
    code = 0
    try:
        main()
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    end_at_ctrl_c()
    # This is what Python does at its end, except for taking all modules apart. Torch's modules take more than a second,
    # and if this process alone has failed, NCCL's groups would wait for the other processes, which wait for this one.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in NOBODY_READS:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{name}: stdout: {error.strerror}; what was printed is incomplete\n")
            code = code or 2
    os._exit(code)


def end_with_parent() -> None:
    """Asks the kernel for a SIGTERM to this process when the one that started it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def check_surroundings() -> None:
    """LocalUserError where torch or DALI could not be imported, for a reason that they would not tell."""
    try:
        os.getcwd()
    except FileNotFoundError:  # torch would report its own libraries as missing
        raise LocalUserError("the working directory was removed; cd to another") from None
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:  # torch's import would end in a traceback
        raise LocalUserError(f"{error.strerror}: set TMPDIR to a folder that can be written to") from None
    if sys.flags.optimize > 1:
        raise LocalUserError("PYTHONOPTIMIZE=2 or -OO: DALI needs the docstrings that this leaves out; unset it")


def _raw_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler, a character at a time: `surrogateescape`, or `backslashreplace` for what that refuses."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def int_from_environment(variable: str, default: int) -> int:
    """The integer that a launcher has set in the environment; `default` if the variable is unset or empty."""
    given = os.environ.get(variable) or default
    try:
        return int(given)
    except ValueError:
        raise LocalUserError(
            f"{variable}={given}: not a whole number; set the one of this process or unset it"
        ) from None


def _open_standard_streams() -> None:
    """Opens to nowhere the standard streams that were closed from the start: else files opened later would get their
    descriptors, and libraries would print into these files."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest descriptor that is free
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, mode))


__all__ = [
    "NOBODY_READS",
    "check_surroundings",
    "end_at_ctrl_c",
    "end_with_parent",
    "ended_by_ctrl_c",
    "held_signals",
    "int_from_environment",
    "run",
    "tidy_up_at_ctrl_c",
]
