"""A command as a process: seconds less before and after it, and an end that waits for nobody else."""

from __future__ import annotations

import atexit
import codecs
import errno
import gc
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from dali_vit.config import LocalUserError

NOBODY_READS = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe, and to a terminal that was closed."""

_RAW_OR_ESCAPED = "dali_vit.raw_or_escaped"

# OpenMP's threads, of torch on the CPU, spin for long before they sleep, on cores that DALI's or others' work on. The
# library reads this as it is loaded: programs import this module before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# CUDA, likewise: by default 8 queues take the kernels of all streams, of which DALI's decoder alone has one a thread. A
# training step's kernel would wait behind a decoder's in the same queue. 32 is the most there are.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def end_at_ctrl_c() -> None:
    """Lets Ctrl-C end the process at once, with 130, until `tidy_up_at_ctrl_c`; nothing where it is ignored.

    Raised where Python imports a module, a KeyboardInterrupt may be swallowed, and leaves half of a module behind.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def tidy_up_at_ctrl_c() -> None:
    """After the imports: Ctrl-C is a KeyboardInterrupt again, where `end_at_ctrl_c` has changed that."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> NoReturn:
    os._exit(130)


def run(main: Callable[[], object]) -> NoReturn:
    """Runs a program and ends the process with its exit code; 1 and a traceback where it raises anything."""
    # Python goes through all objects for cycles each time they are a quarter more: a quarter of the time that torch
    # takes to import, and later 0.4 s in which a GPU runs dry. No cycle holds much: 24 small objects a step, of DALI.
    gc.set_threshold(10_000, 10, 1_000)
    _open_standard_streams()
    # A file's name or a class's may be what the terminal cannot show. Python is strict of it, but in the POSIX locale,
    # where it prints the bytes of names that it could not decode as they were: they still are.
    codecs.register_error(_RAW_OR_ESCAPED, _raw_or_escaped)
    errors = {"strict": "backslashreplace", "surrogateescape": _RAW_OR_ESCAPED}
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in errors:
        sys.stdout.reconfigure(errors=errors[sys.stdout.errors])
    logging.raiseExceptions = False  # a run whose lines nobody reads any more goes on, and without a traceback a line
    code = 0
    try:
        main()
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else int(request.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    end_at_ctrl_c()
    # As Python itself ends, but for taking all modules apart. That takes torch's more than a second, and NCCL's groups,
    # where this process alone has failed, wait for the others, which wait for it.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in NOBODY_READS:
            raise
    os._exit(code)


def _raw_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Python's `surrogateescape`, and its `backslashreplace` of what that refuses, a character at a time."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def int_from_environment(variable: str, default: int) -> int:
    """What a launcher has set in the environment; `default` where that is nothing or empty."""
    given = os.environ.get(variable) or default
    try:
        return int(given)
    except ValueError:
        raise LocalUserError(
            f"{variable}={given}: not a whole number; set the one of this process or unset it"
        ) from None


def _open_standard_streams() -> None:
    """Opens those that were closed from the start, to nowhere: files opened later would get their numbers, and with
    them what libraries print."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)  # as the lowest number that is free
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, mode))


__all__ = ["NOBODY_READS", "end_at_ctrl_c", "int_from_environment", "run", "tidy_up_at_ctrl_c"]
