"""Minival: the training images held out for decisions, chosen by their names alone."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

import numpy as np

from dali_vit.config import UserError
from pipelines.readers import FileList
from pipelines.shards import ImageList, ShardList

__all__ = ["split_minival"]

_CHUNK = 1 << 16


def split_minival(samples: ImageList, folder: Path, share: float) -> tuple[ImageList, ImageList | None]:
    """Training images and minival: the round(share x N) images whose hashed `class/file` is smallest.

    So it is random over the whole set, the same on every machine and in every layout, and adding or losing
    a few files moves hardly any other image across. folder: where the files of a FileList lie, which is no part of
    what is hashed. Raises UserError for a share that leaves nothing to train on.
    """
    count = round(share * len(samples))
    if count == 0:
        return samples, None
    if count == len(samples):
        raise UserError(f"--minival {share:g} of the {count} images of {folder} leaves none to train on: lower it")
    if isinstance(samples, ShardList):
        names, skipped = samples.names, 0
    else:
        names, skipped = samples, len(os.fsencode(folder)) + 1
    held_out = np.zeros(len(samples), bool)
    held_out[np.argsort(_hashes(names, skipped), kind="stable")[:count]] = True
    return samples.subset(np.flatnonzero(~held_out)), samples.subset(np.flatnonzero(held_out))


def _hashes(names: FileList, skipped: int) -> np.ndarray:
    """64-bit hashes of the names less their first bytes, big-endian."""
    paths = names.buffer.data
    pieces = []
    for first in range(0, len(names), _CHUNK):  # Python's integers would take more memory than the names
        chunk = slice(first, first + _CHUNK)
        starts = (names.starts[chunk] + skipped).tolist()
        ends = (names.starts[chunk] + names.lengths[chunk]).tolist()
        pieces.append(b"".join(blake2b(paths[i:j], digest_size=8).digest() for i, j in zip(starts, ends, strict=True)))
    return np.frombuffer(b"".join(pieces), ">u8")
