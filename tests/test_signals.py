"""A terminal that is closed during a run, and a signal that comes a second time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from torch.distributed import run as launcher

from dali_vit import checkpoint, launch
from dali_vit.stopping import Stop
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
