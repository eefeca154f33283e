"""Where the images lie in ILSVRC's tars, which are not compressed, and whether the tars are whole."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

from dali_vit.config import UserError
from dali_vit.listing import is_image

__all__ = ["images_of_tar", "images_of_tars_in_tar"]

Place = tuple[str, int, int]
"""Name of a file, its offset in the outermost tar, and its size, in bytes."""

_BLOCK = 512
# After the last member come two blocks of zeros, and more up to the end of a record: of 10,240 bytes, unless the writer
# was told otherwise. What a download has left out of a file of the full length is longer.
_LONGEST_END = 65_536


def images_of_tar(path: Path) -> Iterator[Place]:
    """The images in a tar; UserError, at the latest after the last of them, where the tar is damaged or cut off."""
    with open(path, "rb") as file:
        yield from _images(file, str(path))


def images_of_tars_in_tar(path: Path) -> Iterator[tuple[str, list[Place]]]:
    """Path in the outer tar of each tar within, and its images; UserError where one is damaged or cut off."""
    with open(path, "rb") as file, tqdm(desc=path.name, unit=" classes", disable=None) as bar:
        for tar, member in _files(file, str(path)):
            if not member.name.endswith(".tar"):
                continue
            inner = tar.extractfile(member)
            assert inner is not None
            start = member.offset_data
            images = _images(inner, f"{member.name} in {path}")
            yield member.name, [(name, start + offset, size) for name, offset, size in images]
            bar.update()


def _images(file: IO[bytes], name: str) -> Iterator[Place]:
    for _, member in _files(file, name):
        if is_image(os.path.basename(member.name)):
            yield os.path.basename(member.name), member.offset_data, member.size


def _files(file: IO[bytes], name: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files in a tar, each with the tar."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.issparse():
                    raise UserError(f"{name} holds {member.name} without its zeros: write it again without tar's -S")
                if member.isfile():
                    yield tar, member
            # To tarfile a header that it does not understand, or of zeros, is the end, whatever follows.
            file.seek(tar.offset)
            rest = file.read(_LONGEST_END + 1)
            if len(rest) > _LONGEST_END and not any(rest):
                raise UserError(
                    f"{name} is not a whole tar file (nothing but zeros from byte {tar.offset:,} on): download it"
                    " again, or write it again with shorter records if it was written so"
                )
            if not _BLOCK <= len(rest) <= _LONGEST_END or any(rest):
                raise tarfile.ReadError(f"no member and no end at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise UserError(f"{name} is not a whole tar file ({error}): download it again") from error
