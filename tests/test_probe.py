"""The pipelines that try samples: how many there are, and that none of them is left."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from nvidia.dali import Pipeline

from pipelines.order import EvalOrder
from pipelines.probe import LackOfMemory, try_samples
from pipelines.readers import FileList, Samples


class Graph:
    """Fails at a batch with a label 0."""

    def __init__(self, labels: np.ndarray, batch_size: int, error: str) -> None:
        self._batches = iter(np.split(labels, range(batch_size, len(labels), batch_size)))
        self._error = error
        self.stopped = False

    def run(self) -> None:
        assert not self.stopped
        if next(self._batches).min() == 0:
            raise RuntimeError(self._error)

    def _shutdown(self) -> None:
        self.stopped = True


class Graphs:
    """Makes pipelines, and keeps them."""

    def __init__(self, error: str = "cannot decode") -> None:
        self._error = error
        self.made: list[Graph] = []

    def __call__(self, samples: Samples, order: EvalOrder) -> Pipeline:
        self.made.append(Graph(samples.labels, order.batch_size, self._error))
        return cast(Pipeline, self.made[-1])

    def left(self) -> int:
        return sum(not graph.stopped for graph in self.made)


def files(*labels: int) -> FileList:
    return FileList.from_paths([f"{i}.jpg" for i in range(len(labels))], labels)


def test_each_pipeline_is_stopped_before_the_next_is_made_for_the_rest() -> None:
    graphs = Graphs()
    samples = files(1, 1, 1, 0, 1, 1)
    found = []
    for sample in try_samples(samples, graphs, batch_size=2):
        found.append(sample)
        assert graphs.left() <= 2  # that of the batch that failed, and that of its samples one by one
    assert found == [(0, True), (1, True), (2, True), (3, False), (4, True), (5, True)]
    assert len(graphs.made) == 3
    assert graphs.left() == 0


def test_no_pipeline_is_left_where_memory_is_lacking() -> None:
    graphs = Graphs("CUDA allocation failed")
    with pytest.raises(LackOfMemory):
        list(try_samples(files(1, 0), graphs))
    assert (len(graphs.made), graphs.left()) == (1, 0)
