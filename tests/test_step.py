"""How far the host works ahead of a GPU, as far as a CPU goes."""

from __future__ import annotations

import pytest
import torch

from dali_vit.step import RunAhead


def test_the_host_is_two_steps_ahead_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    recorded: list[int] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking  # or the thread would spin on a core that DALI's work on

        def record(self) -> None:
            self.step = len(recorded)
            recorded.append(self.step)

        def synchronize(self) -> None:
            done.append(self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    ahead = RunAhead(torch.device("cuda", 0))
    for step in range(10):
        ahead.step_is_queued()
        assert recorded == list(range(step + 1))
        assert done == list(range(step - 1))  # never the last two: the GPU does not run dry


def test_on_the_cpu_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "Event")
    for _ in range(5):
        RunAhead(torch.device("cpu")).step_is_queued()
