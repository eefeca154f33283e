"""Messages about folders that are no data sets and files that are no images, before anything is trained."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dali_vit import data
from dali_vit.data import check_images, load_dataset
from dali_vit.listing import left_out, other_val
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.structure import load_with_faults, val_without_images
from pipelines.readers import FileList
from tests.conftest import write_image_folder
from tests.test_data import fails, make_files, make_split


def test_missing_folder(tmp_path):
    fails(lambda: load_dataset(tmp_path / "none"), str(tmp_path / "none"), "no such folder", "train/<class>")


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "train/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    fails(lambda: load_dataset(""), "--data: empty; give the folder of a dataset")


def test_the_root_of_all_folders_is_one_without_train(monkeypatch):
    monkeypatch.setattr("dali_vit.listing.scan", lambda *_, **__: [])  # whatever this machine has there
    fails(lambda: load_dataset("/"), "/ has no train/: give a folder that holds train/<class>/*")


def test_file_instead_of_a_folder(tmp_path):
    make_files(tmp_path, "x.jpg")
    fails(lambda: load_dataset(tmp_path / "x.jpg"), "x.jpg is a file")


def test_empty_folder(tmp_path):
    fails(lambda: load_dataset(tmp_path), f"{tmp_path} is empty")
    (tmp_path / "train").mkdir()
    fails(lambda: load_dataset(tmp_path), "train has no class folders", "train/<class>/")
    make_files(tmp_path, "train/x.jpg")
    fails(lambda: load_dataset(tmp_path), "images but no class folders")


@pytest.mark.parametrize("split", [None, "val"])
def test_a_flat_val_names_the_command_that_takes_its_labels(split, tmp_path):
    root = make_files(make_split(tmp_path / "my set", "train", "a", 1), "val/ILSVRC2012_val_00000001.JPEG")
    told = (
        f"{root}/val has images but no class folders: put the images into val/<class>/, or make a set by the file of"
        f" their labels: `dali-vit prepare '{root}' OUT --val-labels LOC_val_solution.csv`"
    )
    assert fails(lambda: load_dataset(root, split=split)) == told
    assert fails(lambda: load_with_faults(root)) == told
    assert load_dataset(root, split="train").counts == {"train": 1}
    (root / "train").rename(root / "other")  # without it prepare is of no use
    told = f"{root}/val has images but no class folders: put the images into val/<class>/"
    assert fails(lambda: load_dataset(root, split="val")) == told


@pytest.mark.parametrize("above", ["ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC"])
def test_a_folder_of_kaggles_archive_above_the_images_is_given(above, tmp_path):
    make_split(tmp_path / above, "train", "a", 1)
    fails(lambda: load_dataset(tmp_path), f"{tmp_path} has no train/: did you mean {tmp_path / above}?")


@pytest.mark.parametrize(
    ("files", "meant"),
    [
        (["validation/a/1.jpg", "valid/a/1.jpg", "test/a/1.jpg"], "validation"),
        (["validation/1.jpg"], "validation"),
        (["valid/a/1.jpg", "test/a/1.jpg"], "valid"),
        (["test/a/1.jpg"], "test"),
        (["test/1.jpg"], None),  # images without a class, as ImageNet's
        (["validation", "tests/a/1.jpg"], None),
        (["val/a/1.jpg", "validation/a/1.jpg"], None),
        (["Val/a/1.jpg", "validation/a/1.jpg"], "Val"),
        (["Test/1.jpg"], None),
    ],
)
def test_a_folder_that_may_be_meant_for_val(files, meant, tmp_path):
    make_files(tmp_path, *files)
    assert other_val(tmp_path) == meant
    if meant:
        told = f"{tmp_path} has no val/: if {meant}/ is meant, rename it to val/"
        assert fails(lambda: load_dataset(tmp_path, split="val")) == told


@pytest.mark.parametrize("name", ["Train", "TRAIN", "training"])
def test_a_folder_that_may_be_meant_for_train(name, tmp_path):
    make_split(tmp_path, name, "a", 1)
    told = f"{tmp_path} has no train/: if {name}/ is meant, rename it to train/"
    assert fails(lambda: load_dataset(tmp_path)) == told
    (tmp_path / "set").symlink_to("set")
    told = f"{tmp_path}/set is a link to set, which leads round in a circle: remove the link"
    assert fails(lambda: load_dataset(tmp_path / "set")) == told
    make_split(tmp_path / "imagenet", "train", "a", 1)
    fails(lambda: load_dataset(tmp_path), f"{tmp_path} has no train/: did you mean {tmp_path / 'imagenet'}?")


def test_an_empty_folder_is_not_meant_for_val(tmp_path):
    (tmp_path / "validation").mkdir()
    assert other_val(tmp_path) is None
    assert other_val(tmp_path / "absent") is None


def test_the_split_itself_is_given(tmp_path):
    make_split(make_split(tmp_path, "train", "a", 1), "val", "a", 1)
    for split in ("train", "val"):
        fails(lambda s=split: load_dataset(tmp_path / s), "has no train/", f"give its parent, {tmp_path}")


def test_the_folder_above_is_given(tmp_path):
    make_split(tmp_path / "imagenet", "train", "a", 1)
    fails(lambda: load_dataset(tmp_path), "has no train/", f"did you mean {tmp_path / 'imagenet'}?")


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"], "dali-vit prepare {root} TARGET"),
        (["2012/ILSVRC2012_img_train.tar", "2012/x.txt", "a/b.tar"], "dali-vit prepare {root}/2012 TARGET"),
        (["imagenet2012-train.tfrecord-00000-of-01024"], "dali-vit prepare {root} TARGET"),
        (["train-00000-of-01024"], "dali-vit prepare {root} TARGET"),
        (["data/train-00000-of-00294.parquet"], "dali-vit prepare {root} TARGET"),
        (["imagenet1k-train-0000.tar"], "tar files are not read; unpack them into train/<class>/, or get"),
        (["cat/1.jpg", "dog/1.jpg", "pets.tar"], "its class folders belong in train/"),
    ],
)
def test_archives_are_to_be_prepared(files, remedy, tmp_path):
    make_files(tmp_path, *files)
    fails(lambda: load_dataset(tmp_path), "has no train/: ", remedy.format(root=tmp_path))


def test_folders_of_systems_are_no_classes(tmp_path):
    make_files(tmp_path, "train/cat/1.jpg", "train/@eaDir/1.jpg/x.jpg", "val/cat/1.jpg", "val/__MACOSX/._1.jpg")
    make_files(tmp_path, "train/cat/@eaDir/1.jpg/thumb.jpg", "test/@eaDir/1.jpg")
    dataset = load_dataset(tmp_path, minival=0)
    assert dataset.classes == ("cat",)
    assert not left_out([tmp_path / "train/cat"])
    shutil.rmtree(tmp_path / "val")
    assert other_val(tmp_path) is None


def test_an_empty_val_may_be_removed(tmp_path):
    make_files(tmp_path, "train/cat/1.jpg")
    (tmp_path / "val").mkdir()
    told = "val has no class folders: put the images into val/<class>/, or remove the empty folder"
    assert fails(lambda: load_dataset(tmp_path)) == f"{tmp_path}/{told}"


def test_class_folders_without_a_split(tmp_path):
    make_files(tmp_path, "cat/1.jpg", "dog/1.jpg")
    fails(lambda: load_dataset(tmp_path), "has no train/", "class folders belong in train/")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("train/b/sub/1.jpg", ("files in a subfolder, such as", "move images into the class folder itself")),
        ("train/b/1.gif", ("files of another suffix, such as", "save images as JPEG or PNG")),
    ],
)
def test_nobody_is_told_to_remove_a_class_whose_images_are_not_seen(file, words, tmp_path):
    make_split(tmp_path, "train", "a", 1)
    make_files(tmp_path, file)
    fails(lambda: load_dataset(tmp_path), "without images (b)", str(tmp_path / file), *words)


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_without_images(tmp_path, split):
    make_split(make_split(tmp_path, "train", "a b c d e f", 2), "val", "a b c d e f", 2)
    for name in "bcdf":
        for path in (tmp_path / split / name).iterdir():
            path.rename(path.with_suffix(".txt"))
    fails(lambda: load_dataset(tmp_path), str(tmp_path / split), "(b, c, d and 1 more)")


def test_classes_that_differ(tmp_path):
    make_split(make_split(tmp_path, "train", "a b c d e f", 1), "val", "a z", 1)
    message = fails(lambda: load_dataset(tmp_path), str(tmp_path), "differ in their classes")
    assert "5 missing from val/ (b, c, d and 2 more); 1 missing from train/ (z)" in message
    assert message.endswith(": make them equal; for a class without images in val, make an empty val/b/")
    (tmp_path / "val" / "z").rename(tmp_path / "z")
    for name in "bcdef":
        (tmp_path / "val" / name).mkdir()
    dataset = load_dataset(tmp_path, minival=0)
    assert dataset.classes == tuple("abcdef")
    assert (len(dataset.split("train")), dataset.split("val").labels.tolist()) == (6, [0])
    told = f"{tmp_path}: val has no images of 5 of 6 classes (b, c, d and 2 more)"
    assert val_without_images(dataset) == told
    for path in (tmp_path / "val" / "a").iterdir():
        path.unlink()
    fails(lambda: load_dataset(tmp_path), "val has classes without images (a, b, c and 3 more): add images or remove")


def test_a_class_folder_that_a_copy_has_lost(tmp_path):
    make_split(make_split(tmp_path / "source", "train", "a b", 1), "val", "a b", 1)
    (tmp_path / "source/val/b").rename(tmp_path / "b")
    (tmp_path / "source/val/b").mkdir()
    target = prepare(PrepareArguments(tmp_path / "source", tmp_path / "set", to="folder"))
    assert load_dataset(target, minival=0).split("val").labels.tolist() == [0]
    (target / "val" / "b").rmdir()
    fails(lambda: load_dataset(target), "val/b cannot be listed", "copy the set again, with its empty folders")


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    make_split(tmp_path, "train", "a b", 1)
    scandir = os.scandir

    def deny(folder):
        if str(folder).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", deny)
    fails(lambda: load_dataset(tmp_path), str(tmp_path / "train/b"), "cannot be listed (Permission denied)")


DEAD = "is a link to /mnt/none/x, which is not there: mount the disk or remove the link"


@pytest.mark.parametrize("place", ["train/b", "val/b", "train", "val", "."])
def test_a_link_that_leads_nowhere_is_no_class_the_less(place, tmp_path):
    root = make_split(make_split(tmp_path / "set", "train", "a b", 1), "val", "a b", 1)
    (root / place).rename(tmp_path / "away")
    (root / place).symlink_to("/mnt/none/x")
    for split in (None, "train") if place == "train/b" else (None, "val") if place == "val/b" else (None,):
        assert fails(lambda split=split: load_dataset(root, split=split)) == f"{root / place} {DEAD}"
        assert fails(lambda: load_with_faults(root)) == f"{root / place} {DEAD}"


def test_a_link_to_itself_is_named(tmp_path):
    make_split(tmp_path, "train", "a b", 1)
    (tmp_path / "train/loop").symlink_to("loop")
    told = f"{tmp_path}/train/loop is a link to loop, which leads round in a circle: remove the link"
    assert fails(lambda: load_dataset(tmp_path)) == told


def test_links_that_are_no_classes_may_lead_nowhere(tmp_path):
    """Hidden ones, and those beside the split that is meant, where they are no ground to speak of another mistake."""
    make_split(tmp_path, "train", "a", 1)
    for name in ("train/.b", "old", "train/a/2.txt"):
        (tmp_path / name).symlink_to("/mnt/none/x")
    (tmp_path / "loop").symlink_to("loop")
    assert load_dataset(tmp_path).classes == ("a",)
    fails(lambda: load_dataset(tmp_path, split="val"), "has no val/: give a folder that holds val/<class>/*")


# --- check_images


def file_list(*paths: Path) -> FileList:
    return FileList.from_paths([str(path) for path in paths], [0] * len(paths))


def test_every_format_passes_the_check(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    formats = {"x.jpg": "JPEG", "x.png": "PNG", "x.webp": "WEBP", "x.bmp": "BMP", "x.tif": "TIFF", "x.ppm": "PPM"}
    for name, image_format in formats.items():
        image_module.new("RGB", (4, 3)).save(tmp_path / name, image_format)
    image_module.new("RGB", (4, 3)).save(tmp_path / "png_named.jpg", "PNG")  # as one of ImageNet's
    make_files(tmp_path, "x.jp2", content=b"\0\0\0\x0cjP  \r\n\x87\n")
    check_images(file_list(*tmp_path.iterdir()))


@pytest.mark.parametrize(
    ("content", "fault"),
    [(b"", "is an empty file"), (b"hello there", "is no image"), (b"GIF89a", "is a GIF, which cannot be decoded")],
)
def test_what_is_no_image_is_named(tmp_path, content, fault):
    make_split(tmp_path, "train", "a b", 50)
    make_files(tmp_path, "train/a/a_0031.jpg", content=content)
    files = load_dataset(tmp_path, minival=0).train
    found = "(unusable images: 1 of 100 looked at): remove it or put an image in its place"
    fails(lambda: check_images(files), f"{tmp_path}/train/a/a_0031.jpg {fault}", found)
    make_files(tmp_path, "train/b/b_0007.jpg", "train/b/b_0008.jpg", content=content)
    found = "(unusable images: 3 of 100 looked at): remove them or put images in their place"
    told = fails(lambda: check_images(files), f"{tmp_path}/train/a/a_0031.jpg {fault}", found)
    assert told.count(fault) == 3
    assert "--max-bad-share" not in told
    make_files(tmp_path, "train/b/b_0009.jpg", content=content)
    told = fails(
        lambda: check_images(files), "a_0031.jpg", "b_0008.jpg", "(unusable images: 4 of 100 looked at): remove"
    )
    assert "b_0009.jpg" not in told.partition(" (")[0]
    assert "verify" not in told
    assert fails(lambda: check_images(files, 0.0)).endswith("; `dali-vit verify` names all")
    make_files(tmp_path, "train/b/b_0009.jpg")
    assert fails(lambda: check_images(files, 0.0)).endswith(" put images in their place")


def test_more_bad_images_than_allowed_name_the_limit(tmp_path):
    files = load_dataset(make_split(tmp_path, "train", "a", 122), minival=0).train
    make_files(tmp_path, "train/a/a_0003.jpg", "train/a/a_0100.jpg", content=b"")
    check_images(files, 2 / 122)
    assert fails(lambda: check_images(files, 0.01)) == (
        f"{tmp_path}/train/a/a_0003.jpg is an empty file; {tmp_path}/train/a/a_0100.jpg is an empty file"
        " (unusable images: 2 of 122 looked at, more than --max-bad-share 0.01 allows): remove them or put images in"
        " their place"
    )
    make_files(tmp_path, "train/a/a_0100.jpg")
    fails(lambda: check_images(files, 0), "1 of 122 looked at, more than --max-bad-share 0 allows): remove it")
    check_images(files, 0.001)  # one is allowed in any case, as in training


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to a device", "link to a folder"])
def test_what_is_no_regular_file_is_named_and_never_opened(tmp_path, kind):
    """However few they are: DALI, too, would wait for a pipe's writer."""
    files = load_dataset(make_split(tmp_path, "train", "a", 200), minival=0).train
    odd, pipe = tmp_path / "train/a/a_0031.jpg", tmp_path / "pipe"
    odd.unlink()
    os.mkfifo(odd if kind == "pipe" else pipe)
    if kind != "pipe":
        odd.symlink_to({"link to a pipe": pipe, "link to a device": "/dev/null", "link to a folder": tmp_path}[kind])
    for share in (None, 0.5):
        message = fails(lambda share=share: check_images(files, share))
        assert message == f"{odd} is not a regular file: remove it or put an image in its place"


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "none")
    fails(lambda: check_images(file_list(tmp_path / "dangling.jpg")), "dangling.jpg cannot be read (No such file")


def test_check_looks_at_256_spread_files_of_many(monkeypatch):
    looked_at: list[str] = []
    monkeypatch.setattr(data, "_fault", looked_at.append)
    check_images(FileList.from_paths([str(i) for i in range(4096)], [0] * 4096))
    assert sorted(map(int, looked_at)) == list(range(4096))
    looked_at.clear()
    check_images(FileList.from_paths([str(i) for i in range(100_000)], [0] * 100_000))
    places = np.sort(np.array([int(place) for place in looked_at]))
    assert (len(places), places[0], places[-1]) == (256, 0, 99_999)
    assert set(np.diff(places)) == {392, 393}


def test_shards_whose_manifest_was_left_behind_are_known_as_such(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    root = prepare(PrepareArguments(folder, tmp_path / "set"))
    (root / "dataset.json").unlink()
    fails(
        lambda: load_dataset(root),
        f"{root}/train has shards, but {root}/dataset.json is not there: copy the set again with all its files, or",
    )
