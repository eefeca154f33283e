"""Optimiser, schedule and gradient clipping, exactly the reference's (big_vision, optax.py).

Nothing here reads a value back from the device: the learning rate and the step count live there as tensors, so
that an update never waits for the GPU and can be captured in a CUDA graph (`set_lr` outside of it).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from dali_vit.config import OptimConfig, UserError
from dali_vit.spikes import is_spike


def lr_schedule(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """The factor in [0, 1] on the peak learning rate at `step` (from 0): linear warm-up, then cosine to 0.

    The factor is 0 at step 0 and would be 0 again at `total_steps`. Raises UserError unless the warm-up ends before the
    run does; a run of one step is checked by `plan` instead. Source: big_vision, utils.create_learning_rate_schedule.
    """
    if warmup_steps >= total_steps > 1:
        raise UserError(
            f"--warmup-steps {warmup_steps}: must be below the run's {total_steps} steps; give {total_steps // 10}"
        )
    if step < warmup_steps:
        return float(np.float32(step) / np.float32(warmup_steps))
    # In float32 like the reference: 1 + cos cancels towards the end, where float64 would differ by more than 1e-6.
    progress = np.float32(step - warmup_steps) / np.float32(max(1, total_steps - warmup_steps))
    cosine = np.float32(math.cos(np.float32(math.pi) * min(progress, np.float32(1))))
    return float(np.float32(0.5) * (np.float32(1) + cosine))


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters in two lists: those that weight decay applies to, and the others.

    It applies to the kernels of dense and convolution layers, not to biases, norms, positions and [cls].
    """
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | _ConvNd)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trainable if id(p) in kernels], [p for p in trainable if id(p) not in kernels]


def create_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimiser of a model that is already on its device, at learning rate 0 until `set_lr`.

    adamw: weight decay decoupled and scaled by the schedule but not by lr, hence weight_decay / lr in torch's
    terms; sgd: momentum with classical decay, added to the gradient.
    """
    decayed, others = decay_groups(model)
    device = (decayed + others)[0].device

    def groups(decay: float) -> list[dict[str, Any]]:
        return [
            {"params": params, "weight_decay": weight_decay, "lr": torch.zeros((), device=device)}
            for params, weight_decay in [(decayed, decay), (others, 0.0)]
            if params
        ]

    match config.optimizer:
        case "adamw":
            options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps}
            decoupled = groups(config.weight_decay / config.lr)
            if config.first_moment == "bfloat16":
                return AdamWBFloat16Moment(decoupled, **options)
            return torch.optim.AdamW(decoupled, **options, fused=True)
        case "sgd":
            optimizer = torch.optim.SGD(groups(config.weight_decay), momentum=config.momentum, fused=True)
            # SGD's first step begins with zeros, but if that is left out, SGD leaves its new buffers uninitialised.
            for p in decayed + others:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            return optimizer
        case _:
            assert_never(config.optimizer)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, in place on the device and without waiting for it."""
    for group in optimizer.param_groups:
        # Loading a checkpoint that was read onto the CPU leaves the rate there.
        group["lr"] = group["lr"].to(group["params"][0].device)
        group["lr"].fill_(lr)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales all gradients by min(1, max_norm / norm) and returns their global L2 norm before that, a 0-d tensor.

    With max_norm None they are not scaled. optax's formula: unlike torch's clip_grad_norm_ it adds no epsilon to the
    norm. Scaled by a norm that is not finite, the gradients become 0 or NaN.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / norm).clamp(max=1.0))
    return norm


def optimizer_step(
    optimizer: Optimizer, grad_clip_norm: float | None, loss: Tensor | None = None, spike_threshold: float = 0.0
) -> Tensor:
    """Clips the gradients, updates the parameters and clears the gradients; returns the norm before clipping.

    With several GPUs, gradients and loss must be averaged over them already. The learning rate is set by `set_lr`.
    Where the norm is not finite, or the loss (0-d) is a spike by a threshold above 0, the update is left out:
    parameters and optimiser state stay as they are, and the norm returned is NaN. TypeError for an optimiser that is
    not fused, which would take every step.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise TypeError(f"{type(optimizer).__name__} is not fused: it does not heed found_inf, and takes every step")
    norm = clip_grad_norm((p for group in optimizer.param_groups for p in group["params"]), grad_clip_norm)
    left_out = ~torch.isfinite(norm)
    if loss is not None and spike_threshold > 0:
        left_out |= is_spike(_losses_seen(optimizer, loss), loss, spike_threshold)
    # GradScaler sets this attribute, too: by it, fused optimisers decide on the device whether to update.
    optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.masked_fill(left_out, math.nan)


def _losses_seen(optimizer: Optimizer, loss: Tensor) -> Tensor:
    """The statistics of `is_spike`, kept like the learning rate in a group, which is saved with the optimiser.

    There are none yet where a run begins, or went on with --spike-threshold 0 until now.
    """
    group = optimizer.param_groups[0]
    seen = group.get("losses_seen")
    group["losses_seen"] = torch.zeros(3, device=loss.device) if seen is None else seen.to(loss.device)
    return group["losses_seen"]


class AdamWBFloat16Moment(torch.optim.AdamW):
    """AdamW whose first moment is rounded to bfloat16 after each step, as optax's scale_by_adam keeps it.

    The update uses the new moment before it is rounded. beta1 itself is rounded (0.9 to 0.8984375) where it
    multiplies the old moment, because JAX gives a constant the type of the array; with 0.9 the losses of
    tests/reference/trajectory_mu_bfloat16.npz differ by 0.6 %, with 0.8984375 by 1e-6. The rounded moment is stored as
    float32, which torch's fused kernel requires. Options of a group: lr (a 0-d tensor on the parameters' device),
    betas, eps, weight_decay.
    """

    def __init__(self, params: Any, *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            moments = self._moments(group)
            if moments:
                # The kernel itself multiplies by beta1. A step that is left out must not change the moments.
                beta1 = group["betas"][0]
                scale = torch.full((), _to_bfloat16(beta1) / (beta1 or 1.0), device=moments[0].device)
                if hasattr(self, "found_inf"):
                    scale = torch.where(self.found_inf.bool(), 1.0, scale)
                torch._foreach_mul_(moments, scale)
        super().step()
        for group in self.param_groups:
            moments = self._moments(group)
            rounded = [torch.empty_like(m, dtype=torch.bfloat16) for m in moments]
            torch._foreach_copy_(rounded, moments)
            torch._foreach_copy_(moments, rounded)

    def _moments(self, group: dict[str, Any]) -> list[Tensor]:
        """First moments; before the first step there are none."""
        return [self.state[p]["exp_avg"] for p in group["params"] if p in self.state]


@functools.cache
def _to_bfloat16(value: float) -> float:
    return torch.tensor(value).bfloat16().item()


__all__ = [
    "AdamWBFloat16Moment",
    "clip_grad_norm",
    "create_optimizer",
    "decay_groups",
    "lr_schedule",
    "optimizer_step",
    "set_lr",
]
