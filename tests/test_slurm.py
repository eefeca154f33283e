"""`dali-vit train` under the variables that srun sets: two "nodes" of one task each, on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dali_vit import checkpoint, distributed
from dali_vit.config import LocalUserError
from tests import processes
from tests.processes import command, free_port, logged_steps, wait_for


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """A job's variables; scontrol, which resolves the list of nodes, names this machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && echo 127.0.0.1 && echo node2\n'
    )
    (tools / "scontrol").chmod(0o755)
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": str(1_000_000 + free_port() - 10_000),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_LOCALID": "0",
    }


Start = Callable[[dict[str, str], int, list[str]], processes.Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a task of a job, which ends with the test."""
    with contextlib.ExitStack() as stack:

        def started(job: dict[str, str], rank: int, arguments: list[str]) -> processes.Process:
            own = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)}
            return stack.enter_context(processes.running("-m", "dali_vit", *arguments, **job, **own))

        yield started


def finish(tasks: list[processes.Process]) -> list[tuple[str, str]]:
    return [task.communicate(timeout=90) for task in tasks]


@pytest.mark.timeout(240)
def test_a_job_is_one_run_and_is_requeued_by_its_signal(image_folder, tmp_path, job, start):
    arguments = command(image_folder, tmp_path, steps=150)
    tasks = [start(job, rank, arguments) for rank in (0, 1)]
    wait_for(lambda: logged_steps(tmp_path / "run") > 12, "step 12")
    for task in tasks:  # as scancel and --signal do
        task.send_signal(signal.SIGTERM)
    outputs = finish(tasks)
    assert [task.returncode for task in tasks] == [75, 75], outputs
    assert "2 x CPU" in outputs[0][0]
    assert "stopped by SIGTERM" in outputs[0][1]
    assert "dali-vit" not in outputs[1][0] + outputs[1][1]  # rank 0 speaks for all
    stopped = checkpoint.newest(tmp_path / "run")
    assert 12 < stopped.step < 150
    assert stopped.loader["world_size"] == 2

    # The job started again, of which one node does not see the folder: nothing is trained.
    tasks = [start(job, 0, arguments), start(job, 1, command(image_folder, tmp_path / "elsewhere", steps=150))]
    outputs = finish(tasks)
    assert [task.returncode for task in tasks] == [2, 2], outputs
    assert outputs[0][1] == (
        f"dali-vit: --runs-dir {tmp_path}: the processes would go on from different steps ({stopped.step}, 0);"
        " the folder must be on a file system that all nodes see\n"
    )
    # ... nor where one does not see the images.
    tasks = [start(job, 0, arguments), start(job, 1, command(tmp_path / "nowhere", tmp_path, steps=150))]
    outputs = finish(tasks)
    assert [task.returncode for task in tasks] == [2, 2], outputs
    assert outputs[0][1].startswith("dali-vit: rank 1: ")
    assert "nowhere" in outputs[0][1]
    assert checkpoint.newest(tmp_path / "run").step == stopped.step

    tasks = [start(job, rank, arguments) for rank in (0, 1)]
    outputs = finish(tasks)
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert f"after step {stopped.step}" in outputs[0][0]
    assert checkpoint.newest(tmp_path / "run").step == 150


@pytest.mark.parametrize(
    ("variable", "value"), [("SLURM_STEP_TASKS_PER_NODE", "many"), ("SLURM_NODEID", "-1"), ("SLURM_NODEID", "x")]
)
def test_what_srun_does_not_set_is_named(variable, value, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored
    srun = {"STEP_NUM_TASKS": "4", "STEP_TASKS_PER_NODE": "2(x2)", "JOB_ID": "7", "PROCID": "1", "LOCALID": "1"}
    for name, given in {**{f"SLURM_{name}": set_to for name, set_to in srun.items()}, variable: value}.items():
        monkeypatch.setenv(name, given)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    with pytest.raises(LocalUserError, match=f"^{variable}={value}: "):
        distributed.is_worker()


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "expected"),
    [("8(x2)", 1, "8"), ("8(x2),4", 0, "8"), ("8(x2),4", 1, "8"), ("8(x2),4", 2, "4"), ("2,1", 1, "1"), ("3", 0, "3")],
)
def test_tasks_per_node(monkeypatch, tasks_per_node, node, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    variables = {"NUM_TASKS": "20", "TASKS_PER_NODE": tasks_per_node}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    for name, value in {"JOB_ID": "7", "PROCID": "9", "LOCALID": "1", "NODEID": str(node)}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert distributed.is_worker()
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")]
    assert found == ["9", "20", "1", expected, "10007"]


@pytest.mark.parametrize(
    ("job", "step", "port"), [("7", None, "10007"), ("7", "0", "10007"), ("7", "2", "25845"), ("1019999", "1", "17918")]
)
def test_jobs_and_steps_of_a_node_have_ports_of_their_own(job, step, port, monkeypatch):
    """Below those that Linux gives to outgoing connections, from 32,768 on."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is restored
    given = {"STEP_NUM_TASKS": "2", "STEP_TASKS_PER_NODE": "2", "JOB_ID": job, "PROCID": "0", "LOCALID": "0"}
    for name, value in {**given, "STEP_ID": step or ""}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert distributed.is_worker()
    assert os.environ["MASTER_PORT"] == port


def test_what_is_set_already_is_kept(monkeypatch):
    """By a launcher that srun started, or by a user who knows a port that is free."""
    given = {"STEP_NUM_TASKS": "2", "STEP_TASKS_PER_NODE": "1(x2)", "JOB_ID": "7", "PROCID": "1", "LOCALID": "0"}
    for name, value in {**given, "NODEID": "1", "STEP_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    launchers = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**launchers, **meeting}.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_worker()
    assert {name: os.environ[name] for name in (*launchers, *meeting)} == {**launchers, **meeting}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE")  # left over in the shell that srun was started from
    assert distributed.is_worker()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", *meeting)] == ["1", "2", *meeting.values()]
