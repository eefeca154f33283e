"""Processes and devices: who this process is, how it meets the others, and the few collectives in use."""

from __future__ import annotations

import gc
import logging
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dali_vit import meeting
from dali_vit.config import LocalUserError, UserError, mendable
from dali_vit.environment import cpu_count, cpu_quota, machine, quota_holder, usable_cores
from dali_vit.process import end_with_parent, ended_by_ctrl_c, int_from_environment

PATIENCE = {"preparation": 3.0, "loader": 1.0, "step": 1.5, "compilation": 6.0, "evaluation": 1.5, "checkpoint": 1.5}
"""Stages of a run, and how many times --hang-timeout each may take; what is before the first step is preparation."""

_SAME_GPU = re.compile("Duplicate GPU|Multiple Ranks are using the same GPU")  # NCCL 2.28 and 2.30
# NCCL, misc/shmutils.cc; a container has 64 MB unless it asks for more.
_NO_SHARED_MEMORY = re.compile("Error while creating shared memory segment|failed to extend /dev/shm")
_NO_INTERFACE = re.compile("Unable to find address for: (.*)")  # gloo, transport/tcp/device.cc
_NOT_REACHED = re.compile("Gloo connectFullMesh failed")
_SAID_AFTER = 30.0
"""Seconds that processes wait for each other in silence: NCCL may take ten for many machines."""

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """This process among the processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this machine."""
    local_world_size: int
    device: torch.device
    cores: int = field(default_factory=cpu_count)
    """This process's share of the machine's CPU cores."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0


def is_worker() -> bool:
    """Whether a launcher (torchrun, srun, our own) started this process as one of a group.

    It first sets RANK and the like from srun's variables, so that they are there for all that asks for them afterwards.
    """
    _adopt_slurm()
    return _has_launcher()


def _has_launcher() -> bool:
    return bool(os.environ.get("RANK") and os.environ.get("WORLD_SIZE"))


def _adopt_slurm() -> None:
    """Under srun, sets the variables that torchrun would, from SLURM's."""
    if _has_launcher() or int_from_environment("SLURM_STEP_NUM_TASKS", 1) < 2:
        return
    needed = ["JOB_ID", "PROCID", "LOCALID", "STEP_TASKS_PER_NODE"]
    for name in needed if os.environ.get("MASTER_ADDR") else ["STEP_NODELIST", *needed]:
        if not os.environ.get(f"SLURM_{name}"):
            raise LocalUserError(
                f"SLURM_{name}: not set, though SLURM_STEP_NUM_TASKS is; start by srun, or unset SLURM_STEP_NUM_TASKS"
            )
    if not os.environ.get("MASTER_ADDR"):
        hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        try:
            found = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError("srun: scontrol is not usable here; set MASTER_ADDR to the first node's name") from error
        os.environ["MASTER_ADDR"] = found[0]
    # Jobs and steps that share a node must not share a port, nor take one that Linux gives to outgoing connections.
    if not os.environ.get("MASTER_PORT"):
        number = int_from_environment("SLURM_JOB_ID", 0) + 7_919 * int_from_environment("SLURM_STEP_ID", 0)
        os.environ["MASTER_PORT"] = str(10_000 + number % 20_000)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])  # "8(x2),4" is 8, 8 and 4
    tasks = [int(count) for count, nodes in runs for _ in range(int(nodes or 1))]
    node = int_from_environment("SLURM_NODEID", 0)
    if not tasks or node < 0:
        name = "SLURM_NODEID" if tasks else "SLURM_STEP_TASKS_PER_NODE"
        raise LocalUserError(f"{name}={os.environ[name]}: none of srun's; start by srun, or unset SLURM_STEP_NUM_TASKS")
    os.environ["LOCAL_WORLD_SIZE"] = str(tasks[min(node, len(tasks) - 1)])


def _follow_launcher() -> None:
    """Ends with the launcher: an orphan would go on writing to the run's folder."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


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


def collective_timeout(hang_timeout: float) -> timedelta:
    """How long ranks wait for each other: longer than the watchdog does, which alone can name who hangs, and where."""
    return (
        timedelta(seconds=max(600.0, (max(PATIENCE.values()) + 1) * hang_timeout))
        if hang_timeout
        else timedelta(days=7)
    )


@contextmanager
def connect(gpus: int | None, hang_timeout: float = 600.0) -> Iterator[Group]:
    """The Group of this process, with the process group initialised while more than one process runs."""
    if not is_worker():
        device = torch.device("cuda", 0) if resolve_gpus(gpus) else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        yield _limit_threads(Group(0, 1, 0, 1, device))
        return
    _follow_launcher()
    rank, world_size = int_from_environment("RANK", 0), int_from_environment("WORLD_SIZE", 1)
    local_rank, local_world_size = int_from_environment("LOCAL_RANK", 0), int_from_environment("LOCAL_WORLD_SIZE", 1)
    _check_launcher(rank, world_size)
    timeout = collective_timeout(hang_timeout)
    on_gpu = gpus != 0 and torch.cuda.is_available()
    here = max(local_rank + 1, local_world_size)  # so that all of them say what is wrong, the first among them
    device = _own_gpu(local_rank, here) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    with _mistakes_as_user_errors(here):
        with _report_rendezvous(world_size, local_rank, timeout):
            where = meeting.init_arguments(rank, world_size, timeout)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=timeout, device_id=device if on_gpu else None, **where
            )
        done = False
        try:
            yield _limit_threads(Group(rank, world_size, local_rank, local_world_size, device, _core_share()))
            done = True
        finally:
            if done or not on_gpu:  # NCCL would wait for the others, which after an error of this one wait for it
                dist.destroy_process_group()
            # gloo's threads end with the last reference to the group, and DistributedDataParallel, which has one, lies
            # in a cycle. A thread that frees the tensors of the last collective while Python goes down aborts it.
            gc.collect()


def _check_launcher(rank: int, world_size: int) -> None:
    """UserError where what is to be a launcher's variables tells this process neither its place nor where to meet."""
    if not 0 <= rank < world_size:
        raise LocalUserError(
            f"RANK={rank}: must be from 0 to below WORLD_SIZE={world_size}; number the processes from 0"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise LocalUserError(
                f"{name}: not set, though RANK and WORLD_SIZE are; start by torchrun or with --gpus,"
                " or unset RANK and WORLD_SIZE to run one process alone"
            )
    port = int_from_environment("MASTER_PORT", 0)
    if not 0 < port < 65_536:
        raise LocalUserError(f"MASTER_PORT={port}: must be from 1 to 65535; choose a port that is free")


@contextmanager
def _report_rendezvous(processes: int, local_rank: int, timeout: timedelta) -> Iterator[None]:
    """Says, once on each machine, that processes wait for each other for long; UserError where they do not meet."""
    port = os.environ["MASTER_PORT"]
    where = f"{os.environ['MASTER_ADDR']}:{port}"
    waiting = threading.Timer(_SAID_AFTER, log.warning, ("waiting for %d processes to meet at %s", processes, where))
    waiting.daemon = True
    if local_rank == 0:
        waiting.start()
    try:
        with ended_by_ctrl_c():
            yield
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # they were there: one has died, as its launcher
            raise  # tells, and may start it again
        if "EADDRINUSE" in str(error):
            raise LocalUserError(f"MASTER_PORT={port}: in use by another program; choose another port") from error
        raise LocalUserError(
            f"{where} (MASTER_ADDR and MASTER_PORT): {processes} processes (WORLD_SIZE) did not meet there within"
            f" {timeout}; start all of them, on machines that reach this address, or unset RANK and WORLD_SIZE to run"
            " one process alone"
        ) from error
    finally:
        waiting.cancel()


@contextmanager
def _mistakes_as_user_errors(processes: int) -> Iterator[None]:
    """Turns what NCCL and gloo say of the user's mistakes into UserErrors; some comes with the first gradients."""
    try:
        yield
    except RuntimeError as error:  # NCCL's are DistBackendErrors by torch 2.11, but plain ones by 2.15
        if _SAME_GPU.search(str(error)):  # each process sees the same one
            raise _too_few_gpus(processes) from error
        if _NO_SHARED_MEMORY.search(str(error)):
            raise LocalUserError(
                "/dev/shm is too small for the GPUs of this machine to exchange gradients through (NCCL): give it more,"
                " for a container with `docker run --shm-size=1g`"
            ) from error
        if unknown := _NO_INTERFACE.search(str(error)):
            raise LocalUserError(
                f"GLOO_SOCKET_IFNAME={unknown[1]}: no network interface of this machine, or one without an address;"
                " give one that `ip address` lists"
            ) from error
        if _NOT_REACHED.search(str(error)):  # gloo listens where the machine's name leads, or on loopback alone
            whose, remedy = "the other machines'", "on each machine to its network interface towards the others"
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                whose, remedy = "its other", "to one of its network interfaces, such as lo"
            raise LocalUserError(
                f"{platform.node()}: {whose} processes are not reached from here; set GLOO_SOCKET_IFNAME {remedy}"
            ) from error
        raise


def _limit_threads(group: Group) -> Group:
    """Gives torch, which knows nothing of quotas, no more threads than the group's process has cores; the group."""
    torch.set_num_threads(min(torch.get_num_threads(), group.cores))
    return group


def _core_share() -> int:
    """How many CPU cores this process has to itself, at least 1, if those who may use a core share it evenly.

    A scheduler may bind each process of a machine to cores of its own, or all of them to the same; a container's quota
    is that of all processes in it. Collective.
    """
    cores, holder = usable_cores(), quota_holder()
    here = [found for where, *found in gather_objects((machine(), cores, holder)) if where == machine()]
    share = sum(Fraction(1, sum(core in theirs for theirs, _ in here)) for core in cores)
    return max(1, int(min(share, cpu_quota() / sum(theirs == holder for _, theirs in here))))


def _own_gpu(local_rank: int, processes: int) -> torch.device:
    """The GPU of one of the processes on this machine; UserError where there are not as many."""
    visible = torch.cuda.device_count()
    if visible == 1:  # as srun shows each process its own alone with --gpus-per-task
        return torch.device("cuda", 0)
    if processes > visible:
        raise _too_few_gpus(processes)
    return torch.device("cuda", local_rank)


def _too_few_gpus(processes: int) -> UserError:
    return UserError(
        f"{processes} processes on this machine, but {torch.cuda.device_count()} GPUs: start as many as there are GPUs,"
        " or give --gpus 0 for the CPU"
    )


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


def together(work: Callable[[], T]) -> T:
    """Calls `work` on every rank; where it raises UserError on some, all raise that of the lowest, which it names.

    Else the others would wait for those that have ended. What the operating system refuses is a UserError, too, where
    the user can mend it.
    """
    message = None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    except OSError as error:
        told = mendable(error)
        if told is None:
            raise
        message = str(told)
    for rank, found in enumerate(gather_objects(message)):
        if found is not None:
            raise UserError(f"rank {rank}: {found}" if rank else found)
    return result


def on_main(group: Group, work: Callable[[], T]) -> T | None:
    """The result of work that rank 0 alone does; None on the other ranks. Its UserErrors are raised on all of them."""
    return together(lambda: work() if group.is_main else None)


def share_buffers(model: torch.nn.Module) -> None:
    """Gives every rank the buffers of rank 0 (batch norm's running statistics differ between ranks)."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Waits for all ranks; nothing in a process that is alone. Collective."""
    if dist.is_initialized():
        dist.barrier()


def now(group: Group) -> float:
    """The clock once this process's GPU, if it has one, has nothing left to do; in seconds, to measure by."""
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    return time.perf_counter()
