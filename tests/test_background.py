"""Checkpoints are written while training goes on, which waits only for their data to be copied."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dali_vit import checkpoint, saving
from dali_vit.background import BackgroundWriter, snapshot
from dali_vit.config import Config
from dali_vit.distributed import Group
from dali_vit.plan import plan
from dali_vit.saving import Saver
from dali_vit.train import train
from tests.conftest import read_metrics


class HeldWrite:
    """A write that does not end before it may, and what it has written."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.written: list[dict[str, Any]] = []

    def __call__(self, **state: Any) -> Path:
        assert self.may_end.wait(30)
        self.written.append({name: value.clone() for name, value in state.items()})
        return Path()


@pytest.mark.timeout(60)
def test_a_write_is_not_waited_for_and_holds_the_state_of_its_submission():
    weight, write, background = torch.zeros(1000), HeldWrite(), BackgroundWriter()
    background.submit(write, {"weight": weight})  # would not come back if it waited
    weight += 1
    assert write.written == []
    write.may_end.set()
    background.submit(write, {"weight": weight})
    weight += 1
    background.close()
    assert [float(state["weight"].sum()) for state in write.written] == [0, 1000]


def test_a_snapshot_shares_no_memory_with_the_state():
    """Nor do single numbers, such as AdamW's count of steps, whose memory is used again for the next snapshot."""
    state = {"step": torch.tensor(7.0), "weight": torch.ones(3)}
    first, _ = snapshot(state)
    for tensor in state.values():
        tensor += 1
    assert {name: tensor.tolist() for name, tensor in first.items()} == {"step": 7.0, "weight": [1.0] * 3}
    second, _ = snapshot(state, first)
    for tensor in state.values():
        tensor += 1
    assert {name: tensor.tolist() for name, tensor in second.items()} == {"step": 8.0, "weight": [2.0] * 3}


@pytest.mark.timeout(60)
def test_the_newest_checkpoint_is_the_one_that_is_being_written(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given, **named: may_go.wait(30) and save(*given, **named))
    planned = plan(tiny_config, 1)
    loader: Any = SimpleNamespace(state_dict=lambda: {"num_samples": 54})
    with Saver(tiny_config, cpu, planned, torch.optim.SGD(planned.model.parameters()), loader, None) as saver:
        saver.save(3, evaluation_due=False)
        threading.Timer(0.3, may_go.set).start()
        newest = saver.newest()
    assert newest is not None
    assert newest.step == 3


@pytest.mark.timeout(60)
def test_what_is_behind_a_write_that_fails_is_waited_for():
    background, second = BackgroundWriter(), HeldWrite()

    def fail() -> None:
        raise OSError(28, "full")

    background.submit(fail)
    background.submit(second)
    threading.Timer(0.3, second.may_end.set).start()
    background.wait()
    assert second.written == [{}]
    background.close()


@pytest.mark.timeout(60)
def test_the_next_copy_is_not_made_before_the_last_is_written():
    weight, write, background = torch.zeros(1000), HeldWrite(), BackgroundWriter()
    background.submit(write, {"weight": weight})
    weight += 1
    second = threading.Thread(target=background.submit, args=(write, {"weight": weight}))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    write.may_end.set()
    second.join()
    background.close()
    assert [float(state["weight"].sum()) for state in write.written] == [0, 1000]


def test_a_failed_write_is_a_warning_and_the_last_one_an_error(caplog):
    def fail(**_: Any) -> Path:
        raise OSError("no space")

    background = BackgroundWriter()
    background.submit(fail, {})
    with caplog.at_level("WARNING", logger="dali_vit"):
        background.wait()
    assert "a checkpoint was not written in full (no space)" in caplog.text
    background.submit(fail, {})
    with pytest.raises(OSError, match="no space"):
        background.close()


@pytest.mark.timeout(60)
def test_the_thread_ends_even_if_the_last_write_fails():
    def fail() -> None:
        raise OSError("no space")

    before = set(threading.enumerate())
    background = BackgroundWriter()
    background.submit(fail)
    with pytest.raises(OSError, match="no space"):
        background.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.timeout(60)
def test_a_failed_write_is_told_of_where_training_ends_with_an_error(caplog):
    def fail() -> None:
        raise OSError("no space")

    with suppress(KeyboardInterrupt), BackgroundWriter() as background:
        background.submit(fail)
        raise KeyboardInterrupt
    assert caplog.messages == [
        "a checkpoint was not written in full (no space); the ones before are untouched, training goes on"
    ]


def test_copies_are_written_over_where_they_fit():
    state = {"a": torch.rand(3, 4), "deep": [torch.rand(5), {"b": torch.rand(2)}], "text": "x", "pair": (1, 2)}
    first, event = snapshot(state)
    assert event is None
    state["a"] += 1
    state["deep"][0] = torch.rand(6)
    second, _ = snapshot(state, first)
    assert second["a"] is first["a"]
    assert second["deep"][1]["b"] is first["deep"][1]["b"]
    assert torch.equal(second["a"], state["a"])
    assert second["a"].data_ptr() != state["a"].data_ptr()
    assert torch.equal(second["deep"][0], state["deep"][0])
    assert (second["text"], second["pair"]) == ("x", (1, 2))
    for other in (torch.rand(3, 4, dtype=torch.float64), torch.rand(4, 3)):
        assert torch.equal(snapshot({"a": other}, first)[0]["a"], other)


@pytest.mark.timeout(60)
def test_what_a_checkpoint_costs_the_training_is_logged(tiny_config, cpu, monkeypatch):
    """A write ends half a second after the next one wants to begin: nothing but the next step that saves sees it."""
    save, finish = checkpoint.save, BackgroundWriter._finish
    wanted = threading.Semaphore(0)

    def slow_save(*arguments: Any, **options: Any) -> Path:
        assert wanted.acquire(timeout=50)
        time.sleep(0.5)
        return save(*arguments, **options)

    def said_finish(self: BackgroundWriter) -> None:
        if self._pending:
            wanted.release()
        finish(self)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(BackgroundWriter, "_finish", said_finish)
    train(tiny_config, cpu, plan(tiny_config, 1))
    name = "perf/checkpoint_stall_ms"
    stalls = {m["step"]: m[name] for m in read_metrics(tiny_config.run_dir) if name in m}
    assert list(stalls) == [5, 10, 12]
    assert stalls[5] > 0
    assert stalls[10] >= 500
    assert stalls[12] >= 500


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_copy_from_the_gpu_waits_for_nothing_and_is_overtaken_by_nothing():
    weight = torch.zeros(64 << 20, device="cuda")
    copied, _ = snapshot({"weight": weight})  # pins the memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weight += 1
        again, event = snapshot({"weight": weight}, copied)
        weight += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert again["weight"] is copied["weight"]
    assert again["weight"].is_pinned()
    event.synchronize()
    assert again["weight"].eq(1).all()


@pytest.mark.timeout(60)
def test_events_are_handed_over_before_the_logs_are_flushed_and_the_write_begins(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard writes them in a thread of its own, which may be late."""
    done: list[str] = []
    monkeypatch.setattr(saving, "flush_logs", lambda run_dir: done.append("logs"))
    monkeypatch.setattr(checkpoint, "save", lambda **_: done.append("checkpoint"))
    monkeypatch.setattr(checkpoint, "add_metrics", lambda **_: done.append("metrics"))
    planned = plan(tiny_config, 1)
    loader: Any = SimpleNamespace(state_dict=lambda: {"num_samples": 54})
    writer: Any = SimpleNamespace(flush=lambda: done.append("events"))
    with Saver(tiny_config, cpu, planned, torch.optim.SGD(planned.model.parameters()), loader, writer) as saver:
        saver.save(3, evaluation_due=True)
        saver.newest()  # waits for the write
        saver.add_metrics(3, {"val/top1": 1.0})
    assert done == ["events", "logs", "checkpoint", "events", "logs", "metrics"]
