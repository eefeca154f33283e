"""prepare when it was stopped at any point and is started again, or meets a set that is there already."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.prepare import prepare, targets
from tests.conftest import environment, python
from tests.datasets import NUM_TRAIN, VAL_IMAGES, prepare_fails, tree, write_source

SLOW_PREPARE = """
import sys, time
from pathlib import Path
from dali_vit.prepare import PrepareArguments, prepare, targets

source, target, to, slow = sys.argv[1:]
targets._TAR_OVERHEAD, targets._FOLDER_PART = 200_000, 5
read, reads = targets.read_sample, []

def read_slowly(samples, index):
    reads.append(index)
    if len(reads) > int(slow):
        time.sleep(60)
    return read(samples, index)

targets.read_sample = read_slowly
prepare(PrepareArguments(Path(source), Path(target), to=to, shard_mb=1, workers=1))
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("to", ["shards", "folder"])
def test_killed_and_started_again_it_ends_in_the_same_bytes(tmp_path, monkeypatch, to):
    arguments = write_source("folder", tmp_path / "source")
    monkeypatch.setattr("dali_vit.prepare.targets._TAR_OVERHEAD", 200_000)
    monkeypatch.setattr("dali_vit.prepare.targets._FOLDER_PART", 5)
    whole = prepare(replace(arguments, target=tmp_path / "whole", to=to, shard_mb=1))

    slow = 12 + (NUM_TRAIN if to == "shards" else 0)  # shards: every image is read once to know their size
    command = [sys.executable, "-c", SLOW_PREPARE, arguments.source, tmp_path / "set", to, str(slow)]
    process = subprocess.Popen(command, env=environment())
    receipts = tmp_path / "set.partial" / ".state"
    deadline = time.monotonic() + 60
    while len(list(receipts.glob("train-*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert not (tmp_path / "set").exists()
    with pytest.raises(UserError, match=r"still being prepared, or was cut short"):
        load_dataset(tmp_path / "set")
    with pytest.raises(UserError):
        load_dataset(tmp_path / "set.partial")
    prepare_fails(replace(arguments, target=tmp_path / "set", to=to, shard_mb=1, shorter_side=32), "other settings")
    read: list[int] = []
    from dali_vit.prepare import targets

    original = targets.read_sample
    monkeypatch.setattr(targets, "read_sample", lambda samples, i: (read.append(i), original(samples, i))[1])
    prepare(replace(arguments, target=tmp_path / "set", to=to, shard_mb=1))
    assert tree(tmp_path / "set") == tree(whole)
    probes = NUM_TRAIN + VAL_IMAGES if to == "shards" else 0
    assert len(read) - probes <= NUM_TRAIN + VAL_IMAGES - 9  # two parts were not made again
    assert not (tmp_path / "set.partial").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("kind", "to", "how", "stride"),
    [
        ("folder", "shards", "kill", 7),
        ("parquet", "shards", "kill", 7),
        ("tfds", "folder", "kill", 7),
        ("ilsvrc", "index", "kill", 3),
        ("parquet", "folder", "full", 11),
    ],
)
def test_stopped_before_any_file_operation_and_started_again_it_ends_in_the_same_bytes(tmp_path, kind, to, how, stride):
    """Killed, or on a disk that is full for a moment; before it goes on there is no target, or a whole one."""
    arguments = write_source(kind, tmp_path / "source")
    labels = [] if arguments.val_labels is None else [arguments.val_labels]
    told = arguments.source, tmp_path / "set", to, how, str(stride), *labels
    ran = python("-m", "tests.killed_prepare", *told)
    result = json.loads(ran.stdout)
    assert result["digests"] == [result["digest"]]
    assert result["stops"] >= 12
    assert result["whole"] >= 1  # while the folder of the receipts was being removed
    if how == "full":
        lines = ran.stderr.splitlines()
        assert len(lines) == result["stops"]
        advice = "No space left on device; mend that and run the command again: it goes on where it stopped"
        places = {line.removesuffix(f": {advice}") for line in lines} - {f"preparing {tmp_path / 'set'}"}
        # Making a folder says which one it was, from Python 3.13 on.
        folders = {str(tmp_path / "set.partial"), str(tmp_path / "set.partial" / ".state")}
        assert places <= (folders if sys.version_info >= (3, 13) else set())


def test_a_finished_set_is_left_alone_and_no_other_put_in_its_place(tmp_path):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in prepare(arguments).rglob("*")}
    prepare(arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before
    prepare_fails(replace(arguments, shorter_side=32), "other settings", "another TARGET")
    prepare_fails(replace(arguments, target=arguments.source / "train"), "lies within")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    prepare_fails(replace(arguments, target=tmp_path / "other"), "exists already")
    assert not list(tmp_path.glob("*.partial"))


def test_images_that_changed_are_not_taken_for_those_that_a_set_was_made_of(tmp_path, monkeypatch):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    made = tree(prepare(arguments))
    image = next((arguments.source / "train").glob("*/*"))
    before = image.read_bytes()
    image.write_bytes(before + b"\0")
    prepare_fails(arguments, "other images in it", "remove it to prepare it again")
    assert tree(tmp_path / "set") == made

    def on_a_full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("dali_vit.prepare.write_manifest", on_a_full_disk)
        prepare_fails(replace(arguments, target=tmp_path / "other"), "No space left")
    image.write_bytes(before)
    prepare_fails(replace(arguments, target=tmp_path / "other"), "other images in it", "remove the folder")
    image.write_bytes(before + b"\0")
    assert tree(prepare(replace(arguments, target=tmp_path / "other"))) != made


def test_the_number_of_workers_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr("dali_vit.prepare.targets._TAR_OVERHEAD", 200_000)
    arguments = replace(write_source("folder", tmp_path / "source"), shard_mb=1)
    one, four = (prepare(replace(arguments, target=tmp_path / str(n), workers=n)) for n in (1, 4))
    assert tree(one) == tree(four)


def test_a_link_that_leads_nowhere_is_named_before_anything_is_begun(tmp_path):
    """Else removing it would make the source another one, and what was prepared until then useless."""
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    image = next((tmp_path / "source").rglob("train/*/*.JPEG"))
    image.unlink()
    image.symlink_to("/nowhere.jpg")
    with pytest.raises(UserError) as error:
        prepare(arguments)
    assert str(error.value) == f"{image}: No such file or directory; put it back, or remove it from the source"
    image.unlink()
    prepare(arguments)
    assert load_dataset(tmp_path / "set", minival=0).counts["train"] == NUM_TRAIN - 1


def test_of_a_source_file_that_cannot_be_read_it_is_said_what_doing_without_it_takes(tmp_path, monkeypatch):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set", workers=1)
    image = next((tmp_path / "source").rglob("train/*/*.JPEG"))
    read = targets.read_sample

    def refused(samples, index):
        if samples.path(index) == str(image):
            raise PermissionError(errno.EACCES, "Permission denied", str(image))
        return read(samples, index)

    with monkeypatch.context() as patched:
        patched.setattr(targets, "read_sample", refused)
        with pytest.raises(UserError) as error:
            prepare(arguments)
    assert str(error.value) == (
        f"{image}: Permission denied; mend that and run the command again: it goes on where it stopped;"
        f" to do without that file is to begin anew, with {tmp_path / 'set'}.partial removed"
    )
    prepare(arguments)
    assert load_dataset(tmp_path / "set", minival=0).counts["train"] == NUM_TRAIN


@pytest.mark.timeout(60)
def test_where_a_part_fails_the_others_stop_at_their_next_image(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "_FOLDER_PART", NUM_TRAIN // 2)
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set", to="folder", workers=2)
    read, reads = targets.read_sample, []

    def read_slowly(samples, index):
        reads.append(index)
        if index == 0:
            time.sleep(0.3)
            raise OSError(errno.EIO, os.strerror(errno.EIO), samples.path(index))
        time.sleep(0.1)
        return read(samples, index)

    monkeypatch.setattr(targets, "read_sample", read_slowly)
    prepare_fails(arguments, os.strerror(errno.EIO))
    assert len(reads) < NUM_TRAIN // 2


def test_an_index_of_a_source_that_was_moved_is_another(tmp_path):
    arguments = replace(write_source("tfds", tmp_path / "source"), target=tmp_path / "set", to="index")
    prepare(arguments)
    arguments.source.rename(tmp_path / "moved")
    prepare_fails(replace(arguments, source=tmp_path / "moved"), "made of another source")


def test_two_do_not_prepare_the_same_target_at_once(tmp_path, monkeypatch):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    read, tried = targets.read_sample, []

    def read_meanwhile(samples, index):
        if not tried:
            tried.append(index)
            prepare_fails(arguments, "is being written by another prepare: wait for it, or stop it")
        return read(samples, index)

    monkeypatch.setattr(targets, "read_sample", read_meanwhile)
    prepare(arguments)
    assert tried
    assert load_dataset(tmp_path / "set", minival=0).counts["train"] == NUM_TRAIN


def test_shards_of_a_source_that_was_moved_are_the_same(tmp_path):
    """Unlike an index they do not depend on where it lies."""
    arguments = replace(write_source("tfds", tmp_path / "source"), target=tmp_path / "set")
    made = {path: path.stat().st_mtime_ns for path in prepare(arguments).rglob("*")}
    arguments.source.rename(tmp_path / "moved")
    prepare(replace(arguments, source=tmp_path / "moved"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == made


def test_a_target_within_the_source_is_refused_however_it_is_called(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    (tmp_path / "link").symlink_to(arguments.source)
    prepare_fails(replace(arguments, target=tmp_path / "link" / "set"), "lies within")
    prepare_fails(replace(arguments, source=tmp_path / "link", target=arguments.source / "set"), "lies within")
