"""Gradient accumulation, which trains on a batch part by part, and what a user is told when memory does not suffice.

n parts need about 1/n of the memory and give the gradients of the whole batch up to rounding: Mixup's partners and the
mean loss are those of the whole batch, and processes exchange gradients once a step. Only batch norm differs: it sees
one part at a time.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_vit.config import Config, LocalUserError
from dali_vit.distributed import Group
from dali_vit.environment import available_memory
from dali_vit.model import kept_bytes_per_image
from pipelines.probe import LackOfMemory

log = logging.getLogger(__name__)

_FIRST = 10  # steps; if memory runs out later, there is another reason, and a restart may help
_OF_OTHERS = 4 * 2**30  # bytes in use on a GPU before the run's model: more than CUDA and NCCL themselves take

# Only torch's allocator for GPUs has an error of its own, which the compiler puts into one of another kind. CUDA,
# Triton and NCCL say "out of memory", cuBLAS CUBLAS_STATUS_ALLOC_FAILED.
_LACK_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory")

Passes = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images uint8 [N, H, W, 3], labels int64 [N], lambda 0-d) -> the mean loss, 0-d; adds to the gradients."""


def forward_and_backward(step: nn.Module, parts: int, replicas: DistributedDataParallel | None) -> Passes:
    """A function that runs the forward and backward pass over a batch in `parts` parts of equal size.

    step: maps images, labels and lambda to a mean loss, as `step.TrainStep` does; for a part of a batch it also takes
    the partners and their labels. replicas: the module in `step` that averages gradients over the processes, if any.
    """

    without_exchange = nullcontext if replicas is None else replicas.no_sync

    def whole(images: Tensor, labels: Tensor, lam: Tensor) -> Tensor:
        loss: Tensor = step(images, labels, lam)
        loss.backward()
        return loss

    def in_parts(images: Tensor, labels: Tensor, lam: Tensor) -> Tensor:
        batch = (images, labels, images.roll(1, 0), labels.roll(1, 0))
        losses = []
        for number, part in enumerate(zip(*(tensor.chunk(parts) for tensor in batch), strict=True)):
            own_images, own_labels, *partners = part
            with without_exchange() if number < parts - 1 else nullcontext():
                loss = step(own_images, own_labels, lam, *partners) / parts
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return whole if parts == 1 else in_parts


def next_divisor(number: int, least: int) -> int:
    """The smallest divisor of `number` that is at least `least`, or `number` itself where there is none."""
    return next((n for n in range(least, number) if number % n == 0), number)


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
            images = f"{share // parts} image{'s' if share > parts else ''} at once"
            if isinstance(error, LackOfMemory):  # raised for DALI, which loads whole batches
                images = f"{share} images being loaded beside {share // parts} being trained on"
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


__all__ = [
    "forward_and_backward",
    "is_lack_of_memory",
    "next_divisor",
    "oom_as_user_error",
    "warn_of_memory",
    "warn_of_others",
]
