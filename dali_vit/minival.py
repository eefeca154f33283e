"""Minival: the training images held out for decisions, chosen by their names alone."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np

from dali_vit.config import UserError
from dali_vit.names import chunks_of_names
from pipelines.shards import ImageList

__all__ = ["split_minival"]


def split_minival(samples: ImageList, folder: Path, share: float) -> tuple[ImageList, ImageList | None]:
    """Training images and minival: the round(share x N) images whose hashed `class/file` is smallest.

    So minival is random over the whole set and the same on every machine and in every layout, and adding or losing a
    few files moves hardly any other image into or out of it. folder: the folder that holds the files of a FileList,
    which is not part of the hashed name. Raises UserError for a share that leaves nothing to train on.
    """
    count = round(share * len(samples))
    if count == 0:
        return samples, None
    if count == len(samples):
        raise UserError(f"--minival {share:g} of the {count} images of {folder} leaves none to train on: lower it")
    held_out = np.zeros(len(samples), bool)
    held_out[np.argsort(_hashes(samples, folder), kind="stable")[:count]] = True
    return samples.subset(np.flatnonzero(~held_out)), samples.subset(np.flatnonzero(held_out))


def _hashes(samples: ImageList, folder: Path) -> np.ndarray:
    """64-bit hashes of the names, big-endian."""
    pieces = [
        b"".join(blake2b(name, digest_size=8).digest() for name in chunk) for chunk in chunks_of_names(samples, folder)
    ]
    return np.frombuffer(b"".join(pieces), ">u8")
