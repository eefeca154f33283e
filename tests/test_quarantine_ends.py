"""Ends of `verify --quarantine` that nothing in the process can catch: no image is lost, and each move is listed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from dali_vit.config import UserError
from dali_vit.inspection import Problem
from dali_vit.quarantine import move_aside
from tests.processes import run_to_end
from tests.test_verify import broken_folder

KILLED = """
import os, signal
from dali_vit import cli, quarantine
move, left = quarantine._move, [4]
def moved(*arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    move(*arguments)
quarantine._move = moved
cli.run()
"""


@pytest.mark.timeout(120)
def test_what_was_moved_before_a_kill_is_listed(tmp_path: Path) -> None:
    source, aside = broken_folder(tmp_path / "source"), tmp_path / "aside"
    killed = run_to_end("-c", KILLED, "verify", str(source), "--quarantine", str(aside))
    assert killed.returncode == -signal.SIGKILL
    moved = {str(source / path.relative_to(aside)) for path in aside.rglob("*.JPEG")}
    lines = [line.split("\t") for line in (aside / "quarantined.tsv").read_text().splitlines()]
    assert len(lines) == len(moved) == 3
    assert {path for path, _, _ in lines} == moved
    assert not any(map(os.path.lexists, moved))


def test_an_image_whose_move_is_said_to_have_failed_when_it_is_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a disk that is reached over a network."""
    image = tmp_path / "set/train/a/x.JPEG"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"no image")
    move = shutil.move

    def fail_afterwards(*arguments: Any) -> None:
        move(*arguments)
        raise OSError(errno.EIO, "Input/output error", str(image))

    monkeypatch.setattr("dali_vit.quarantine.shutil.move", fail_afterwards)
    with pytest.raises(UserError, match=f"^{image} cannot be moved away .Input/output error."):
        move_aside(tmp_path / "set", tmp_path / "aside", [Problem("not an image", "train", str(image), "")])
    assert (tmp_path / "aside/train/a/x.JPEG").read_bytes() == b"no image"
    assert not image.exists()
