"""A file that is replaced is there as a whole, or as it was before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dali_vit.files import dead_link, flush, replacing


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with replacing(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
        assert temporary.parent == tmp_path
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """As in a copy of a run or a set that is made of links."""
    (tmp_path / "origin").write_text("before")
    (tmp_path / "link").symlink_to("origin")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("after")
    assert (tmp_path / "origin").read_text() == "before"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "after"


@pytest.mark.parametrize("before", [None, "before"])
def test_what_fails_leaves_the_file_as_it_was_and_nothing_else(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "file"
    if before:
        path.write_text(before)

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert {file: file.read_text() for file in tmp_path.iterdir()} == ({path: before} if before else {})


def test_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first:
        with replacing(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_a_file_system_that_does_not_synchronise_is_no_error(tmp_path: Path) -> None:
    receiver, sender = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(receiver)
    flush(Path(f"/proc/self/fd/{receiver}"))
    os.close(receiver)
    os.close(sender)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "file")


def test_a_disk_that_fails_to_synchronise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        flush(tmp_path)


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 120 + ".png"])
def test_the_longest_name_is_possible(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with replacing(path) as temporary:
        temporary.write_text("text")
    assert path.read_text() == "text"


def test_links_that_lead_nowhere_are_told_with_where_they_would_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for name, target in [
        ("good", "file"),
        ("gone", "/mnt/none/x"),
        ("within", "file/x"),
        ("loop", "loop"),
        ("to", "fro"),
        ("fro", "to"),
    ]:
        Path(name).symlink_to(target)
    assert [dead_link(name) for name in ("file", "good", "none", "gone/below")] == [None] * 4
    for name, target in (("gone", "/mnt/none/x"), ("within", "file/x")):
        told = f"{name} is a link to {target}, which is not there: mount the disk or remove the link"
        assert dead_link(Path(name)) == told
    for name, target in (("loop", "loop"), ("to", "fro")):
        assert dead_link(name) == f"{name} is a link to {target}, which leads round in a circle: remove the link"


def test_an_error_names_the_file_and_not_what_is_written_in_its_place(tmp_path):
    with pytest.raises(FileNotFoundError) as told, replacing(tmp_path / "gone/file") as temporary:
        temporary.write_text("")
    assert told.value.filename == str(tmp_path / "gone/file")
