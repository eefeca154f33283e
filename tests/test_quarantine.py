"""What `verify --quarantine` moves aside, what it lists, and what stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.inspection import Problem
from dali_vit.manifest import MANIFEST
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.quarantine import move_aside
from dali_vit.verify import VerifyArguments, verify
from tests import datasets
from tests.datasets import NUM_TRAIN, VAL_IMAGES, WNIDS, write_source
from tests.processes import run_to_end
from tests.test_verify import FOUND, HURT, IMAGES, broken_folder


@pytest.mark.timeout(60)
def test_quarantine_moves_what_hurts_and_lists_it(tmp_path):
    root, aside = broken_folder(tmp_path / "set"), tmp_path / "aside"
    (root / "val" / WNIDS[2] / "gone.JPEG").unlink()
    report = verify(VerifyArguments(root, quarantine=aside))
    assert (report.quarantined, report.exit_code) == (HURT - 1, 0)
    moved = {path for kind in FOUND if kind not in ("CMYK", "other format", "no file") for path in FOUND[kind]}
    assert {str(path.relative_to(aside)) for path in aside.rglob("*.JPEG")} == moved
    lines = [line.split("\t") for line in (aside / "quarantined.tsv").read_text().splitlines()]
    assert {path.removeprefix(f"{root}/"): kind for path, kind, _ in lines} == {
        path: kind for kind, paths in FOUND.items() for path in paths if path in moved
    }
    assert load_dataset(root, minival=0).counts == {"train": 24, "val": 9}
    assert verify(VerifyArguments(root, quarantine=aside)).exit_code == 0


@pytest.mark.timeout(60)
def test_quarantine_takes_links_and_odd_names(tmp_path):
    """A link leads from there to where it did, even if to nowhere; a name may have what parts the list's fields."""
    root, aside = tmp_path / "set", tmp_path / "aside" / "deeper"
    write_source("folder", root)
    folder = root / "train" / WNIDS[0]
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "bad.jpg").write_bytes(b"no image")
    (folder / "link.jpg").symlink_to("../../../pool/bad.jpg")
    (folder / "gone.jpg").symlink_to("../../../pool/gone.jpg")
    (folder / "a\tb\nc.jpg").write_bytes(b"no image")
    report = verify(VerifyArguments(root, quarantine=aside))
    assert (report.quarantined, report.exit_code) == (3, 0)
    moved = aside / "train" / WNIDS[0]
    assert sorted(path.name for path in moved.iterdir()) == ["a\tb\nc.jpg", "gone.jpg", "link.jpg"]
    assert (moved / "link.jpg").read_bytes() == (tmp_path / "pool" / "bad.jpg").read_bytes() == b"no image"
    assert (moved / "gone.jpg").is_symlink()
    lines = [line.split("\t") for line in (aside / "quarantined.tsv").read_text().splitlines()]
    assert sorted((line[0].removeprefix(f"{folder}/"), line[1]) for line in lines) == [
        (r"a\tb\nc.jpg", "not an image"),
        ("gone.jpg", "no file"),
        ("link.jpg", "not an image"),
    ]
    assert not list(folder.glob("*.jpg"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("linked", [True, False])
def test_a_dead_link_in_the_quarantine_is_neither_lost_nor_written_through(linked, tmp_path):
    """verify itself puts dead links there."""
    root, aside, outside = tmp_path / "set", tmp_path / "aside", tmp_path / "outside"
    write_source("folder", root)
    name = f"train/{WNIDS[0]}/x.jpg"
    (root / name).symlink_to(outside)
    assert verify(VerifyArguments(root, quarantine=aside)).exit_code == 0
    if linked:
        (root / name).symlink_to("elsewhere")
    else:
        (root / name).write_bytes(b"no image")
    with pytest.raises(UserError, match=f"--quarantine {aside} holds {name} already: give a new one"):
        verify(VerifyArguments(root, quarantine=aside))
    assert os.readlink(aside / name) == str(outside)
    assert os.path.lexists(root / name)
    assert not outside.exists()


def test_the_set_itself_is_no_quarantine(tmp_path):
    root = tmp_path / "set"
    write_source("folder", root)
    with pytest.raises(UserError, match="is the set itself: choose a folder outside of it"):
        verify(VerifyArguments(root, quarantine=root))
    assert sorted(os.listdir(root)) == ["train", "val"]


@pytest.mark.timeout(60)
def test_quarantine_takes_a_class_that_is_linked_twice(tmp_path):
    root, aside = tmp_path / "set", tmp_path / "aside"
    write_source("folder", root)
    for split in ("train", "val"):
        (root / split / "z").symlink_to(WNIDS[0])
    bad = root / "train" / WNIDS[0] / "bad.jpg"
    bad.write_bytes(b"no image")
    (bad.parent / "dead.jpg").symlink_to("none.jpg")
    report = verify(VerifyArguments(root, quarantine=aside))
    moved = aside / "train" / WNIDS[0]
    assert sorted(path.name for path in moved.iterdir()) == ["bad.jpg", "dead.jpg"]
    lines = [line.split("\t")[0] for line in (aside / "quarantined.tsv").read_text().splitlines()]
    assert sorted(lines) == [str(bad), str(bad.with_name("dead.jpg"))]
    kinds = [problem.kind for problem in report.problems if Path(problem.path).name in ("bad.jpg", "dead.jpg")]
    assert sorted(kinds) == ["no file", "no file", "not an image", "not an image"]
    assert report.quarantined == sum(problem.hurts for problem in report.problems)
    assert report.exit_code == 0


@pytest.mark.timeout(60)
def test_an_image_that_val_has_by_a_link_stays(tmp_path):
    """Moved, it would be lost to val, which was a folder of dangling links after that. What is broken goes anyway."""
    root, aside, pool = tmp_path / "set", tmp_path / "aside", tmp_path / "pool"
    write_source("folder", root)
    shutil.move(root / "train" / WNIDS[0], pool)
    (root / "train" / WNIDS[0]).symlink_to(pool)
    of_train = [root / "train" / wnid / name for wnid in WNIDS[:2] for name in ("a.jpg", "b.jpg", "bad.jpg")]
    for i, path in enumerate(of_train):
        Image.new("RGB", (40, 30), (9 * i, 0, 90)).save(path)
    for path in (of_train[2], of_train[5]):
        path.write_bytes(b"no image")
    of_val = [root / "val" / path.parent.name / path.name for path in of_train]
    for here, there in zip(of_val, of_train, strict=True):
        here.symlink_to(there.resolve())
    copied, linked = root / "train" / WNIDS[2] / "copy.jpg", root / "train" / WNIDS[2] / "link.jpg"
    shutil.copyfile(of_train[0], copied)
    linked.symlink_to(of_train[1])

    report = verify(VerifyArguments(root, quarantine=aside))
    found = [(problem.path, problem.kind) for problem in report.problems if problem.hurts]
    stayed = [path for path in of_train if path.name != "bad.jpg"]
    assert {path for path, kind in found if kind == "shared"} == set(map(str, of_train))
    assert {path for path, kind in found if kind == "duplicate"} == {str(copied), str(linked)}
    assert (len(found), report.quarantined, report.exit_code) == (12, 8, 2)  # four of bad.jpg are two problems
    assert all(path.exists() for path in stayed)
    assert not copied.exists()
    assert not linked.is_symlink()
    assert [path.exists() for path in of_val] == [True, True, False] * 2
    again = verify(VerifyArguments(root, quarantine=aside))
    assert ({problem.kind for problem in again.problems if problem.hurts}, again.quarantined) == ({"shared"}, 0)
    details = [problem.detail for problem in again.problems if problem.hurts]
    assert details == [f"the same file as {path}" for path in of_val if path.name != "bad.jpg"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("linked", ["file", "class", "split"])
def test_what_vals_links_lead_through_stays(linked, tmp_path):
    """Train's images being links themselves, to a pool elsewhere."""
    root, pool = tmp_path / "set", tmp_path / "pool"
    pool.mkdir()
    for number in range(4):
        folder = root / "train" / f"c{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (50 * number, 0, 90)).save(pool / f"{number}.jpg")
        (folder / f"{number}.jpg").symlink_to(pool / f"{number}.jpg")
        if linked == "file":
            (root / "val" / folder.name).mkdir(parents=True, exist_ok=True)
            (root / "val" / folder.name / f"{number}.jpg").symlink_to(f"../../train/{folder.name}/{number}.jpg")
    if linked == "class":
        (root / "val").mkdir()
        for name in ("c0", "c1"):
            (root / "val" / name).symlink_to(f"../train/{name}")
    elif linked == "split":
        (root / "val").symlink_to("train")
    before = load_dataset(root, minival=0).counts
    report = verify(VerifyArguments(root, quarantine=tmp_path / "aside"))
    assert [problem.kind for problem in report.problems] == ["shared"] * 4
    assert (report.quarantined, report.exit_code) == (0, 2)
    assert load_dataset(root, minival=0).counts == before == {"train": 4, "val": 4}
    assert verify(VerifyArguments(root)).counts == before


@pytest.mark.timeout(60)
def test_a_prepared_folder_of_which_a_split_is_moved_whole(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    target = prepare(replace(arguments, target=tmp_path / "set", to="folder"))
    for path in (target / "val").rglob("*.*"):
        path.write_bytes(path.read_bytes()[:100])
    report = verify(VerifyArguments(target, quarantine=tmp_path / "aside"))
    assert (report.quarantined, report.exit_code) == (VAL_IMAGES, 0)
    assert load_dataset(target, minival=0).counts == {"train": NUM_TRAIN}
    assert json.loads((target / MANIFEST).read_text())["splits"]["val"]["mean_bytes"] == 0


@pytest.mark.timeout(60)
def test_a_class_that_quarantine_leaves_empty_is_said(tmp_path, caplog):
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    for path in (root / "train" / WNIDS[1]).iterdir():
        path.write_bytes(b"")
    with caplog.at_level("INFO", "dali_vit"):
        report = verify(VerifyArguments(root, quarantine=tmp_path / "aside"))
    assert report.exit_code == 2
    reason = f"{root / 'train'} has classes without images ({WNIDS[1]}): add images or remove the folders"
    assert report.refused == (reason,)
    assert f"training refuses the set: {reason}" in caplog.messages
    assert caplog.messages[-1] == "33 images of train, val: 1 problem that would hurt training"


def test_a_class_that_quarantine_leaves_without_val_images_is_remarked_on(tmp_path, caplog):
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    for path in (root / "val" / WNIDS[1]).iterdir():
        path.write_bytes(b"")
    for arguments in (VerifyArguments(root, quarantine=tmp_path / "aside"), VerifyArguments(root)):
        caplog.clear()
        with caplog.at_level("INFO", "dali_vit"):
            report = verify(arguments)
        assert (report.exit_code, report.refused) == (0, ())
        assert caplog.messages[-1] == f"{root}: val has no images of 1 of {len(WNIDS)} classes ({WNIDS[1]})"


@pytest.mark.timeout(60)
def test_a_prepared_folder_is_trusted_again_after_quarantine(tmp_path):
    source = broken_folder(tmp_path / "source")
    (source / "val" / WNIDS[2] / "gone.JPEG").unlink()
    target = prepare(PrepareArguments(source, tmp_path / "set", to="folder"))
    assert load_dataset(target, minival=0).counts == {"train": 29, "val": 10}
    assert verify(VerifyArguments(target, quarantine=tmp_path / "aside")).exit_code == 0
    assert load_dataset(target, minival=0).counts == {"train": 24, "val": 9}
    splits = json.loads((target / MANIFEST).read_text())["splits"]
    assert splits["train"]["bytes"] == sum(len(data) for _, _, data in IMAGES["train"])


@pytest.mark.timeout(60)
def test_of_a_set_that_cannot_be_written_to_nothing_is_copied_and_once_it_can_the_same_command_goes_on(
    tmp_path, monkeypatch
):
    """A read-only mount, and a quarantine on another disk: there a file is moved by copying it."""
    root, aside = broken_folder(tmp_path / "set"), tmp_path / "aside"

    def across(source: str, target: Path) -> None:
        shutil.copy2(source, target)
        raise OSError(errno.EROFS, "Read-only file system", source)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "move", across)
        with pytest.raises(
            UserError, match=r"set/.* cannot be moved away \(Read-only file system\); mend that and run"
        ):
            verify(VerifyArguments(root, quarantine=aside))
    assert not list(aside.rglob("*.JPEG"))
    assert (aside / "quarantined.tsv").read_text() == ""
    assert verify(VerifyArguments(root, quarantine=aside)).quarantined >= HURT - 1


@pytest.mark.parametrize("dead", [False, True])
def test_what_was_not_moved_is_still_counted(dead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set", to="folder"))
    aside = tmp_path / "aside"
    first, second = sorted((made / "train").glob("*/*"))[:2]
    if dead:
        for path in (first, second):
            path.unlink()
            path.symlink_to("nowhere")
    taken = aside / first.relative_to(made)
    taken.parent.mkdir(parents=True)
    taken.write_bytes(b"of an earlier run")
    with pytest.raises(UserError, match="already"):
        move_aside(made, aside, [Problem("empty", "train", str(path), "") for path in (first, second)])
    assert os.path.lexists(first)
    before = json.loads((made / MANIFEST).read_text())["splits"]["train"]["bytes"]

    def fail(*_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(second))

    with monkeypatch.context() as patched:
        patched.setattr("dali_vit.quarantine._move", fail)
        with pytest.raises(UserError, match="Read-only"):
            move_aside(made, aside, [Problem("empty", "train", str(second), "")])
    assert json.loads((made / MANIFEST).read_text())["splits"]["train"]["bytes"] == before
    assert json.loads((made / MANIFEST).read_text())["splits"]["train"]["count"] == NUM_TRAIN


STOPPED = """
import os, signal
from dali_vit import cli, quarantine
move, left = quarantine._move, [3]
def moved(*arguments):
    move(*arguments)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGTERM)
quarantine._move = moved
cli.run()
"""


@pytest.mark.timeout(120)
def test_a_quarantine_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """SIGTERM between two images: the list and the manifest tell what was moved, and the same command goes on."""
    source = broken_folder(tmp_path / "source")
    (source / "val" / WNIDS[2] / "gone.JPEG").unlink()
    made, aside = prepare(PrepareArguments(source, tmp_path / "set", to="folder")), tmp_path / "aside"
    arguments = ("verify", str(made), "--quarantine", str(aside))
    stopped = run_to_end("-c", STOPPED, *arguments)
    assert stopped.returncode == -signal.SIGTERM
    moved = {str(path.relative_to(aside)) for path in aside.rglob("*.JPEG")}
    assert len(moved) == 3
    listed = {line.split("\t")[0] for line in (aside / "quarantined.tsv").read_text().splitlines()}
    assert listed == {str(made / path) for path in moved}
    assert sum(load_dataset(made, minival=0).counts.values()) == 29 + 10 - 3
    assert run_to_end("-m", "dali_vit", *arguments).returncode == 0
    assert load_dataset(made, minival=0).counts == {"train": 24, "val": 9}


@pytest.mark.timeout(60)
def test_what_no_copy_can_be_made_of_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarantine on another disk, where moving is copying, and a named pipe."""
    pipe = tmp_path / "set/train/a/x.JPEG"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)

    def across(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", across)
    with pytest.raises(UserError) as raised:
        move_aside(tmp_path / "set", tmp_path / "aside", [Problem("no file", "train", str(pipe), "")])
    assert str(raised.value).startswith(f"{pipe} is no file and stays on its disk (")
    assert str(raised.value).endswith("): remove it and run verify again")
    assert (tmp_path / "aside/quarantined.tsv").read_text() == ""
