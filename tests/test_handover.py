"""How long a batch's memory stays DALI's, with a CUDA stream and its events played by others."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, cast

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline

from pipelines import handover
from pipelines.handover import Runner


class Event:
    def __init__(self) -> None:
        self.has_come = False

    def query(self) -> bool:
        return self.has_come

    def synchronize(self) -> None:
        self.has_come = True


class Stream:
    """Also the current stream, which waits for this one."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.waits = 0

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def wait_stream(self, other: Stream) -> None:
        assert other is self
        self.waits += 1


class Output:
    """A dense output of a graph, of which it can be told whether anything holds it."""

    def __init__(self, value: int) -> None:
        self._array = np.full((2, 3), value, np.uint8)

    def as_array(self) -> np.ndarray:
        return self._array


class Outputs(list[Output]):
    pass


class Graph:
    def __init__(self) -> None:
        self.given: list[weakref.ref[Outputs]] = []
        self.stopped = False

    def run(self) -> Outputs:
        outputs = Outputs([Output(len(self.given)), Output(100)])
        self.given.append(weakref.ref(outputs))
        return outputs

    def _shutdown(self) -> None:
        self.stopped = True

    def held(self) -> list[bool]:
        return [given() is not None for given in self.given]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(handover, "_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    return stream


def run(runner: Runner, graph: Graph, augment: Any = None) -> list[torch.Tensor]:
    return runner(cast(Pipeline, graph), augment)


def test_buffers_are_held_until_what_reads_them_has_run(stream: Stream) -> None:
    runner, graph = Runner(0), Graph()
    batches = [run(runner, graph) for _ in range(3)]
    assert [int(images[0, 0]) for images, _ in batches] == [0, 1, 2]
    assert graph.held() == [True, True, True]
    stream.events[0].has_come = True
    run(runner, graph)
    assert graph.held() == [False, True, True, True]
    runner.release()
    assert graph.held() == [False] * 4
    assert all(event.has_come for event in stream.events)


def test_all_buffers_that_are_read_by_now_are_given_back_at_once(stream: Stream) -> None:
    runner, graph = Runner(0), Graph()
    for _ in range(3):
        run(runner, graph)
    for event in stream.events:
        event.has_come = True
    run(runner, graph)
    assert graph.held() == [False, False, False, True]
    runner.release()


def test_all_pipelines_are_shut_down(stream: Stream) -> None:
    graphs = [Graph() for _ in range(3)]
    Runner(0).shut_down([cast(Pipeline, graph) for graph in graphs])
    assert [graph.stopped for graph in graphs] == [True] * 3


def test_buffers_are_held_where_what_reads_them_fails(stream: Stream) -> None:
    def fails(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    runner, graph = Runner(0), Graph()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(runner, graph, fails)
    assert (graph.held(), len(stream.events)) == ([True], 1)
    runner.release()


def test_a_gpu_that_has_failed_holds_nothing_and_hides_no_error(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error")

    released: list[bool] = []

    def release() -> None:
        released.append(True)
        fails()

    monkeypatch.setattr(handover, "ReleaseUnusedMemory", release)
    runner, graph = Runner(0), Graph()
    run(runner, graph)
    monkeypatch.setattr(Event, "synchronize", fails)
    runner.shut_down([cast(Pipeline, graph)])
    assert (graph.held(), graph.stopped, released) == ([False], True, [True])
    monkeypatch.setattr(Graph, "_shutdown", fails)
    runner.shut_down([cast(Pipeline, graph)])

    def unlike(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Stream, "record_event", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(runner, graph, unlike)


def test_the_current_stream_waits_for_each_batch(stream: Stream) -> None:
    runner, graph = Runner(0), Graph()
    for i in range(3):
        run(runner, graph)
        assert stream.waits == i + 1
    runner.release()


@pytest.mark.parametrize("augmented", [False, True])
def test_no_tensor_shares_a_buffer(stream: Stream, augmented: bool) -> None:
    augment = (lambda images, numbers: images + numbers) if augmented else None
    graph = Graph()
    held = graph.run()
    graph.run = lambda: held  # type: ignore[method-assign]
    images, *others = run(Runner(0), graph, augment)
    assert torch.equal(images, torch.full((2, 3), 100 if augmented else 0, dtype=torch.uint8))
    assert len(others) == (0 if augmented else 1)
    assert images.data_ptr() != held[0].as_array().ctypes.data
