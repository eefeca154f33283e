"""Refuses settings whose values no run can use, whatever the data and the machine."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

from dali_vit.config import WITH_CUDA_GRAPHS, Config, OptimConfig, UserError

__all__ = [
    "MAX_BATCH_SIZE",
    "MAX_RESOLUTION",
    "MAX_STEPS",
    "MAX_THREADS",
    "check_local",
    "check_range",
    "given_data",
    "validate",
]

# Beyond what any machine can do, so that typing errors are refused here and not by the operating system.
MAX_THREADS = 1024
MAX_RESOLUTION = 8192
MAX_BATCH_SIZE = 2**20
MAX_EPOCHS = 10**6
MAX_RANDAUG_LAYERS = 100
MAX_STEPS = 10**10
MAX_SECONDS = 10**7
MAX_FLOAT32 = 1e38

# Settings without effect, by optimiser.
_IDLE = {"adamw": ("momentum",), "sgd": ("beta1", "beta2", "eps", "first_moment")}


def check_range(flag: str, value: float, low: float, high: float = math.inf) -> None:
    """UserError unless low <= value <= high and the value is finite."""
    if not math.isfinite(value):
        raise UserError(f"{flag} {value}: must be a finite number")
    if not low <= value <= high:
        limits = f"at least {low:,}" if high == math.inf else f"from {low:,} to {high:,}"
        raise UserError(f"{flag} {value}: must be {limits}")


def check_local(path: str | Path, flag: str = "") -> None:
    """UserError for a URL where only local files are possible: it would be taken for a path in a folder named `s3:`."""
    url = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", str(path), re.DOTALL)
    if url:  # a Path has kept one of its slashes
        given = f"{flag} {url[1]}://{url[2]}".lstrip()
        raise UserError(f"{given}: must be on this machine's disks; name a local path, and copy from or to the store")


def given_data(config: Config) -> str:
    """The data set to train on, as it was given; UserError where none was."""
    if config.data.data is None:
        raise UserError("--data: missing; give a folder with train/ and val/, or `--data demo`")
    return config.data.data


def validate(config: Config) -> None:
    """Raises UserError for the first value that no run can use, naming its flag and the remedy."""
    data, optim, run = config.data, config.optim, config.run
    for group in (data, config.model, optim, run):
        for f in dataclasses.fields(group):
            value = getattr(group, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{f.name.replace('_', '-')} {value}: must be a finite number")
    if (optim.epochs is None) == (optim.steps is None):
        raise UserError("give exactly one of --epochs and --steps")
    for flag, value in [("--epochs", optim.epochs), ("--steps", optim.steps)]:
        if value is not None and value <= 0:
            raise UserError(f"{flag} {value}: must be above 0")
    check_range("--epochs", optim.epochs or 0, 0, MAX_EPOCHS)
    check_range("--steps", optim.steps or 0, 0, MAX_STEPS)
    check_range("--hang-timeout", run.hang_timeout, 0, MAX_SECONDS)
    if optim.lr <= 0:
        raise UserError(f"--lr {optim.lr:g}: must be above 0, such as 0.001")
    check_range("--lr", optim.lr, 0, MAX_FLOAT32)
    check_range("--weight-decay", optim.weight_decay, 0, 1 if optim.optimizer == "adamw" else MAX_FLOAT32)
    check_range("--batch-size", optim.batch_size, 1, MAX_BATCH_SIZE)
    check_range("--resolution", data.resolution, 1, MAX_RESOLUTION)
    check_range("--grad-accum-steps", run.grad_accum_steps, 1)
    check_range("--log-every", run.log_every, 1)
    check_range("--checkpoint-every", run.checkpoint_every, 1)
    check_range("--keep-checkpoints", run.keep_checkpoints, 1)
    if run.threads is not None:
        check_range("--threads", run.threads, 1, MAX_THREADS)
    for flag, share in [("--beta1", optim.beta1), ("--beta2", optim.beta2), ("--momentum", optim.momentum)]:
        if not 0 <= share < 1:
            raise UserError(f"{flag} {share:g}: must be from 0 to below 1")
    for name in _IDLE[optim.optimizer]:
        if getattr(optim, name) != getattr(OptimConfig, name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(optim, name)}: has no effect on {optim.optimizer}; leave it out"
            )
    check_range("--eps", optim.eps, 1e-37, MAX_FLOAT32)  # an eps that is 0 in float32 makes NaN
    if optim.grad_clip_norm is not None and optim.grad_clip_norm <= 0:
        raise UserError(f"--grad-clip-norm {optim.grad_clip_norm:g}: must be above 0; None switches clipping off")
    for flag, number in [
        ("--warmup-steps", optim.warmup_steps),
        ("--mixup-alpha", optim.mixup_alpha),
        ("--spike-threshold", optim.spike_threshold),
        ("--eval-every", run.eval_every),
        ("--seed", run.seed),
        ("--max-restarts", run.max_restarts),
        ("--max-skipped-steps", run.max_skipped_steps),
        ("--profile", run.profile),
    ]:
        if not number >= 0:
            raise UserError(f"{flag} {number}: must not be negative")
    check_range("--randaug-layers", data.randaug_layers, 0, MAX_RANDAUG_LAYERS)
    if optim.steps is not None and optim.warmup_steps >= optim.steps:
        raise UserError(
            f"--steps {optim.steps}: the warm-up alone takes {optim.warmup_steps}; add --warmup-steps"
            f" {optim.steps // 10}"
        )
    if not 0 <= data.randaug_magnitude <= 10:
        raise UserError(f"--randaug-magnitude {data.randaug_magnitude:g}: must be from 0 to 10")
    if not 0 <= data.max_bad_share <= 1:
        raise UserError(f"--max-bad-share {data.max_bad_share:g}: must be a share from 0 to 1")
    if not 0 <= data.minival < 1:
        raise UserError(f"--minival {data.minival:g}: must be a share from 0 to below 1")
    if not 0 <= optim.label_smoothing < 1:
        raise UserError(f"--label-smoothing {optim.label_smoothing:g}: must be from 0 to below 1")
    if run.compile in WITH_CUDA_GRAPHS and run.grad_accum_steps > 1:
        # Replaying the graph for a part would overwrite the gradients of the part before.
        raise UserError(
            f"--compile {run.compile}: its CUDA graphs do not go with --grad-accum-steps; give --compile default"
        )
    if run.max_hours is not None and not run.max_hours > 0:
        raise UserError(f"--max-hours {run.max_hours:g}: must be above 0")
    if run.seed >= 2**63:
        raise UserError(f"--seed {run.seed}: must be below 2^63")
    if run.name is not None and not run.name.strip():
        raise UserError("--name: empty; give a name, or leave it out for the recipe's")
    check_local(run.runs_dir, "--runs-dir")
    name = run.name or run.recipe
    if Path(name).name != name or name == "..":
        raise UserError(f"--name {name}: a run's name is one folder; choose its parent with --runs-dir")
    if any(ord(character) < 32 for character in name):
        raise UserError(f"--name {name!r}: has a line break or another control character in it; leave it out")
    if len(os.fsencode(name)) > 255:
        raise UserError(f"--name {name[:20]}...: longer than the 255 bytes that a folder's name may have")
    try:
        str(config.run_dir).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--runs-dir {run.runs_dir}, --name {name}: not UTF-8, in which TensorBoard takes them; choose others"
        ) from None
