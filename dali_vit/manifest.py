"""What `prepare` records of a set it made: `dataset.json`, written last, and an index of each split's samples.

```
dataset.json        the manifest: a folder that has one is whole
train.index.npz     (shards, index) where every sample lies, in the order of label and name
train/shard-000000.tar, shard-000000.idx, ... (shards) or train/<class>/* (folder) or nothing (index)
val...
```
The order is that of an image folder's listing, so training sees a set in the same order, with the same augmentation
and the same minival, whatever the set's layout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dali_vit.config import UserError
from dali_vit.files import dead_link, file_sha256
from pipelines.readers import FileList
from pipelines.shards import ShardList

__all__ = [
    "MANIFEST",
    "Manifest",
    "Shard",
    "Split",
    "is_made_up",
    "load_shards",
    "made_up_name",
    "read_manifest",
    "save_index",
    "write_manifest",
]

MANIFEST = "dataset.json"

_VERSION = 1
_MADE_UP = re.compile(r".*-\d{12}\.jpg")
_MINIVAL_RULE = "the round(share x train) images whose class/file has the smallest 64-bit BLAKE2b hash"


@dataclass(frozen=True)
class Shard:
    """One shard of a split."""

    file: str
    """Path below the set's folder, or absolute if the set only refers to the file."""
    samples: int
    bytes: int
    """Size of the file."""
    sha256: str | None
    """None for a file of the source, which prepare did not read as a whole."""


@dataclass(frozen=True)
class Split:
    """One split of a set."""

    count: int
    bytes: int
    """Bytes of the encoded images alone, without the tars or records around them."""
    index_sha256: str | None = None
    """Checksum of the split's index, where there are shards."""
    shards: tuple[Shard, ...] = ()

    @property
    def mean_bytes(self) -> float:
        """Mean bytes of an encoded image; 0 for a split without images."""
        return self.bytes / self.count if self.count else 0.0


@dataclass(frozen=True)
class Manifest:
    """A prepared set."""

    layout: Literal["folder", "shards", "index"]
    classes: tuple[str, ...]
    """Class names, by class index."""
    splits: dict[str, Split]
    plan: str
    """Fingerprint of the source and the settings that the set was made from."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that the images or their packing depend on."""


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Writes `root/dataset.json` in one piece."""
    fields = dataclasses.asdict(manifest)
    for name, split in manifest.splits.items():
        fields["splits"][name]["mean_bytes"] = round(split.mean_bytes, 1)
    fields["minival"] = {"rule": _MINIVAL_RULE}
    text = json.dumps({"version": _VERSION, **fields}, indent=1, ensure_ascii=False)
    temporary = root / f".{MANIFEST}.tmp"
    with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(root / MANIFEST)


def made_up_name(shard: str, offset: int) -> str:
    """File name of an image whose source gives it none."""
    return f"{os.path.basename(shard)}-{offset:012d}.jpg"


def is_made_up(name: str) -> bool:
    """Whether a name looks like those that `made_up_name` gives."""
    return _MADE_UP.fullmatch(name) is not None


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a prepared set, None for a folder without one; UserError if it cannot be understood."""
    path = root / MANIFEST
    try:
        fields = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        if fields.get("version") != _VERSION:
            raise UserError(f"{path} is of version {fields.get('version')}, not {_VERSION}: prepare the set again")
        if fields["layout"] not in ("folder", "shards", "index"):
            raise UserError(f"{path} is of layout {fields['layout']}, which there is not: prepare the set again")
        splits = {}
        for name, values in fields["splits"].items():
            shards = tuple(Shard(**shard) for shard in values["shards"])
            splits[name] = Split(values["count"], values["bytes"], values["index_sha256"], shards)
        return Manifest(fields["layout"], tuple(fields["classes"]), splits, fields["plan"], fields["settings"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        refused = f"{path} cannot be read ({error.strerror}): check its permissions"
        raise UserError(dead_link(root) or dead_link(path) or refused) from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a manifest that prepare wrote ({error}): prepare the set again") from error


def save_index(path: Path, samples: ShardList) -> str:
    """Writes the place, label and name of every sample; returns the file's SHA-256."""
    names = samples.names
    starts, ends = names.starts.tolist(), (names.starts + names.lengths).tolist()
    buffer = names.buffer.tobytes()
    with open(path, "wb") as file:
        np.savez(
            file,
            shard=samples.shard,
            offset=samples.offsets,
            length=samples.lengths,
            label=samples.labels.astype(np.int32),
            name=np.frombuffer(b"".join(buffer[i:j] for i, j in zip(starts, ends, strict=True)), np.uint8),
            name_length=names.lengths,
        )
        file.flush()
        os.fsync(file.fileno())
    return file_sha256(path)


def load_shards(root: Path, manifest: Manifest, split: str) -> ShardList:
    """The samples of a split that lies in shards.

    Raises UserError if a shard's size or the index's checksum is not the manifest's, or one of them is missing; the
    contents of shards are left to `verify`.
    """
    entry = manifest.splits[split]
    index = root / f"{split}.index.npz"
    again = "copy the set again, or prepare it again"
    faults = [fault for shard in entry.shards if (fault := _fault(root / shard.file, shard.bytes))]
    if faults:
        more = f" (unusable shards: {len(faults)} of {len(entry.shards)})" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}: {again}")
    try:
        if file_sha256(index) != entry.index_sha256:
            raise UserError(f"{index} is not the file that prepare wrote: {again}")
        with np.load(index) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise UserError(f"{index} cannot be read ({error.strerror}): {again}") from error
    labels = columns["label"].astype(np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() < len(manifest.classes):
        raise UserError(
            f"{root / MANIFEST} has {len(manifest.classes)} classes, {index} labels from {labels.min()} to"
            f" {labels.max()}: {again}"
        )
    lengths = columns["name_length"]
    names = FileList(columns["name"], np.cumsum(lengths, dtype=np.int64) - lengths, lengths, labels)
    shards = tuple(str(root / shard.file) for shard in entry.shards)
    return ShardList(shards, names, columns["shard"], columns["offset"], columns["length"], labels)


def _fault(path: Path, size: int) -> str | None:
    """Why a shard cannot be the file of that many bytes that the manifest names; None if it can."""
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"{path} cannot be found ({error.strerror})"
    return None if found == size else f"{path} has {found} bytes, not the {size} of the manifest"
