"""prepare: a folder whose val/ holds the images themselves, as in Kaggle's download of ImageNet, and its labels."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from dali_vit.data import load_dataset
from dali_vit.prepare import PrepareArguments, prepare
from tests.conftest import python
from tests.datasets import (
    IMAGES,
    NUM_TRAIN,
    VAL_IMAGES,
    WNIDS,
    contents,
    prepare_fails,
    tree,
    write_folder,
)

HEADER = "ImageId,PredictionString"


def write_flat(root: Path) -> Path:
    """train/<class>/* and a flat val/."""
    write_folder(root, {"train": IMAGES["train"]})
    (root / "val").mkdir()
    for _, name, data in IMAGES["val"]:
        (root / "val" / name).write_bytes(data)
    return root


def kaggle_lines() -> list[str]:
    """Lines of LOC_val_solution.csv, which are in no order; an image in two has two boxes."""
    lines = [
        f"{name.removesuffix('.JPEG')},{wnid} 85 1 499 272 " + f"{wnid} 0 3 40 50 " * (i % 2)
        for i, (wnid, name, _) in enumerate(IMAGES["val"])
    ]
    return [HEADER, *lines[::-2], *lines[-2::-2]]


def write_kaggle(root: Path) -> PrepareArguments:
    """Kaggle's archive; the arguments are complete but for the target."""
    folder = write_flat(root / "ILSVRC/Data/CLS-LOC")
    (folder / "test").mkdir()
    (folder / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(IMAGES["val"][0][2])
    labels = root / "LOC_val_solution.csv"
    labels.write_text("\n".join(kaggle_lines()) + "\n")
    return PrepareArguments(folder, root, val_labels=labels, workers=2)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("given", [{"to": "shards"}, {"to": "folder"}, {"to": "folder", "shorter_side": 48}])
def test_the_set_is_that_of_the_same_images_in_class_folders(given, tmp_path):
    arguments = write_kaggle(tmp_path / "kaggle")
    flat = prepare(replace(arguments, target=tmp_path / "flat", **given))
    source = write_folder(tmp_path / "source", IMAGES)
    assert tree(flat) == tree(prepare(PrepareArguments(source, tmp_path / "set", **given)))  # with its fingerprint
    assert not (tmp_path / "flat.partial").exists()
    found = contents(flat)["val"]
    assert {name: label for name, (label, _) in found.items()} == {
        f"{wnid}/{name}": WNIDS.index(wnid) for wnid, name, _ in IMAGES["val"]
    }
    if "shorter_side" not in given:
        assert {name.split("/")[1]: data for name, (_, data) in found.items()} == {n: d for _, n, d in IMAGES["val"]}


@pytest.mark.parametrize(
    "lines",
    [
        [wnid for wnid, _, _ in IMAGES["val"]],
        [f"{name} {wnid}" for wnid, name, _ in reversed(IMAGES["val"])],
        [f"some/folder/{name};{wnid}" for wnid, name, _ in IMAGES["val"]],
        ["image,label", *(f"{name},{wnid}" for wnid, name, _ in IMAGES["val"])],
        ["\ufeff" + IMAGES["val"][0][0], *(wnid for wnid, _, _ in IMAGES["val"][1:])],
        ["\ufeff" + kaggle_lines()[0], *kaggle_lines()[1:], "ILSVRC2012_val_00049981,n09999999 1 2 3 4"],
    ],
    ids=["classes alone", "images in another order", "paths", "a header of one's own", "a mark first", "more images"],
)
def test_the_labels_may_have_any_form_of_those_of_the_tars(lines, tmp_path):
    arguments = write_kaggle(tmp_path / "kaggle")
    whole = prepare(replace(arguments, target=tmp_path / "whole"))
    arguments.val_labels.write_text("\r\n".join(lines), encoding="utf-8")
    assert tree(prepare(replace(arguments, target=tmp_path / "set"))) == tree(whole)


def test_a_class_may_have_no_image_in_val(tmp_path):
    """Its number is that of the folders of train."""
    arguments = replace(write_kaggle(tmp_path / "kaggle"), target=tmp_path / "set", to="folder")
    for wnid, name, _ in IMAGES["val"]:
        if wnid == WNIDS[1]:
            (arguments.source / "val" / name).unlink()
    dataset = load_dataset(prepare(arguments))
    assert dataset.classes == WNIDS
    assert dataset.counts == {"train": NUM_TRAIN, "val": VAL_IMAGES - 3}
    assert dataset.val.labels.tolist() == [0] * 3 + [2] * 3


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("to", "how"), [("shards", "kill"), ("folder", "full")])
def test_stopped_before_any_file_operation_and_started_again_it_ends_in_the_same_bytes(to, how, tmp_path):
    arguments = write_kaggle(tmp_path / "kaggle")
    (tmp_path / "work").mkdir()
    told = arguments.source, tmp_path / "work/set", to, how, "7", arguments.val_labels
    result = json.loads(python("-m", "tests.killed_prepare", *told).stdout)
    assert result["digests"] == [result["digest"]]
    assert result["stops"] >= 12


def test_other_labels_are_another_set(tmp_path):
    arguments = replace(write_kaggle(tmp_path / "kaggle"), target=tmp_path / "set")
    prepare(arguments)
    text = arguments.val_labels.read_text()
    arguments.val_labels.write_text(text.replace(WNIDS[0], WNIDS[1]))
    prepare_fails(arguments, "holds a set made of another source, of other images in it or with other settings")
    arguments.val_labels.write_text(text)
    before = tree(arguments.target)
    prepare(arguments)
    assert tree(arguments.target) == before


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (kaggle_lines()[:-2], "has no class for ILSVRC2012_val_00000002, ILSVRC2012_val_00000004: give a line for"),
        (
            [HEADER, "ILSVRC2012_val_00000001,", *(f"{n[:-5]},{w}" for w, n, _ in IMAGES["val"][1:])],
            "has no class for ILSVRC2012_val_00000001: give a line for each image, or classes alone",
        ),
        (
            [line.replace(WNIDS[2], "n09999999") for line in kaggle_lines()],
            "3 of 9 validation images are, by --val-labels {}, of classes that train/ does not hold (n09999999): give",
        ),
        (
            ["image_id,width,label", *(f"{n[:-5]},500,{w}" for w, n, _ in IMAGES["val"])],
            "has the columns image_id,width,label: give Kaggle's LOC_val_solution.csv (ImageId,PredictionString), or",
        ),
        (
            ["label,name", *(f"{w},{n}" for w, n, _ in IMAGES["val"])],
            "has the columns label,name: give Kaggle's LOC_val_solution.csv (ImageId,PredictionString), or lines of",
        ),
        (
            [HEADER, *(f"ILSVRC2012_test_{i:08d},{WNIDS[0]} 1 2 3 4" for i in range(1, 10))],
            "has no class for ILSVRC2012_val_00000001, ILSVRC2012_val_00000002, ILSVRC2012_val_00000003 and 6 more: ",
        ),
        (
            [f"{n[:-5]},{w[1:]}" for w, n, _ in IMAGES["val"]],
            "9 of 9 validation images are, by --val-labels {}, of classes that train/ does not hold (01440764, 01443",
        ),
        ([WNIDS[0]] * 8, "has 8 lines but val/ 9 images: give that set's labels"),
        ([], "has 0 lines but val/ 9 images: give that set's labels"),
    ],
)
def test_labels_of_no_use_are_named(lines, told, tmp_path):
    arguments = replace(write_kaggle(tmp_path / "kaggle"), target=tmp_path / "set")
    arguments.val_labels.write_text("\n".join(lines))
    told = told if "{}" in told else f"--val-labels {{}} {told}"
    prepare_fails(arguments, told.format(arguments.val_labels))
    assert not list(tmp_path.glob("set*"))


def test_a_val_that_is_not_flat_is_named(tmp_path):
    arguments = replace(write_kaggle(tmp_path / "kaggle"), target=tmp_path / "set")
    flag, val = f"--val-labels {arguments.val_labels}", arguments.source / "val"
    command = f"`dali-vit prepare {arguments.source} OUT --val-labels LOC_val_solution.csv`"
    prepare_fails(replace(arguments, val_labels=None), f"{val} has images but no class folders", command)
    prepare_fails(replace(arguments, to="index"), "--to index", "choose --to shards")
    prepare_fails(replace(arguments, val_labels=tmp_path / "absent.csv"), "absent.csv cannot be read")
    (val / WNIDS[0]).mkdir()
    prepare_fails(arguments, f"{val} has images beside folders ({WNIDS[0]}): for {flag} all images must lie in val/")
    for path in val.glob("*.JPEG"):
        path.rename(val / WNIDS[0] / path.name)
    prepare_fails(arguments, f"{flag}: the folders of {val} say already which class an image is of; leave it out")
    (val / WNIDS[0]).rename(tmp_path / "away")
    prepare_fails(arguments, f"{val} holds no images: put those that {flag} is for there")
    val.rmdir()
    prepare_fails(
        arguments, f"{arguments.source} has no val/: put the images that {flag} is for there, or leave it out"
    )
    above = replace(arguments, source=tmp_path / "kaggle")
    prepare_fails(above, f"{tmp_path}/kaggle has no train/: did you mean {arguments.source}?")
    assert not list(tmp_path.glob("set*"))


def test_files_of_val_that_are_no_images_are_counted(tmp_path, caplog):
    arguments = replace(write_kaggle(tmp_path / "kaggle"), target=tmp_path / "set")
    for name in ("one.gif", "two.gif"):
        (arguments.source / "val" / name).write_bytes(b"GIF89a")
    with caplog.at_level(logging.INFO, "dali_vit"):
        prepare(arguments)
    first = arguments.source / "val" / "one.gif"
    assert f"other suffix (left out; save images as JPEG or PNG): 2, such as {first}" in caplog.messages
    assert len(contents(arguments.target)["val"]) == VAL_IMAGES


@pytest.mark.parametrize(("name", "warned"), [("validation", True), ("val", False), ("other", False)])
def test_a_val_of_another_name_is_warned_of(name, warned, tmp_path, caplog):
    root = write_folder(tmp_path / "source", {"train": IMAGES["train"], name: IMAGES["val"]})
    prepare(PrepareArguments(root, tmp_path / "set"))
    told = f"{root} has no val/, so train/ alone is prepared: if {name}/ is meant, rename it to val/"
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [told] * warned
