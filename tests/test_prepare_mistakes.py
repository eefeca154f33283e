"""prepare: everything that can be wrong with a source or a set."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dali_vit.manifest as manifest_module
import dali_vit.prepare as prepare_module
from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.manifest import MANIFEST, read_manifest, write_manifest
from dali_vit.prepare import PrepareArguments, prepare
from tests import datasets
from tests.datasets import IMAGES, NUM_TRAIN, VAL_IMAGES, WNIDS, contents, prepare_fails, tree, write_source


def test_mistakes_are_named_with_their_remedy(tmp_path):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    prepare_fails(replace(arguments, source=tmp_path / "absent"), "absent", "no such folder")
    prepare_fails(replace(arguments, shard_mb=0), "--shard-mb 0", "at least 1")
    prepare_fails(replace(arguments, quality=96), "--quality 96", "from 1 to 95")
    prepare_fails(replace(arguments, shorter_side=2), "--shorter-side 2")
    prepare_fails(replace(arguments, quality=50), "--quality 50: images keep their bytes", "give --shorter-side too")
    prepare_fails(replace(arguments, workers=0), "--workers 0")
    prepare_fails(
        replace(arguments, val_labels=tmp_path / "x"), "--val-labels", "source/val say already", "leave it out"
    )
    prepare_fails(replace(arguments, source_format="tfrecord"), "no TFRecords with 'train'")
    prepare_fails(replace(arguments, source_format="ilsvrc"), "ILSVRC2012_img_train.tar")
    prepare_fails(replace(arguments, target=Path("/")), "/ exists already: choose another TARGET")
    for name in ("source", "target"):
        url = {name: Path("s3://bucket/set")}
        told = (
            f"{name.upper()} s3://bucket/set: must be on this machine's disks; name a local path, and copy from or to"
        )
        prepare_fails(replace(arguments, **url), told)
    assert not list(tmp_path.glob("set*"))


def test_mistakes_with_ilsvrc(tmp_path):
    root = datasets.write_ilsvrc(tmp_path / "source", IMAGES)
    arguments = PrepareArguments(root, tmp_path / "set")
    prepare_fails(arguments, "ILSVRC2012_devkit_t12.tar.gz", "--val-labels")
    labels = tmp_path / "labels.txt"
    for text, *words in [
        ("n01440764\n" * 8, "8 lines", "9 images"),
        ("n01440764\n" * 8 + "n09999999\n", "n09999999"),
        ("ILSVRC2012_val_00000001.JPEG n01440764\n" * 9, "no class for ILSVRC2012_val_00000002"),
    ]:
        labels.write_text(text)
        prepare_fails(replace(arguments, val_labels=labels), *words)
    prepare_fails(replace(arguments, val_labels=tmp_path / "absent"), "absent", "cannot be read")
    for name in ("ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar"):
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
        prepare_fails(
            replace(arguments, val_labels=root / "val_wnids.txt"), name, "not a whole tar file", "download it again"
        )
    assert not list(tmp_path.glob("set*"))


def test_mistakes_with_tfrecords(tmp_path):
    root = datasets.write_tfds(tmp_path / "source", IMAGES)
    path = root / "imagenet2012-train.tfrecord-00001-of-00002"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    prepare_fails(PrepareArguments(root, tmp_path / "set"), path.name, "cut off or compressed at byte")
    path.write_bytes(data.replace(b"\x05image", b"\x05pixel"))
    prepare_fails(PrepareArguments(root, tmp_path / "set"), path.name, "record at byte 0", "image/encoded")
    path.write_bytes(data)
    (root / "label.labels.txt").write_text("one\ntwo\n")
    prepare_fails(PrepareArguments(root, tmp_path / "set"), "label 2 is none of the 2 classes, which count from 0")
    # As many names as labels, but those count from 1.
    inception = datasets.write_inception(tmp_path / "inception", IMAGES)
    for path in inception.iterdir():
        path.write_bytes(path.read_bytes().replace(b"image/class/synset", b"image/class/symbol"))
    (inception / "label.labels.txt").write_text("one\ntwo\nthree\n")
    prepare_fails(PrepareArguments(inception, tmp_path / "set"), "label 3 is none of the 3 classes")


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_without_records_are_named_by_their_split(split, tmp_path):
    root = datasets.write_tfds(tmp_path / "source", IMAGES)
    for path in root.glob(f"*{split}*"):
        path.write_bytes(b"")
    prepare_fails(PrepareArguments(root, tmp_path / "set"), f"{root}: its {split} files hold no images; fetch them")


@pytest.mark.parametrize("label", [None, "cat"])
def test_a_label_of_parquet_that_is_no_number_is_named(tmp_path, label):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = {split: [(label, name, data) for _, name, data in rows] for split, rows in IMAGES.items()}
    (tmp_path / "source").mkdir()
    for split, rows in images.items():
        columns = {"image": [{"bytes": d, "path": n} for _, n, d in rows], "label": [found for found, _, _ in rows]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "source" / f"{split}.parquet")
    path, name = tmp_path / "source/train.parquet", images["train"][0][1]
    prepare_fails(PrepareArguments(tmp_path / "source", tmp_path / "set"), f"{path}: {name} has the label {label!r}")


def test_a_refused_way_of_writing_keeps_the_target_free(tmp_path):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    prepare_fails(replace(arguments, to="index"), "--to index", "choose --to shards")
    assert not list(tmp_path.glob("set*"))
    assert load_dataset(prepare(arguments)).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}


@pytest.mark.parametrize("name", ["{}", "{}.jfif", ".{}.jpg"])
def test_a_folder_that_would_not_list_its_images_is_not_written(name, tmp_path):
    images = {
        split: [(wnid, name.format(file.removesuffix(".JPEG")), data) for wnid, file, data in rows]
        for split, rows in IMAGES.items()
    }
    arguments = replace(write_source("tfds", tmp_path / "source", images), target=tmp_path / "set")
    prepare_fails(replace(arguments, to="folder"), f"{images['train'][0][1]}, which a folder's listing", "--to shards")
    assert not list(tmp_path.glob("set*"))
    assert load_dataset(prepare(arguments)).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}


def test_images_without_a_class_are_named(tmp_path):
    """As in a test split; labels that begin at 1 are Inception's, but none begin at -1."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "source").mkdir()
    data = IMAGES["train"][0][2]
    columns = {"image": [{"bytes": data, "path": f"{i}.jpg"} for i in range(4)], "label": [0, 1, 0, -1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "source/train.parquet")
    prepare_fails(PrepareArguments(tmp_path / "source", tmp_path / "set"), "label -1: images without a class")


@pytest.mark.parametrize(
    ("kind", "missing", "pattern"),
    [
        ("tfds", "imagenet2012-train.tfrecord-00001-of-00002", "imagenet2012-train.tfrecord-*-of-00002"),
        ("tfds", "imagenet2012-validation.tfrecord-00000-of-00002", "imagenet2012-validation.tfrecord-*-of-00002"),
        ("parquet", "data/train-00001-of-00002.parquet", "data/train-*-of-00002.parquet"),
    ],
)
def test_a_file_missing_of_those_numbered_is_named(tmp_path, kind, missing, pattern):
    arguments = replace(write_source(kind, tmp_path / "source"), target=tmp_path / "set")
    (arguments.source / missing).unlink()
    prepare_fails(arguments, f"{arguments.source}: 1 of 2 files of {pattern} is missing ({missing}); download it")
    assert not list(tmp_path.glob("set*"))


def test_numbered_files_are_of_one_set(tmp_path):
    root = datasets.write_inception(tmp_path / "source", IMAGES)
    arguments = PrepareArguments(root, tmp_path / "set")
    whole = root / "train-00000-of-00001"
    other = whole.rename(root / "train-00001-of-01024")
    prepare_fails(
        arguments,
        f"{root}: 1023 of 1024 files of train-*-of-01024 are missing (train-00000-of-01024, ...); download them",
    )
    whole.write_bytes(b"")
    prepare_fails(
        arguments, f"{root} has files of several sets, train-*-of-00001 and train-*-of-01024: keep those of one"
    )
    other.rename(whole)
    assert load_dataset(prepare(arguments)).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("inception", "00000-of-00001", "00001-of-00001"),
        ("inception", "-00000-of-00001", ".tfrecord"),
        ("inception", "00000-of-00001", "7"),
        ("parquet", "-of-00002.parquet", ".parquet"),
    ],
)
def test_files_may_be_numbered_otherwise(tmp_path, kind, old, new):
    source_format = "parquet" if kind == "parquet" else "tfrecord"
    arguments = replace(write_source(kind, tmp_path / "source"), target=tmp_path / "set", source_format=source_format)
    for path in [path for path in arguments.source.rglob("*") if old in path.name]:
        path.rename(path.with_name(path.name.replace(old, new)))
    assert load_dataset(prepare(arguments)).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}


def test_parquet_files_may_have_a_fingerprint_each(tmp_path):
    arguments = replace(write_source("parquet", tmp_path / "source"), target=tmp_path / "set")
    data = arguments.source / "data"
    for i, path in enumerate(sorted(data.iterdir())):
        path.rename(path.with_name(f"{path.stem}-a09b74b3ef9c3b5{i}.parquet"))
    kept = (data / "train-00000-of-00002-a09b74b3ef9c3b50.parquet").rename(tmp_path / "kept")
    prepare_fails(arguments, "1 of 2 files of data/train-*-of-00002-*.parquet is missing (data/train-00000-of-00002-*.")
    kept.rename(data / "train-00000-of-00002-a09b74b3ef9c3b50.parquet")
    assert load_dataset(prepare(arguments)).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}


def test_a_manifest_with_fewer_classes_than_labels_is_named(tmp_path):
    target = prepare(replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set"))
    manifest = read_manifest(target)
    write_manifest(target, replace(manifest, classes=manifest.classes[:-1]))
    highest = len(manifest.classes) - 1
    told = f"{target / MANIFEST} has {highest} classes, {target}/train.index.npz labels from 0 to {highest}: copy the"
    with pytest.raises(UserError) as error:
        load_dataset(target)
    assert str(error.value).startswith(told)


def test_an_index_with_negative_labels_is_named(tmp_path, monkeypatch):
    target = prepare(replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set"))
    index = target / "train.index.npz"
    with np.load(index) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    np.savez(index, **{**columns, "label": columns["label"] - 1})
    monkeypatch.setattr(manifest_module, "file_sha256", lambda _: read_manifest(target).splits["train"].index_sha256)
    with pytest.raises(UserError, match=r"train\.index\.npz labels from -1 to"):
        load_dataset(target, split="train")


def test_what_the_manifest_says_must_be_there(tmp_path):
    target = prepare(replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set"))
    shard = target / "train/shard-000000.tar"
    data = shard.read_bytes()
    for change, *words in [
        (
            lambda: shard.write_bytes(data[:-512]),
            "train/shard-000000.tar",
            f"{len(data) - 512} bytes",
            "prepare it again",
        ),
        (shard.unlink, "train/shard-000000.tar", "cannot be found"),
    ]:
        change()
        with pytest.raises(UserError) as error:
            load_dataset(target)
        assert all(word in str(error.value) for word in words), error.value
    shard.write_bytes(data)
    assert load_dataset(target).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}
    os.truncate(target / "train.index.npz", 100)
    with pytest.raises(UserError, match=r"train.index.npz is not the file that prepare wrote"):
        load_dataset(target)
    (target / MANIFEST).write_text((target / MANIFEST).read_text().replace('"layout": "shards"', '"layout": "cards"'))
    with pytest.raises(UserError, match=r"dataset.json is of layout cards, which there is not: prepare the set again"):
        load_dataset(target)
    (target / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"dataset.json is of version None"):
        load_dataset(target)


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("place", ["source", "around the source", "other", "file"])
def test_a_folder_that_happens_to_be_called_partial_is_left_alone(place, valid, tmp_path):
    """Whether the source can be prepared or not."""
    partial = tmp_path / "set.partial"
    source = {"source": partial, "around the source": partial / "images"}.get(place, tmp_path / "source")
    if valid:
        source = write_source("folder", source).source
    else:
        (source / "stuff").mkdir(parents=True)
        (source / "stuff" / "a.txt").write_text("mine")
    if place == "other":
        partial.mkdir()
        (partial / "notes.txt").write_text("mine")
    elif place == "file":
        partial.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"set.partial is in the way, and not by prepare: rename it, or choose another"):
        prepare(PrepareArguments(source, tmp_path / "set"))
    assert tree(tmp_path) == before


def test_what_is_put_beside_the_work_stays(tmp_path):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    note = tmp_path / "set.partial" / "notes.txt"
    begun = prepare_module.open_source

    def put(*given, **named):
        note.write_text("mine")
        return begun(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "open_source", put)
        prepare(arguments)
    assert [path.name for path in note.parent.iterdir()] == ["notes.txt"]
    assert load_dataset(tmp_path / "set").counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}


def test_a_target_may_be_a_link_to_an_empty_folder(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").symlink_to("disk")
    prepare(replace(arguments, target=tmp_path / "set"))
    assert (tmp_path / "set").is_symlink()
    assert load_dataset(tmp_path / "set").counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}
    assert not list(tmp_path.glob("*.partial"))


def test_shards_that_did_not_arrive_are_counted(tmp_path):
    target = prepare(replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set"))
    manifest = read_manifest(target)
    (there,) = manifest.splits["train"].shards
    missing = [replace(there, file=f"train/shard-{i:06d}.tar") for i in (1, 2)]
    train = replace(manifest.splits["train"], shards=(there, *missing))
    write_manifest(target, replace(manifest, splits=manifest.splits | {"train": train}))
    with pytest.raises(UserError, match=r"000001.tar cannot be found .*\(unusable shards: 2 of 3\): copy the set"):
        load_dataset(target)


def test_a_prepared_folder_holds_what_its_manifest_counts(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    target = prepare(replace(arguments, target=tmp_path / "set", to="folder"))
    next((target / "train" / WNIDS[1]).iterdir()).unlink()
    with pytest.raises(UserError, match=rf"train has {NUM_TRAIN - 1} images but dataset.json {NUM_TRAIN}"):
        load_dataset(target)


def test_files_that_are_no_part_of_the_set_are_counted(tmp_path, caplog):
    """And the set that was made of the source has none."""
    arguments = write_source("folder", tmp_path / "source")
    folder = arguments.source / "train" / WNIDS[0]
    for name in ("one.gif", "two.gif"):
        (folder / name).write_bytes(b"GIF89a")
    with caplog.at_level(logging.INFO, "dali_vit"):
        target = prepare(replace(arguments, target=tmp_path / "set", to="folder"))
    remark = f"other suffix (left out; save images as JPEG or PNG): 2, such as {folder / 'one.gif'}"
    assert caplog.messages.count(remark) == 1
    assert len(contents(target)["train"]) == NUM_TRAIN
    caplog.clear()
    with caplog.at_level(logging.INFO, "dali_vit"):
        prepare(replace(arguments, source=target, target=tmp_path / "again"))
    assert not any("left out" in message for message in caplog.messages)


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_an_image_is_named(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    pipe = next(path for path in sorted((arguments.source / "train").rglob("*")) if path.is_file())
    pipe.unlink()
    os.mkfifo(pipe)
    prepare_fails(replace(arguments, target=tmp_path / "set"), f"{pipe}: not a regular file; mend that and run")
