"""Samples inside large files: byte ranges of memory maps, so that shards are shuffled like single files.

This module does not depend on a container's format: in tar shards, the tars of ILSVRC and TFRecords alike, an encoded
image lies in one piece.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from pipelines import open_files
from pipelines.readers import FileList, as_indices

__all__ = ["ImageList", "ShardList"]


@dataclass(frozen=True, eq=False, repr=False)
class ShardList:
    """Images at byte ranges of shards, and their labels: 48 bytes a sample besides its name.

    A shard is mapped when it is first read, once for all subsets of a list. It must not shrink while it is in
    use: the operating system would end the process.
    """

    encoded: ClassVar[bool] = True

    shards: tuple[str, ...]
    """Paths of the shards."""
    names: FileList
    """What each sample is called, `class/file`."""
    shard: np.ndarray
    """Which shard holds a sample, int32 [N]."""
    offsets: np.ndarray
    """Where in its shard a sample begins, int64 [N]."""
    lengths: np.ndarray
    """Bytes of a sample, int64 [N]."""
    labels: np.ndarray
    """Class indices, int64 [N]."""
    _maps: dict[int, tuple[mmap.mmap, np.ndarray]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets)

    def __repr__(self) -> str:
        return f"ShardList of {len(self)} samples in {len(self.shards)} shards"

    def path(self, index: int) -> str:
        """`shard: class/file`."""
        return f"{self.shards[self.shard[index]]}: {self.names.path(index)}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> ShardList:
        """The samples at the given indices, in that order; names and maps stay shared."""
        indices = as_indices(indices)
        shard, offsets, lengths, labels = (
            column[indices] for column in (self.shard, self.offsets, self.lengths, self.labels)
        )
        return ShardList(self.shards, self.names.subset(indices), shard, offsets, lengths, labels, self._maps)

    def payload(self, indices: np.ndarray) -> list[np.ndarray]:
        """Encoded images, uint8 views of the memory maps; the kernel is told to read all of them at once."""
        starts = self.offsets[indices]
        ends = starts + self.lengths[indices]
        pages = starts - starts % mmap.PAGESIZE
        found = []
        columns = (self.shard[indices], starts, ends, pages)
        for number, start, end, page in zip(*(column.tolist() for column in columns), strict=True):
            if start == end:  # neither can an empty file be mapped, nor advice be given beyond the end of one
                found.append(np.empty(0, np.uint8))
                continue
            shard, array = self._map(number)
            # Otherwise the pages would be read one after the other, at the page faults of the thread that uses them.
            shard.madvise(mmap.MADV_WILLNEED, page, end - page)
            found.append(array[start:end])
        return found

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray]:
        mapped = self._maps.get(shard)
        if mapped is None:
            open_files.allow_shards(len(self.shards))
            with open(self.shards[shard], "rb") as file:
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            buffer.madvise(mmap.MADV_RANDOM)  # reads are in random order: the kernel would read ahead in vain
            mapped = self._maps[shard] = buffer, np.frombuffer(buffer, np.uint8)
        return mapped


# Images on this machine's file systems, in either form.
ImageList = FileList | ShardList
