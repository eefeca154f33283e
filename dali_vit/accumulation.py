"""Gradient accumulation, which trains on a batch part by part.

n parts need about 1/n of the memory and give the gradients of the whole batch up to rounding: Mixup's partners and the
mean loss are those of the whole batch, and processes exchange gradients once a step. Only batch norm differs: it sees
one part at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["forward_and_backward", "next_divisor"]

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
