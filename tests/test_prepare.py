"""prepare: from each source to each target, the form of shards, and resized images."""

import io
import json
import tarfile
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.manifest import MANIFEST
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.prepare.sources import sample_names
from dali_vit.prepare.targets import shrink
from pipelines.loader import TrainLoader
from tests import datasets
from tests.datasets import (
    IMAGES,
    NUM_TRAIN,
    SOURCES,
    TRAIN_PER_CLASS,
    VAL_IMAGES,
    WNIDS,
    WORDS,
    contents,
    prepare_fails,
    tree,
    write_source,
)

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
    prepare_fails(
        replace(arguments, target=tmp_path / "small", to="index", shorter_side=32), "--shorter-side 32", "--to index"
    )


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_an_index_needs_images_in_one_piece(tmp_path, kind):
    prepare_fails(replace(write_source(kind, tmp_path / "source"), target=tmp_path / "set", to="index"), "--to shards")


def test_minival_is_that_of_the_manifests_rule_whatever_the_layout(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    expected = contents(arguments.source, minival=0.25)
    names = [f"{wnid}/{name}" for wnid, name, _ in IMAGES["train"]]
    names.sort(key=lambda name: blake2b(name.encode(), digest_size=8).digest())
    assert set(expected["minival"]) == set(names[:6])
    for to in ("shards", "folder"):
        target = prepare(replace(arguments, target=tmp_path / to, to=to))
        assert contents(target, minival=0.25) == expected
        rule = json.loads((target / MANIFEST).read_text())["minival"]["rule"]
        assert rule == "the round(share x train) images whose class/file has the smallest 64-bit BLAKE2b hash"


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


# --- shards


def many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """About 10 KB an image, hence more shards than one although a megabyte is the least."""
    monkeypatch.setattr("dali_vit.prepare.targets._TAR_OVERHEAD", 200_000)
    return prepare(replace(write_source("folder", tmp_path / "source"), target=tmp_path / "set", shard_mb=1))


def test_shards_of_small_images_have_the_size_asked_for(tmp_path):
    """Most of them is then the tar's headers and padding."""
    ((wnid, _, data), *_) = IMAGES["val"]
    images = {"train": [(wnid, f"{i}.jpg", data + bytes([i % 256, i // 256])) for i in range(1200)]}
    prepare(replace(write_source("folder", tmp_path / "source", images), target=tmp_path / "set", shard_mb=1))
    sizes = [path.stat().st_size for path in (tmp_path / "set").glob("train/*.tar")]
    assert 1200 * len(data) < 0.75 * sum(sizes)
    assert len(sizes) > 1
    assert 0.75e6 < min(sizes) <= max(sizes) < 1.35e6


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


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_of_16_bits_the_upper_8_are_kept(image_format):
    """Clipped to 8 such an image would be white."""
    values = np.arange(80 * 96, dtype=np.uint16).reshape(80, 96) * 8
    out = io.BytesIO()
    Image.fromarray(values).save(out, image_format)
    small = Image.open(io.BytesIO(shrink(out.getvalue(), 40, 90)))
    assert (small.size, small.mode, small.format) == ((48, 40), "L", image_format)
    expected = Image.fromarray((values >> 8).astype(np.uint8)).resize((48, 40), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(small), np.asarray(expected))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_a_tiff_is_resized_whatever_its_compression(compression):
    pixels = np.arange(80 * 60 * 3, dtype=np.uint8).reshape(80, 60, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "TIFF", compression=compression)
    small = Image.open(io.BytesIO(shrink(out.getvalue(), 40, 90)))
    assert (small.size, small.info["compression"]) == ((40, 53), compression or "raw")


@pytest.mark.parametrize(("orientation", "stays"), [(1, False), (6, True)])
def test_a_tiff_is_not_turned(orientation, stays):
    """Pillow turns it as it loads it, and DALI does not."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(np.zeros((80, 60, 3), np.uint8)).save(out, "TIFF", exif=exif)
    shrunk = shrink(out.getvalue(), 40, 90)
    assert (shrunk == out.getvalue()) is stays
    if not stays:
        assert Image.open(io.BytesIO(shrunk)).size == (40, 53)


@pytest.mark.parametrize("change", ["another form", "another class", "a class less", "another order"])
def test_names_of_hugging_face_that_do_not_tell_the_classes_stay(change, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    wnids = list(reversed(WNIDS)) if change == "another order" else list(WNIDS)
    rows = [[data, f"{i}_{wnids[i % 3]}.JPEG", i % 3] for i, (_, _, data) in enumerate(IMAGES["train"])]
    if change == "another form":
        rows[5][1] = "5.JPEG"
    elif change == "another class":
        rows[4][2] = 2
    elif change == "a class less":
        rows = [row for row in rows if row[2] != 1]
    info = {"info": {"features": {"label": {"names": list(WORDS)}}}}
    columns = {"image": [{"bytes": data, "path": name} for data, name, _ in rows], "label": [row[2] for row in rows]}
    table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(info)})
    (tmp_path / "source").mkdir()
    parquet.write_table(table, tmp_path / "source/train.parquet")
    dataset = load_dataset(prepare(PrepareArguments(tmp_path / "source", tmp_path / "set", workers=1)), minival=0)
    assert dataset.classes == WORDS
    assert sorted(sample_names(dataset.train, WORDS)) == sorted(f"{WORDS[label]}/{name}" for _, name, label in rows)


def test_a_tar_beside_images_in_folders_does_not_matter(tmp_path):
    source = datasets.write_folder(tmp_path / "source", IMAGES)
    (source / "train" / "ILSVRC2012_img_train.tar").touch()  # moved there to be unpacked
    expected = load_dataset(source, minival=0).counts
    assert load_dataset(prepare(PrepareArguments(source, tmp_path / "set")), minival=0).counts == expected


def test_what_was_resized_is_not_said_to_be_larger(tmp_path):
    arguments = write_source("folder", tmp_path / "source")
    small = prepare(replace(arguments, target=tmp_path / "small", shorter_side=24))
    for side in (24, 48):
        given = PrepareArguments(small, tmp_path / "set", shorter_side=side)
        prepare_fails(given, f"--shorter-side {side}: {small} was resized to 24 already; leave it out")
    assert not (tmp_path / "set.partial").exists()
    smaller = prepare(PrepareArguments(small, tmp_path / "set", shorter_side=16))
    assert load_dataset(smaller, minival=0).resized == {"shorter_side": 16, "quality": 92}


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_val_may_be_called_so(word, tmp_path):
    arguments = write_source("tfds", tmp_path / "source")
    for path in arguments.source.glob("*validation*"):
        path.rename(path.with_name(path.name.replace("validation", word)))
    assert load_dataset(prepare(replace(arguments, target=tmp_path / "set")), minival=0).counts["val"] == VAL_IMAGES


def test_the_quality_is_the_one_that_was_asked_for():
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(out, "JPEG")
    low, high = (Image.open(io.BytesIO(shrink(out.getvalue(), 32, quality))).quantization for quality in (30, 90))
    assert sum(low[0]) > 3 * sum(high[0])
