"""Which folders are checkpoints, and what becomes of those that are not kept or were not finished."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from dali_vit.step_folders import last_step, prune, remove_unfinished, step_folders


def make(run_dir: Path, name: str, top1: float = 50.0) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    step = int(name.removeprefix("step_")) if name.startswith("step_") else 1
    (folder / "checkpoint.json").write_text(json.dumps({"step": step, "metrics": {"val/top1": top1}}))
    return folder


def test_folders_that_a_user_named_after_checkpoints_are_none(tmp_path: Path) -> None:
    folder = make(tmp_path, "step_000000005")
    for name in ("step_000000006.bak", "old_step_000000007", "step_8"):
        (folder.parent / name).mkdir()
    assert step_folders(folder.parent) == [folder]


def test_the_last_step_is_that_of_the_highest_number(tmp_path: Path) -> None:
    assert last_step(tmp_path) is None
    for step in (10, 1_000_000_000, 5):
        make(tmp_path, f"step_{step:09d}")
    assert last_step(tmp_path) == 1_000_000_000


def test_a_link_to_the_best_that_was_begun_before_is_in_nobodys_way(tmp_path: Path) -> None:
    """By a process that was killed between making the link and giving it its name."""
    folder = make(tmp_path, "step_000000001")
    (folder.parent / ".tmp-best").symlink_to("step_000000009")
    prune(folder.parent, 1, folder)
    assert os.readlink(folder.parent / "best") == "step_000000001"
    assert sorted(os.listdir(folder.parent)) == ["best", "step_000000001"]


def test_a_checkpoint_of_which_a_file_cannot_be_removed_is_none_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [make(tmp_path, f"step_{step:09d}", step) for step in (1, 2, 3)]

    def fail(path: Path) -> None:
        (path / "model.safetensors").unlink(missing_ok=True)
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", fail)
        prune(folders[0].parent, 1, folders[2])
    assert step_folders(folders[0].parent) == [folders[2]]
    remove_unfinished(folders[0].parent)
    assert sorted(os.listdir(folders[0].parent)) == ["best", "step_000000003"]


def test_of_what_is_unfinished_links_are_removed_and_not_what_they_lead_to(tmp_path: Path) -> None:
    folder = make(tmp_path, "step_000000001")
    (folder.parent / ".tmp-best").symlink_to(folder.name)
    (folder.parent / ".tmp-none").symlink_to("step_000000009")
    make(tmp_path, ".tmp-old-best")
    (folder / ".dali-vit-0.tmp").touch()
    remove_unfinished(folder.parent)
    assert os.listdir(folder.parent) == ["step_000000001"]
    assert os.listdir(folder) == ["checkpoint.json"]


def test_a_copy_of_the_best_that_cannot_be_compared_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Here a link to weights on a disk that is not mounted."""
    copy, original = make(tmp_path, "best"), make(tmp_path, "step_000000001")
    for folder in (copy, original):
        (folder / "model.safetensors").symlink_to(tmp_path / "not mounted")
    prune(copy.parent, 1, original)
    assert not copy.is_symlink()
    assert sorted(os.listdir(copy)) == ["checkpoint.json", "model.safetensors"]
    assert caplog.messages == [
        f"{copy}: is a folder, not a link to the best checkpoint, and will not be brought up to date: remove it"
    ]


def test_what_is_unfinished_and_cannot_be_removed_is_named_and_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as another user's, which would take up room unseen."""
    for name, code in ((".tmp-old-step_000000001", errno.EACCES), (".tmp-old-step_000000002", errno.ENOTEMPTY)):
        (tmp_path / name).mkdir()

        def refuse(path: Path, code: int = code) -> None:
            raise OSError(code, os.strerror(code), str(path))

        monkeypatch.setattr(shutil, "rmtree", refuse)
        remove_unfinished(tmp_path)
        (tmp_path / name).rmdir()
    assert caplog.messages == [
        f"{tmp_path}/.tmp-old-step_000000001: cannot be removed (Permission denied): have its owner remove it, as it"
        " takes up room"
    ]
