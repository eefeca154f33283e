"""A launcher's variables in the environment, how processes meet, and what the main process does alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch

from dali_vit import cli, distributed
from dali_vit.config import LocalUserError
from dali_vit.distributed import Group
from tests.conftest import environment, run
from tests.processes import free_port, run_to_end, running, wait_for
from tests.test_distributed import MEETING

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOT_MET = "though RANK and WORLD_SIZE are; start by torchrun or with --gpus, or unset RANK and WORLD_SIZE"


@contextmanager
def second_of_two(*_: object) -> Iterator[Group]:
    """`distributed.connect` of a process that is not the main one."""
    yield Group(1, 2, 1, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": ""}, None),
        ({"RANK": "", "WORLD_SIZE": "2"}, None),
        ({"RANK": "1"}, None),  # a group has a size, too: this process is alone and tells what is wrong
        ({"RANK": "1", "WORLD_SIZE": ""}, None),
        ({"SLURM_STEP_NUM_TASKS": ""}, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": ""}, None),
        ({"RANK": "one"}, "RANK=one"),
        ({"SLURM_STEP_NUM_TASKS": "1,2"}, "SLURM_STEP_NUM_TASKS=1,2"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "x"}, "SLURM_PROCID=x"),
    ],
)
def test_launchers_variables_that_are_empty_or_no_numbers(variables, told, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = run("verify", str(tmp_path / "absent"), capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    if told is None:
        assert err.startswith(f"dali-vit: {tmp_path}/absent: no such folder")
    else:
        assert err == f"dali-vit: {told}: not a whole number; set the one of this process or unset it\n"


@pytest.mark.timeout(60)
def test_a_working_directory_that_was_removed_is_named(tmp_path):
    """Else torch's libraries would not be found."""
    gone = tmp_path / "gone"
    gone.mkdir()
    remove = ["bash", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', "-", str(gone)]
    for arguments, code, out, err in [
        (["doctor"], 2, "", "dali-vit: the working directory was removed; cd to another\n"),
        (["--version"], 0, "0.1.0\n", ""),
    ]:
        gone.mkdir(exist_ok=True)
        ended = subprocess.run(
            [*remove, sys.executable, "-m", "dali_vit", *arguments],
            capture_output=True,
            text=True,
            timeout=50,
            env=environment(),
            check=False,
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, out, err)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("installed", [True, False])
def test_a_folder_of_the_users_is_not_taken_for_a_package_of_ours(installed, tmp_path):
    """Where that lies in the working directory; a checkout that is not installed is run from there or by PYTHONPATH."""
    ours, mine = tmp_path / "ours", tmp_path / "mine"
    (mine / "pipelines").mkdir(parents=True)
    (mine / "pipelines" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    ours.mkdir()
    if not installed:
        for name in ("dali_vit", "pipelines"):
            shutil.copytree(os.path.join(os.path.dirname(os.path.dirname(cli.__file__)), name), ours / name)
        with (ours / "dali_vit" / "cli.py").open("a") as file:
            file.write("PROGRAM = 'copied'\n")
    program = "dali-vit" if installed else "copied"
    for folder, path in [(mine, "")] if installed else [(mine, str(ours)), (ours, "")]:
        ended = subprocess.run(
            [sys.executable, "-m", "dali_vit", "predict", "--checkpoint", "absent", "absent.jpg"],
            capture_output=True,
            text=True,
            timeout=50,
            cwd=folder,
            env={**environment(), "PYTHONPATH": path},
            check=False,
        )
        assert (ended.returncode, ended.stderr) == (2, f"{program}: absent.jpg: no such image file\n")


LAUNCH_ONCE = "import sys; from dali_vit.launch import launch_once; sys.exit(launch_once(2, sys.argv[1:]))"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("ends", "code", "told"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(2 if rank == 1 else 0)", 2, ""),  # that one has said what the mistake is
        ("sys.exit(3 if rank == 1 else 0)", 3, "rank 1 (process 0) failed first, with exit code 3\n"),
        (
            "os.kill(os.getpid() if rank == 1 else 0, 9 * rank)",
            1,
            "rank 1 (process 0) failed first, with signal SIGKILL\n",
        ),
    ],
)
def test_how_workers_end_is_how_the_command_ends(ends, code, told, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\nrank = int(os.environ['RANK'])\nassert sys.argv[1:] == ['--flag']\n{ends}\n")
    ended = run_to_end("-c", LAUNCH_ONCE, script, "--flag", timeout=100)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert re.sub(r"process \d+", "process 0", ended.stderr) == told


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_cannot_be_gone_on_with(number, tmp_path):
    script, ready = tmp_path / "script.py", tmp_path / "ready"
    script.write_text("import os, sys, time\nopen(sys.argv[1] + os.environ['RANK'], 'w')\ntime.sleep(100)\n")
    with running("-c", LAUNCH_ONCE, str(script), str(ready)) as launcher:
        wait_for(lambda: len(list(tmp_path.glob("ready?"))) == 2, "the start")
        launcher.send_signal(number)
        launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + number


@pytest.mark.timeout(60)
def test_of_several_processes_the_main_one_predicts(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("dali_vit.distributed.connect", second_of_two)
    predict = ["predict", "--checkpoint", str(tmp_path), str(tmp_path / "no.jpg")]
    for more in ([], ["--json"]):
        assert run(*predict, *more, capsys=capsys) == (0, "", "")
    # Its mistakes end the others, too, in silence.
    monkeypatch.setattr("dali_vit.distributed.gather_objects", lambda mine: ["no.jpg: no such image file", mine])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(*predict, capsys=capsys) == (2, "", "")


@pytest.mark.timeout(60)
def test_an_image_that_the_main_process_cannot_decode_is_told_to_the_others(monkeypatch, capsys):
    """Which would wait for its answer; it is no UserError."""
    from pipelines.bad_samples import DecodeError

    def fail(*_: object, **__: object) -> None:
        raise DecodeError("a.jpg cannot be decoded", ["a.jpg"])

    told = []
    monkeypatch.setattr("dali_vit.inference.predict", fail)
    monkeypatch.setattr("dali_vit.distributed.gather_objects", lambda mine: (told.append(mine), [mine, None])[1])
    code, out, err = run("predict", "--checkpoint", "m", "a.jpg", "--gpus", "0", capsys=capsys)
    assert (code, out, err) == (2, "", "dali-vit: a.jpg cannot be decoded\n")
    assert told == ["a.jpg cannot be decoded"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": None}, f"MASTER_ADDR: not set, {NOT_MET} to run one process alone"),
        ({"MASTER_ADDR": ""}, f"MASTER_ADDR: not set, {NOT_MET} to run one process alone"),
        ({"MASTER_PORT": None}, f"MASTER_PORT: not set, {NOT_MET} to run one process alone"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be from 1 to 65535; choose a port that is free"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: must be from 1 to 65535; choose a port that is free"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: not a whole number; set the one of this process or unset it"),
        ({"RANK": "2"}, "RANK=2: must be from 0 to below WORLD_SIZE=2; number the processes from 0"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: not a whole number; set the one of this process or unset it"),
    ],
)
def test_a_launchers_variables_are_whole_or_named(variables, message, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING, **variables}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(LocalUserError) as refused, distributed.connect(0):
        raise AssertionError
    assert str(refused.value) == message


@pytest.mark.parametrize("variables", [{"RANK": ""}, {"RANK": "", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": ""}])
def test_empty_variables_make_no_worker(variables, monkeypatch):
    for name in (*LAUNCHER, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, variables.get(name, ""))
    assert not distributed.is_worker()
    with distributed.connect(0) as group:
        assert (group.rank, group.world_size) == (0, 1)


def test_what_srun_should_have_set_is_named(monkeypatch):
    slurm = {"STEP_NUM_TASKS": "2", "STEP_NODELIST": "n1", "JOB_ID": "7", "PROCID": "1", "STEP_TASKS_PER_NODE": "2"}
    for name in LAUNCHER:
        monkeypatch.setenv(name, "")  # so that all are as before in the end
    for name, value in {**slurm, "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("STEP_NODELIST", "JOB_ID", "PROCID", "LOCALID", "STEP_TASKS_PER_NODE"):
        told = "not set, though SLURM_STEP_NUM_TASKS is; start by srun, or unset SLURM_STEP_NUM_TASKS"
        with monkeypatch.context() as changed:
            changed.setenv(f"SLURM_{name}", "")
            with pytest.raises(LocalUserError, match=f"^SLURM_{name}: {told}$"):
                distributed.is_worker()
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "")  # of which the first is known
    assert distributed.is_worker()
    assert (os.environ["RANK"], os.environ["MASTER_PORT"]) == ("1", "10007")


def meeting_of_two(rank: int, port: int) -> subprocess.CompletedProcess[str]:
    """What becomes of a process that is given 2 s to meet another, and told after a quarter of it to say so."""
    program = """
from datetime import timedelta
from dali_vit import cli, distributed
distributed._SAID_AFTER, distributed.collective_timeout = 0.5, lambda seconds: timedelta(seconds=2)
cli.main(["predict", "--checkpoint", "absent", "absent.jpg", "--gpus", "0"])
"""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return run_to_end("-c", program, **variables)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_wait_in_vain_say_for_whom(rank):
    """The first finds that not all come, the others that nobody is there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = meeting_of_two(rank, port)
    assert (result.returncode, result.stdout) == (2, f"waiting for 2 processes to meet at 127.0.0.1:{port}\n")
    told = [line for line in result.stderr.splitlines() if line.startswith("dali-vit: ")]
    assert told == [
        f"dali-vit: 127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT): 2 processes (WORLD_SIZE) did not meet there within"
        " 0:00:02; start all of them, on machines that reach this address, or unset RANK and WORLD_SIZE to run one"
        " process alone"
    ]
    assert "Traceback" not in result.stderr


WAITING = """
import signal
from dali_vit import cli, distributed, process
if {ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
distributed._SAID_AFTER = 0.5
cli.run()
"""


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("ctrl_c_is_minded")
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("command", ["train", "predict"])
def test_ctrl_c_ends_a_process_that_waits_for_the_others(command, ignored):
    """Torch waits where no handler of Python's runs. What ignores Ctrl-C, as in a script's background, goes on."""
    flags = {"train": ["--data", "absent"], "predict": ["--checkpoint", "absent", "absent.jpg"]}[command]
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = WAITING.format(ignored=ignored)
    with running("-c", program, command, *flags, "--gpus", "0", anew=True, **variables) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline().startswith("waiting for 2 processes")
        os.kill(waiting.pid, signal.SIGINT)
        if ignored:
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(2)
        else:
            assert waiting.wait(20) == -signal.SIGINT


@pytest.mark.timeout(60)
def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        result = meeting_of_two(0, port)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"dali-vit: MASTER_PORT={port}: in use by another program; choose another port\n"


def test_processes_whom_their_launcher_has_meet_are_its_to_start_again(monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise torch.distributed.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0//cpu//0/1")

    variables = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", **MEETING}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.meeting, "init_arguments", fail)
    with pytest.raises(torch.distributed.DistStoreError), distributed.connect(0):
        raise AssertionError


def test_processes_that_have_met_are_not_said_to_wait(monkeypatch):
    """And of those of a machine one says that it waits."""
    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)
    done: list[str] = []

    class Timer:
        def __init__(self, seconds, work, arguments):
            assert (seconds, work) == (distributed._SAID_AFTER, distributed.log.warning)

        def start(self):
            done.append("start")

        def cancel(self):
            done.append("cancel")

    monkeypatch.setattr(distributed.threading, "Timer", Timer)
    for local_rank in (0, 1):
        with distributed._report_rendezvous(2, local_rank, timedelta(seconds=9)):
            done.append(f"{local_rank} waits")
    assert done == ["start", "0 waits", "cancel", "1 waits", "cancel"]


def test_a_process_of_a_launcher_takes_its_share_of_the_cores(monkeypatch):
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_core_share", lambda: 77)
    with distributed.connect(0) as group:
        assert group.cores == 77
