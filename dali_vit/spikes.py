"""Loss spikes: a step whose loss leaps out of the run is recognised on the device, before it reaches the weights.

The loss is watched rather than the norm of the gradients. Clipping bounds what a large gradient does, and healthy
runs have norms many times their usual one; the mean loss of a whole batch has no such tail, so that only a leap can
reach a bound far above it. Every rank compares the mean loss over all ranks, with the same bits, because either all
ranks leave a step out or none does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORY = 1000  # steps: up to here a plain mean of all, then an exponential one with this time constant
WARM_UP = 100  # steps that are needed before a deviation means something
_LEAST = 0.1  # the least deviation, as a share of the mean and of 1 nat; see `is_spike`


def is_spike(seen: Tensor, loss: Tensor, threshold: float) -> Tensor:
    """Whether a step's loss leaps above the losses before it: a 0-d bool on the device, without waiting for it.

    seen: float32 [3], zeros at first: steps counted, running mean and variance of the loss; updated in place by a
    loss that is finite and no spike, so that spikes in a row are all recognised. loss: 0-d float32. A spike is more
    than `threshold` deviations above the mean. A deviation counts as at least a tenth of the mean and at least 0.1:
    with a threshold of 10 the loss has to double and to rise by 1, so that small batches of memorised images, whose
    losses are near 0 except for single images, are not taken for spikes.
    """
    count, mean, variance = seen.unbind()
    excess = loss - mean
    deviation = torch.maximum(variance.sqrt(), _LEAST * mean.clamp(min=1.0))
    spike = (count >= WARM_UP) & (excess > threshold * deviation)
    weight = 1.0 / (count + 1.0)
    updated = torch.stack(
        [
            (count + 1.0).clamp(max=MEMORY - 1.0),
            mean + weight * excess,
            (1.0 - weight) * (variance + weight * excess.square()),
        ]
    )
    seen.copy_(torch.where(spike | ~loss.isfinite(), seen, updated))
    return spike


class SharedLoss(nn.Module):
    """A loss for DistributedDataParallel to wrap, whose mean over the ranks comes along with the gradients.

    The mean is the gradient of a parameter that is and stays 0, in a bucket that is averaged anyway: a separate
    collective would cost every step a message to all ranks. The loss itself and the other gradients keep their bits.
    """

    def __init__(self, step: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.step = step
        self.carrier = nn.Parameter(torch.zeros((), device=device))

    def forward(self, *arguments: Tensor) -> Tensor:
        loss: Tensor = self.step(*arguments)
        return loss + self.carrier * loss.detach()

    def take_mean(self) -> Tensor:
        """The mean loss, 0-d; to be called once a step, after its backward passes."""
        mean = self.carrier.grad
        assert mean is not None
        self.carrier.grad = None  # else the next step's mean would be added to it
        return mean


__all__ = ["MEMORY", "WARM_UP", "SharedLoss", "is_spike"]
