"""Scalars and images in the log, and what a run that goes on keeps of them."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.summary.writer import event_file_writer

from dali_vit import metric_log, metrics, report
from dali_vit.distributed import Group
from dali_vit.metric_log import MetricLog
from dali_vit.metrics import StepTimer, Window, peak_flops
from dali_vit.train import _is_evaluated
from tests.conftest import read_metrics


def attempt(run_dir: Path, start: int, steps: range, value: float) -> None:
    log = MetricLog(run_dir, start)
    if start == 0:
        log.image("samples/train", np.zeros((4, 4, 3), np.uint8), 0)
    for step in steps:
        log.scalars(step, {"train/loss": value})
    log.close()


def logged(run_dir: Path) -> tuple[list[tuple[int, float]], int]:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("train/loss")], len(events.Images("samples/train"))


def test_what_was_logged_up_to_the_checkpoint_stays_and_what_comes_again_goes(tmp_path: Path) -> None:
    attempt(tmp_path, 0, range(1, 6), 1.0)
    attempt(tmp_path, 3, range(4, 7), 2.0)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert logged(tmp_path) == (expected, 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == expected


def test_a_log_that_an_exception_ends_is_closed(tmp_path: Path) -> None:
    hook = threading.excepthook
    log = MetricLog(tmp_path, 0)
    with suppress(InterruptedError), log:
        log.scalars(1, {"train/loss": 1.0})
        raise InterruptedError
    assert threading.excepthook is hook
    assert log._lines.closed
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0)]


def test_lines_that_are_none_of_ours_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[1, 2]\n{"step"\n3\n{"step": 2}\n')
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xf4garbage\n")
    attempt(tmp_path, 1, range(2, 3), 1.0)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_of_an_attempt_without_a_checkpoint_nothing_stays(tmp_path: Path) -> None:
    attempt(tmp_path, 0, range(1, 6), 1.0)
    attempt(tmp_path, 0, range(1, 4), 2.0)
    assert logged(tmp_path) == ([(1, 2.0), (2, 2.0), (3, 2.0)], 1)


def test_windows_of_time_follow_on_one_another_but_for_what_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the rate that is logged would leave out what logging itself takes."""
    now = 100.0
    monkeypatch.setattr("dali_vit.metrics.time", SimpleNamespace(perf_counter=lambda: now))

    def step(waits: float, works: float) -> None:
        nonlocal now
        with timer.waiting():
            now += waits
        now += works

    timer = StepTimer(torch.device("cpu"))
    for _ in range(4):
        step(0.25, 1.0)
    assert timer.read() == (4, 5.0, 1.0)
    now += 0.5  # a log line
    step(0.0, 1.0)
    assert timer.read() == (1, 1.5, 0.0)
    now += 60.0  # an evaluation
    timer.reset()
    step(0.5, 1.0)
    assert timer.read() == (1, 1.5, 0.5)


@pytest.mark.parametrize("every", [1e-308, 0.3, 1.0, 2.5, 7.75, 1238.6])
def test_evaluations_come_when_a_multiple_is_reached(every: float) -> None:
    expected = {math.ceil(i * every) for i in range(1, 20_000)} if every >= 0.3 else set(range(1, 5000))
    assert [step for step in range(1, 5000) if _is_evaluated(step, every)] == sorted(s for s in expected if s < 5000)
    assert not any(_is_evaluated(step, 0.0) for step in range(1, 100))


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA A40", 150),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_is_that_of_the_gpu_by_its_whole_name(monkeypatch, name, teraflops) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == (teraflops and teraflops * 1e12)


def test_a_window_knows_the_longest_wait_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rank 1 that waits for data; rank 0 waits for it in the exchange of gradients."""
    cpu = torch.device("cpu")
    windows = [Window(Group(rank, 2, rank, 2, cpu)) for rank in range(2)]
    for loss, window in zip((1.0, 2.0), windows, strict=True):
        for _ in range(3):
            window.add(torch.tensor(loss), torch.tensor(2 * loss))
    messages: list[torch.Tensor] = []
    monkeypatch.setattr(metrics, "sum_over_ranks", lambda tensor: messages.append(tensor) or tensor)
    windows[1].read(5, 0.9)
    monkeypatch.setattr(metrics, "sum_over_ranks", lambda tensor: tensor + messages[0])
    assert windows[0].read(2, 0.1) == (1.5, 3.0, 0.9)
    assert (windows[0].skipped, windows[0].healthy, windows[0].more_bad_samples) == (0, True, True)
    group = Group(0, 2, 0, 2, cpu)
    assert metrics.speed(3, 1.0, 0.9, batch_size=8, train_flops=1.0, group=group)["perf/data_wait_pct"] == 90
    assert metrics.speed(3, 1.0, 1.1, batch_size=8, train_flops=1.0, group=group)["perf/data_wait_pct"] == 100


def test_a_window_is_healthy_if_its_last_step_was_taken() -> None:
    """A step left out earlier keeps no checkpoint from being written, and one taken earlier has none written."""
    window = Window(Group(0, 1, 0, 1, torch.device("cpu")))
    found = []
    for norms in ((2.0, math.nan, 2.0), (2.0, 2.0, math.nan), (2.0, 2.0, 2.0)):
        for norm in norms:
            window.add(torch.tensor(1.0), torch.tensor(norm))
        assert window.read(0, 0.0) == (1.0, 2.0, 0.0)
        found.append((window.healthy, window.skipped))
    assert found == [(True, 1), (False, 2), (True, 2)]


def test_every_rank_knows_when_one_of_them_finds_another_bad_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows is collective: a rank that did not know would leave the others waiting."""
    cpu = torch.device("cpu")
    windows = [Window(Group(rank, 2, rank, 2, cpu)) for rank in range(2)]
    found = []
    for counts in ((1, 0), (1, 0), (1, 1)):
        total = torch.tensor([2.0, 2.0, 2.0, sum(counts), 0.0, 0.0], dtype=torch.float64)
        monkeypatch.setattr(metrics, "sum_over_ranks", lambda sent, total=total: total)
        for window, count in zip(windows, counts, strict=True):
            window.add(torch.tensor(1.0), torch.tensor(1.0))
            window.read(count, 0.0)
        found.append([window.more_bad_samples for window in windows])
    assert found == [[True, True], [False, False], [True, True]]


def test_the_time_left_forgets_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 seconds of compilation, then a step a second."""
    now = 100.0
    monkeypatch.setattr(report.time, "perf_counter", lambda: now)
    left = report.TimeLeft(total=110, start=10)
    now += 60
    assert left.after(20) == 540
    found = []
    for done in (30, 40, 110):
        now = 160.0 + done - 20
        found.append(left.after(done))
    assert found == [80, 70, 0]


@pytest.mark.parametrize("clocks", [(5000, 0, -10), (0, 0, 0), (0, 1000, 1), (0, 0, 1000), (-1000, -1000, 0)])
def test_a_clock_that_goes_back_or_stands_still_hides_nothing(
    clocks: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of processes of the same number, too, as in containers: their files then differ in the second alone."""
    (tmp_path / "events.out.tfevents.of-others").write_bytes(b"")
    right = time.time
    made = []
    for start, wrong in zip((0, 3, 5), clocks, strict=True):
        monkeypatch.setattr(event_file_writer.time, "time", lambda wrong=wrong: right() + wrong)
        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
        monkeypatch.setattr(event_file_writer.socket, "gethostname", lambda: "host")
        monkeypatch.setattr(event_file_writer.os, "getpid", lambda: 7)
        attempt(tmp_path, start, range(start + 1, start + 4), float(start))
        files = sorted(path.name for path in tmp_path.glob("*.host.*"))
        made.append(files[-1])
    assert logged(tmp_path) == ([(1, 0), (2, 0), (3, 0), (4, 3), (5, 3), (6, 5), (7, 5), (8, 5)], 1)
    assert len(files) == 3
    ahead = [i for i in range(3) if any(clocks[i] > later + 2 for later in clocks[i + 1 :])]
    assert [i for i in range(3) if made[i] not in files] == ahead  # no other is taken from a reader


def test_texts_of_a_run_that_goes_on_stand_at_the_step_it_goes_on_from(tmp_path: Path) -> None:
    for start, text in ((0, "first"), (7, "second")):
        log = MetricLog(tmp_path, start)
        log.text("config", text)
        log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("config/text_summary")]
    assert texts == [(0, "```\nfirst\n```"), (7, "```\nsecond\n```")]


@pytest.mark.parametrize("removed", ["the folder", "metrics.jsonl"])
def test_new_events_begin_where_they_were_removed(removed: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = log_of_two_steps(folder)
    shutil.rmtree(folder) if removed == "the folder" else (folder / "metrics.jsonl").unlink()
    log.scalars(3, {"a": 1.0})
    log.scalars(4, {"a": 1.0})
    log.close()
    found = [[e.file_version or e.step for e in EventFileLoader(str(f)).Load()] for f in folder.glob("events.*")]
    # A file begins with its version; one of a start has that twice, and where it begins.
    version = "brain.Event:2"
    assert found == [[version, 3, 4] if removed == "the folder" else [version, version, 0, 1, 2, 3, 4]]
    assert [line["step"] for line in read_metrics(folder)] == [3, 4]


@pytest.mark.parametrize("kept", [False, True])
def test_a_log_that_is_replaced_or_that_a_network_disk_keeps_is_noticed(
    kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An editor replaces the file; NFS gives one that is open another name when it is removed."""
    log, path = log_of_two_steps(tmp_path), tmp_path / "metrics.jsonl"
    if kept:
        path.rename(tmp_path / ".nfs0001")
    else:
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)
    for step in (3, 4):
        log.scalars(step, {"a": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == ([3, 4] if kept else [1, 2, 3, 4])
    removed = "removed: a new one begins with step 3"
    replaced = "replaced: what is logged from step 3 on is added to what is there now"
    assert caplog.messages == [f"{path} was {removed if kept else replaced}"]


def test_a_folder_that_cannot_be_made_again_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = log_of_two_steps(tmp_path / "a" / "run")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").touch()
    for step in (3, 4):
        log.scalars(step, {"a": 1.0})
    log.close()
    path = tmp_path / "a/run/metrics.jsonl"
    assert caplog.messages == [
        f"{path} cannot be written to (Not a directory); training goes on without these lines",
        "no more TensorBoard events are written (Not a directory); training goes on",
    ]


def test_a_file_system_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = log_of_two_steps(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(metric_log.os.path, "samestat", fail)
        log.scalars(3, {"a": 1.0})
    log.scalars(4, {"a": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4]
    told = f"{tmp_path}/metrics.jsonl cannot be written to (Stale file handle); training goes on without these lines"
    assert caplog.messages == [told]


def log_of_two_steps(folder: Path) -> MetricLog:
    folder.mkdir(parents=True, exist_ok=True)
    log = MetricLog(folder, 0)
    for step in (1, 2):
        log.scalars(step, {"a": 1.0})
    log.flush()
    return log


def test_gpus_report_their_memory_in_gib_and_their_waits_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def elapsed_time(self, other: object) -> float:
            return 40.0  # milliseconds

    synchronized: list[int] = []
    stream = SimpleNamespace(synchronize=lambda: synchronized.append(1))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    clock = iter([10.0, 12.0, 12.03])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    device = torch.device("cuda", 0)
    timer = metrics.StepTimer(device)
    # A wait is at most the window's time, from which the stream's may differ a little.
    for steps, seconds, waited in ((2, 2.0, 0.08), (1, 0.03, 0.03)):
        for _ in range(steps):
            with timer.waiting():
                pass
        before = len(synchronized)
        assert timer.read() == (steps, pytest.approx(seconds), pytest.approx(waited))
        assert len(synchronized) == before + 1
    scalars = metrics.speed(4, 2.0, 0.5, batch_size=16, train_flops=1e12, group=Group(0, 2, 0, 2, device))
    assert scalars == {
        "perf/images_per_sec": 32.0,
        "perf/images_per_sec_per_gpu": 16.0,
        "perf/step_ms": 500.0,
        "perf/data_wait_pct": 25.0,
        "perf/mfu_pct": pytest.approx(100 * 32e12 / (2 * 989e12)),
        "memory/gpu_peak_gib": 3.0,
    }
