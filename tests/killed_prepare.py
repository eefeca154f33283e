"""Runs of prepare that are each stopped before another of its file operations, and then started again.

    python -m tests.killed_prepare SOURCE TARGET LAYOUT kill|full STRIDE [VAL_LABELS]

`kill`: SIGKILL; `full`: the operation fails as on a full disk. STRIDE: every STRIDE-th operation is tried. Every run is
a fork of this process, which has imported everything and has no threads, so a run takes milliseconds. Standard output
is one JSON object: `operations`, of a run that nothing stops; `stops`, the number of stopped runs; `whole`, how many of
them left the whole target; `digest`, of the target of the run that nothing stops; and `digests`, of the targets of the
runs that were started again.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.prepare import PrepareArguments, prepare, targets

OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
LAST = 8  # operations at the end, from the manifest to the renaming: all are tried, whatever the stride


def digest(root: Path) -> str:
    """SHA-256 of the names and the contents of all files of a folder."""
    found = sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()


def small_parts() -> None:
    """Makes parts of few images: --shard-mb is at least 1, so each image counts as 200 KB more."""
    targets._TAR_OVERHEAD, targets._FOLDER_PART = 200_000, 5


def forked(work: Callable[[], Any]) -> int:
    """Exit status of a fork that does the work."""
    # The kernel keeps a thread for a moment after it was joined, and from Python 3.12 on a fork beside it is warned of.
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except UserError as error:
            print(error, file=sys.stderr)
            os._exit(2)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def before_each_operation(root: Path, act: Callable[[int], None]) -> None:
    """From now on calls `act` before each file operation below a folder, with the number of the operation."""
    numbers = itertools.count()
    # Two workers may both make the same folder or open the same file to read from it. Only the first attempt counts,
    # else runs would differ in their operations.
    shared: set[tuple[str, str]] = set()
    lock = threading.Lock()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0] if event in OPERATIONS else None
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(str(root)):
            return
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event == "os.mkdir" or reads:
            with lock:
                key = event, os.fspath(path)
                if key in shared:
                    return
                shared.add(key)
        act(next(numbers))

    sys.addaudithook(hook)


def count_operations(arguments: PrepareArguments, root: Path) -> int:
    """Number of file operations of a run that nothing stops; the run leaves its target."""
    receiver, sender = os.pipe()

    def work() -> None:
        before_each_operation(root, lambda _: os.write(sender, b"."))
        prepare(arguments)

    assert forked(work) == 0
    return len(os.read(receiver, 1 << 16))


def stop_at(operation: int, how: str, arguments: PrepareArguments, root: Path) -> int:
    """Exit status of a run that is stopped before the given operation."""

    def act(number: int) -> None:
        if number == operation:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work() -> None:
        before_each_operation(root, act)
        prepare(arguments)

    return forked(work)


def main(arguments: PrepareArguments, how: str, stride: int) -> dict[str, Any]:
    """The JSON object of the module's docstring; source and target, and nothing else, must lie in one folder."""
    target = arguments.target
    small_parts()
    os.sync = lambda: None  # a killed process loses nothing that it gave to the kernel
    os.fsync = lambda _: None
    total = count_operations(arguments, target.parent)
    whole = digest(target)
    shutil.rmtree(target)

    digests, found_whole = set(), 0
    stops = [*range(0, total - LAST, stride), *range(max(0, total - LAST), total)]
    for operation in stops:
        assert stop_at(operation, how, arguments, target.parent) == {"kill": -signal.SIGKILL, "full": 2}[how]
        try:
            load_dataset(target, minival=0)
            assert digest(target) == whole
            found_whole += 1
        except UserError:
            pass
        assert forked(lambda: prepare(arguments)) == 0
        assert [path.name for path in target.parent.iterdir() if path.name.startswith(target.name)] == [target.name]
        digests.add(digest(target))
        shutil.rmtree(target)
    return {
        "operations": total,
        "stops": len(stops),
        "whole": found_whole,
        "digest": whole,
        "digests": sorted(digests),
    }


if __name__ == "__main__":
    source, chosen, to, how, stride, *labels = sys.argv[1:]
    result = main(
        PrepareArguments(
            Path(source),
            Path(chosen),
            to=to,  # type: ignore[arg-type]
            shard_mb=1,
            workers=2,
            val_labels=Path(labels[0]) if labels else None,
        ),
        how,
        int(stride),
    )
    print(json.dumps(result))
