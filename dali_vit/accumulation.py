"""Gradient accumulation: a batch in parts, one after the other, and what to do where memory does not hold a batch.

The parts take as much less memory and give the gradients of the whole batch up to rounding: Mixup's partners and the
mean loss are the batch's, and processes exchange gradients once a step. Batch norm alone sees a part at a time.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_vit.config import Config, LocalUserError
from dali_vit.data import LackOfMemory
from dali_vit.distributed import Group
from dali_vit.environment import available_memory
from dali_vit.model import kept_bytes_per_image

log = logging.getLogger(__name__)

_FIRST = 10  # steps: what has been held for longer fails for another reason, and a restart may help
_OF_OTHERS = 4 * 2**30  # bytes of a GPU's memory in use before a run's own: more than CUDA and NCCL themselves take

Passes = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images uint8 [N, H, W, 3], labels int64 [N], lambda 0-d) -> the mean loss, 0-d; gradients are added up."""


def forward_and_backward(step: nn.Module, parts: int, replicas: DistributedDataParallel | None) -> Passes:
    """Both passes over a batch, in parts that divide it.

    step: maps images, labels, lambda and, of a part, its partners and their labels to a mean loss, as
    `step.TrainStep` does; replicas: what is wrapped in it, if anything, to average gradients over the processes.
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
    """The smallest divisor of a number from `least` on, or the number itself."""
    return next((n for n in range(least, number) if number % n == 0), number)


def name_lack_of_memory(work: Callable[..., Any], config: Config, group: Group) -> Callable[..., Any]:
    """What is done every step, with a LocalUserError where the device's memory does not hold the first of them."""
    share, parts = config.optim.batch_size // group.world_size, config.run.grad_accum_steps
    made = itertools.count()

    def guarded(*arguments: Any) -> Any:
        number = next(made)
        try:
            return work(*arguments)
        except (torch.OutOfMemoryError, LackOfMemory) as error:
            if number >= _FIRST:
                raise
            more = next_divisor(share, parts + 1)
            remedy = f"--grad-accum-steps {more}, " if more > parts else ""
            images = f"{share // parts} images at once"
            if isinstance(error, LackOfMemory):  # of DALI, whose batches are whole
                images = f"{share} images being loaded beside {share // parts} being trained on"
            raise LocalUserError(
                f"--batch-size {config.optim.batch_size}: {_memory(group.device)} does not hold {images};"
                f" give {remedy}a smaller batch or more GPUs"
            ) from error

    return guarded


def warn_of_memory(model: nn.Module, config: Config, group: Group) -> None:
    """Says so where a step on the CPU is likely to take more memory than there is: the system would end the process.

    On a GPU there is an error instead; there it is said what others hold, so it is to be called before the model moves.
    """
    warn_of_others(group)
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
    """Says so where other processes hold memory of the GPU that this one has yet to use."""
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


__all__ = ["forward_and_backward", "name_lack_of_memory", "next_divisor", "warn_of_memory", "warn_of_others"]
