"""Where images, labels and names lie in a TFRecord of Examples, found without TensorFlow."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from dali_vit.config import UserError

__all__ = ["num_records", "read_tfrecord"]

# Names of each feature, by TensorFlow Datasets and by the Inception scripts; the first one that is found counts.
_IMAGE, _LABEL = ("image", "image/encoded"), ("label", "image/class/label")
_FILE, _CLASS = ("file_name", "image/filename"), ("image/class/synset",)
# Field numbers of protocol buffers: key and value of an entry of Features.feature; the kinds of a Feature's value.
_KEY, _VALUE = 1, 2
_BYTES_LIST, _INT64_LIST = 1, 3
# A place in a buffer: (start, end).
Place = tuple[int, int]


def read_tfrecord(path: Path) -> Iterator[tuple[int, int, int, str | None, str]]:
    """Offset and length of the image, label, class name and file name of each record."""
    if path.stat().st_size == 0:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        data.madvise(mmap.MADV_RANDOM)  # only what lies around the images is looked at
        position = 0
        while position < len(data):
            # length (8 bytes), its checksum (4), the record, its checksum (4)
            length = struct.unpack_from("<Q", data, position)[0] if position + 12 <= len(data) else len(data)
            start, end = position + 12, position + 12 + length
            if end + 4 > len(data):
                raise UserError(f"{path} is cut off or compressed at byte {position}: give whole, plain TFRecords")
            try:
                features = _features(data, (start, end))
                image = next(features[name] for name in _IMAGE if name in features)
                label = next(features[name] for name in _LABEL if name in features)
                offset, image_end = _one(data, image, _BYTES_LIST)
                texts = [
                    next((_text(data, features[name]) for name in names if name in features), "")
                    for names in (_FILE, _CLASS)
                ]
                yield offset, image_end - offset, _integer(data, label), texts[1] or None, os.path.basename(texts[0])
            except (StopIteration, LookupError, ValueError):
                raise UserError(
                    f"{path}: the record at byte {position} has no features {_IMAGE[0]} and {_LABEL[0]}, "
                    f"nor {_IMAGE[1]} and {_LABEL[1]}: give TFRecords of encoded images"
                ) from None
            position = end + 4


def num_records(folder: Path) -> dict[str, int]:
    """Records in each file of a folder, by name, as TensorFlow Datasets has noted; empty where it has not."""
    found = {}
    try:
        info = json.loads((folder / "dataset_info.json").read_bytes())
        for split in info["splits"]:
            counts = [int(count) for count in split.get("shardLengths", ())]
            for i, count in enumerate(counts):
                found[f"{info['name']}-{split['name']}.tfrecord-{i:05d}-of-{len(counts):05d}"] = count
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        # It may be another program's.
        return {}
    return found


def _features(data: mmap.mmap, record: Place) -> dict[str, Place]:
    """Where each feature of an Example lies, by name."""
    found = {}
    for _, features in _fields(data, record):
        for _, entry in _fields(data, features):
            parts = dict(_fields(data, entry))
            found[bytes(data[slice(*parts[_KEY])]).decode()] = parts.get(_VALUE, (0, 0))
    return found


def _one(data: mmap.mmap, feature: Place, kind: int) -> Place:
    """Where the only value of a feature lies."""
    ((found, values),) = _fields(data, feature)
    ((_, value),) = _fields(data, values)
    if found != kind:
        raise ValueError(f"feature of kind {found}")
    return value


def _text(data: mmap.mmap, feature: Place) -> str:
    return bytes(data[slice(*_one(data, feature, _BYTES_LIST))]).decode(errors="surrogateescape")


def _integer(data: mmap.mmap, feature: Place) -> int:
    value = _varint(data, _one(data, feature, _INT64_LIST)[0])[0]
    return value - (1 << 64) if value >= 1 << 63 else value  # an int64's bits


def _fields(data: mmap.mmap, message: Place) -> Iterator[tuple[int, Place]]:
    """Number and place of each field of a protocol buffer message; ValueError for types that Examples do not have."""
    position, end = message
    while position < end:
        tag, position = _varint(data, position)
        if tag & 7 == 2:  # length and content
            length, position = _varint(data, position)
            field_end = position + length
        elif tag & 7 == 0:  # an integer
            _, field_end = _varint(data, position)
        else:
            raise ValueError(f"field of wire type {tag & 7}")
        if field_end > end:
            raise ValueError("field beyond its message")
        yield tag >> 3, (position, field_end)
        position = field_end


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """The integer at a position (seven bits a byte, the lowest first), and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
