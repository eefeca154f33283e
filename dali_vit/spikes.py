"""Loss spikes: a step whose loss leaps out of the run is recognised on the device, before it reaches the weights.

Watched is the loss and not the norm of the gradients. Clipping bounds what a large gradient does, and healthy
runs have norms many times their usual one; the mean loss of a whole batch has no such tail, so that a bound far
above it can be reached by nothing but a leap. What is compared is the mean over all ranks, the same bits on each,
because either all of them leave a step out or none does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEMORY = 1000  # steps: the running mean is that of all steps until then, and exponential from there on
WARM_UP = 100  # steps: as many are needed before a deviation means something
_LEAST = 0.1  # of the mean and of 1 nat: what counts as a deviation at least, see `is_spike`


def is_spike(seen: Tensor, loss: Tensor, threshold: float) -> Tensor:
    """Whether a step's loss leaps out of those before it: a 0-d bool on their device, which nothing waits for.

    seen: float32 [3], zeros at first: steps counted, running mean and variance of the loss, updated in place by a
    loss that is finite and no spike, so that a row of spikes stays one. loss: 0-d float32. A spike is more than
    `threshold` deviations above the mean. A deviation counts as a tenth of the mean and as 0.1 at least: with
    a threshold of 10 the loss has to double and to rise by 1, which keeps small batches of memorised images, whose
    losses are next to 0 but for single images, from being taken for spikes.
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

    It is the gradient of a parameter that is 0 and stays it, in a bucket that is averaged anyway: a collective of
    its own would cost every step a message to all ranks. The loss itself and the other gradients keep their bits.
    """

    def __init__(self, step: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.step = step
        self.carrier = nn.Parameter(torch.zeros((), device=device))

    def forward(self, *arguments: Tensor) -> Tensor:
        loss: Tensor = self.step(*arguments)
        return loss + self.carrier * loss.detach()

    def take_mean(self) -> Tensor:
        """The mean after a backward pass, 0-d; it is to be taken once each."""
        mean = self.carrier.grad
        assert mean is not None
        self.carrier.grad = None  # else the next would be added to it
        return mean


__all__ = ["MEMORY", "WARM_UP", "SharedLoss", "is_spike"]
