"""Which of torch's attention kernels is the fastest for a model on this GPU, measured when a run starts.

At 196 tokens and heads of 64 they are close, and which wins depends on the chip and on torch's version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dali_vit.distributed import Group, gather_objects

log = logging.getLogger(__name__)

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_GAIN = 1.03  # less is noise: the first of BACKENDS stays
_WARM_UP, _REPEATS = 3, 10


class Shape(NamedTuple):
    """Of the attention in a step of one process."""

    images: int
    tokens: int
    heads: int
    head_width: int


class Attention(NamedTuple):
    """What attention is to run on."""

    context: Callable[[], AbstractContextManager[object]]
    """Makes a context in which it does."""
    kernel: str
    """One of BACKENDS, or `torch's choice`."""
    words: str
    """The kernel, and the times of all."""


_TORCHS_CHOICE = Attention(nullcontext, "torch's choice", "torch's choice")


def fastest_attention(model: nn.Module, images: int, group: Group) -> Attention:
    """The fastest kernel for `images` a process.

    For plain ViTs on GPUs; elsewhere torch's own choice stays. All ranks choose alike. Collective, takes a second.
    """
    shape = shape_of(model, images)
    if group.device.type != "cuda" or shape is None:
        return _TORCHS_CHOICE
    # On every rank: torch's first use of attention in a process puts an order of its own above the one asked for, which
    # must not be while the step is traced.
    times = gather_objects(measure(shape, group.device))[0]
    if not times:
        log.warning("none of %s runs here: attention is torch's plain one", ", ".join(BACKENDS))
        return _TORCHS_CHOICE
    chosen = choose(times)
    # The others stay behind it, for what it cannot do.
    order = sorted([*BACKENDS.values(), SDPBackend.MATH], key=lambda backend: backend != BACKENDS[chosen])
    measured = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in times.items())
    return Attention(partial(sdpa_kernel, order, set_priority=True), chosen, f"{chosen} ({measured} a layer)")


def shape_of(model: nn.Module, images: int) -> Shape | None:
    """What `model` asks of attention, or None where it is no plain ViT."""
    if not isinstance(model, VisionTransformer):
        return None
    vit: Any = model  # timm's modules are typed as tensors or modules
    heads = vit.blocks[0].attn.num_heads
    return Shape(images, vit.patch_embed.num_patches + vit.num_prefix_tokens, heads, vit.embed_dim // heads)


def choose(times: dict[str, float]) -> str:
    """The fastest by time; the first where it is hardly slower."""
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] * _GAIN < times[first] else first


def measure(shape: Shape, device: torch.device) -> dict[str, float]:
    """Milliseconds of forward and backward in bfloat16, for the kernels that run here."""
    times = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                times[name] = _milliseconds(shape, device)
        except RuntimeError as error:  # not built for this chip, or not for these sizes
            log.debug("attention %s: %s", name, error)
    return times


def _milliseconds(shape: Shape, device: torch.device) -> float:
    # In memory as the model's one product of all three leaves them, and their gradient as the next one's.
    size = (shape.images, shape.tokens, 3, shape.heads, shape.head_width)
    qkv = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    upstream = torch.randn(shape.images, shape.tokens, shape.heads, shape.head_width, device=device).bfloat16()
    upstream = upstream.transpose(1, 2)

    def run(times: int) -> None:
        for _ in range(times):
            torch.autograd.grad(scaled_dot_product_attention(q, k, v), qkv, upstream, retain_graph=True)

    run(_WARM_UP)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run(_REPEATS)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _REPEATS
