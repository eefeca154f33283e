"""Where bytes come from: lists of image files, and the callables that hand them to DALI's external_source."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipelines.order import EvalOrder, TrainOrder

__all__ = ["EvalSource", "FileList", "TrainSource"]


class BatchInfo(Protocol):
    """The part of nvidia.dali.types.BatchInfo in use: batches handed out so far."""

    iteration: int


@dataclass(frozen=True, eq=False, repr=False)
class FileList:
    """Image files and their labels, held compactly: 20 bytes a file besides the path's own.

    Python strings would take about 150 bytes each, and every worker process holds the whole list.
    """

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
        """List of the given files; ValueError if there is not one label per path."""
        if len(paths) != len(labels):
            raise ValueError(f"{len(paths)} paths but {len(labels)} labels: give one label per path")
        encoded = [os.fsencode(path) for path in paths]
        lengths = np.fromiter((len(path) for path in encoded), np.int32, len(encoded))
        ends = np.cumsum(lengths, dtype=np.int64)
        buffer = np.frombuffer(b"".join(encoded), np.uint8)
        return cls(buffer, ends - lengths, lengths, np.asarray(labels, np.int64).reshape(len(paths)))

    def __len__(self) -> int:
        return len(self.starts)

    def __repr__(self) -> str:
        return f"FileList of {len(self)} files"

    def encoded_paths(self, indices: np.ndarray) -> list[np.ndarray]:
        """Paths as bytes, uint8 views of the buffer (what DALI's io.file.read takes)."""
        starts = self.starts[indices]
        ends = starts + self.lengths[indices]
        # Slicing by Python integers takes half the time of slicing by numpy's.
        return [self.buffer[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def encoded_path(self, index: int) -> np.ndarray:
        """Path as bytes, a uint8 view of the buffer."""
        return self.encoded_paths(np.array([index]))[0]

    def path(self, index: int) -> str:
        return os.fsdecode(self.encoded_path(index).tobytes())

    def subset(self, indices: Sequence[int] | np.ndarray) -> FileList:
        """The files at the given indices, in that order; the paths themselves stay shared."""
        indices = np.asarray(indices, np.int64)
        return FileList(self.buffer, self.starts[indices], self.lengths[indices], self.labels[indices])


@dataclass(frozen=True)
class TrainSource:
    """The callable of the training graph: iteration -> (paths, labels, uniforms, ...) of that step.

    It keeps nothing between calls, so a pipeline can be built at any step: iteration 0 is start_step. The
    uniforms come as one array float32 [local_batch_size, n] for each n in `counts`, as slicing them apart in the
    graph would cost more than drawing them.
    """

    samples: FileList
    order: TrainOrder
    counts: Sequence[int]
    start_step: int = 0

    def __call__(self, info: BatchInfo) -> tuple[list[np.ndarray], np.ndarray, *tuple[np.ndarray, ...]]:
        step = self.start_step + info.iteration
        indices = self.order.indices(step)
        uniforms = self.order.uniforms(step, sum(self.counts))
        groups = np.split(uniforms, np.cumsum(self.counts)[:-1], axis=1)
        paths = self.samples.encoded_paths(indices)
        return paths, self.samples.labels[indices], *map(np.ascontiguousarray, groups)


@dataclass(frozen=True)
class EvalSource:
    """The callable of the evaluation graph: iteration -> (paths, labels), StopIteration after the last batch.

    Padding repeats the first file and is labelled -1.
    """

    samples: FileList
    order: EvalOrder

    def __call__(self, info: BatchInfo) -> tuple[list[np.ndarray], np.ndarray]:
        if info.iteration >= self.order.num_batches:
            raise StopIteration
        indices = self.order.indices(info.iteration)
        padded = indices < 0
        indices = np.where(padded, 0, indices)
        return self.samples.encoded_paths(indices), np.where(padded, -1, self.samples.labels[indices])
