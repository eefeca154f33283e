"""A small made-up ILSVRC in every form in which people have it, and functions that the tests of prepare share."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.prepare.sources import read_sample, sample_names

WNIDS = ("n01440764", "n01443537", "n02086910")
WORDS = ("tench, Tinca tinca", "goldfish, Carassius auratus", "papillon")
TRAIN_PER_CLASS, VAL_IMAGES = 8, 9

# (class, file name, bytes)
Images = list[tuple[str, str, bytes]]


def encode(pixels: np.ndarray, image_format: str = "JPEG", mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, image_format)
    return out.getvalue()


def draw_images() -> dict[str, Images]:
    """Images of both splits; in train one PNG under a JPEG's name and one CMYK JPEG."""
    rng = np.random.default_rng(0)

    def pixels() -> np.ndarray:
        height, width = rng.integers(40, 80, 2)
        return rng.integers(0, 256, (height, width, 3), np.uint8)

    train = [(wnid, f"{wnid}_{7 * i}.JPEG", encode(pixels())) for wnid in WNIDS for i in range(TRAIN_PER_CLASS)]
    train[3] = (*train[3][:2], encode(pixels(), "PNG"))
    train[12] = (*train[12][:2], encode(pixels(), mode="CMYK"))
    val = [(WNIDS[i * 2 % 3], f"ILSVRC2012_val_{i + 1:08d}.JPEG", encode(pixels())) for i in range(VAL_IMAGES)]
    return {"train": train, "val": val}


def write_folder(root: Path, images: dict[str, Images]) -> Path:
    for split, files in images.items():
        for wnid, name, data in files:
            path = root / split / wnid / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def tar(files: Sequence[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return out.getvalue()


def write_ilsvrc(root: Path, images: dict[str, Images]) -> Path:
    """The two tars, classes and images in reverse order, and a text file with the class of each validation image."""
    root.mkdir()
    inner = [(f"{w}.tar", tar([(n, d) for c, n, d in reversed(images["train"]) if c == w])) for w in reversed(WNIDS)]
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar([(n, d) for _, n, d in reversed(images["val"])]))
    (root / "val_wnids.txt").write_text("".join(f"{wnid}\n" for wnid, _, _ in images["val"]))
    return root


def write_devkit(root: Path, images: dict[str, Images]) -> None:
    """The devkit's archive, whose ids are not in the order of the WordNet ids."""
    from scipy.io import savemat

    ids = {wnid: i + 1 for i, wnid in enumerate((WNIDS[2], WNIDS[0], WNIDS[1]))}
    synsets = np.zeros((len(ids), 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    for row, (wnid, number) in zip(synsets[:, 0], ids.items(), strict=True):
        row["ILSVRC2012_ID"], row["WNID"], row["words"] = number, wnid, f"words of {wnid}"
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{ids[wnid]}\n" for wnid, _, _ in images["val"]).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in (("meta.mat", meta.getvalue()), ("ILSVRC2012_validation_ground_truth.txt", truth)):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _example_type() -> Any:
    """tf.train.Example, from its description in TensorFlow's example.proto and feature.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, str | None]) -> Any:
        added = file.message_type.add(name=name)
        for field_name, kind, label, type_name in fields:
            added.field.add(name=field_name, number=len(added.field) + 1, type=kind, label=label, type_name=type_name)
        return added

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("BytesList", ("value", field.TYPE_BYTES, many, None))
    message("FloatList", ("value", field.TYPE_FLOAT, many, None))
    message("Int64List", ("value", field.TYPE_INT64, many, None))
    lists = [(n, field.TYPE_MESSAGE, one, f".t.{t}List") for n, t in (("b", "Bytes"), ("f", "Float"), ("i", "Int64"))]
    message("Feature", *lists)
    features = message("Features", ("feature", field.TYPE_MESSAGE, many, ".t.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=one)
    entry.field.add(name="value", number=2, type=field.TYPE_MESSAGE, label=one, type_name=".t.Feature")
    message("Example", ("features", field.TYPE_MESSAGE, one, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def write_records(path: Path, records: list[dict[str, int | float | str | bytes]]) -> None:
    example_type = _example_type()
    with open(path, "wb") as file:
        for record in records:
            example = example_type()
            for name, value in record.items():
                feature = example.features.feature[name]
                if isinstance(value, int):
                    feature.i.value.append(value)
                elif isinstance(value, float):
                    feature.f.value.append(value)
                else:
                    feature.b.value.append(value.encode() if isinstance(value, str) else value)
            data = example.SerializeToString()
            file.write(struct.pack("<QI", len(data), 0) + data + bytes(4))


def write_tfds(root: Path, images: dict[str, Images]) -> Path:
    """TensorFlow Datasets: `image`, `label`, `file_name`; two files for each split."""
    root.mkdir()
    (root / "label.labels.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (root / "features.json").write_text("{}")
    for split, name in (("train", "train"), ("val", "validation")):
        records = [{"file_name": n, "image": d, "label": WNIDS.index(c)} for c, n, d in images[split]]
        for i in range(2):
            write_records(root / f"imagenet2012-{name}.tfrecord-{i:05d}-of-00002", records[i::2])
    return root


def write_inception(root: Path, images: dict[str, Images]) -> Path:
    """The Inception scripts: `image/...`, labels from 1."""
    root.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        records = [
            {
                "image/encoded": data,
                "image/class/label": WNIDS.index(wnid) + 1,
                "image/class/synset": wnid,
                "image/filename": file,
                "image/height": 224,
                "image/object/bbox/xmin": 0.25,
                "image/colorspace": "RGB",
            }
            for wnid, file, data in images[split]
        ]
        write_records(root / f"{name}-00000-of-00001", records)
        for suffix in ("csv", "tsv", "json", "txt", "md"):  # notes beside them
            (root / f"{name}.{suffix}").write_text("image,class")
    return root


def write_parquet(root: Path, images: dict[str, Images], pyarrow: Any, parquet: Any) -> Path:
    """Hugging Face: columns `image` (`bytes` and `path`) and `label`; the schema's metadata has the classes, as words.

    File names are ILSVRC's with the class (WNID) added.
    """
    import json

    (root / "data").mkdir(parents=True)
    info = {"info": {"features": {"label": {"names": list(WORDS), "_type": "ClassLabel"}}}}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = images[split]
        for i in range(2):
            part = rows[i::2]
            table = pyarrow.table(
                {
                    "image": [{"bytes": data, "path": file.replace(".", f"_{wnid}.")} for wnid, file, data in part],
                    "label": [WNIDS.index(wnid) for wnid, _, _ in part],
                }
            ).replace_schema_metadata({"huggingface": json.dumps(info)})
            parquet.write_table(table, root / "data" / f"{name}-{i:05d}-of-00002.parquet")
    return root


IMAGES = draw_images()
NUM_TRAIN = TRAIN_PER_CLASS * len(WNIDS)
SOURCES = ("folder", "ilsvrc", "tfds", "inception", "parquet")


def write_source(kind: str, root: Path, images: dict[str, Images] | None = None) -> PrepareArguments:
    """Writes images (default: IMAGES) in one of the forms; returns prepare's arguments, complete but for the target."""
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        write_parquet(root, images or IMAGES, pyarrow, parquet)
    else:
        write = {"folder": write_folder, "ilsvrc": write_ilsvrc, "tfds": write_tfds, "inception": write_inception}
        write[kind](root, images or IMAGES)
    labels = root / "val_wnids.txt" if kind == "ilsvrc" else None
    return PrepareArguments(root, root, val_labels=labels, workers=2)


def contents(root: Path, *, minival: float = 0) -> dict[str, dict[str, tuple[int, bytes]]]:
    """Label and bytes of every image, by split and name."""
    dataset = load_dataset(root, minival=minival)
    splits = {"train": dataset.train, "minival": dataset.minival, "val": dataset.val}
    return {
        split: {
            name: (int(samples.labels[i]), read_sample(samples, i))
            for i, name in enumerate(sample_names(samples, dataset.classes))
        }
        for split, samples in splits.items()
        if samples is not None
    }


def tree(root: Path) -> dict[str, bytes]:
    """Contents of every file, by its path below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def prepare_fails(arguments: PrepareArguments, *words: str) -> None:
    """Asserts that prepare refuses the arguments, with one line that has the given words."""
    with pytest.raises(UserError) as error:
        prepare(arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
