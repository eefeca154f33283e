"""prepare of ILSVRC's tars: parts that a download has left out, of which tarfile says nothing."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from dali_vit.config import UserError
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.prepare.tars import images_of_tar, images_of_tars_in_tar
from tests.datasets import IMAGES, NUM_TRAIN, VAL_IMAGES, WNIDS, prepare_fails, tar, write_ilsvrc

BLOCK = 512
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


@pytest.fixture
def arguments(tmp_path: Path) -> PrepareArguments:
    root = write_ilsvrc(tmp_path / "source", IMAGES)
    return PrepareArguments(root, tmp_path / "set", val_labels=root / "val_wnids.txt")


def headers(path: Path, *, inner: bool) -> list[int]:
    """Offsets of the members' headers, or of those of the second tar within."""
    with tarfile.open(path) as outer:
        if not inner:
            return [member.offset for member in outer]
        member = outer.getmembers()[1]
        with tarfile.open(fileobj=outer.extractfile(member)) as within:
            return [member.offset_data + image.offset for image in within]


def overwrite(path: Path, at: int, data: bytes) -> None:
    contents = bytearray(path.read_bytes())
    contents[at : at + len(data)] = data
    path.write_bytes(contents)


@pytest.mark.parametrize("damage", [bytes(BLOCK), b"\xff" * BLOCK])
@pytest.mark.parametrize(("name", "inner"), [(TRAIN, True), (TRAIN, False), (VAL, False)])
@pytest.mark.parametrize("place", [1, -1])
def test_a_header_that_was_not_downloaded_is_no_end(
    place: int, name: str, inner: bool, damage: bytes, arguments: PrepareArguments
) -> None:
    path = arguments.source / name
    at = headers(path, inner=inner)[place]
    overwrite(path, at, damage)
    start = headers(path, inner=False)[1] + BLOCK if inner else 0
    which = f"{WNIDS[1]}.tar in {path}" if inner else str(path)
    prepare_fails(
        arguments,
        f"{which} is not a whole tar file (no member and no end at byte {at - start:,}): download it again",
    )
    assert not arguments.target.exists()


def test_zeros_to_the_end_of_a_file_of_full_length_are_no_end(tmp_path: Path) -> None:
    """As where a download reserves the room for all and has not come to the last part."""
    path = tmp_path / "images.tar"
    path.write_bytes(tar([(f"{i}.jpg", bytes([i + 1]) * 50_000) for i in range(4)]))
    assert [place[0] for place in images_of_tar(path)] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    at = headers(path, inner=False)[2]
    overwrite(path, at, bytes(path.stat().st_size - at))
    with pytest.raises(UserError, match=rf"^{path} is not a whole tar file .nothing but zeros from byte {at:,} on.: "):
        list(images_of_tar(path))


@pytest.mark.parametrize(("after", "whole"), [(0, False), (1, True), (2, True), (2 + 19, True), (128, True)])
def test_ends_as_writers_make_them(after: int, whole: bool, tmp_path: Path) -> None:
    """Blocks of zeros after the last member: two, filled up to a record; of more than nothing some are accepted."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        member = tarfile.TarInfo("a.jpg")
        member.size = 700
        file.addfile(member, io.BytesIO(b"x" * 700))
    path = tmp_path / "images.tar"
    path.write_bytes(out.getvalue()[: 3 * BLOCK] + bytes(after * BLOCK))
    if whole:
        assert list(images_of_tar(path)) == [("a.jpg", BLOCK, 700)]
        return
    with pytest.raises(UserError, match="not a whole tar file"):
        list(images_of_tar(path))


def test_offsets_within_an_inner_tar_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "train.tar"
    path.write_bytes(tar([("b.tar", tar([("1.jpg", b"one"), ("x.txt", b"x")])), ("a.tar", tar([("2.jpg", b"two")]))]))
    contents = path.read_bytes()
    found = {name: [contents[at : at + size] for _, at, size in images] for name, images in images_of_tars_in_tar(path)}
    assert found == {"b.tar": [b"one"], "a.tar": [b"two"]}


def test_two_tars_of_one_class_are_named(arguments: PrepareArguments) -> None:
    inner = [(f"{folder}{wnid}.tar", tar([(f"{wnid}_1.JPEG", b"x")])) for folder in ("", "b/") for wnid in WNIDS]
    (arguments.source / TRAIN).write_bytes(tar(inner))
    prepare_fails(arguments, f"{arguments.source / TRAIN} has two tars of the class {WNIDS[0]}: leave one")


def test_a_member_without_its_zeros_is_refused(tmp_path: Path) -> None:
    """Where its bytes lie, and what follows it, is not what its size says."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    os.truncate(tmp_path / "a.jpg", 2**20)
    subprocess.run(["tar", "-S", "-cf", "images.tar", "a.jpg"], cwd=tmp_path, check=True)
    path = tmp_path / "images.tar"
    assert path.stat().st_size < 2**16
    with pytest.raises(UserError, match=rf"^{path} holds a.jpg without its zeros: write it again without tar's -S$"):
        list(images_of_tar(path))


def test_other_numbers_of_images_than_ilsvrcs_are_told(
    arguments: PrepareArguments, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "dali_vit")
    prepare(arguments)
    told = [f"{arguments.source / TRAIN} holds {NUM_TRAIN} images, ILSVRC2012's 1,281,167"]
    told.append(f"{arguments.source / VAL} holds {VAL_IMAGES} images, ILSVRC2012's 50,000")
    assert [message for message in caplog.messages if "ILSVRC2012's" in message] == told
    caplog.clear()
    monkeypatch.setattr("dali_vit.prepare.sources._NUM_IMAGES", {TRAIN: NUM_TRAIN, VAL: VAL_IMAGES})
    prepare(replace(arguments, target=arguments.target.with_name("again")))
    assert not [message for message in caplog.messages if "ILSVRC2012's" in message]


def test_labels_of_images_that_are_not_there_are_told(
    arguments: PrepareArguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = tmp_path / "labels.csv"
    rows = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4" for wnid, name, _ in IMAGES["val"]]
    labels.write_text("\n".join(["ImageId,PredictionString", *rows]))
    prepare(replace(arguments, val_labels=labels))
    assert "that are not there" not in caplog.text
    rows += [f"ILSVRC2012_val_0000100{i},{WNIDS[0]} 1 2 3 4" for i in range(4)]
    labels.write_text("\n".join(["ImageId,PredictionString", *rows]))
    prepare(replace(arguments, val_labels=labels, target=tmp_path / "again"))
    absent = ", ".join(f"ILSVRC2012_val_0000100{i}" for i in range(3))
    assert f"--val-labels {labels} names 4 images that are not there: {absent} and 1 more" in caplog.messages
