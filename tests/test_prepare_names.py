"""prepare: names of classes and files, and labels, that a source makes up at will, lead nowhere outside of the set."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from dali_vit.data import load_dataset
from dali_vit.manifest import MANIFEST
from dali_vit.prepare import PrepareArguments, prepare, records
from tests import datasets
from tests.datasets import IMAGES, prepare_fails, tree, write_records

JPEG = IMAGES["train"][0][2]


def write(root: Path, records_of: Sequence[dict[str, int | float | str | bytes]]) -> Path:
    root.mkdir(parents=True)
    write_records(root / "train.tfrecord", [{"image/encoded": JPEG, "image/class/label": 0, **r} for r in records_of])
    return root


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("../../../kept", "_.._.._kept"),
        ("ABSOLUTE", "ABSOLUTE"),
        ("..", "_"),
        (".hidden", "hidden"),
        ("a/b", "a_b"),
        ("a\nb\x7f", "a_b_"),
        ("Katze ü", "Katze ü"),
    ],
)
def test_a_class_lies_in_a_folder_of_its_split_whatever_its_name(name: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/f.jpg").write_bytes(b"mine")
    if name == "ABSOLUTE":
        name, folder = str(tmp_path / "kept"), str(tmp_path / "kept").replace("/", "_")
    source = write(
        tmp_path / "source",
        [
            {"image/class/synset": name, "image/filename": "f.jpg"},
            {"image/class/synset": "z", "image/filename": "g.jpg"},
        ],
    )
    made = prepare(PrepareArguments(source, tmp_path / "set", to="folder"))
    assert {*tree(made)} == {MANIFEST, f"train/{folder}/f.jpg", "train/z/g.jpg"}
    assert (tmp_path / "kept/f.jpg").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["kept", "set", "source"]


@pytest.mark.parametrize("name", ["..", ".", ".x"])
def test_a_tar_that_names_no_class_is_refused(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    datasets.write_ilsvrc(source, IMAGES)
    inner = datasets.tar([("a.JPEG", JPEG)])
    (source / "ILSVRC2012_img_train.tar").write_bytes(datasets.tar([("n01440764.tar", inner), (f"{name}.tar", inner)]))
    prepare_fails(
        PrepareArguments(source, tmp_path / "set", val_labels=source / "val_wnids.txt", to="folder"),
        f"ILSVRC2012_img_train.tar has '{name}.tar', which names no class: download it again",
    )
    assert sorted(os.listdir(tmp_path)) == ["source"]


@pytest.mark.parametrize("name", ["x" * 256, "nul\0.jpg"])
def test_what_no_folder_can_hold_is_told_before_the_target_is_made(name: str, tmp_path: Path) -> None:
    key = "image/filename" if name.endswith(".jpg") else "image/class/synset"
    source = write(tmp_path / "source", [{"image/class/synset": "a", "image/filename": "f.jpg", key: name}])
    arguments = PrepareArguments(source, tmp_path / "set", to="folder")
    prepare_fails(arguments, f"train has {name[:80]!r}, which no folder can hold: choose --to shards")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_a_class_without_images_has_a_folder_all_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [{"image/class/label": 0, "image/filename": "f.jpg"}])
    (source / "label.labels.txt").write_text(f"a\n{256 * 'x'}\n")
    arguments = PrepareArguments(source, tmp_path / "set", to="folder")
    prepare_fails(arguments, f"train has {80 * 'x'!r}, which no folder can hold: choose --to shards")


def test_names_of_folders_are_unique() -> None:
    assert records._folder_names(["a", "a", "a_0", "b"]) == ["a_0_", "a_1", "a_0", "b"]
    assert records._folder_names(["/", "\0", "a", "..a"]) == ["__0", "__1", "a_2", "a_3"]
    assert records._folder_names(["n02", "n01"]) == ["n02", "n01"]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ((0, -1), "label -1: images without a class cannot be trained on; leave them out"),
        ((-(2**63), 1), f"label {-(2**63)}: images without a class"),
        ((1, 10**12), "has labels from 1 to 1000000000000: number the classes from 0 or 1 on"),
    ],
)
def test_labels_that_are_none_are_refused_at_once(labels: tuple[int, int], told: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", [{"image/class/label": label} for label in labels])
    prepare_fails(PrepareArguments(source, tmp_path / "set"), told)


def test_labels_far_apart_are_classes_without_images(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [{"image/class/label": label} for label in (1, 1000)])
    made = load_dataset(prepare(PrepareArguments(source, tmp_path / "set")), minival=0)
    assert (made.classes[0], made.classes[-1], len(made.classes)) == ("0001", "1000", 1000)
    assert made.split("train").labels.tolist() == [0, 999]


def test_a_file_name_in_another_encoding_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [{"image/class/synset": "a", "image/filename": b"\xe9.jpg"}])
    made = prepare(PrepareArguments(source, tmp_path / "set", to="folder"))
    assert os.listdir(os.fsencode(made / "train/a")) == [b"\xe9.jpg"]


@pytest.mark.parametrize(
    ("names", "classes", "told"),
    [
        ('["cat", "dog"]', ("cat", "dog"), None),
        ("[1, 2]", ("0", "1"), "[1, 2]"),
        ('"ab"', ("0", "1"), "ab"),
        ('{"0": "a", "1": "b"}', ("0", "1"), "{'0': 'a', '1': 'b'}"),
        ("null", ("0", "1"), None),
    ],
)
def test_names_of_classes_that_are_no_list_of_texts_are_told_of(
    names: str, classes: tuple[str, ...], told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = f'{{"info": {{"features": {{"label": {{"names": {names}}}}}}}}}'
    with caplog.at_level(logging.WARNING, "dali_vit"):
        assert classes_of_parquet(tmp_path, metadata) == classes
    told = told and f"{tmp_path}/source names its classes by {told}, not by a list of texts: they are numbered"
    assert caplog.messages == ([told] if told else [])


@pytest.mark.parametrize("metadata", ["", "{", "null", '{"info": [1]}', '{"info": {"features": null}}', "[" * 100_000])
def test_metadata_that_name_no_classes_do_not_matter(metadata: str, tmp_path: Path) -> None:
    assert classes_of_parquet(tmp_path, metadata) == ("0", "1")


def classes_of_parquet(tmp_path: Path, metadata: str) -> tuple[str, ...]:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "source").mkdir()
    columns = {"image": [{"bytes": JPEG, "path": f"{i}.jpg"} for i in range(2)], "label": [0, 1]}
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, tmp_path / "source/train.parquet")
    return load_dataset(prepare(PrepareArguments(tmp_path / "source", tmp_path / "set")), minival=0).classes


def test_an_image_whose_name_is_empty_gets_one(tmp_path: Path) -> None:
    rows: list[dict[str, int | float | str | bytes]] = [
        {"image": JPEG, "label": label, "file_name": name} for label, name in enumerate(("", "b.jpg"))
    ]
    found = datasets.contents(prepare(PrepareArguments(write(tmp_path / "source", rows), tmp_path / "set")))
    names = [name.split("/")[1] for split in found.values() for name in split]
    assert names
    assert all(names)
