"""One training step: the loss that is compiled as one graph (normalise, Mixup, forward), and the update around it."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_vit.accumulation import forward_and_backward
from dali_vit.attention import TORCH_DEFAULT, choose_attention
from dali_vit.blocks import use_packed_attention
from dali_vit.compiling import compile_failure_as_user_error, how_to_compile
from dali_vit.config import WITH_CUDA_GRAPHS, Config, UserError
from dali_vit.distributed import Group, gather_objects
from dali_vit.environment import too_old
from dali_vit.memory import oom_as_user_error
from dali_vit.mixup import mixup_cross_entropy, normalize_and_mix
from dali_vit.optim import optimizer_step, set_lr
from dali_vit.spikes import SharedLoss

# torch 2.15 deprecates broadcast_buffers. Its successor still sends them once, at the start, when they are the same.
_HAS_SUCCESSOR = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _HAS_SUCCESSOR else "broadcast_buffers": False}

DDP_OPTIONS: dict[str, Any] = {"gradient_as_bucket_view": True, "static_graph": True}
"""DistributedDataParallel's settings that change its speed alone; tools/measure_ddp.py compares them."""

_CACHE_KEY_TAG = torch.compiler.config.cache_key_tag  # the user's, by TORCH_COMPILE_CACHE_KEY_TAG

Update = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]


class TrainStep(nn.Module):
    """Loss of a classifier on one batch as the loader hands it over; compile it, or wrap it for several GPUs.

    `autocast` is the type of the matrix products (torch.bfloat16 on GPUs) or None for the parameters' own;
    parameters, gradients and the loss stay float32 either way.
    """

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.autocast = autocast

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        lam: Tensor,
        partners: Tensor | None = None,
        partner_labels: Tensor | None = None,
    ) -> Tensor:
        """images [N, H, W, 3] uint8, labels [N] int64, lam 0-d float32, all on one device; loss 0-d float32.

        Of a part of a batch, what its images are mixed with is given like the images and labels.
        """
        mixed = normalize_and_mix(images, lam, partners)
        with torch.autocast(images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits = self.model(mixed)
        return mixup_cross_entropy(logits, labels, lam, self.label_smoothing, partner_labels)


class RunAhead:
    """Keeps the host at most two steps ahead of a GPU, which always has a whole step left to do.

    Further ahead it would stand in launches that the GPU has no room for; and each step ahead holds a batch.
    """

    MOST = 2  # steps

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ends: deque[torch.cuda.Event] = deque()

    def step_is_queued(self) -> None:
        """Call it after each step; waits for the end of an earlier one where the host is too far ahead."""
        if not self._on_gpu:
            return
        end = torch.cuda.Event(blocking=True)  # the thread sleeps
        end.record()
        self._ends.append(end)
        if len(self._ends) > self.MOST:
            self._ends.popleft().synchronize()


def build_update(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> tuple[Update, dict[str, str]]:
    """The function (images, labels, lambda, lr) -> (loss, gradient norm) that trains one step, and how it runs, in
    words: `compile` and, where there is something to say of them, `attention` and `parts`.

    images uint8 [N, H, W, 3] and labels int64 [N] on the group's device; both results are 0-d tensors there, for which
    nothing waits: the host waits only for the end of the step before last (`RunAhead`). The loss is this process's, the
    norm that of all; it is NaN where the step was left out.
    Collective. Raises UserError where a GPU has no matrix products in bfloat16, and where compilation is asked for and
    does not work here. The function raises LocalUserError where the step cannot be compiled, and where device memory
    does not hold one of the first steps.
    """
    if old := next(filter(None, gather_objects(too_old(group.device))), None):
        raise UserError(
            f"{old}: training takes a GPU of the Ampere generation (8.0) or later; choose by CUDA_VISIBLE_DEVICES, or"
            " give --gpus 0 for the CPU"
        )
    on_gpu = group.device.type == "cuda"
    parts = config.run.grad_accum_steps
    mode, words = how_to_compile(config, group)
    how = {"compile": words}
    images_at_once = config.optim.batch_size // group.world_size // parts
    attention = choose_attention(config.run.attention, model, images_at_once, group, compiled=mode != "off")
    use_packed_attention(model, attention.packed)
    loss_step: nn.Module = TrainStep(
        model, label_smoothing=config.optim.label_smoothing, autocast=torch.bfloat16 if on_gpu else None
    )
    shared = SharedLoss(loss_step, group.device) if group.world_size > 1 else None
    replicas = None
    if shared is not None:
        loss_step = replicas = DistributedDataParallel(
            shared,
            device_ids=[group.device.index] if on_gpu else None,
            **_KEEP_BUFFERS,  # every rank builds the same ones; batch statistics are made equal before evaluation
            **DDP_OPTIONS | ({"static_graph": False} if parts > 1 else {}),  # it cannot leave an exchange out
        )
    if mode != "off":
        # torch's cache on disk does not tell kernels of attention apart: a later run would get the first one's.
        torch.compiler.config.cache_key_tag = f"{_CACHE_KEY_TAG} attention: {attention.kernel}"
        loss_step = torch.compile(loss_step, mode=None if mode == "default" else mode)  # type: ignore[assignment]
    if attention.kernel != TORCH_DEFAULT:
        how["attention"] = attention.words
    if parts > 1:
        how["parts"] = f"{parts}, whose gradients are added up"
    replays = mode in WITH_CUDA_GRAPHS
    passes = forward_and_backward(loss_step, parts, replicas)
    ahead = RunAhead(group.device)

    def update(images: Tensor, labels: Tensor, lam: float, lr: float) -> tuple[Tensor, Tensor]:
        # From pinned memory, so that the copy waits for nothing.
        lam_tensor = torch.tensor(lam, dtype=torch.float32, pin_memory=on_gpu)
        if replays:
            torch.compiler.cudagraph_mark_step_begin()
        with attention.context():
            loss = passes(images, labels, lam_tensor.to(group.device, non_blocking=True))
        set_lr(optimizer, lr)
        # The next replay of a CUDA graph writes where this one's loss lies.
        loss = loss.detach().clone() if replays else loss.detach()
        mean = loss if shared is None else shared.take_mean()
        norm = optimizer_step(optimizer, config.optim.grad_clip_norm, mean, config.optim.spike_threshold)
        ahead.step_is_queued()
        return loss, norm

    return compile_failure_as_user_error(oom_as_user_error(update, config, group), config), how


__all__ = ["DDP_OPTIONS", "RunAhead", "TrainStep", "build_update"]
