"""Processes and devices: who this process is, how others are started, and the few collectives in use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dali_vit.config import UserError


@dataclass(frozen=True)
class Group:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this machine."""
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def is_worker() -> bool:
    """Whether a launcher (torchrun, srun, our own) started this process as one of a group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def resolve_gpus(gpus: int | None) -> int:
    """Number of GPUs to use on this machine; UserError where `gpus` asks for more than there are."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus is None:
        return visible
    if gpus < 0:
        raise UserError(f"--gpus {gpus}: must not be negative; 0 means the CPU")
    if gpus > visible:
        remedy = f"use --gpus {visible}" if visible else "use --gpus 0 for the CPU"
        raise UserError(f"--gpus {gpus}: {visible} visible on this machine; {remedy}")
    return gpus


def launch(num_processes: int, argv: Sequence[str]) -> int:
    """Runs `dali-vit ARGV` in worker processes under torch's launcher; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    try:
        main(["--standalone", f"--nproc-per-node={num_processes}", "-m", "dali_vit", *argv])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


@contextmanager
def connect(gpus: int | None) -> Iterator[Group]:
    """The Group of this process, with the process group initialised while more than one process runs."""
    if not is_worker():
        device = torch.device("cuda", 0) if resolve_gpus(gpus) else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        yield Group(0, 1, 0, 1, device)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", 1)))
    on_gpu = gpus != 0 and torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank}: this machine has {torch.cuda.device_count()} GPUs; "
            "start that many processes, or give --gpus 0 for the CPU"
        )
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timedelta(minutes=10),
        device_id=device if on_gpu else None,
    )
    try:
        yield Group(rank, world_size, local_rank, local_world_size, device)
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """One picklable value of every rank, by rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
