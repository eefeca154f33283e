"""What samples are called, whatever holds them: `class/file`, by which minival is chosen and a set is known again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from pipelines.shards import ImageList, ShardList

__all__ = ["chunks_of_names", "fingerprint"]

_CHUNK = 1 << 16


def chunks_of_names(samples: ImageList, folder: Path) -> Iterator[list[bytes]]:
    """`class/file` of every sample in order, in the file system's encoding, 65,536 at a time.

    folder: where the files of a FileList lie, which is no part of their names here.
    """
    if isinstance(samples, ShardList):
        names, skipped = samples.names, 0
    else:
        names, skipped = samples, len(os.fsencode(folder)) + 1
    for first in range(0, len(names), _CHUNK):  # Python's integers would take more memory than the names
        starts = names.starts[first : first + _CHUNK] + skipped
        ends = starts - skipped + names.lengths[first : first + _CHUNK]
        begin = int(starts.min())
        text = names.buffer[begin : int(ends.max())].tobytes()  # slices of bytes take a third of the time of views'
        yield [text[i:j] for i, j in zip((starts - begin).tolist(), (ends - begin).tolist(), strict=True)]


def fingerprint(samples: ImageList, folder: Path) -> str:
    """128-bit hash, in hexadecimal, of which samples there are and in what order: the same in every layout."""
    digest = blake2b(digest_size=16)
    for chunk in chunks_of_names(samples, folder):
        digest.update(b"\0".join(chunk))
        digest.update(b"\0")
    return digest.hexdigest()
