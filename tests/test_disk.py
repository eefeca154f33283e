"""Disks that cannot be written to, because they are full or read-only, before a run and in the middle of it."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter

from dali_vit import checkpoint, runfolder, runlock
from dali_vit.config import ModelConfig, UserError
from dali_vit.inference import convert
from dali_vit.metric_log import MetricLog
from dali_vit.model import create_model
from dali_vit.plan import plan
from dali_vit.saving import _close
from tests.conftest import read_metrics
from tests.processes import LAUNCH, command, dali_vit, logged_steps, run_to_end, running, wait_for
from tests.test_checkpoint import save


def fill(disk: Path) -> Path:
    """A file that takes what room there is, however much a run takes meanwhile."""
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:  # noqa: PT012
        while file.write(bytes(4096)):
            pass
    return ballast


@pytest.mark.timeout(120)
def test_a_full_disk_is_warned_of_and_costs_no_checkpoint(image_folder, tmp_path, small_disk):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(small_disk)
    with running("-m", "dali_vit", *command(image_folder, tmp_path, steps=120)) as process:
        wait_for(lambda: list(small_disk.glob("step_*")), "the first checkpoint")
        fill(small_disk)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 2, err
    assert "no space left on the disk); the ones before are untouched, training goes on" in out
    assert err.splitlines()[-1].startswith("dali-vit: the last checkpoint could not be written")
    assert err.splitlines()[-1].endswith("no space left on the disk); make room and start again")
    assert not list(small_disk.glob(".tmp*"))
    kept = checkpoint.newest(run_dir)
    assert kept.step >= 10
    (small_disk / "ballast").unlink()
    assert dali_vit(*command(image_folder, tmp_path, steps=120)).returncode == 0
    assert checkpoint.newest(run_dir).step == 120


@pytest.mark.timeout(120)
def test_a_run_goes_on_without_its_log(image_folder, small_disk):
    """Everything but the checkpoints lies on the full disk; lines are whole or missing, and come again with room."""
    run_dir = small_disk / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    steps = 400
    with running(
        "-m", "dali_vit", *command(image_folder, small_disk, "--checkpoint-every", "1000", steps=steps)
    ) as process:
        wait_for(lambda: logged_steps(run_dir) > 12, "step 12")
        ballast = fill(small_disk)
        assert process.stdout is not None
        for line in process.stdout:
            if "cannot be written to" in line:
                ballast.unlink()
                break
        out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "cannot be written to" not in out
    assert "Traceback" not in err
    logged = [m["step"] for m in read_metrics(run_dir) if "train/loss" in m]
    assert logged == sorted(set(logged))
    assert set(range(1, 13)) <= set(logged)
    assert 12 < len(logged) < steps
    assert logged[-1] == steps
    assert checkpoint.newest(run_dir).step == steps


def remount(folder: Path, mode: str) -> bool:
    """Whether a file system is now as asked for; while a file on it is being written it cannot become read-only."""
    return (
        subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], capture_output=True, check=False).returncode
        == 0
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("starter", "exists"),
    [(("-m", "dali_vit"), False), (("-m", "dali_vit"), True), (("-c", LAUNCH), True)],
    ids=["new", "existing", "two-processes"],
)
def test_a_read_only_folder_is_named_before_anything_is_trained(image_folder, small_disk, exists, starter):
    if exists:
        (small_disk / "run").mkdir()
    assert remount(small_disk, "ro")
    result = run_to_end(*starter, *command(image_folder, small_disk))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    refused = small_disk / "run" if exists else small_disk
    assert line == f"dali-vit: --runs-dir {small_disk}: cannot write {refused} (Read-only file system)"
    assert "loss" not in result.stdout


@pytest.mark.timeout(120)
def test_a_folder_that_becomes_read_only_is_warned_of_and_costs_no_checkpoint(image_folder, tmp_path, small_disk):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(small_disk)
    with running("-m", "dali_vit", *command(image_folder, tmp_path, steps=200)) as process:
        wait_for(lambda: list(small_disk.glob("step_*")), "the first checkpoint")
        wait_for(lambda: remount(small_disk, "ro"), "the remount")
        out, err = process.communicate(timeout=90)
    assert process.returncode == 2, err
    assert out.count("Read-only file system") >= 1
    assert "training goes on" in out
    assert err.splitlines()[-1].startswith("dali-vit: the last checkpoint could not be written")
    assert 10 <= checkpoint.newest(run_dir).step < 200
    assert read_metrics(run_dir)[-1]["step"] == 200
    assert remount(small_disk, "rw")
    assert dali_vit(*command(image_folder, tmp_path, steps=200)).returncode == 0
    assert checkpoint.newest(run_dir).step == 200


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(27, "File too large"), "larger than a file may be here; raise that limit (ulimit -f)"),
        (
            SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
            "larger than a file may be here; raise that limit (ulimit -f)",
        ),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
        (
            RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 202176 vs 202068\nmore"),
            "no space left on the disk, or a quota or limit is reached",
        ),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "no space left on the disk, or a quota or limit is reached",
        ),
        (RuntimeError("something else\nmore"), "something else"),
    ],
)
def test_a_refusal_to_write_is_said_in_the_users_words(error, reason, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_model", refuse)
    with pytest.raises(OSError, match="step_000000001: ") as raised:
        save(tmp_path, 1)
    assert str(raised.value).endswith(f"step_000000001: {reason}")
    assert os.listdir(tmp_path / "checkpoints") == []


def test_events_that_cannot_be_written_are_given_up_with_one_warning(tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    log = MetricLog(tmp_path, 0)
    log.scalars(1, {"train/loss": 1.0})
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with caplog.at_level("WARNING", logger="dali_vit"):
        log.scalars(2, {"train/loss": 2.0})
        log.scalars(3, {"train/loss": 3.0})
        log.close()
    assert [r.getMessage() for r in caplog.records] == [
        "no more TensorBoard events are written (No space left on device); training goes on"
    ]
    assert [m["train/loss"] for m in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(("error", "reported"), [(OSError(28, "No space left on device"), False), (ValueError(), True)])
def test_the_thread_that_writes_events_does_not_say_itself_that_a_disk_is_full(error, reported, tmp_path, monkeypatch):
    seen: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    before = threading.excepthook
    log = MetricLog(tmp_path, 0)
    writer = log._events.file_writer.event_writer._async_writer
    log.flush()  # what events begin with is written in another thread, which is not to fail before a scalar comes

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(writer._writer, "write", refuse)
    log.scalars(1, {"train/loss": 1.0})
    writer._worker.join(20)
    assert not writer._worker.is_alive()
    assert [type(failed.exc_value) for failed in seen] == ([type(error)] if reported else [])
    if not reported:
        log.close()
        assert threading.excepthook == before


def test_a_run_folder_that_may_not_be_written_to_is_named_with_the_flag(tiny_config, monkeypatch):
    run_dir = tiny_config.run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text("data:\n")
    monkeypatch.setattr(runfolder.os, "access", lambda path, mode: path != run_dir)  # root may write everywhere
    with pytest.raises(UserError) as raised:
        runfolder.write_run_files(tiny_config)
    runs = tiny_config.run.runs_dir
    assert str(raised.value) == f"--runs-dir {runs}: cannot write {run_dir} (Permission denied)"
    assert (run_dir / "config.yaml").read_text() == "data:\n"


def test_only_the_process_that_writes_needs_the_runs_folder(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert plan(tiny_config, 2, writes=False).checkpoint is None
    with pytest.raises(UserError) as raised:
        plan(tiny_config, 2)
    assert str(raised.value) == f"--runs-dir {tmp_path}: cannot write {tmp_path} (Permission denied)"


@pytest.mark.parametrize("link", ["runs", "runs/tiny", "runs/tiny/checkpoints"])
def test_a_link_to_a_disk_that_is_not_mounted_is_told_before_anything_is_trained(link, tiny_config, cpu, tmp_path):
    runs = tmp_path / "runs"
    config = replace(tiny_config, run=replace(tiny_config.run, runs_dir=runs))
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to("/mnt/none/x")
    with pytest.raises(UserError) as raised, runlock.locked(config, cpu):
        runfolder.write_run_files(config)
    told = f"{tmp_path / link} is a link to /mnt/none/x, which is not there: mount the disk or remove the link"
    assert str(raised.value) == f"--runs-dir {runs}: {told}"


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.symlink_to("/mnt/none/x")
    with pytest.raises(UserError) as raised:
        MetricLog(tmp_path, 0)
    told = f"{log} is a link to /mnt/none/x, which is not there: mount the disk or remove the link"
    assert str(raised.value) == told
    log.unlink()
    log.mkdir()
    with pytest.raises(UserError) as raised:
        MetricLog(tmp_path, 0)
    assert str(raised.value) == f"{log}: cannot be written (Is a directory); mend that and start again"


def test_convert_on_a_full_disk_is_said_in_one_line(tmp_path, small_disk, capsys):
    config = ModelConfig(model="mu/16", width=256, mlp_dim=1024)
    checkpoint.save_model(
        tmp_path / "m.safetensors", create_model(config, num_classes=5, resolution=32).state_dict(), config, 32, None, 1
    )
    for name in ("m.npz", "again.safetensors"):
        with pytest.raises(UserError, match=f"{name}: cannot be written ") as raised:
            convert(tmp_path / "m.safetensors", small_disk / name)
        assert "\n" not in str(raised.value)
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize(
    ("error", "cause", "remedy"),
    [
        (OSError("step_000000001: no space left on the disk"), None, "make room"),
        (OSError("step_000000001: Disk quota exceeded"), OSError(errno.EDQUOT, "Disk quota exceeded"), "make room"),
        (OSError(errno.EACCES, "Permission denied", "/workspace/no space"), None, "mend that"),
        (OSError("step_000000001: larger than a file may be here; raise that limit (ulimit -f)"), None, "mend that"),
    ],
)
def test_what_to_do_about_a_last_checkpoint_that_was_not_written(error, cause, remedy):
    error.__cause__ = cause
    with pytest.raises(UserError, match=f"; {remedy} and start again$"):
        _close(SimpleNamespace(close=lambda: (_ for _ in ()).throw(error)))
