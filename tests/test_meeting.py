"""Processes that torchrun has started again meet each other, and none that have died."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dali_vit import checkpoint, meeting
from tests.processes import command, logged_steps, running, wait_for

SECONDS = timedelta(seconds=20)


@pytest.fixture
def port() -> Iterator[int]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=SECONDS)
    yield store.port
    del store


def join(port: int, rank: int, met: dict[int, str]) -> threading.Thread:
    def meet() -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=SECONDS)
        met[rank] = meeting.agree(store, rank, 3, SECONDS)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    return thread


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("order", "early"), [((0, 2, 1), []), ((0, 1, 2), [1]), ((2, 1, 0), [])])
def test_each_attempt_has_a_name_of_its_own_whoever_comes_first(
    port: int, order: tuple[int, ...], early: list[int]
) -> None:
    names = []
    for _ in range(3):
        met: dict[int, str] = {}
        threads = [join(port, rank, met) for rank in order[:-1]]
        time.sleep(0.5)
        assert list(met) == early  # others wait, though the store knows the name of the attempt before
        threads.append(join(port, order[-1], met))
        for thread in threads:
            thread.join(20)
        assert sorted(met) == [0, 1, 2]
        assert len(set(met.values())) == 1
        names.append(met[0])
    assert len(set(names)) == 3


@pytest.mark.timeout(60)
def test_who_meets_nobody_says_so(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=SECONDS)
    store.set("dali_vit/meeting", "of a rank 0 that has died")
    with pytest.raises(dist.DistStoreError, match=r"^rank 2 of 3 has met no rank 0 within 0:00:01$"):
        meeting.agree(store, 2, 3, timedelta(seconds=1))


def test_without_torchrun_torch_meets_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert meeting.init_arguments(0, 2, SECONDS) == {}


@pytest.mark.timeout(240)
def test_torchrun_starts_a_run_again_after_a_process_has_died(image_folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    launcher += ["--max-restarts=1", "-m", "dali_vit", *command(image_folder, tmp_path, "--hang-timeout", "30")]
    with running(*launcher) as process:
        wait_for(lambda: checkpoint.newest(run_dir) is not None and logged_steps(run_dir) > 12, "step 12")
        os.kill(worker(process.pid, "1"), signal.SIGKILL)
        out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert re.search(r"resuming  after step \d+", out + err)
    assert checkpoint.newest(run_dir).step == 60


def worker(launcher: int, rank: str) -> int:
    """The process of that rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(child)
    raise AssertionError
