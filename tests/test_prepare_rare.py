"""prepare: sources and targets with something rare about them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.prepare.sources import read_sample
from dali_vit.verify import VerifyArguments, verify
from tests import datasets
from tests.datasets import IMAGES, NUM_TRAIN, VAL_IMAGES, WNIDS, contents, write_source


def pyarrow() -> tuple[Any, Any]:
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write_parquet(root: Path, images: dict[str, list[bytes]]) -> Path:
    """A file a split, whose images are of classes 0 and 1 in turn."""
    arrow, parquet = pyarrow()
    root.mkdir()
    for split, payloads in images.items():
        column = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(payloads)]
        parquet.write_table(
            arrow.table({"image": column, "label": [i % 2 for i in range(len(column))]}), root / f"{split}.parquet"
        )
    return root


@pytest.mark.parametrize("to", ["shards", "folder"])
@pytest.mark.parametrize("first", [b"", b"x" * 4096])
def test_images_of_no_bytes_are_left_to_verify(first: bytes, to: Any, tmp_path: Path) -> None:
    """Alone in their file, which cannot be mapped then, and behind the last byte of its last page."""
    images = [data for _, _, data in IMAGES["train"][:4]]
    source = write_parquet(tmp_path / "source", {"train": images, "val": [first, b""]})
    made = prepare(PrepareArguments(source, tmp_path / "set", to=to))
    report = verify(VerifyArguments(made))
    empty = [problem for problem in report.problems if problem.kind == "empty"]
    assert len(empty) == (2 if first == b"" else 1)
    assert report.counts == {"train": 4, "val": 2}


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\r\n"])
def test_names_of_classes_need_no_newline_at_the_end(ending: str, tmp_path: Path) -> None:
    source = datasets.write_tfds(tmp_path / "source", IMAGES)
    (source / "label.labels.txt").write_text(("\r\n" if "\r" in ending else "\n").join(WNIDS) + ending, newline="")
    made = load_dataset(prepare(PrepareArguments(source, tmp_path / "set")), minival=0)
    assert (made.classes, made.counts) == (tuple(sorted(WNIDS)), {"train": NUM_TRAIN, "val": VAL_IMAGES})


def test_a_tar_of_ilsvrc_left_beside_what_was_unpacked_of_it_does_not_matter(tmp_path: Path) -> None:
    source = datasets.write_folder(tmp_path / "source", IMAGES)
    (source / "ILSVRC2012_img_val.tar").touch()
    made = prepare(PrepareArguments(source, tmp_path / "set"))
    assert load_dataset(made, minival=0).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}
    (source / "ILSVRC2012_img_train.tar").touch()
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar"):
        prepare(PrepareArguments(source, tmp_path / "other"))


@pytest.mark.parametrize("folder", ["train", "val"])
def test_a_tar_of_ilsvrc_is_no_split_that_is_left_out(folder: str, tmp_path: Path) -> None:
    """Of a download of which one tar alone was unpacked."""
    source = datasets.write_folder(tmp_path / "source", IMAGES)
    (source / folder).rename(tmp_path / "away")
    (source / "ILSVRC2012_img_val.tar").touch()
    with pytest.raises(UserError, match=r"has no ILSVRC2012_img_train\.tar"):
        prepare(PrepareArguments(source, tmp_path / "set"))


def test_there_are_no_more_shards_than_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dali_vit.prepare.targets._TAR_OVERHEAD", 3_000_000)
    arguments = write_source("folder", tmp_path / "source")
    made = prepare(replace(arguments, target=tmp_path / "set", shard_mb=1))
    assert len(list(made.glob("train/*.tar"))) == NUM_TRAIN
    train = load_dataset(made, minival=0).split("train")
    assert sorted(read_sample(train, i) for i in range(len(train))) == sorted(data for _, _, data in IMAGES["train"])


def test_a_folder_is_whole_whatever_lies_beside_it(tmp_path: Path) -> None:
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    (tmp_path / "set.partial").mkdir()
    assert load_dataset(root, minival=0).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}
    root.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"set is still being prepared, or was cut short: run prepare to its end"):
        load_dataset(root, minival=0)


def test_of_a_set_that_is_there_nothing_is_unpacked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pyarrow()
    arguments = replace(write_source("parquet", tmp_path / "source"), target=tmp_path / "set")
    made = prepare(arguments)
    before = contents(made)

    def fail(*_: Any) -> None:
        pytest.fail("a receipt is written")

    monkeypatch.setattr("dali_vit.prepare.records.write_receipt", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parquet-train-00000.json").write_text('{"origin": [], "rows": []}')  # none of ours
    caplog.set_level(logging.INFO, "dali_vit")
    assert prepare(arguments) == made
    assert caplog.messages[-1] == f"{made} is there already, made of this source with these settings"
    assert contents(made) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "parquet-train-00000.json",
        "set",
        "source",
    ]

    # What was unpacked for another set of this name is not removed, and no longer without a word.
    left = tmp_path / "set.partial/.state/parquet-train-00000.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"unpacked")
    prepare(arguments)
    assert left.read_bytes() == b"unpacked"
    assert f"{tmp_path}/set.partial holds what a prepare that was stopped has unpacked; remove it" in caplog.text
