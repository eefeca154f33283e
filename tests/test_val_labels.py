"""prepare: where the classes of ILSVRC's validation images come from; test_prepare_flat_val tests Kaggle's."""

import tarfile

import pytest

from dali_vit.prepare import PrepareArguments, prepare
from tests import datasets
from tests.datasets import IMAGES, WNIDS, contents, prepare_fails, tree


def test_the_devkit_says_what_the_validation_images_show(tmp_path):
    root = datasets.write_ilsvrc(tmp_path / "source", IMAGES)
    datasets.write_devkit(root, IMAGES)
    by_text = prepare(PrepareArguments(root, tmp_path / "text", val_labels=root / "val_wnids.txt"))
    (root / "val_wnids.txt").unlink()
    by_devkit = prepare(PrepareArguments(root, tmp_path / "devkit"))
    assert tree(by_text) == tree(by_devkit)
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        tar.extractall(root, filter="data")
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert tree(prepare(PrepareArguments(root, tmp_path / "extracted"))) == tree(by_devkit)


def test_val_labels_may_name_the_images(tmp_path):
    root = datasets.write_ilsvrc(tmp_path / "source", IMAGES)
    lines = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4" for wnid, name, _ in reversed(IMAGES["val"])]
    (tmp_path / "solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]))
    prepare(PrepareArguments(root, tmp_path / "set", val_labels=tmp_path / "solution.csv"))
    assert {name: label for name, (label, _) in contents(tmp_path / "set")["val"].items()} == {
        f"{wnid}/{name}": WNIDS.index(wnid) for wnid, name, _ in IMAGES["val"]
    }


def test_an_image_has_one_class(tmp_path):
    root = datasets.write_ilsvrc(tmp_path / "source", IMAGES)
    wnid, name, _ = IMAGES["val"][0]
    stem = name.removesuffix(".JPEG")
    lines = [f"{name.removesuffix('.JPEG')},{wnid}" for wnid, name, _ in IMAGES["val"]]
    arguments = PrepareArguments(root, tmp_path / "set", val_labels=tmp_path / "solution.csv")
    other = next(another for another in WNIDS if another != wnid)
    (tmp_path / "solution.csv").write_text("\n".join([*lines, f"{stem},{other}"]))
    prepare_fails(arguments, f"--val-labels {tmp_path / 'solution.csv'} has two classes for {stem}, {wnid} and {other}")
    (tmp_path / "solution.csv").write_text("\n".join([*lines, *lines, "of_train,a", "of_train,b"]))
    assert prepare(arguments) == tmp_path / "set"


@pytest.mark.parametrize("damage", ["half an archive", "half a table", "another table", "no table"])
def test_a_damaged_devkit_is_named(tmp_path, damage):
    root = datasets.write_ilsvrc(tmp_path / "source", IMAGES)
    datasets.write_devkit(root, IMAGES)
    archive = root / "ILSVRC2012_devkit_t12.tar.gz"
    if damage == "half an archive":
        archive.write_bytes(archive.read_bytes()[:300])
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
        archive.unlink()
        meta = root / "ILSVRC2012_devkit_t12/data/meta.mat"
        changes = {"half a table": meta.read_bytes()[:200], "another table": b"MATLAB 5.0 MAT-file" + bytes(200)}
        meta.unlink() if damage == "no table" else meta.write_bytes(changes[damage])
    arguments = PrepareArguments(root, tmp_path / "set")
    prepare_fails(arguments, "ILSVRC2012_devkit_t12", "is not ILSVRC2012's devkit", "download it again")
