"""What a run keeps in its folder besides checkpoints: its log, settings, environment, samples and traces."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from dali_vit.config import Config, UserError, to_yaml
from dali_vit.distributed import Group
from dali_vit.environment import describe_environment
from dali_vit.files import dead_link, flush, replacing
from dali_vit.metric_log import MetricLog
from dali_vit.runlock import current, unwritable

log = logging.getLogger(__name__)

PROFILE_AFTER = 10  # steps: a trace leaves out compilation and the first filling of the queues


def check_own(config: Config) -> None:
    """UserError for a folder that is no run's, but has files that a run would overwrite."""
    marks = ("checkpoints", "metrics.jsonl")
    if any((config.run_dir / name).exists() for name in marks) or _is_config(config.run_dir / "config.yaml"):
        return
    other = next((name for name in ("config.yaml", "env.txt") if (config.run_dir / name).exists()), None)
    if other:
        raise UserError(f"{config.run_dir}: holds a {other} that is not a run's; choose another --name")


def _is_config(path: Path) -> bool:
    """Whether `to_yaml` may have written this file, if only in part, as on a full disk."""
    try:
        text = path.read_bytes()
    except OSError:
        return False
    return not text or text.startswith(b"data:\n")


def check_writable(config: Config) -> None:
    """UserError if the run's folder, or its checkpoints/, cannot be made or written to, as far as can be told without
    trying."""
    for folder in (config.run_dir, config.run_dir / "checkpoints"):
        if fault := dead_link(folder):
            raise UserError(f"--runs-dir {config.run.runs_dir}: {fault}")
        there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
        code = 0
        if not there.is_dir():
            code = errno.ENOTDIR
        elif not os.access(there, os.W_OK | os.X_OK):
            code = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
        if code:
            error = OSError(code, os.strerror(code), str(there))
            raise UserError(f"--runs-dir {config.run.runs_dir}: {unwritable(config, error)}")


def write_run_files(config: Config, *, anew: bool = False) -> None:
    """Writes config.yaml and env.txt; UserError if the run's folder, or its checkpoints/, cannot be written to.

    anew: the run begins from scratch, so the files that an earlier run logged in this folder are renamed.
    """
    check_writable(config)  # now, as else it would show only after hours
    metrics = config.run_dir / "metrics.jsonl"
    if not anew and metrics.exists() and not os.access(metrics, os.W_OK):  # else another user's files were replaced
        raise UserError(f"{metrics}: cannot be written ({os.strerror(errno.EACCES)}); mend that and start again")
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if anew:
            _set_aside(config.run_dir)
        environment = "".join(f"{name}: {value}\n" for name, value in describe_environment().items())
        for name, text in (("config.yaml", to_yaml(config)), ("env.txt", environment)):
            with replacing(config.run_dir / name) as temporary:
                temporary.write_bytes(text.encode(errors="surrogateescape"))  # paths may be any bytes
        flush(config.run_dir.parent)  # the run's folder may be new
    except OSError as error:
        raise UserError(f"--runs-dir {config.run.runs_dir}: {unwritable(config, error)}") from error


def open_folder(config: Config, start: int, evaluation_due: bool) -> MetricLog:
    """The log of a run that goes on from step `start`, 0 if it begins, in its folder, which has the run's files then.

    evaluation_due: whether it begins by the evaluation of that step. UserError for a folder that cannot be written to.
    """
    write_run_files(config, anew=start == 0)
    return MetricLog(config.run_dir, start, now=lambda: current(config), evaluation_due=evaluation_due)


def _set_aside(run_dir: Path) -> None:
    """Renames metrics.jsonl, config.yaml and env.txt to metrics.jsonl.1 and so on, if anything was logged."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists() or not metrics.stat().st_size:
        return
    names = ("config.yaml", "env.txt", "metrics.jsonl")
    number = next(n for n in itertools.count(1) if not any((run_dir / f"{name}.{n}").exists() for name in names))
    for name in names:
        if (run_dir / name).exists():
            (run_dir / name).rename(run_dir / f"{name}.{number}")
    log.info("begins from scratch, as there is no checkpoint; %s.%d is what was logged before", metrics, number)


def flush_logs(run_dir: Path) -> None:
    """Makes what this start has logged so far survive a loss of power, as far as the disk takes it."""
    events = sorted(run_dir.glob("events.out.tfevents.*"))[-1:]  # the last by name is this start's
    for path in (run_dir / "metrics.jsonl", *events, run_dir):
        with suppress(OSError):  # a checkpoint is worth writing even if its log is not to be had
            flush(path)


def log_texts(writer: MetricLog, config: Config, summary: str) -> None:
    """What describes a run in words, to TensorBoard: its settings, its opening summary and its environment."""
    writer.text("config", to_yaml(config))
    writer.text("summary", summary)
    writer.text("environment", (config.run_dir / "env.txt").read_text(encoding="utf-8", errors="surrogateescape"))


def log_samples(writer: MetricLog, run_dir: Path, images: torch.Tensor) -> None:
    """Logs the first augmented images of a run to TensorBoard and samples/train.png; a warning if the file fails."""
    grid = _image_grid(images)
    writer.image("samples/train", grid, 0)
    try:
        (run_dir / "samples").mkdir(exist_ok=True)
        Image.fromarray(grid).save(run_dir / "samples" / "train.png")
    except OSError as error:
        log.warning("%s is not written (%s); training goes on", run_dir / "samples", error.strerror)


def _image_grid(images: torch.Tensor, columns: int = 8, rows: int = 4) -> np.ndarray:
    """The first images of a batch side by side, uint8 [N, S, S, 3] -> [rows*S, columns*S, 3]."""
    images = images[: columns * rows].cpu()
    columns = min(columns, len(images))
    rows = len(images) // columns
    _, height, width, channels = images.shape
    grid = images[: rows * columns].reshape(rows, columns, height, width, channels)
    return grid.permute(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels).numpy()


@contextmanager
def profiling(config: Config, group: Group, steps: int) -> Iterator[Any]:
    """Yields a profiler whose `step` is to be called after each step. It traces --profile of the steps and writes the
    trace, for TensorBoard and Perfetto, into `profile/` of the run's folder; without --profile it does nothing."""
    if not (config.run.profile and steps):
        yield SimpleNamespace(step=lambda: None)
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if group.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def write(profiler: torch.profiler.profile) -> None:
        # The run's folder may have been moved meanwhile, which rank 0 knows.
        torch.profiler.tensorboard_trace_handler(str(current(config) / "profile"), f"rank{group.rank}")(profiler)

    active = min(config.run.profile, steps)
    before = min(PROFILE_AFTER, steps - active)
    warmup = min(2, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that so few steps leave none for the profiler's warm-up
        schedule = torch.profiler.schedule(wait=before - warmup, warmup=warmup, active=active, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler
