"""prepare of TFRecords that lack records, where each record that is there is whole."""

import json
import logging

import pytest

from dali_vit.data import load_dataset
from dali_vit.prepare import PrepareArguments, prepare
from tests import datasets
from tests.datasets import IMAGES, NUM_TRAIN, VAL_IMAGES, prepare_fails


@pytest.mark.parametrize("left", [0, 1])  # records: a download may end between two of them, or before the first
def test_a_tfrecord_of_fewer_records_than_noted_is_named(left, tmp_path):
    arguments = PrepareArguments(datasets.write_tfds(tmp_path / "source", IMAGES), tmp_path / "set")
    path = arguments.source / "imagenet2012-train.tfrecord-00001-of-00002"
    half = NUM_TRAIN // 2
    splits = [
        {"name": "test"},
        {"name": "train", "numBytes": "9", "shardLengths": [str(half), str(half)]},
        {"name": "validation", "shardLengths": [str(VAL_IMAGES - VAL_IMAGES // 2), str(VAL_IMAGES // 2)]},
    ]
    info = arguments.source / "dataset_info.json"
    info.write_text(json.dumps({"name": "imagenet2012", "splits": splits}))
    whole = path.read_bytes()
    path.write_bytes(whole[: (16 + int.from_bytes(whole[:8], "little")) * left])
    noted = f"not the {half} that dataset_info.json beside it says: fetch it again"
    prepare_fails(arguments, f"{path} holds {left} records, {noted}")
    path.write_bytes(whole)
    assert load_dataset(prepare(arguments)).counts == {"train": NUM_TRAIN, "val": VAL_IMAGES}


@pytest.mark.parametrize(
    "info",
    [
        *(None, "", "[]", "[" * 100_000, "{"),
        '{"name": "imagenet2012", "splits": [{"name": "train"}]}',
        '{"name": "imagenet2012", "splits": ["train"]}',
        '{"name": "imagenet2012", "splits": [{"name": "train", "shardLengths": [1e400, 1]}]}',
    ],
)
def test_an_empty_tfrecord_of_which_nothing_is_noted_is_told(info, tmp_path, caplog):
    """A program that writes a given number of files may leave one of a small set empty."""
    arguments = PrepareArguments(datasets.write_tfds(tmp_path / "source", IMAGES), tmp_path / "set")
    if info is not None:
        (arguments.source / "dataset_info.json").write_text(info)
    path = arguments.source / "imagenet2012-train.tfrecord-00001-of-00002"
    path.write_bytes(b"")
    caplog.set_level(logging.WARNING, "dali_vit")
    assert load_dataset(prepare(arguments)).counts["train"] == NUM_TRAIN // 2
    assert caplog.messages == [f"empty: {path}; if they should not be, fetch them and prepare the set again"]
