"""Further evaluation sets: folders named by class or by number, and ReaL's labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dali_vit.data import check_images, load_dataset, load_eval_folder, load_real_labels
from dali_vit.prepare import PrepareArguments, prepare
from tests.datasets import IMAGES
from tests.test_data import fails, make_files, make_split, relative


def test_numeric_folders_are_class_indices(tmp_path):
    make_files(tmp_path, "0/a.jpeg", "2/b.jpeg", "10/c.jpeg", "10/d.jpeg", "11/e.jpeg")
    files = load_eval_folder(tmp_path, [f"n{i:08d}" for i in range(12)])
    assert relative(files, tmp_path) == ["0/a.jpeg", "10/c.jpeg", "10/d.jpeg", "11/e.jpeg", "2/b.jpeg"]
    assert files.labels.tolist() == [0, 10, 10, 11, 2]
    assert files.labels.dtype == np.int64
    fails(lambda: load_eval_folder(tmp_path, ["a"] * 11), "none of the model's 11 classes (11)")


def test_named_folders_follow_the_models_classes(tmp_path):
    make_files(tmp_path, "cat/1.jpg", "emu/1.jpg")
    assert load_eval_folder(tmp_path, ["ape", "cat", "dog", "emu"]).labels.tolist() == [1, 3]
    fails(lambda: load_eval_folder(tmp_path, ["ape", "cat"]), "none of the model's 2 classes (emu)")


def test_classes_with_numeric_names_keep_their_order(tmp_path):
    make_files(tmp_path, "2/1.jpg", "10/1.jpg")
    files = load_eval_folder(tmp_path, ["0", "10", "2"])
    assert dict(zip(relative(files, tmp_path), files.labels.tolist(), strict=True)) == {"10/1.jpg": 1, "2/1.jpg": 2}


def test_two_folders_of_one_class_are_named(tmp_path):
    make_files(tmp_path, "0/1.jpg", "1/1.jpg", "000/1.jpg")
    told = f"{tmp_path} has two folders of one class, 0 and 000: remove one"
    assert fails(lambda: load_eval_folder(tmp_path, ["cat", "emu"])) == told


def test_missing_evaluation_folder(tmp_path):
    fails(lambda: load_eval_folder(tmp_path / "v2", ["a"]), str(tmp_path / "v2"), "no such folder")


def test_a_bad_image_of_an_evaluation_names_no_flag_of_training(tmp_path):
    make_files(tmp_path, "cat/1.jpg", "emu/1.jpg")
    (tmp_path / "emu/1.jpg").write_bytes(b"")
    assert fails(lambda: check_images(load_eval_folder(tmp_path, ["cat", "emu"]))) == (
        f"{tmp_path}/emu/1.jpg is an empty file (unusable images: 1 of 2 looked at): "
        "remove it or put an image in its place"
    )


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_real_labels_go_by_file_name_across_classes(tmp_path):
    make_files(tmp_path, "val/b/val_0001.jpg", "val/a/val_0002.jpg", "val/b/val_0003.jpg", "val/a/val_0004.jpg")
    val = load_dataset(tmp_path, split="val").val
    real = write_json(tmp_path / "real.json", [[1], [], [1, 0, 7], [0, 1]])
    assert [Path(val.path(i)).stem[-1] for i in range(4)] == ["2", "4", "1", "3"]
    expected = [[-1, -1, -1], [0, 1, -1], [1, -1, -1], [1, 0, 7]]
    np.testing.assert_array_equal(load_real_labels(real, val, num_classes=8), np.array(expected, np.int64), strict=True)


def test_real_labels_of_repeated_file_names_go_by_path(tmp_path):
    make_files(tmp_path, "val/a/1.jpg", "val/a/2.jpg", "val/b/1.jpg")
    val = load_dataset(tmp_path, split="val").val
    real = write_json(tmp_path / "real.json", [[3], [4], [5]])
    assert load_real_labels(real, val, num_classes=8).tolist() == [[3], [4], [5]]


def test_real_labels_of_imagenet_go_by_ilsvrcs_number(tmp_path, monkeypatch):
    """Whatever stands around it; and where it was lost, sorted names are no ground to go by."""
    monkeypatch.setattr("dali_vit.real_labels.NUM_VAL", 3)
    renamed = ("val/a/z_ILSVRC2012_val_00000001.jpg", "val/a/ILSVRC2012_val_00000003.jpg")
    make_files(tmp_path / "set", *renamed, "val/b/a_ILSVRC2012_val_00000002_b.jpg")
    real = write_json(tmp_path / "real.json", [[3], [4], [5]])
    val = load_dataset(tmp_path / "set", split="val").val
    assert load_real_labels(real, val, num_classes=8).tolist() == [[5], [3], [4]]

    make_files(tmp_path / "lost", *renamed, "val/b/2.jpg")
    make_files(tmp_path / "twice", *renamed, "val/b/ILSVRC2012_val_00000001.jpg")
    for folder in ("lost", "twice"):
        val = load_dataset(tmp_path / folder, split="val").val
        fails(
            lambda val=val: load_real_labels(real, val, num_classes=8),
            f"--real {real}: val has lost ILSVRC's file names",
        )


def test_real_labels_are_of_no_use_where_prepare_made_names_up(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "source").mkdir()
    for split in ("train", "val"):
        images = [{"bytes": data, "path": ""} for _, _, data in IMAGES[split]]
        columns = {"image": images, "label": [0] * len(images)}
        parquet.write_table(pyarrow.table(columns), tmp_path / "source" / f"{split}.parquet")
    val = load_dataset(prepare(PrepareArguments(tmp_path / "source", tmp_path / "set")), split="val").val
    real = write_json(tmp_path / "real.json", [[0]] * len(val))
    fails(lambda: load_real_labels(real, val, num_classes=8), f"--real {real}: val has lost ILSVRC's file names")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"a": [1]}, "is not a list of label lists"),
        ([1, 2], "is not a list of label lists"),
        ([["cat"], [1]], "is not a list of label lists"),
        ([[-1], [1]], "is not a list of label lists"),
        ([[1]], "labels for 1 images but val has 2"),
        ([[7, 8], []], "has label 8, the model 8 classes"),
        ([[], []], "labels no image"),
    ],
)
def test_real_file_of_another_layout(tmp_path, content, fault):
    make_split(tmp_path, "val", "a b", 1)
    val = load_dataset(tmp_path, split="val").val
    fails(lambda: load_real_labels(write_json(tmp_path / "real.json", content), val, num_classes=8), "real.json", fault)


def test_a_real_file_of_another_set_is_told_by_the_evaluated_sets_name(tmp_path):
    files = load_eval_folder(make_files(tmp_path / "v2", "a/1.jpg", "b/1.jpg"), ["a", "b"])
    real = write_json(tmp_path / "real.json", [[1]])
    message = fails(lambda: load_real_labels(real, files, num_classes=8, split="v2"))
    assert message == f"{real} has labels for 1 images but v2 has 2: give that set's file"


def test_real_file_that_is_no_json(tmp_path):
    val = load_dataset(make_split(tmp_path, "val", "a", 1), split="val").val
    make_files(tmp_path, "real.json")
    fails(lambda: load_real_labels(tmp_path / "real.json", val, num_classes=8), "real.json cannot be read as JSON")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    fails(lambda: load_real_labels(tmp_path / "deep.json", val, num_classes=8), "deep.json cannot be read as JSON")
    fails(
        lambda: load_real_labels(tmp_path / "none.json", val, num_classes=8),
        "none.json: No such file or directory; give ReaL",
    )
