"""Processes under test, and what tests ask of their runs.

Most processes are forked off a server that has imported everything, as a start of Python takes 4 s for that. Each has a
session, an environment, streams and an end of its own, but all have the same seed of Python's hashes. Tests of the
start itself, and of variables that are read at import, need `anew`. Launchers are forked, too; the workers that they
start are not.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import TextIOWrapper
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from dali_vit import checkpoint
from tests.conftest import TINY, environment

ROOT = Path(__file__).parents[1]
LAUNCH = "import sys; from dali_vit.launch import launch; sys.exit(launch(2, sys.argv[1:], max_restarts=2))"
IMPORTED = [
    "dali_vit.process",
    "dali_vit.train",
    "dali_vit.inference",
    "dali_vit.plan",
    "dali_vit.preview",
    "dali_vit.verify",
    "torch.distributed.run",
    "tests.frozen",
]


@functools.cache
def _server(environ: tuple[tuple[str, str], ...]) -> ForkServerContext:
    """A context whose fork server is running, in an environment that no test has changed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    changed = dict(os.environ)
    os.environ.clear()
    os.environ.update(environ)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(changed)
    return context


_START = tuple(environment().items())


class Forked:
    """`python ARGUMENTS` as a fork, with some of the names of `Popen`.

    ARGUMENTS: those of `-m dali_vit` or `-m torch.distributed.run`; or a program, as a file or after `-c`, and its own.
    """

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], output: int = subprocess.PIPE) -> None:
        context = _server(_START)
        self.args = list(arguments)
        self.stdout: TextIOWrapper | None = None
        self.stderr: TextIOWrapper | None = None
        ends: list[Connection | None] = [None, None]
        if output == subprocess.PIPE:
            (out, ends[0]), (err, ends[1]) = context.Pipe(duplex=False), context.Pipe(duplex=False)
            self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno()), "r") for end in (out, err))
            out.close()
            err.close()
        heeds = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        self._process = context.Process(target=_child, args=(self.args, dict(env), os.getcwd(), ends, heeds))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        for end in ends:
            if end is not None:
                end.close()

    @property
    def returncode(self) -> int | None:
        """The exit code, up to date as after `poll`."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that the process writes to stdout and stderr, once it has ended."""
        read: dict[int, str] = {}

        def drain(index: int, stream: TextIOWrapper) -> None:
            read[index] = stream.read()

        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        drains = [threading.Thread(target=drain, args=each, daemon=True) for each in enumerate(streams)]
        for thread in drains:
            thread.start()
        self.wait(timeout)
        for thread in drains:
            thread.join(10)
            assert not thread.is_alive(), "something still holds its stdout or stderr"
        return read.get(0, ""), read.get(1, "")


def _child(arguments: list[str], env: dict[str, str], folder: str, ends: list[Connection | None], heeds: bool) -> None:
    """Gives the fork all that a new process would have, but for the imports, and runs its program."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL if heeds else signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor, end in enumerate(ends, start=1):
        os.dup2(nowhere if end is None else end.fileno(), descriptor)
        if end is not None:
            end.close()
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    if arguments[:2] == ["-m", "dali_vit"]:
        from dali_vit.cli import run

        sys.argv = arguments[1:]
        run()
    if arguments[:2] == ["-m", "torch.distributed.run"]:
        from torch.distributed.run import main

        main(arguments[2:])
        return
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


Process = Forked | subprocess.Popen[str]


def start(*arguments: str, anew: bool = False, output: int = subprocess.PIPE, **variables: str) -> Process:
    """Starts `python ARGUMENTS` as the leader of a session, with these variables in its environment."""
    env = {**environment(), **variables}
    if not anew:
        return Forked(arguments, env=env, output=output)
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=output, stderr=output, text=True, env=env, start_new_session=True
    )


def end(process: Process) -> None:
    """Kills a process with all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait(30)


@contextlib.contextmanager
def running(*arguments: str, **options: Any) -> Iterator[Process]:
    """A process of `start`, which is killed with all its children if it outlives the block."""
    process = start(*arguments, **options)
    try:
        yield process
    finally:
        end(process)


def dali_vit(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `dali-vit ARGUMENTS` to its end."""
    return run_to_end("-m", "dali_vit", *arguments, **options)


def run_to_end(*arguments: str | Path, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` to its end."""
    with running(*map(str, arguments), **options) as process:
        out, err = process.communicate(timeout=timeout)
        assert process.returncode is not None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_ranks(
    count: int, *arguments: str, code: int = 0, timeout: float = 240, **variables: str
) -> list[tuple[str, str]]:
    """Runs `count` processes with a launcher's variables, which must all end with `code`; returns what they wrote."""
    variables |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(running(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **variables))
            for rank in range(count)
        ]
        with ThreadPoolExecutor(count) as pool:  # all at once, as a process whose pipe is full waits
            ends = {pool.submit(process.communicate, timeout): process for process in processes}
            for ended in as_completed(ends):
                if ended.exception() or ends[ended].returncode != code:  # the other ranks would wait for it
                    for process in processes:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
        written = [ended.result() for ended in ends]
        assert [process.returncode for process in processes] == [code] * count, written
    return written


def free_port() -> int:
    # Far from those of pytest's other workers, whose process ids are the next ones: else both may choose the same. From
    # 32,768 on Linux chooses itself.
    for port in range(20_000 + 25 * (os.getpid() % 500), 32_768):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError


def command(data: Path, runs_dir: Path, *more: str, steps: int = 60) -> list[str]:
    """Arguments of a small run: steps of a few milliseconds, and a checkpoint every ten of them."""
    return [
        *("train", "--data", str(data), "--runs-dir", str(runs_dir), "--name", "run", "--gpus", "0", *TINY),
        *("--steps", str(steps), "--threads", "1", "--log-every", "1", "--eval-every", "0"),
        *("--checkpoint-every", "10", *more),
    ]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.002)


def logged_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.newest(run_dir).model_state()


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
