"""prepare: what can be wrong with parquet files, told before the first of them is unpacked."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.prepare import PrepareArguments, prepare, records
from tests.datasets import IMAGES, NUM_TRAIN, VAL_IMAGES, contents, prepare_fails, write_source

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareArguments:
    """Two files a split, none of which may be unpacked."""
    monkeypatch.setattr(records, "_unpack_parquet", lambda *_: pytest.fail("unpacked"))
    return replace(write_source("parquet", tmp_path / "source"), target=tmp_path / "set")


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    """All of its description at the end; pyarrow's error for it is an OSError."""
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[: -8 - length] + b"\xff" * length + data[-8:])


def left_by_lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def other_columns(path: Path) -> None:
    parquet.write_table(pyarrow.table({"img": [b"1"], "fine_label": [1]}), path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_short, "is not a whole parquet file (Parquet magic bytes not found in footer. "),
        (overwritten, "is not a whole parquet file (Couldn't deserialize thrift"),
        (left_by_lfs, "is what Git LFS puts in a file's place: download the file by `git lfs pull`"),
        (
            other_columns,
            "has the columns img, fine_label, not image and label: give files as Hugging Face's",
        ),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named_first(
    arguments: PrepareArguments, tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    last = arguments.source / "data/validation-00001-of-00002.parquet"
    damage(last)
    prepare_fails(arguments, f"{last} {told}")
    assert os.listdir(tmp_path) == ["source"]


def test_images_that_are_no_structs_are_named(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    path = tmp_path / "source/train.parquet"
    parquet.write_table(pyarrow.table({"image": [b"1"], "label": [1]}), path)
    prepare_fails(
        PrepareArguments(tmp_path / "source", tmp_path / "set"), f"{path}: its column image has no bytes", "Hugging"
    )


def test_an_index_of_parquet_is_refused_at_once(arguments: PrepareArguments, tmp_path: Path) -> None:
    prepare_fails(replace(arguments, to="index"), "--to index: images can be read in place from tars and TFRecords")
    assert os.listdir(tmp_path) == ["source"]


def test_files_of_a_test_split_are_told_of_where_there_is_no_val(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = replace(write_source("parquet", tmp_path / "source"), target=tmp_path / "set")
    for path in (arguments.source / "data").glob("validation*"):
        path.rename(path.with_name(path.name.replace("validation", "test")))
    with caplog.at_level(logging.WARNING):
        assert load_dataset(prepare(arguments), minival=0).counts == {"train": NUM_TRAIN}
    (said,) = caplog.messages
    assert said == (
        f"{arguments.source} has no parquet files with 'val' in their names, so train alone is prepared: if those with"
        " 'test' are meant, such as data/test-00000-of-00002.parquet, rename them"
    )


def test_a_test_split_beside_val_is_not_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ImageNet's, whose labels are -1."""
    arguments = replace(write_source("parquet", tmp_path / "source"), target=tmp_path / "set")
    (arguments.source / "data/test-00000-of-00001.parquet").touch()
    with caplog.at_level(logging.WARNING):
        assert load_dataset(prepare(arguments), minival=0).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}
    assert not caplog.messages


def test_a_file_in_place_of_its_folder_is_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    file.touch()
    prepare_fails(PrepareArguments(file, tmp_path / "set"), f"{file}: is a file; give the folder that holds it")


@pytest.mark.timeout(60)
def test_an_image_of_another_source_is_never_taken_for_one_of_this(tmp_path, monkeypatch):
    """Of a source by mistake, stopped while it was unpacked to where this one's images lay."""
    arguments = replace(write_source("parquet", tmp_path / "source"), target=tmp_path / "set")
    whole = contents(prepare(replace(arguments, target=tmp_path / "whole")))
    inverted = {
        split: [(wnid, name, bytes(255 - value for value in data)) for wnid, name, data in rows]
        for split, rows in IMAGES.items()
    }
    wrong = replace(write_source("parquet", tmp_path / "other", inverted), target=tmp_path / "set")

    def stop(*_):
        raise KeyboardInterrupt

    for where, given in (("write_shards", arguments), ("records.write_receipt", wrong)):
        with monkeypatch.context() as patched:
            patched.setattr(f"dali_vit.prepare.{where}", stop)
            with pytest.raises(KeyboardInterrupt):
                prepare(given)
    assert contents(prepare(arguments)) == whole


def test_a_file_that_another_of_its_size_replaced_is_unpacked_anew(tmp_path: Path) -> None:
    path, target = tmp_path / "train.parquet", tmp_path / "unpacked"

    def write(data: bytes, mtime_ns: int) -> int:
        rows = [{"image": {"bytes": data, "path": "a.jpg"}, "label": 0}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none")
        os.utime(path, ns=(mtime_ns, mtime_ns))
        return path.stat().st_size

    assert write(b"first", 1_000) == write(b"other", 1_000)
    for data, mtime_ns, unpacked in (
        (b"first", 1_000, b"first"),
        (b"other", 1_001, b"other"),
        (b"third", 1_001, b"other"),
    ):
        write(data, mtime_ns)
        _, rows, _ = records._unpack_parquet(path, target)
        assert (target.read_bytes(), list(map(list, rows))) == (unpacked, [[0, 5, 0, "a.jpg"]])


def test_null_in_place_of_an_image_is_named(tmp_path: Path) -> None:
    """It has no name, and where one has none all get made-up ones."""
    images = [{"bytes": b"first", "path": "a.jpg"}, {"bytes": None, "path": "c.jpg"}, None]
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"image": images[:2], "label": [0, 0]}), path)
    _, rows, _ = records._unpack_parquet(path, tmp_path / "unpacked")
    assert list(map(tuple, rows)) == [(0, 5, 0, "a.jpg"), (5, 0, 0, "c.jpg")]
    parquet.write_table(pyarrow.table({"image": images, "label": [0, 0, 1]}), path)
    with pytest.raises(UserError) as raised:
        records._unpack_parquet(path, tmp_path / "unpacked")
    assert str(raised.value) == f"{path}: row 2, from 0, has no image: remove the row"


def test_paths_in_place_of_images_are_told_of(tmp_path: Path) -> None:
    """As in a set that was saved without the images themselves."""
    (tmp_path / "source").mkdir()
    images = [{"bytes": None, "path": f"{i}.jpg"} for i in range(3)]
    path = tmp_path / "source/train.parquet"
    parquet.write_table(pyarrow.table({"image": images, "label": [0, 1, 2]}), path)
    told = f"{path} has paths of images, not their bytes: give files that hold the images"
    prepare_fails(PrepareArguments(tmp_path / "source", tmp_path / "set"), told)


@pytest.mark.parametrize("stopped_in", ["_claim", "write_shards"])
def test_what_was_begun_for_a_target_outlives_another_in_its_place(
    stopped_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished set is moved away, another begun in its place, and the first put back."""
    first = replace(write_source("folder", tmp_path / "first"), target=tmp_path / "set")
    made = prepare(first)
    made.rename(tmp_path / "away")
    second = replace(write_source("parquet", tmp_path / "second"), target=tmp_path / "set", shorter_side=24)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"dali_vit.prepare.{stopped_in}", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(second)
    left = {path.name for path in (tmp_path / "set.partial/.state").iterdir()}
    assert ("plan.json" in left) == (stopped_in == "write_shards")
    (tmp_path / "away").rename(made)
    prepare_fails(second, "holds a set made of another source")
    prepare_fails(replace(second, shorter_side=None), "holds a set made of another source")
    assert prepare(first) == made
    assert {path.name for path in (tmp_path / "set.partial/.state").iterdir()} == left
    made.rename(tmp_path / "away")
    assert prepare(second) == made
    assert not (tmp_path / "set.partial").exists()


def test_nothing_is_unpacked_for_a_set_made_with_other_settings(tmp_path: Path, monkeypatch: Any) -> None:
    made = replace(write_source("parquet", tmp_path / "source"), target=tmp_path / "set", shorter_side=24)
    prepare(made)
    with monkeypatch.context() as patched:
        patched.setattr(records, "_unpack_parquet", lambda *_: pytest.fail("unpacked"))
        for change in ({"shorter_side": 16}, {"shard_mb": 7}, {"quality": 60}, {"to": "folder"}):
            prepare_fails(replace(made, **change), f"{tmp_path / 'set'} holds a set made", "choose another TARGET")
            assert not (tmp_path / "set.partial").exists()
    prepare_fails(replace(made, shorter_side=None), f"{tmp_path / 'set'} holds a set made", "choose another TARGET")
    assert not (tmp_path / "set.partial").exists()
    assert prepare(made) == tmp_path / "set"
