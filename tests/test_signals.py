"""A terminal that is closed during a run, and a signal that comes a second time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import run as launcher
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dali_vit import checkpoint, launch
from dali_vit.distributed import Group
from dali_vit.stopping import Stop, Watchdog
from tests.conftest import environment, read_metrics, write_image_folder
from tests.processes import LAUNCH, alive, command, logged_steps, running, wait_for
from tests.test_faults import stall, wait_for_stall


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("hang_up_is_minded")
@pytest.mark.parametrize("starter", [("-m", "dali_vit"), ("-c", LAUNCH)])
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_ends_a_run_with_a_checkpoint_but_not_under_nohup(nohup, starter, image_folder, tmp_path):
    """The kernel sends SIGHUP to all processes of the terminal, and whatever they write to it fails."""
    controller, terminal = os.openpty()
    run_dir = tmp_path / "run"
    steps = 60 if nohup else 100_000

    def in_terminal() -> None:  # a session of its own, with the terminal
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def shown_and_done() -> bool:
        with contextlib.suppress(BlockingIOError):
            while os.read(controller, 4096):
                pass
        return logged_steps(run_dir) > 12

    arguments = [sys.executable, *starter, *command(image_folder, tmp_path, steps=steps)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen(arguments, **streams, env=environment(), start_new_session=True, preexec_fn=in_terminal)
    try:
        os.close(terminal)
        os.set_blocking(controller, False)
        wait_for(shown_and_done, "step 12")
        os.close(controller)
        assert process.wait(60) == (0 if nohup else 75)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    assert not alive(process.pid)
    stopped_at = checkpoint.newest(run_dir).step
    assert stopped_at == read_metrics(run_dir)[-1]["step"]
    assert stopped_at == 60 if nohup else stopped_at > 12


@pytest.mark.timeout(120)
def test_a_second_signal_ends_the_process_at_once(image_folder, tmp_path):
    # The steps of the first batch that reads the pipe never end, so the first signal alone cannot be obeyed.
    data = write_image_folder(tmp_path / "data", train=4, val=2)
    with running("-m", "dali_vit", *command(data, tmp_path, "--log-every", "1", steps=4000)) as process:
        wait_for(lambda: logged_steps(tmp_path / "run") > 2, "step 2")
        stall(data)
        wait_for_stall(tmp_path / "run")
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(("given", "expected"), [(None, 300), ("20", 20)])
def test_workers_have_minutes_to_write_a_checkpoint_before_they_are_killed(given, expected, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", given or "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if given is None:
        monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    configs = []
    monkeypatch.setattr(
        launcher, "main", lambda argv: configs.append(launcher.config_from_args(launcher.parse_args(argv)))
    )
    assert launch.launch(2, ["train"], max_restarts=0) == 0
    ((config, _, arguments),) = configs
    assert arguments[-2:] == ["dali_vit", "train"]
    if not hasattr(config, "shutdown_timeout"):
        pytest.skip("torch before 2.15 waits 30 s")
    assert config.shutdown_timeout == expected


@pytest.mark.parametrize("nohup", [False, True])
def test_the_launcher_passes_on_each_signal_that_ends_it(nohup, monkeypatch) -> None:
    """Of SIGQUIT, which a terminal sends for Ctrl-\\, the workers would know nothing else, and save nothing."""
    monkeypatch.setattr(launch, "hang_up_is_ignored", lambda: nohup)
    given: list[list[str]] = []
    monkeypatch.setattr(launcher, "main", given.append)
    assert launch.launch_once(2, ["-m", "a"]) == 0
    (signals,) = (word.partition("=")[2] for word in given[0] if word.startswith("--signals-to-handle="))
    assert signals.split(",") == ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", *([] if nohup else ["SIGHUP"])]


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("3", "3")])
def test_workers_have_one_openmp_thread_unless_the_user_says_otherwise(given, expected, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    seen: list[str] = []
    monkeypatch.setattr(launcher, "main", lambda _: seen.append(os.environ["OMP_NUM_THREADS"]))
    assert launch.launch_once(2, ["-m", "a"]) == 0
    assert seen == [expected]


def test_what_is_given_up_ends_with_1_whatever_the_worker_ended_with(monkeypatch, caplog) -> None:
    """A worker that was killed has a negative code, which is none of a process."""
    started: list[list[str]] = []
    monkeypatch.setattr(launch, "_start", lambda processes, program: started.append(program[2:]) or -signal.SIGKILL)
    assert launch.launch(2, ["train"], max_restarts=1) == 1
    assert started == [["train"], ["train", "--resume"]]
    assert caplog.messages == ["restart 1 of 1, from the last checkpoint", "given up after 1 restarts (--max-restarts)"]


@pytest.mark.parametrize(
    ("code", "told"), [(2, []), (75, []), (70, ["rank 1 (process 5) failed first, with exit code 70"])]
)
def test_a_worker_that_ends_in_order_has_not_failed(code, told, monkeypatch, caplog) -> None:
    def main(_: list[str]) -> None:
        raise ChildFailedError("a", {1: ProcessFailure(1, 5, code, "")})

    monkeypatch.setattr(launcher, "main", main)
    assert launch.launch_once(2, ["-m", "a"]) == code
    assert caplog.messages == told


ROOT = Path(__file__).parents[1]
TWICE = """
import os, signal, time, torch
from dali_vit.distributed import Group
from dali_vit.stopping import Stop

stop = Stop(Group(0, 1, 0, 1, torch.device("cpu")), None, 0, ends_process=True)
with stop.watching():
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    print(stop.reason(), flush=True)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.1)
del stop
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
print("ended in order", flush=True)
time.sleep({pause})
os.kill(os.getpid(), signal.SIGTERM)
time.sleep({pause})
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("pause", "code"), [("0", 0), ("1.1", 128 + signal.SIGTERM)])
def test_a_signal_that_terminal_and_launcher_both_pass_on_is_one(pause, code) -> None:
    """Also while the process ends, whose exit code a scheduler or a script goes by."""
    program = [sys.executable, "-c", TWICE.replace("{pause}", pause)]
    ended = subprocess.run(program, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment(), check=False)
    assert ended.stdout == "stopped by SIGINT\nended in order\n"
    assert ended.returncode == code


@pytest.mark.usefixtures("hang_up_is_minded")
@pytest.mark.parametrize(("stopped", "ends_process"), [(False, True), (False, False), (True, False)])
def test_where_the_process_goes_on_what_handled_the_signals_before_does_again(stopped, ends_process, cpu) -> None:
    """As in a notebook, where a run was stopped."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    stop = Stop(cpu, None, 0, ends_process=ends_process)
    with stop.watching():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
        if stopped:
            signal.raise_signal(signal.SIGTERM)
            wait_for(stop.reason, "the signal")
    assert {number: signal.getsignal(number) for number in before} == before
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    assert descriptor == -1


@pytest.mark.parametrize(("device", "steps"), [("cpu", list(range(1, 31))), ("cuda", [10, 20, 30])])
def test_on_gpus_the_ranks_agree_every_ten_steps_alone(device, steps, monkeypatch) -> None:
    """Which makes the hosts wait for each other, where else they run ahead."""
    stop = Stop(Group(0, 1, 0, 1, torch.device(device)), None, 0)
    monkeypatch.setattr(stop, "reason", lambda: "stopped by SIGTERM")
    assert [step for step in range(1, 31) if stop.agreed(step)] == steps


def test_a_signal_is_told_of_though_the_hours_are_over_too(cpu) -> None:
    stop = Stop(cpu, 1e-12, 0)
    stop.start_clock()
    assert stop.reason() == "--max-hours are over"
    with stop.watching():
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: stop.reason() != "--max-hours are over", "the signal")
    assert stop.reason() == "stopped by SIGTERM"


def test_other_signals_that_the_process_handles_do_not_stop_a_run(cpu) -> None:
    """As a site's wrapper may, to log what a job does."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        stop = Stop(cpu, None, 0)
        with stop.watching():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
            wait_for(stop.reason, "the signals")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stop.reason() == "stopped by SIGTERM"


@pytest.mark.parametrize(("seconds", "watching"), [(0, 0), (600, 1)])
def test_the_watchdog_watches_while_its_block_runs_and_never_without_seconds(seconds, watching, cpu) -> None:
    """Else it would end a notebook after the run, or at once a run with --hang-timeout 0."""
    before = set(threading.enumerate())
    with Watchdog(cpu, seconds, "preparation", 0):
        begun = [thread for thread in set(threading.enumerate()) - before if thread.name == "watchdog"]
        assert len(begun) == watching
    for thread in begun:
        thread.join(10)
        assert not thread.is_alive()
