"""What a prepared set's manifest says, as it is read again, and held against the set's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from dali_vit.prepare import PrepareArguments, prepare
from tests.datasets import IMAGES, write_folder


def test_a_manifest_reads_as_it_was_written(tmp_path: Path) -> None:
    """With a class of bytes that are no UTF-8, as a folder may have them."""
    shard = Shard("train/shard-000000.tar", 3, 10_240, "1" * 64)
    splits = {"train": Split(3, 900, "2" * 64, (shard,)), "val": Split(1, 200)}
    manifest = Manifest("shards", ("žába", os.fsdecode(b"\xff")), splits, "3" * 32, {"quality": None})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_is_refused_as_the_set_is_loaded(change: int, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "images", IMAGES)
    shard = prepare(PrepareArguments(source, tmp_path / "set")) / "train/shard-000000.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] if change < 0 else content + b"x")
    with pytest.raises(UserError) as refused:
        load_dataset(tmp_path / "set")
    assert str(refused.value) == (
        f"{shard} has {len(content) + change} bytes, not the {len(content)} of the manifest:"
        " copy the set again, or prepare it again"
    )
