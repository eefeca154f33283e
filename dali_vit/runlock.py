"""The folder of a run while it runs: locked against other processes, and found again where it is moved or removed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dali_vit.config import Config, UserError
from dali_vit.distributed import Group, on_main
from dali_vit.files import dead_link

T = TypeVar("T")

log = logging.getLogger(__name__)

LOCK = ".lock"
"""File in a run's folder that the process which runs it has locked; it stays when the run ends."""

_locks: dict[Path, tuple[int, ExitStack]] = {}  # run folders by their first names, their descriptors, what holds them
_relocking = threading.Lock()
_moves: dict[Path, Path] = {}  # run folders by their first names, and the new names that were warned of


@contextmanager
def locked(config: Config, group: Group) -> Iterator[None]:
    """Keeps other processes from running the same run; UserError, on every rank, if another process already does.

    The lock is the kernel's, so it is released when the process that holds it ends, in whatever way. It is on a file in
    the folder, as NFS tells other machines of no lock on a folder.
    """
    with ExitStack() as held:
        on_main(group, lambda: _lock(config, held))
        yield


def _lock(config: Config, held: ExitStack) -> None:
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(config.run_dir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--runs-dir {config.run.runs_dir}: {unwritable(config, error)}") from error
    held.callback(os.close, descriptor)
    try:
        lock = _open_lock(config.run_dir, descriptor)
    except OSError as error:
        raise UserError(f"--runs-dir {config.run.runs_dir}: {unwritable(config, error)}") from error
    held.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{config.run_dir}: another process is running it; wait for it or choose --name") from None
    except OSError as error:
        log.warning("%s: its file system has no locks (%s), so see that nothing else runs it", config.run_dir, error)
    _locks[config.run_dir] = descriptor, held
    held.callback(_locks.pop, config.run_dir, None)
    held.callback(_moves.pop, config.run_dir, None)


def _open_lock(run_dir: Path, descriptor: int) -> int:
    """A descriptor of what is to be locked in a run's folder, which is open as `descriptor`."""
    try:
        return os.open(run_dir / LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError:
        with suppress(FileNotFoundError):  # another user's, or on a disk that is read-only now: the lock is the same
            return os.open(run_dir / LOCK, os.O_RDONLY)
        return os.dup(descriptor)  # the folder may be read-only, and the run finished


def current(config: Config) -> Path:
    """The present path of the run's folder, which may have been moved or renamed; a warning is logged for each move.

    Another run may meanwhile have a folder of the old name. If the folder was removed it is made and locked anew, with
    a warning; UserError if another process has begun to run there.
    """
    lock = _locks.get(config.run_dir)
    if lock is None or _is_open_as(config.run_dir, lock[0]):
        return config.run_dir
    descriptor = lock[0]
    try:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:  # there is no /proc
        return config.run_dir
    if not _is_open_as(path, descriptor):
        with _relocking:  # one of the threads that ask
            if _locks[config.run_dir] is lock and _was_removed(descriptor):
                try:
                    config.run_dir.mkdir(parents=True, exist_ok=True)
                except OSError:  # what writes there will say so
                    return config.run_dir
                _lock(config, lock[1])
                _moves.pop(config.run_dir, None)
                log.warning("%s was removed while it runs: it goes on in a new one", config.run_dir)
        return config.run_dir
    if _moves.get(config.run_dir) != path:
        _moves[config.run_dir] = path
        log.warning("%s was moved to %s while it runs: what it writes goes there", config.run_dir, path)
    return path


def how_to_go_on(config: Config) -> str:
    """What to start so that a run which was stopped goes on, in words."""
    now = current(config)
    if now == config.run_dir:
        return "start the same command again to go on"
    where = shlex.join(["--runs-dir", str(now.parent), "--name", now.name])
    return f"it is {now} now: start the same command with {where} to go on"


def following(config: Config, write: Callable[..., T]) -> Callable[..., T]:
    """`write` with the run's folder as argument run_dir; called again if it fails because the folder was moved."""

    def anew(**arguments: Any) -> T:
        while True:
            run_dir = current(config)
            try:
                return write(run_dir=run_dir, **arguments)
            except OSError:
                if current(config) == run_dir:
                    raise

    return anew


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _was_removed(descriptor: int) -> bool:
    try:
        return not os.fstat(descriptor).st_nlink
    except OSError as error:
        return error.errno == errno.ESTALE  # on NFS, by another machine


def unwritable(config: Config, error: OSError) -> str:
    """Why the run's folder cannot be made or written to, in words for a message; `error` is what tells of it."""
    for folder in (config.run_dir, *config.run_dir.parents):
        if fault := dead_link(folder):
            return fault
    for folder in (config.run_dir, config.run_dir / "checkpoints"):
        if folder.exists() and not folder.is_dir():
            return f"{folder.relative_to(config.run_dir.parent)} is a file there; choose another --name"
    return f"cannot write {error.filename or 'there'} ({error.strerror})"
