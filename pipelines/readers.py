"""Where encoded images come from: collections of samples, and how a graph reads from them."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, Self

import numpy as np
from nvidia.dali import fn
from nvidia.dali.data_node import DataNode

from pipelines import open_files
from pipelines.order import EvalOrder, TrainOrder

__all__ = [
    "NUM_LAST_BYTES",
    "PLACEHOLDER",
    "EvalSource",
    "FileList",
    "Samples",
    "TrainSource",
    "allow_open_files",
    "as_indices",
    "check_samples",
    "read",
    "stack_paths",
]

NUM_LAST_BYTES = 8  # of a file, which show whether it was cut short; even the smallest image, a PBM, has as many

PLACEHOLDER = Path(__file__).with_name("placeholder.jpg")
"""A good image, which takes the place of bad ones."""


class BatchInfo(Protocol):
    """The part of nvidia.dali.types.BatchInfo that is used here: the number of batches handed out so far."""

    iteration: int


class Samples(Protocol):
    """Encoded images and their labels, wherever they are stored: what the loaders need to know about them."""

    encoded: ClassVar[bool]
    """What the payload is: False, the path of a file that DALI is to read; True, the encoded image itself."""

    @property
    def labels(self) -> np.ndarray:
        """Class indices, int64 [N]."""

    def __len__(self) -> int: ...

    def subset(self, indices: Sequence[int] | np.ndarray, /) -> Self:
        """The samples at the given indices, in that order."""

    def path(self, index: int, /) -> str:
        """How messages name a sample: a file's path, or for instance `shard-0003.tar: n01440764/x.JPEG`."""

    def payload(self, indices: np.ndarray, /) -> list[np.ndarray]:
        """One uint8 array [n] a sample. DALI does not copy it, but holds it as long as it is needed: it must not be
        changed any more. Called by the thread that takes batches from the loader."""


@dataclass(frozen=True, eq=False, repr=False)
class FileList:
    """Image files and their labels, held compactly: 20 bytes a file besides the path's own.

    Python strings would take about 150 bytes each, and every worker process holds the whole list.
    """

    encoded: ClassVar[bool] = False

    buffer: np.ndarray
    """All paths one after the other, in the file system's encoding, uint8."""
    starts: np.ndarray
    """Where a path begins in the buffer, int64 [N]."""
    lengths: np.ndarray
    """Bytes of a path, int32 [N]."""
    labels: np.ndarray
    """Class indices, int64 [N]."""

    @classmethod
    def from_paths(cls, paths: Sequence[str], labels: Sequence[int] | np.ndarray) -> FileList:
        """List of the given files; ValueError unless there is one class index from 0 per path."""
        if len(paths) != len(labels):
            raise ValueError(f"{len(paths)} paths but {len(labels)} labels: give one label per path")
        classes = np.asarray(labels).reshape(len(paths))
        if len(classes) and (classes.dtype.kind not in "iu" or classes.min() < 0):
            wrong = classes.min() if classes.dtype.kind in "iu" else f"{classes.tolist()[0]!r} ({classes.dtype})"
            raise ValueError(f"labels such as {wrong}: give class indices, integers from 0")
        encoded = [os.fsencode(path) for path in paths]
        lengths = np.fromiter((len(path) for path in encoded), np.int32, len(encoded))
        ends = np.cumsum(lengths, dtype=np.int64)
        buffer = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(buffer, ends - lengths, lengths, classes.astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts)

    def __repr__(self) -> str:
        return f"FileList of {len(self)} files"

    def payload(self, indices: np.ndarray) -> list[np.ndarray]:
        """Paths as bytes, uint8 views of the buffer (what DALI's io.file.read takes)."""
        starts = self.starts[indices]
        ends = starts + self.lengths[indices]
        # Slicing by Python integers takes half the time of slicing by numpy's.
        return [self.buffer[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def encoded_path(self, index: int) -> np.ndarray:
        """Path as bytes, a uint8 view of the buffer."""
        return self.payload(np.array([index]))[0]

    def path(self, index: int) -> str:
        """Path of a file, decoded as the file system's names are."""
        return os.fsdecode(self.encoded_path(index).tobytes())

    def subset(self, indices: Sequence[int] | np.ndarray) -> FileList:
        """The files at the given indices, in that order, or in the places of a mask; the paths stay shared."""
        indices = as_indices(indices)
        return FileList(self.buffer, self.starts[indices], self.lengths[indices], self.labels[indices])


def as_indices(chosen: Sequence[int] | np.ndarray) -> np.ndarray:
    """Indices int64 as they are given, or of the places where a mask, bool [N], is true."""
    chosen = np.asarray(chosen)
    return np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)


def check_samples(samples: Samples) -> None:
    """Raises ValueError for what is no `Samples`, or has not one class index, int64, for each of them."""
    if not all(hasattr(samples, name) for name in ("encoded", "labels", "__len__", "subset", "path", "payload")):
        raise ValueError(
            f"samples is a {type(samples).__name__}: give a split of a data set, as dataset.split('train'),"
            " FileList.from_paths(paths, labels), or an object with the methods of pipelines.readers.Samples"
        )
    labels = samples.labels
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.shape != (len(samples),):
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise ValueError(f"samples.labels is {found}: it must be a numpy array int64 [{len(samples)}], a label each")


@functools.cache
def _placeholder(encoded: bool) -> np.ndarray:
    """The payload that stands in for a sample which cannot be decoded, uint8."""
    return np.frombuffer(PLACEHOLDER.read_bytes() if encoded else os.fsencode(PLACEHOLDER), np.uint8)


def _payload(samples: Samples, indices: np.ndarray, left_out: np.ndarray | None) -> list[np.ndarray]:
    """The payload of samples, with a grey image in the places marked in left_out, bool [len(indices)]."""
    if left_out is None or not left_out.any():
        return samples.payload(indices)
    kept = iter(samples.payload(indices[~left_out]))
    placeholder = _placeholder(samples.encoded)
    return [placeholder if out else next(kept) for out in left_out.tolist()]


@dataclass(frozen=True)
class TrainSource:
    """What the training graph reads: iteration -> payload, or paths, and iteration -> (labels, uniforms, ...).

    It keeps nothing between calls, so a pipeline can be built at any step: iteration i is step start_step + i * stride.
    The uniforms come as one array float32 [local_batch_size, n] for each n in `counts`, as slicing them apart in the
    graph would cost more than drawing them.
    """

    samples: Samples
    order: TrainOrder
    counts: Sequence[int]
    start_step: int = 0
    stride: int = 1
    """Steps from one iteration to the next."""
    bad: np.ndarray | None = None
    """Which samples to leave out, bool [N]: in their place comes a grey image of label -1."""

    @property
    def num_arrays(self) -> int:
        """How many arrays `arrays` gives."""
        return 1 + len(self.counts)

    def payload(self, info: BatchInfo) -> list[np.ndarray]:
        """The path of each sample of this rank at an iteration, or its encoded bytes if it is in a shard, uint8."""
        indices = self.order.indices(self.start_step + info.iteration * self.stride)
        return _payload(self.samples, indices, None if self.bad is None else self.bad[indices])

    def paths(self, info: BatchInfo) -> tuple[np.ndarray, np.ndarray]:
        """`payload` as `stack_paths` arranges it."""
        return stack_paths(self.payload(info))

    def arrays(self, info: BatchInfo) -> tuple[np.ndarray, ...]:
        """Labels int64 [local_batch_size], -1 for bad samples, and the uniforms float32 [local_batch_size, n]."""
        step = self.start_step + info.iteration * self.stride
        indices = self.order.indices(step)
        labels = self.samples.labels[indices]
        if self.bad is not None:
            labels[self.bad[indices]] = -1
        uniforms = self.order.uniforms(step, sum(self.counts))
        groups = np.split(uniforms, np.cumsum(self.counts)[:-1], axis=1)
        return labels, *map(np.ascontiguousarray, groups)


@dataclass(frozen=True)
class EvalSource:
    """What the evaluation graph reads: iteration -> payload, or paths, and iteration -> (labels,).

    Iteration 0 is start_batch; StopIteration comes after the last batch. Padding is a grey image, labelled -1.
    """

    samples: Samples
    order: EvalOrder
    start_batch: int = 0
    bad: np.ndarray | None = None
    """Which samples to leave out, bool [N]: in their place comes padding."""

    num_arrays: ClassVar[int] = 1

    def _indices(self, info: BatchInfo) -> tuple[np.ndarray, np.ndarray]:
        """Indices of a batch, int64 [batch_size], and which of its places are padding, bool [batch_size]."""
        batch = self.start_batch + info.iteration
        if batch >= self.order.num_batches:
            raise StopIteration
        indices = self.order.indices(batch)
        return indices, indices < 0 if self.bad is None else (indices < 0) | self.bad[indices]

    def payload(self, info: BatchInfo) -> list[np.ndarray]:
        """As `TrainSource.payload`. Raises StopIteration after the last batch."""
        return _payload(self.samples, *self._indices(info))

    def paths(self, info: BatchInfo) -> tuple[np.ndarray, np.ndarray]:
        """`payload` as `stack_paths` arranges it."""
        return stack_paths(self.payload(info))

    def arrays(self, info: BatchInfo) -> tuple[np.ndarray, ...]:
        """Labels int64 [batch_size], -1 for padding. Raises StopIteration after the last batch."""
        indices, padding = self._indices(info)
        return (np.where(padding, -1, self.samples.labels[indices]),)


def read(source: TrainSource | EvalSource) -> list[DataNode]:
    """Encoded images, uint8 on the CPU, and the source's arrays; to be called within a pipeline definition."""
    if source.samples.encoded:
        # Copying would take one thread 16 us an image, and that thread would have to read the memory maps, too.
        encoded = fn.external_source(source.payload, batch=True, batch_info=True, no_copy=True)
    else:
        # A list of arrays would cost the training thread 7 us more an image, in DALI's Python code (BENCHMARKS.md).
        paths, lengths = fn.external_source(source.paths, num_outputs=2, batch=True, batch_info=True)
        # With memory maps DALI would remember every path it has ever read, 265 bytes each, and be no faster.
        encoded = fn.io.file.read(paths[:lengths], dont_use_mmap=True)
    arrays = fn.external_source(source.arrays, num_outputs=source.num_arrays, batch=True, batch_info=True)
    return [encoded, *arrays]


def allow_open_files(samples: Samples, batch_size: int) -> None:
    """Lets this process read batches of this size: DALI opens all files of a batch before it reads the first.

    To be called before a pipeline runs. Raises `open_files.TooManyFiles` where the system does not allow that many.
    """
    if not samples.encoded:
        # Two pipelines may read at once: a loader's two lanes on the CPU, training's and evaluation's on a GPU.
        what = f"the files of two batches of {batch_size:,} images"
        open_files.allow(2 * batch_size, what, "read smaller batches, or shards")


def stack_paths(paths: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Paths uint8 [n] of different lengths as rows of one array padded with zeros, uint8 [N, longest]; n, int32 [N]."""
    lengths = np.fromiter(map(len, paths), np.int32, len(paths))
    rows = np.zeros((len(paths), lengths.max()), np.uint8)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.concatenate(paths)
    return rows, lengths
