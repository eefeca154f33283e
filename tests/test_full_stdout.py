"""Where stdout is a file on a full disk: that ends nothing, and the end of a command tells what is lost."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dali_vit import parsing
from dali_vit.config import UserError
from tests.conftest import environment


@pytest.mark.timeout(120)
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", ["verify", "prepare"])
def test_a_full_disk_under_a_report_is_told(name: str, unbuffered: str, image_folder: Path, tmp_path: Path) -> None:
    """What is lost depends on Python's buffer, which PYTHONUNBUFFERED turns off."""
    arguments = [name, str(image_folder), *([str(tmp_path / "set")] if name == "prepare" else [])]
    variables = {**environment(), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "dali_vit", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
            timeout=100,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (2, "dali-vit: stdout: No space left on device; make room\n")
    assert name == "verify" or (tmp_path / "set" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("number", "stream", "told"),
    [
        (errno.ENOSPC, "stdout", True),
        (errno.EPIPE, "stdout", False),  # nobody reads it
        (errno.EIO, "stdout", False),  # a terminal that was closed
        (errno.ENOSPC, "stderr", False),  # with --json
    ],
)
def test_lines_that_a_full_disk_did_not_take_are_told_of(
    number: int, stream: str, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Python's buffer, and unless something else has ended the program."""

    class Refusing(io.RawIOBase):
        full = True

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if self.full:
                raise OSError(number, os.strerror(number))
            return len(data)

        def fileno(self) -> int:
            return -1

    raw = Refusing()
    monkeypatch.setattr(sys, stream, io.TextIOWrapper(raw, write_through=True))  # type: ignore[type-var]
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    handler = parsing.LogHandler(getattr(sys, stream))
    monkeypatch.setattr(logging.getLogger("dali_vit"), "handlers", [handler])
    handler.handle(logging.makeLogRecord({"msg": "x"}))
    raw.full = False
    assert [parsing.after_log(code) for code in (1, 75)] == [1, 75]
    for code in (0, 2):
        if told:
            with pytest.raises(UserError, match=r"^stdout: No space left on device; make room$"):
                parsing.after_log(code)
        else:
            assert parsing.after_log(code) == code


def test_lines_that_a_buffer_has_kept_until_there_was_room_are_not_lost(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballast = small_disk / "ballast"
    with (small_disk / "log").open("w") as log:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        monkeypatch.setattr(sys, "stdout", log)
        monkeypatch.setattr(logging, "raiseExceptions", False)
        handler = parsing.LogHandler(log)
        monkeypatch.setattr(logging.getLogger("dali_vit"), "handlers", [handler])
        handler.handle(logging.makeLogRecord({"msg": "first"}))
        assert handler.failure is not None
        ballast.unlink()
        handler.handle(logging.makeLogRecord({"msg": "second"}))
        assert parsing.after_log(0) == 0
    assert (small_disk / "log").read_text() == "first\nsecond\n"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("same", [False, True])
def test_a_full_disk_under_the_lines_of_a_run_is_told_at_its_end(same: bool) -> None:
    """Without a traceback, also where stderr is on it, and with the code of what it did."""
    program = (
        "from dali_vit import cli\n"
        "cli.main = lambda: (cli._set_up_logging(0), cli.logging.getLogger('dali_vit').info('x'), cli.sys.exit(75))\n"
        "cli.run()"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=full if same else subprocess.PIPE,
            text=True,
            env={**environment(), "PYTHONUNBUFFERED": ""},
            timeout=100,
            check=False,
        )
    assert ended.returncode == 75
    assert same or ended.stderr == "dali-vit: stdout: No space left on device; what was printed is incomplete\n"
