"""Runs that are disturbed: signals, dead workers and launchers, stalled readers, other world sizes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dali_vit import checkpoint, distributed, stopping
from tests.conftest import environment, read_metrics, write_image_folder
from tests.processes import (
    LAUNCH,
    alive,
    assert_equal,
    command,
    dali_vit,
    free_port,
    logged_steps,
    run_ranks,
    run_to_end,
    running,
    wait_for,
    weights,
)


@pytest.fixture(scope="module")
def whole(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the run that nothing interrupts, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    result = dali_vit(*command(image_folder, folder))
    assert result.returncode == 0, result.stderr
    return weights(folder / "run")


def workers_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if b"dali_vit" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("hang_up_is_minded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_asks_for_a_requeue(number, image_folder, tmp_path, whole):
    run_dir = tmp_path / "run"
    with running("-m", "dali_vit", *command(image_folder, tmp_path)) as process:
        wait_for(lambda: logged_steps(run_dir) > 12, "step 12")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert f"stopped by {number.name} after step" in err
    stopped_at = checkpoint.newest(run_dir).step
    assert 12 < stopped_at < 60
    assert stopped_at == read_metrics(run_dir)[-1]["step"]
    assert dali_vit(*command(image_folder, tmp_path)).returncode == 0
    assert_equal(weights(run_dir), whole)


@pytest.mark.timeout(120)
def test_max_hours_stop_by_the_clock(image_folder, tmp_path):
    result = dali_vit(*command(image_folder, tmp_path, "--max-hours", str(1.5 / 3600), steps=100_000))
    assert result.returncode == 75
    assert "--max-hours are over after step" in result.stderr
    assert checkpoint.newest(tmp_path / "run").step == read_metrics(tmp_path / "run")[-1]["step"]


@pytest.mark.timeout(240)
def test_a_killed_worker_takes_the_job_back_to_the_last_checkpoint(image_folder, tmp_path):
    arguments = command(image_folder, tmp_path / "a", "--no-resume", steps=150)  # as far as it was there before
    with running("-c", LAUNCH, *arguments) as launcher:
        wait_for(lambda: logged_steps(tmp_path / "a" / "run") > 25, "step 25")
        os.kill(workers_of(launcher.pid)[1], signal.SIGKILL)
        out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, err
    assert "rank 1" in out + err
    assert "SIGKILL" in out + err
    assert "restart 1 of 2" in out + err
    run_ranks(2, "-m", "dali_vit", *command(image_folder, tmp_path / "b", steps=150))
    assert_equal(weights(tmp_path / "a" / "run"), weights(tmp_path / "b" / "run"))


@pytest.mark.timeout(240)
def test_workers_end_with_a_killed_launcher_and_the_run_goes_on(image_folder, tmp_path):
    run_dir = tmp_path / "run"
    with running("-c", LAUNCH, *command(image_folder, tmp_path, steps=4000)) as launcher:
        wait_for(lambda: logged_steps(run_dir) > 15, "step 15")
        workers = workers_of(launcher.pid)
        assert len(workers) == 2
        launcher.kill()
        wait_for(lambda: not any(map(alive, workers)), "the end of the workers", 30)
    assert checkpoint.newest(run_dir).step >= 10
    # Two workers go on as one, with the same steps; the number of processes is no setting of the run.
    result = dali_vit(*command(image_folder, tmp_path, "--max-hours", str(1 / 3600), steps=4000))
    assert result.returncode == 75, result.stderr
    assert "with 1 process instead of 2" in result.stdout


@pytest.mark.timeout(120)
def test_a_machine_whose_name_nobody_knows(image_folder, tmp_path):
    rename = ["unshare", "-u", "bash", "-c", 'hostname no-such-name.invalid && exec "$@"', "-"]
    if subprocess.run([*rename, "true"], capture_output=True, check=False).returncode:
        pytest.skip("renaming the machine for a process needs root")
    result = subprocess.run(
        [*rename, sys.executable, "-c", LAUNCH, *command(image_folder, tmp_path, steps=4)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "step 4/4" in result.stdout


@pytest.mark.timeout(240)
def test_a_mistake_of_the_user_is_not_tried_again(image_folder, tmp_path):
    result = run_to_end("-c", LAUNCH, *command(image_folder, tmp_path), "--batch-size", "7")
    assert result.returncode == 2
    assert "restart" not in result.stdout + result.stderr
    assert result.stderr.count("--batch-size 7") == 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_the_same_samples(first, second, image_folder, tmp_path, whole):
    plain = ("--randaug-layers", "0", "--mixup-alpha", "0")
    expected = dali_vit(*command(image_folder, tmp_path / "one", *plain))
    assert expected.returncode == 0
    for processes, hours, code in ((first, 0.1 / 3600, 75), (second, 1.0, 0)):
        arguments = command(image_folder, tmp_path / "mixed", *plain, "--max-hours", str(hours))
        out, _ = run_ranks(processes, "-m", "dali_vit", *arguments, code=code)[0]
    assert f"with {second} process{'es' if second > 1 else ''} instead of {first}" in out
    losses = [
        [m["train/loss"] for m in read_metrics(tmp_path / n / "run") if "train/loss" in m] for n in ("one", "mixed")
    ]
    assert len(losses[0]) == len(losses[1]) == 60
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-5)


@pytest.mark.timeout(240)
def test_two_launchers_make_one_run(image_folder, tmp_path):
    """Two "nodes" of one process each meet on loopback."""
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port),
                *("-m", "dali_vit", *command(image_folder, tmp_path, steps=15)),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "2 x CPU" in outputs[0][0]
    assert checkpoint.newest(tmp_path / "run").step == 15
    assert checkpoint.newest(tmp_path / "run").loader["world_size"] == 2


def stall(data: Path) -> None:
    """Puts a pipe that nobody writes to in the place of every training image: reading one never ends."""
    for path in (data / "train").rglob("*.jpg"):
        path.unlink()
        os.mkfifo(path)


def wait_for_stall(run_dir: Path) -> None:
    before = -1
    while before != (before := logged_steps(run_dir)):
        time.sleep(1)


@pytest.mark.timeout(120)
def test_a_stalled_reader_is_named_with_its_stage(tmp_path):
    data = write_image_folder(tmp_path / "data", train=4, val=2)
    with running("-m", "dali_vit", *command(data, tmp_path, "--hang-timeout", "3", steps=4000)) as process:
        wait_for(lambda: logged_steps(tmp_path / "run") > 2, "step 2")
        stall(data)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 70
    assert "rank 0 hangs in the loader of step" in err


@pytest.mark.timeout(120)
def test_a_shard_that_is_cut_short_meanwhile_ends_the_run_with_a_word_and_is_named_by_the_next(image_folder, tmp_path):
    prepared = dali_vit("prepare", image_folder, tmp_path / "shards")
    assert prepared.returncode == 0, prepared.stderr
    (shard,) = (tmp_path / "shards/train").glob("*.tar")
    size = shard.stat().st_size
    with running("-m", "dali_vit", *command(tmp_path / "shards", tmp_path, steps=4000)) as process:
        wait_for(lambda: checkpoint.newest(tmp_path / "run"), "a checkpoint")
        os.truncate(shard, 100)
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGBUS
    assert err.startswith("Fatal Python error: Bus error")
    assert checkpoint.newest(tmp_path / "run").step >= 10
    again = dali_vit(*command(tmp_path / "shards", tmp_path, steps=4000))
    assert again.returncode == 2
    assert f"{shard} has 100 bytes, not the {size} of the manifest" in again.stderr


@pytest.mark.timeout(120)
def test_a_process_that_was_suspended_for_long_goes_on(image_folder, tmp_path):
    """By Ctrl-Z, or by a scheduler: it did not hang."""
    with running("-m", "dali_vit", *command(image_folder, tmp_path, "--hang-timeout", "2")) as process:
        wait_for(lambda: logged_steps(tmp_path / "run") > 2, "step 2")
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert checkpoint.newest(tmp_path / "run").step == 60


def test_the_watchdog_names_a_hanging_process_before_the_others_give_it_up():
    for hang_timeout in (60.0, 600.0, 1800.0):
        waits = distributed.collective_timeout(hang_timeout).total_seconds()
        assert waits > max(distributed.PATIENCE.values()) * hang_timeout
    # Nor does one that waits in a collective of any stage end before one that hangs in its loader.
    waiting = [patience for stage, patience in distributed.PATIENCE.items() if stage != "loader"]
    assert min(waiting) >= 1.5 * distributed.PATIENCE["loader"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("stage", "patience", "at_least"),
    [
        ("loader", 1.0, 60),
        ("step", 1.5, 60),
        ("compilation", 6.0, 60),
        ("preparation", 3.0, 0),
        ("preparation", 8.0, 4),
    ],
)
def test_stages_are_given_as_long_as_they_may_take(stage, patience, at_least):
    """at_least: seconds that what comes before the first step is given in any case."""
    assert stopping._PREPARATION == 600
    program = (
        "import time, torch; from dali_vit import stopping; from dali_vit.distributed import Group\n"
        f"stopping._PREPARATION = {at_least}\n"
        f"stopping.Watchdog(Group(3, 8, 3, 8, torch.device('cpu')), 0.5, {stage!r}, 41)\n"
        "began = time.monotonic()\n"
        "while True: time.sleep(0.1); print(time.monotonic() - began, flush=True)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, env=environment(), check=False
    )
    assert ended.returncode == 70
    assert ended.stderr.startswith(f"dali-vit: rank 3 hangs in the {stage} of step 42 for ")
    assert float(ended.stdout.split()[-1]) >= 0.5 * patience - 0.2


@pytest.mark.timeout(120)
def test_a_hang_before_the_first_step_is_told_of(image_folder, tmp_path):
    program = (
        "import sys, time; from dali_vit import cli, stopping, train\n"
        "stopping._PREPARATION = 0\n"
        "train.loader_settings = lambda *_: time.sleep(1000)\n"
        "cli.main()"
    )
    with running("-c", program, *command(image_folder, tmp_path, "--hang-timeout", "1")) as process:
        _, err = process.communicate(timeout=100)
    assert process.returncode == 70
    assert "rank 0 hangs in the preparation of step 1 for" in err


@pytest.mark.timeout(120)
def test_a_run_is_not_run_twice_at_once(image_folder, tmp_path):
    with running("-m", "dali_vit", *command(image_folder, tmp_path, steps=4000)) as process:
        wait_for(lambda: logged_steps(tmp_path / "run") > 2, "step 2")
        second = dali_vit(*command(image_folder, tmp_path, steps=4000))
        assert process.poll() is None
    assert second.returncode == 2
    assert "another process is running it" in second.stderr


@pytest.mark.timeout(240)
def test_a_long_run_keeps_its_memory_descriptors_and_threads(image_folder, tmp_path):
    """3,000 steps with evaluations and checkpoints in between."""
    steps = 3000
    samples: list[tuple[int, int, int]] = []
    arguments = command(image_folder, tmp_path, "--eval-every", "50", "--checkpoint-every", "150", steps=steps)
    with running("-m", "dali_vit", *arguments, anew=True, output=subprocess.DEVNULL) as process:
        proc = Path(f"/proc/{process.pid}")
        seen = 0
        while process.poll() is None:
            if (step := logged_steps(tmp_path / "run")) >= seen + 100:
                seen = step
                with contextlib.suppress(OSError):
                    resident = int((proc / "statm").read_text().split()[1])
                    samples.append((resident, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))))
            time.sleep(0.01)
    warm, late = samples[len(samples) // 3], samples[-3]
    print(samples)
    assert len(samples) >= 15
    assert late[0] <= warm[0] * 1.02
    # A pipeline that happens to be evaluating has a few more of both for a moment, at both ends of the run alike.
    for kind in (1, 2):
        early_least = min(sample[kind] for sample in samples[3 : len(samples) // 2])
        late_least = min(sample[kind] for sample in samples[len(samples) // 2 :])
        assert late_least <= early_least


def test_what_stops_one_rank_stops_all(cpu, monkeypatch):
    stop = stopping.Stop(cpu, None, 0)
    stop._gloo = object()
    combine = {torch.distributed.ReduceOp.MAX: max, torch.distributed.ReduceOp.MIN: min}
    reasons = []
    for theirs in (0, 1, 2):
        monkeypatch.setattr(
            torch.distributed,
            "all_reduce",
            lambda own, op, group, theirs=theirs: own.fill_(combine[op](int(own), theirs)),
        )
        reasons.append(stop.reason())
    assert reasons == [None, "--max-hours are over", "stopped by a signal to another rank"]


def test_hours_are_hours(cpu, monkeypatch):
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    stop = stopping.Stop(cpu, 2.0, 0)
    stop.start_clock()
    now += 7199
    assert stop.reason() is None
    now += 1
    assert stop.reason() == "--max-hours are over"
