"""The folder of a run while it runs: its lock, and where it is after it was moved or removed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dali_vit import runlock
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group
from dali_vit.metric_log import MetricLog


def test_the_folder_is_followed_while_it_is_locked(
    tiny_config: Config, cpu: Group, caplog: pytest.LogCaptureFixture
) -> None:
    before, now = tiny_config.run_dir, tiny_config.run_dir.parent / "elsewhere"
    with runlock.locked(tiny_config, cpu):
        assert runlock.current(tiny_config) == before
        before.rename(now)
        assert runlock.current(tiny_config) == now
        before.mkdir()  # another run of the old name
        assert runlock.current(tiny_config) == now
        assert caplog.messages == [f"{before} was moved to {now} while it runs: what it writes goes there"]
        caplog.clear()
        shutil.rmtree(before)
        assert runlock.current(tiny_config) == now
        shutil.rmtree(now)
        for _ in range(2):
            assert runlock.current(tiny_config) == before
        with pytest.raises(UserError, match="another process is running it"), runlock.locked(tiny_config, cpu):
            pass
        before.rename(now)  # the new one is followed, too
        assert runlock.current(tiny_config) == now
    assert runlock.current(tiny_config) == before
    assert caplog.messages == [
        f"{before} was removed while it runs: it goes on in a new one",
        f"{before} was moved to {now} while it runs: what it writes goes there",
    ]


@pytest.mark.parametrize("moved", [False, True])
def test_where_the_folder_is_removed_no_other_run_is_disturbed(moved: bool, tiny_config: Config, cpu: Group) -> None:
    """One that has begun there is the only one to go on; here in the same process, which the lock does not mind."""
    before, now = tiny_config.run_dir, tiny_config.run_dir.parent / "elsewhere"
    with runlock.locked(tiny_config, cpu):
        log = MetricLog(before, 0, now=lambda: runlock.current(tiny_config))
        log.scalars(1, {"train/loss": 1.0})
        log.flush()  # else TensorBoard's thread would write a file while they are removed
        if moved:
            before.rename(now)
        shutil.rmtree(now if moved else before)
        before.mkdir()
        with open(before / runlock.LOCK, "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(UserError, match=f"^{before}: another process is running it"):
                log.scalars(2, {"train/loss": 1.0})
        assert os.listdir(before) == [runlock.LOCK]


def test_a_folder_that_cannot_be_found_is_not_said_to_be_removed(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that is renamed again at that moment, or one on a file system that fails."""
    before = tiny_config.run_dir
    with runlock.locked(tiny_config, cpu):
        before.rename(before.parent / "elsewhere")
        monkeypatch.setattr(runlock.os, "readlink", lambda _: str(before.parent / "gone"))
        assert runlock.current(tiny_config) == before

        def fail(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(runlock.os, "fstat", fail)
            found = runlock.current(tiny_config)
        assert found == before
    assert caplog.messages == []


def test_a_run_is_locked_by_a_file_as_nfs_takes_no_lock_of_a_folder_to_other_machines(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    locked: list[str] = []

    def flock(descriptor: int, how: int) -> None:
        locked.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        assert how == fcntl.LOCK_EX | fcntl.LOCK_NB
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY  # which NFS needs for such a lock
        if len(locked) > 1:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    for said in (
        "",
        f"{tiny_config.run_dir}: its file system has no locks ([Errno 37] No locks available), so see that",
    ):
        with runlock.locked(tiny_config, cpu):
            assert locked[-1] == str(tiny_config.run_dir / ".lock")
        assert caplog.text == "" if not said else said in caplog.text


def test_the_lock_ends_with_the_run_and_others_may_take_it(tiny_config: Config, cpu: Group) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with runlock.locked(tiny_config, cpu):
            second = os.open(tiny_config.run_dir / ".lock", os.O_WRONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(second)
    assert len(os.listdir("/proc/self/fd")) == before
    mask = os.umask(0)
    os.umask(mask)
    assert (tiny_config.run_dir / ".lock").stat().st_mode & 0o777 == 0o666 & ~mask  # the group's, where it may write


def test_a_folder_that_takes_no_file_is_locked_itself(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a finished run, which is to say so wherever it lies."""
    before = os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if os.path.basename(path) == ".lock" and flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return before(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with runlock.locked(tiny_config, cpu):
        second = before(tiny_config.run_dir, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(second)
        with pytest.raises(UserError, match="another process is running it"), runlock.locked(tiny_config, cpu):
            pass
    assert caplog.text == ""


def test_the_lock_of_another_user_is_the_same(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a group that may write to the folder, but not to the file: a lock on the folder would be another one."""
    allowed, before = {os.O_RDONLY}, os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if os.path.basename(path) == ".lock" and flags not in allowed:
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return before(path, flags, *mode)

    with runlock.locked(tiny_config, cpu):
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(UserError, match="another process is running it"), runlock.locked(tiny_config, cpu):
            pass
    descriptors = len(os.listdir("/proc/self/fd"))
    with runlock.locked(tiny_config, cpu):
        lock = before(tiny_config.run_dir / ".lock", os.O_WRONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    allowed.clear()  # as under umask 077
    said = r"^--runs-dir .*: cannot write .*\.lock \(Permission denied\)$"
    with pytest.raises(UserError, match=said), runlock.locked(tiny_config, cpu):
        pass
    assert caplog.text == ""


@pytest.mark.timeout(60)
def test_threads_that_notice_together_that_the_folder_is_gone_lock_a_new_one_once(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log's and the checkpoints'; a second lock would meet the process's own."""
    both, readlink = threading.Barrier(2), os.readlink

    def meet(path: str) -> str:
        if path == of_lock:
            both.wait(20)
        return readlink(path)

    with runlock.locked(tiny_config, cpu):
        of_lock = f"/proc/self/fd/{runlock._locks[tiny_config.run_dir][0]}"
        shutil.rmtree(tiny_config.run_dir)
        with monkeypatch.context() as patched, ThreadPoolExecutor(2) as pool:
            patched.setattr(os, "readlink", meet)
            found = list(pool.map(lambda _: runlock.current(tiny_config), range(2)))
    assert found == [tiny_config.run_dir] * 2
    assert caplog.messages == [f"{tiny_config.run_dir} was removed while it runs: it goes on in a new one"]


def test_a_folder_that_another_machine_removed_is_made_and_locked_anew(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NFS says so of what is open there."""
    fstat = os.fstat

    def stale(descriptor: int) -> os.stat_result:
        if descriptor == runlock._locks[tiny_config.run_dir][0]:
            raise OSError(errno.ESTALE, "Stale file handle")
        return fstat(descriptor)

    with runlock.locked(tiny_config, cpu):
        shutil.rmtree(tiny_config.run_dir)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", stale)
            assert runlock.current(tiny_config) == tiny_config.run_dir
        assert tiny_config.run_dir.is_dir()
        with pytest.raises(UserError, match="another process is running it"), runlock.locked(tiny_config, cpu):
            pass
    assert caplog.messages == [f"{tiny_config.run_dir} was removed while it runs: it goes on in a new one"]
