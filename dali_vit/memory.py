"""Lack of memory: what is said before it is likely to come, and what a user can do when it has come."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dali_vit.accumulation import next_divisor
from dali_vit.config import Config, LocalUserError
from dali_vit.distributed import Group
from dali_vit.environment import available_memory
from dali_vit.model import kept_bytes_per_image
from pipelines.probe import LackOfMemory
from pipelines.words import counted

__all__ = ["is_lack_of_memory", "oom_as_user_error", "warn_of_memory", "warn_of_others"]

log = logging.getLogger(__name__)

_FIRST = 10  # steps; if memory runs out later, there is another reason, and a restart may help
_OF_OTHERS = 4 * 2**30  # bytes in use on a GPU before the run's model: more than CUDA and NCCL themselves take

# Only torch's allocator for GPUs has an error of its own, which the compiler puts into one of another kind. CUDA,
# Triton and NCCL say "out of memory", cuBLAS CUBLAS_STATUS_ALLOC_FAILED.
_LACK_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory")


def oom_as_user_error(work: Callable[..., Any], config: Config, group: Group) -> Callable[..., Any]:
    """Wraps `work`, called every step: LocalUserError where device memory does not hold one of the first steps."""
    share, parts = config.optim.batch_size // group.world_size, config.run.grad_accum_steps
    made = itertools.count()

    def guarded(*arguments: Any) -> Any:
        number = next(made)
        try:
            return work(*arguments)
        except RuntimeError as error:
            if number >= _FIRST or not is_lack_of_memory(error):
                raise
            more = next_divisor(share, parts + 1)
            remedy = f"--grad-accum-steps {more}, " if more > parts else ""
            images = f"{counted(share // parts, 'image')} at once"
            if isinstance(error, LackOfMemory):  # raised for DALI, which loads whole batches
                images = f"{counted(share, 'image')} being loaded beside {share // parts:,} being trained on"
            raise LocalUserError(
                f"--batch-size {config.optim.batch_size}: {_memory(group.device)} does not hold {images};"
                f" give {remedy}a smaller batch or more GPUs"
            ) from error

    return guarded


def is_lack_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch, Triton, CUDA or the loader says that memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError | LackOfMemory) or bool(_LACK_OF_MEMORY.search(str(error)))


def warn_of_memory(model: nn.Module, config: Config, group: Group) -> None:
    """Warns where a step on the CPU is likely to take more memory than there is: the system would end the process.

    On a GPU a lack of memory is an error instead.
    """
    if group.device.type != "cpu" or not group.is_main:
        return
    share, parts = config.optim.batch_size // group.world_size, config.run.grad_accum_steps
    images = share // parts * group.local_world_size
    needed = kept_bytes_per_image(model, config.data.resolution) * images
    available = available_memory()
    if needed > available:
        fitting = next_divisor(share, math.ceil(parts * needed / available))
        log.warning(
            "a step of %s images takes about %.0f GiB of memory, of which there are %.1f: the system may end the"
            " process; give --grad-accum-steps %d or a smaller --batch-size",
            f"{images:,}",
            needed / 2**30,
            available / 2**30,
            fitting,
        )


def warn_of_others(group: Group) -> None:
    """Warns where other processes hold memory of the GPU; to be called before this process uses it."""
    if group.device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(group.device)
    if total - free > _OF_OTHERS:
        log.warning(
            "%s is used by other processes, which hold %.1f GiB: expect low rates or too little memory; nvidia-smi"
            " names them",
            _memory(group.device),
            (total - free) / 2**30,
        )


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return "memory"
    found = torch.cuda.get_device_properties(device)
    return f"the memory of GPU {device.index} ({found.name}, {found.total_memory / 2**30:.0f} GiB)"
