import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.manifest import MANIFEST
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.prepare.sources import read_sample, sample_names
from pipelines.loader import TrainLoader
from tests import datasets
from tests.conftest import environment
from tests.datasets import TRAIN_PER_CLASS, VAL_IMAGES, WNIDS

IMAGES = datasets.draw_images()
NUM_TRAIN = TRAIN_PER_CLASS * len(WNIDS)
SOURCES = ("folder", "ilsvrc", "tfds", "inception", "parquet")


def write_source(kind: str, root: Path) -> PrepareArguments:
    """Writes the images in one of the forms; the arguments are complete but for the target."""
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        datasets.write_parquet(root, IMAGES, pyarrow, parquet)
    else:
        getattr(datasets, f"write_{kind}")(root, IMAGES)
    labels = root / "val_wnids.txt" if kind == "ilsvrc" else None
    return PrepareArguments(root, root, val_labels=labels, workers=2)


def contents(root: Path, *, minival: float = 0) -> dict[str, dict[str, tuple[int, bytes]]]:
    """Label and bytes of every image, by split and name."""
    dataset = load_dataset(root, minival=minival)
    splits = {"train": dataset.train, "minival": dataset.minival, "val": dataset.val}
    return {
        split: {name: (int(samples.labels[i]), read_sample(samples, i)) for i, name in enumerate(sample_names(samples))}
        for split, samples in splits.items()
        if samples is not None
    }


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def fails(arguments: PrepareArguments, *words: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- from each source to each target


@pytest.mark.timeout(60)
@pytest.mark.parametrize("to", ["shards", "folder"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_image_arrives_with_its_class_name_and_bytes(tmp_path, kind, to):
    target = prepare(replace(write_source(kind, tmp_path / "source"), target=tmp_path / "set", to=to))
    assert target == tmp_path / "set"
    assert not (tmp_path / "set.partial").exists()
    expected = {
        split: {f"{wnid}/{name}": (WNIDS.index(wnid), data) for wnid, name, data in images}
        for split, images in IMAGES.items()
    }
    assert contents(target) == expected
    dataset = load_dataset(target)
    assert dataset.classes == WNIDS
    assert dataset.counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}

    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["layout"] == to
    assert manifest["classes"] == list(WNIDS)
    for split, images in IMAGES.items():
        size = sum(len(data) for _, _, data in images)
        entry = manifest["splits"][split]
        assert (entry["count"], entry["bytes"]) == (len(images), size)
        assert entry["mean_bytes"] == round(size / len(images), 1)


@pytest.mark.parametrize("kind", ["ilsvrc", "tfds", "inception"])
def test_an_index_reads_the_source_in_place(tmp_path, kind):
    arguments = write_source(kind, tmp_path / "source")
    target = prepare(replace(arguments, target=tmp_path / "set", to="index"))
    assert {path.name for path in target.iterdir()} == {MANIFEST, "train.index.npz", "val.index.npz"}
    folder = datasets.write_folder(tmp_path / "folder", IMAGES)
    assert contents(target, minival=0.25) == contents(folder, minival=0.25)
    moved = (tmp_path / "source").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"source/.* cannot be found"):
        load_dataset(target)
    moved.rename(tmp_path / "source")
    fails(replace(arguments, target=tmp_path / "small", to="index", shorter_side=32), "--shorter-side 32", "--to index")


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_an_index_needs_images_in_one_piece(tmp_path, kind):
    fails(replace(write_source(kind, tmp_path / "source"), target=tmp_path / "set", to="index"), "--to shards")


def test_minival_is_the_folders_whatever_the_layout(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    expected = contents(arguments.source, minival=0.25)
    assert len(expected["minival"]) == 6
    for to in ("shards", "folder"):
        assert contents(prepare(replace(arguments, target=tmp_path / to, to=to)), minival=0.25) == expected


def test_shards_do_not_depend_on_the_source(tmp_path):
    sets = []
    for kind in ("folder", "ilsvrc", "tfds", "inception"):
        target = prepare(replace(write_source(kind, tmp_path / kind), target=tmp_path / f"{kind}-set"))
        sets.append({name: data for name, data in tree(target).items() if name != MANIFEST})
    assert sets[0] == sets[1] == sets[2] == sets[3]
    assert set(sets[0]) == {
        f"{split}{suffix}"
        for split in IMAGES
        for suffix in (".index.npz", *(f"/shard-000000.{s}" for s in ("tar", "idx")))
    }


def test_tfrecords_without_names_are_numbered(tmp_path):
    root = datasets.write_tfds(tmp_path / "source", IMAGES)
    (root / "label.labels.txt").unlink()
    for path in root.glob("*.tfrecord*"):
        path.write_bytes(path.read_bytes().replace(b"file_name", b"file_None"))
    found = contents(prepare(PrepareArguments(root, tmp_path / "set", to="folder")))
    assert load_dataset(tmp_path / "set").classes == ("0", "1", "2")
    for split, images in IMAGES.items():
        expected = sorted((WNIDS.index(wnid), data) for wnid, _, data in images)
        assert sorted(found[split].values()) == expected


def test_labels_keep_their_order_where_class_names_are_not_sorted(tmp_path):
    root = datasets.write_tfds(tmp_path / "source", IMAGES)
    (root / "label.labels.txt").write_text("tench, Tinca tinca\na/goldfish\ncrane\n")
    for to in ("folder", "shards"):
        dataset = load_dataset(prepare(PrepareArguments(root, tmp_path / to, to=to)), minival=0)
        assert dataset.classes == ("tench, Tinca tinca", "a_goldfish", "crane")
        assert dataset.train is not None
        assert np.bincount(dataset.train.labels).tolist() == [TRAIN_PER_CLASS] * 3
        assert dataset.train.path(0).endswith("tench, Tinca tinca/n01440764_0.JPEG")


def test_the_devkit_says_what_the_validation_images_show(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    root = datasets.write_ilsvrc(tmp_path / "source", IMAGES)
    datasets.write_devkit(root, IMAGES, savemat)
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


# --- shards


def many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """About 10 KB an image, hence more shards than one although a megabyte is the least."""
    monkeypatch.setattr("dali_vit.prepare.targets._TAR_OVERHEAD", 200_000)
    return prepare(replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set", shard_mb=1))


def test_shards_are_whole_tars_of_like_counts_in_shuffled_order(tmp_path, monkeypatch):
    target = many_shards(tmp_path, monkeypatch)
    manifest = json.loads((target / MANIFEST).read_text())
    shards = manifest["splits"]["train"]["shards"]
    assert [shard["samples"] for shard in shards] == [4, 5, 5, 5, 5]
    expected = {data: WNIDS.index(wnid) for wnid, _, data in IMAGES["train"]}
    labels, keys = [], []
    for shard in shards:
        with tarfile.open(target / shard["file"]) as tar:
            members = tar.getmembers()
            assert all((m.mtime, m.uid) == (0, 0) for m in members)
            for image, label in zip(members[::2], members[1::2], strict=True):
                data = tar.extractfile(image).read()
                assert int(tar.extractfile(label).read()) == expected.pop(data)
                assert (image.name, label.name) == (f"{len(keys):09d}.jpg", f"{len(keys):09d}.cls")
                keys.append(image.name)
                labels.append(label)
    assert not expected
    read = load_dataset(target, minival=0).train
    assert len(read.shards) == 5
    order = np.lexsort((read.offsets, read.shard))
    assert read.labels[order].tolist() != sorted(read.labels.tolist())
    assert len(set(read.labels[order][:10].tolist())) == 3


def test_the_index_is_the_one_that_dalis_tool_writes(tmp_path, monkeypatch):
    wds2idx = pytest.importorskip("wds2idx")
    target = many_shards(tmp_path, monkeypatch)
    for shard in sorted(target.glob("*/*.tar")):
        index = tmp_path / "index.idx"
        with wds2idx.IndexCreator(str(shard), str(index), verbose=False) as creator:
            creator.create_index()
        assert shard.with_suffix(".idx").read_text() == index.read_text()


@pytest.mark.timeout(60)
def test_dalis_own_reader_reads_the_shards(tmp_path, monkeypatch):
    from nvidia.dali import fn, pipeline_def

    target = many_shards(tmp_path, monkeypatch)
    shards = sorted(map(str, target.glob("train/*.tar")))

    @pipeline_def(batch_size=NUM_TRAIN, num_threads=1, device_id=None)
    def graph():
        indexes = [shard.removesuffix(".tar") + ".idx" for shard in shards]
        return tuple(fn.readers.webdataset(paths=shards, index_paths=indexes, ext=["jpg", "cls"]))

    images, labels = graph().run()
    found = {bytes(images.at(i)): int(bytes(labels.at(i))) for i in range(NUM_TRAIN)}
    assert found == {data: WNIDS.index(wnid) for wnid, _, data in IMAGES["train"]}


@pytest.mark.timeout(60)
def test_training_batches_are_the_folders_bit_for_bit(tmp_path, monkeypatch):
    target = many_shards(tmp_path, monkeypatch)

    def batches(root: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
        samples = load_dataset(root, minival=0.1).split("train")
        loader = TrainLoader(
            samples, batch_size=8, image_size=32, seed=3, rank=0, world_size=1, device="cpu", num_threads=1
        )
        return [tuple(tensor.clone() for tensor in next(loader)) for _ in range(5)]

    for (images, labels), (expected_images, expected_labels) in zip(
        batches(target), batches(tmp_path / "source"), strict=True
    ):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(images, expected_images)


# --- started again


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
    fails(replace(arguments, target=tmp_path / "set", to=to, shard_mb=1, shorter_side=32), "other settings")
    read: list[int] = []
    from dali_vit.prepare import targets

    original = targets.read_sample
    monkeypatch.setattr(targets, "read_sample", lambda samples, i: (read.append(i), original(samples, i))[1])
    prepare(replace(arguments, target=tmp_path / "set", to=to, shard_mb=1))
    assert tree(tmp_path / "set") == tree(whole)
    probes = NUM_TRAIN + VAL_IMAGES if to == "shards" else 0
    assert len(read) - probes <= NUM_TRAIN + VAL_IMAGES - 9  # two parts were not made again
    assert not (tmp_path / "set.partial").exists()


def test_a_finished_set_is_left_alone_and_no_other_put_in_its_place(tmp_path):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in prepare(arguments).rglob("*")}
    prepare(arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before
    fails(replace(arguments, shorter_side=32), "other settings", "another TARGET")
    fails(replace(arguments, target=arguments.source / "train"), "lies within")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    fails(replace(arguments, target=tmp_path / "other"), "exists already")
    assert not list(tmp_path.glob("*.partial"))


def test_the_number_of_workers_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr("dali_vit.prepare.targets._TAR_OVERHEAD", 200_000)
    arguments = replace(write_source("folder", tmp_path / "source"), shard_mb=1)
    one, four = (prepare(replace(arguments, target=tmp_path / str(n), workers=n)) for n in (1, 4))
    assert tree(one) == tree(four)


# --- resized


def test_shorter_side_shrinks_larger_images_alone(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    broken = arguments.source / "train" / WNIDS[0] / "broken.JPEG"
    broken.write_bytes(IMAGES["train"][0][2][:200])
    found = contents(prepare(replace(arguments, target=tmp_path / "set", shorter_side=48, quality=90)))
    assert found["train"].pop(f"{WNIDS[0]}/broken.JPEG")[1] == broken.read_bytes()
    shrunk = 0
    for wnid, name, data in IMAGES["train"]:
        before, after = (Image.open(io.BytesIO(d)) for d in (data, found["train"][f"{wnid}/{name}"][1]))
        if min(before.size) <= 48:
            assert found["train"][f"{wnid}/{name}"][1] == data
            continue
        shrunk += 1
        assert min(after.size) == 48
        assert max(after.size) == round(max(before.size) * 48 / min(before.size))
        assert after.format == before.format
        assert after.mode == "RGB"
        reference = before.convert("RGB").resize(after.size, Image.Resampling.BICUBIC)
        # In noise JPEG keeps no more than the luminance.
        difference = np.subtract(after.convert("L"), reference.convert("L"), dtype=float)
        assert np.abs(difference).mean() < (1e-9 if after.format == "PNG" else 5)
    assert shrunk > 10


# --- mistakes


def test_mistakes_are_named_with_their_remedy(tmp_path):
    arguments = replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set")
    fails(replace(arguments, source=tmp_path / "absent"), "absent", "no such folder")
    fails(replace(arguments, shard_mb=0), "--shard-mb 0", "at least 1")
    fails(replace(arguments, quality=96), "--quality 96", "from 1 to 95")
    fails(replace(arguments, shorter_side=2), "--shorter-side 2")
    fails(replace(arguments, workers=0), "--workers 0")
    fails(replace(arguments, val_labels=tmp_path / "x"), "--val-labels", "only ILSVRC")
    fails(replace(arguments, source_format="tfrecord"), "no TFRecords with 'train'")
    fails(replace(arguments, source_format="ilsvrc"), "ILSVRC2012_img_train.tar")
    assert not list(tmp_path.glob("set*"))


def test_mistakes_with_ilsvrc(tmp_path):
    root = datasets.write_ilsvrc(tmp_path / "source", IMAGES)
    arguments = PrepareArguments(root, tmp_path / "set")
    fails(arguments, "ILSVRC2012_devkit_t12.tar.gz", "--val-labels")
    labels = tmp_path / "labels.txt"
    for text, *words in [
        ("n01440764\n" * 8, "8 lines", "9 images"),
        ("n01440764\n" * 8 + "n09999999\n", "n09999999"),
        ("ILSVRC2012_val_00000001.JPEG n01440764\n" * 9, "does not name ILSVRC2012_val_00000002"),
    ]:
        labels.write_text(text)
        fails(replace(arguments, val_labels=labels), *words)
    fails(replace(arguments, val_labels=tmp_path / "absent"), "absent", "cannot be read")
    for name in ("ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar"):
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
        fails(replace(arguments, val_labels=root / "val_wnids.txt"), name, "not a whole tar file", "download it again")
    assert not list(tmp_path.glob("set*"))


def test_mistakes_with_tfrecords(tmp_path):
    root = datasets.write_tfds(tmp_path / "source", IMAGES)
    path = root / "imagenet2012-train.tfrecord-00001-of-00002"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    fails(PrepareArguments(root, tmp_path / "set"), path.name, "cut off or compressed at byte")
    path.write_bytes(data.replace(b"\x05image", b"\x05pixel"))
    fails(PrepareArguments(root, tmp_path / "set"), path.name, "record at byte 0", "image/encoded")
    path.write_bytes(data)
    (root / "label.labels.txt").write_text("one\ntwo\n")
    fails(PrepareArguments(root, tmp_path / "set"), "label 2 is none of the 2 class names")


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
    (target / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"dataset.json is of version None"):
        load_dataset(target)


def test_a_prepared_folder_holds_what_its_manifest_counts(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    target = prepare(replace(arguments, target=tmp_path / "set", to="folder"))
    next((target / "train" / WNIDS[1]).iterdir()).unlink()
    with pytest.raises(UserError, match=rf"train has {NUM_TRAIN - 1} images but dataset.json {NUM_TRAIN}"):
        load_dataset(target)
