"""The index that is kept of a large image folder: it is used until anything changes, and then made anew."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dali_vit import index_cache, listing
from dali_vit.data import load_dataset
from dali_vit.index_cache import INDEX
from tests.processes import running

CLASSES, PER_CLASS = 20, 1000


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 hard links to one file, their folders long unchanged as far as the index is concerned."""
    root = tmp_path_factory.mktemp("linked") / "set"
    return link(root, CLASSES, PER_CLASS)


def link(root: Path, classes: int, per_class: int) -> Path:
    root.mkdir()
    (root / "image").write_bytes(b"\xff\xd8\xff")
    for c in range(classes):
        folder = root / "train" / f"n{c:08d}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            os.link(root / "image", folder / f"{folder.name}_{i}.JPEG")
    return root


@pytest.fixture
def folder(linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same for one test to change, with a user's cache of its own."""
    monkeypatch.setenv("DALI_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "_SETTLED_SECONDS", 0.0)
    index_cache._say.cache_clear()
    index = linked / "train" / INDEX
    index.unlink(missing_ok=True)
    return linked


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the class folders that were listed."""
    seen: list[str] = []
    scan = listing.scan

    def recording(path: Path | str, *, folders: bool) -> list[str]:
        if not folders:
            seen.append(os.path.basename(path))
        return scan(path, folders=folders)

    monkeypatch.setattr(listing, "scan", recording)
    return seen


def paths(root: Path) -> list[str]:
    train = load_dataset(root, minival=0).split("train")
    assert [f"n{label:08d}" for label in train.labels] == [train.path(i).split("/")[-2] for i in range(len(train))]
    return [train.path(i) for i in range(len(train))]


def test_second_listing_reads_the_index_alone(folder: Path, listed: list[str]) -> None:
    first = paths(folder)
    assert len(first) == CLASSES * PER_CLASS
    assert first == sorted(str(path) for path in (folder / "train").glob("n*/*"))
    assert len(listed) == CLASSES
    assert (folder / "train" / INDEX).stat().st_size < 2 * sum(len(path.split("train/")[1]) for path in first)
    assert paths(folder) == first
    assert len(listed) == CLASSES
    minival = load_dataset(folder, minival=0.01)
    (folder / "train" / INDEX).unlink()
    anew = load_dataset(folder, minival=0.01)
    for name in ("train", "minival"):
        kept, made = minival.split(name), anew.split(name)
        np.testing.assert_array_equal(kept.labels, made.labels)
        assert [kept.path(i) for i in range(200)] == [made.path(i) for i in range(200)]


@pytest.mark.parametrize("kept", ["by none of the folders", "not by the one of the classes"])
def test_where_folders_have_no_times_of_change_no_index_is_kept(
    kept: str, folder: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in mounts of object stores: what came or went would never be noticed."""
    stat, train = os.stat, str(folder / "train")

    def constant(path: Any, *arguments: Any, **options: Any) -> Any:
        found = stat(path, *arguments, **options)
        parent, name = os.path.split(str(path))
        if (parent == train and name[0] == "n") if kept == "by none of the folders" else str(path) == train:
            return SimpleNamespace(st_mtime_ns=10**18, st_ctime_ns=10**18, st_mode=found.st_mode)
        return found

    monkeypatch.setattr(index_cache.os, "stat", constant)
    caplog.set_level(logging.INFO, "dali_vit")
    for times in (1, 2):
        assert len(paths(folder)) == CLASSES * PER_CLASS
        assert len(listed) == times * CLASSES
    assert caplog.text.count("is listed anew each time: the times of its folders do not tell whether one") == 1
    assert not (folder / "train" / INDEX).exists()
    assert not list(folder.parent.rglob("*.npz"))


def test_another_process_that_removes_such_an_index_is_no_reason_to_keep_it_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(index_cache, "_write", lambda path, columns: written.append(path))  # it is gone at once
    assert len(paths(folder)) == CLASSES * PER_CLASS
    assert written == [folder / "train" / INDEX]


def test_a_copy_made_of_links_has_an_index_of_its_own(folder: Path, listed: list[str], tmp_path: Path) -> None:
    """As `cp -rs` makes it, with a link to the other's index."""
    expected = [path.removeprefix(str(folder)) for path in paths(folder)]
    copy, before = tmp_path / "copy", (folder / "train" / INDEX).read_bytes()
    subprocess.run(["cp", "-rs", str(folder), str(copy)], check=True)
    assert (copy / "train" / INDEX).is_symlink()
    listed.clear()
    for _ in range(2):
        assert [path.removeprefix(str(copy)) for path in paths(copy)] == expected
    assert len(listed) == CLASSES
    assert (folder / "train" / INDEX).read_bytes() == before
    assert not (copy / "train" / INDEX).is_symlink()


def test_a_set_of_one_class_has_an_index_too(
    tmp_path: Path, listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "_SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(index_cache, "_MIN_IMAGES", 4)
    root = link(tmp_path / "set", 1, 5)
    assert len(paths(root)) == len(paths(root)) == 5
    assert len(listed) == 1


def test_files_that_come_go_or_are_renamed_are_noticed(
    folder: Path, listed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    names = set(paths(folder))
    one = folder / "train/n00000007"
    changes: list[tuple[Callable[[], object], set[str], set[str]]] = [
        (lambda: os.link(folder / "image", one / "new.JPEG"), set(), {f"{one}/new.JPEG"}),
        (lambda: (one / "new.JPEG").rename(one / "a.JPEG"), {f"{one}/new.JPEG"}, {f"{one}/a.JPEG"}),
        (lambda: (one / "a.JPEG").unlink(), {f"{one}/a.JPEG"}, set()),
    ]
    for change, gone, come in changes:
        caplog.clear()
        times = os.stat(one)
        change()
        os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))  # as tools that copy folders do
        expected = (names - gone) | come
        with caplog.at_level(logging.INFO, "dali_vit"):
            assert paths(folder) == sorted(expected)
        assert [r.getMessage() for r in caplog.records] == [
            f"{folder}/train/{INDEX} is out of date (1 of {CLASSES} class folders changed): the images are listed again"
        ]
        names = expected
        before = len(listed)
        assert paths(folder) == sorted(names)
        assert len(listed) == before


def test_classes_that_come_go_or_are_renamed_are_noticed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = paths(folder)
    (folder / "train/n00000019").rename(folder / "aside")
    try:
        with caplog.at_level(logging.INFO, "dali_vit"):
            assert paths(folder) == [path for path in before if "n00000019" not in path]
    finally:
        (folder / "aside").rename(folder / "train/n00000019")
    assert "is out of date (1 class folders came, went or were renamed)" in caplog.text
    assert paths(folder) == before


def test_what_is_inside_a_file_does_not_matter(folder: Path, listed: list[str]) -> None:
    first = paths(folder)
    (folder / "image").write_bytes(b"\xff\xd8\xff more")
    assert paths(folder) == first
    assert len(listed) == CLASSES


@pytest.mark.parametrize("damage", ["cut short", "a bit", "text", "an array", "empty", "another version", "unreadable"])
def test_a_damaged_index_is_named_and_replaced(
    folder: Path, listed: list[str], damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = paths(folder)
    index = folder / "train" / INDEX
    content = index.read_bytes()
    if damage == "cut short":
        index.write_bytes(content[: len(content) // 2])
    elif damage == "a bit":
        place = content.index(b"n00000011_500.JPEG")
        index.write_bytes(content[:place] + b"m" + content[place + 1 :])
    elif damage == "text":
        index.write_text("this is no index")
    elif damage == "an array":
        with open(index, "wb") as file:
            np.save(file, np.zeros(5))
    elif damage == "empty":
        index.write_bytes(b"")
    elif damage == "another version":
        with monkeypatch.context() as patch:
            patch.setattr(index_cache, "_VERSION", 0)
            index.unlink()
            paths(folder)
        listed.clear()
        listed.extend(first[:CLASSES])
    else:
        index.unlink()
        index.mkdir()
    with caplog.at_level(logging.INFO, "dali_vit"):
        assert paths(folder) == first
    assert len(listed) == 2 * CLASSES
    assert caplog.records[0].getMessage().startswith(f"{index} ")
    assert "the images are listed again" in caplog.text
    assert paths(folder) == first
    assert len(listed) == 2 * CLASSES
    if index.is_dir():
        index.rmdir()


def test_an_index_of_another_folder_is_not_used(folder: Path, tmp_path: Path, listed: list[str]) -> None:
    paths(folder)
    other = link(tmp_path / "other", CLASSES, 600)
    shutil.copy2(folder / "train" / INDEX, other / "train" / INDEX)
    assert len(paths(other)) == CLASSES * 600
    assert len(listed) == 2 * CLASSES


def test_a_folder_that_just_changed_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.link(folder / "image", folder / "train/n00000003/new.JPEG")
    (folder / "train/n00000003/new.JPEG").unlink()
    monkeypatch.setattr(index_cache, "_SETTLED_SECONDS", 2.0)
    paths(folder)
    assert not (folder / "train" / INDEX).exists()
    time.sleep(2.1)
    paths(folder)
    assert (folder / "train" / INDEX).exists()


def test_a_small_folder_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "_SETTLED_SECONDS", 0.0)
    assert len(paths(link(tmp_path / "small", 3, 100))) == 300
    assert sorted(path.name for path in (tmp_path / "small/train").iterdir()) == [f"n{c:08d}" for c in range(3)]


def test_a_folder_that_cannot_be_written_to(
    folder: Path, tmp_path: Path, listed: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = index_cache._write

    def deny(path: Path, columns: dict[str, np.ndarray]) -> None:
        if path.is_relative_to(folder):
            raise OSError(30, "Read-only file system")
        write(path, columns)

    monkeypatch.setattr(index_cache, "_write", deny)
    with caplog.at_level(logging.INFO, "dali_vit"):
        first = paths(folder)
    (kept,) = (tmp_path / "cache" / "index").iterdir()
    assert [record.getMessage() for record in caplog.records] == [
        f"the index of {folder}/train is kept in {kept}, as it cannot be beside the images (Read-only file system)"
    ]
    assert paths(folder) == first
    assert len(listed) == CLASSES

    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file in the way")
    caplog.clear()
    with caplog.at_level(logging.INFO, "dali_vit"):
        assert paths(folder) == paths(folder) == first
    assert len(caplog.records) == 1  # said once
    assert f"{folder}/train is listed anew each time" in caplog.text


@pytest.mark.timeout(120)
def test_processes_that_start_at_once(folder: Path, tmp_path: Path) -> None:
    """Each finds all images, and one whole index is left."""
    program = (
        "import sys; from dali_vit import index_cache; index_cache._SETTLED_SECONDS = 0.0\n"
        "from dali_vit.data import load_dataset\n"
        "for _ in range(5):\n"
        "    assert load_dataset(sys.argv[1], minival=0.01).counts == {'train': 19_800, 'minival': 200}\n"
        "    (load_dataset(sys.argv[1]).root / 'train/.dali-vit-index.npz').unlink(missing_ok=True)\n"
        "load_dataset(sys.argv[1])\n"
    )
    with running("-c", program, str(folder)) as one, running("-c", program, str(folder)) as other:
        for process in (one, other):
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 0, errors
    assert [path.name for path in (folder / "train").iterdir() if path.is_file()] == [INDEX]


def test_a_file_that_comes_while_its_folder_is_listed_is_found_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "_SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(index_cache, "_MIN_IMAGES", 1)
    folder = tmp_path / "set/train/ant"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"x")
    scan = listing.scan

    def slow(path, *, folders):
        found = scan(path, folders=folders)
        if not folders:
            (folder / "b.jpg").write_bytes(b"x")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(listing, "scan", slow)
        assert load_dataset(tmp_path / "set", minival=0).counts["train"] == 1
    assert load_dataset(tmp_path / "set", minival=0).counts["train"] == 2
