"""Attention of short sequences in two Triton kernels, on q, k and v as their joint projection leaves them in memory.

torch's kernels are made for long sequences. They pad a ViT's 196 tokens to 256 in both directions, add up the gradient
of q in float32 in memory, and return the gradients of q, k and v separately, to be joined by one more kernel. Here a
program has all tokens of a head: the gradient of q stays in its registers, all three gradients are written where the
next product reads them, with the sums that the gradient of the bias needs, and only 208 of the 256 columns are
computed. The order of all sums is fixed: the same input gives the same bits.

The kernels are in `dali_vit.attention_kernels`. Importing this needs Triton, which comes with torch's builds for GPUs.
`dali_vit.attention` decides, by a measurement, whether a run uses it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.library import triton_op, wrap_triton

from dali_vit.attention_kernels import attention_backward, attention_forward

MOST_TOKENS = 256  # up to here the gradient of q for one head fits into the registers of a program
HEAD_WIDTHS = (16, 32, 64)
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
"""Launch options of the backward kernel. More stages would prefetch its many small loads, and wait for them."""

_BLOCK = 64  # rows of a product of Hopper's tensor cores
_TILE = 32  # queries that the backward pass takes at once


class _Tiles(NamedTuple):
    """How tokens are cut: into `full` tiles and, for the rest, one of `tail` rows.

    `tail` is the least power of two from 16 on that holds the rest; 0 where there is no rest.
    """

    full: int
    tail: int

    @classmethod
    def of(cls, tokens: int, size: int) -> _Tiles:
        rest = tokens % size
        return cls(tokens // size, max(16, triton.next_power_of_2(rest)) if rest else 0)


def fits(tokens: int, head_width: int) -> bool:
    """Whether the kernels are made for sequences of so many tokens and heads of this width."""
    return tokens <= MOST_TOKENS and head_width in HEAD_WIDTHS


class PackedAttention(Function):
    """softmax(q k^T / sqrt(D)) v: maps qkv [N, T, 3 * heads * D] to [N, T, heads * D], both in memory in that order.

    `bias` [3 * heads * D] has been added to qkv already; it is passed to get its gradient. `fits` limits T and D.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, heads: int) -> Tensor:
        out, logs = attend(qkv, heads)
        ctx.save_for_backward(qkv, out, logs)
        ctx.heads, ctx.dtype = heads, bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        qkv, out, logs = ctx.saved_tensors
        dqkv, sums = attend_backward(dout.contiguous(), qkv, out, logs, ctx.heads)
        return dqkv, sums.sum(0, dtype=ctx.dtype), None


@triton_op("dali_vit::attend", mutates_args={})
def attend(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Attention [N, T, heads * D] of qkv [N, T, 3 * heads * D], contiguous on a GPU.

    Also returns each query's logarithm to base 2 of the sum of its exponentials, float32 [N * heads, T rounded up].
    """
    return launch_forward(wrap_triton(attention_forward), qkv, heads)


@triton_op("dali_vit::attend_backward", mutates_args={})
def attend_backward(dout: Tensor, qkv: Tensor, out: Tensor, logs: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The gradient of `attend`'s qkv [N, T, 3 * heads * D]; its sums over the tokens, float32 [N, 3 * heads * D]."""
    return launch_backward(wrap_triton(attention_backward), dout, qkv, out, logs, heads)


def launch_forward(kernel: Any, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Computes `attend`. kernel: `attention_forward`, as it is or wrapped for torch.compile."""
    images, tokens, width = qkv.shape
    head_width = width // (3 * heads)
    full, tail = _Tiles.of(tokens, _TILE)
    padded = full * _TILE + tail
    full, tail = _Tiles.of(tokens, _BLOCK)
    out = qkv.new_empty(images, tokens, width // 3)
    logs = torch.empty(images * heads, padded, device=qkv.device, dtype=torch.float32)
    kernel[(images * heads * triton.cdiv(tokens, _BLOCK),)](
        qkv,
        out,
        logs,
        tokens,
        heads,
        padded,
        math.log2(math.e) / math.sqrt(head_width),
        D=head_width,
        BLOCK=_BLOCK,
        FULL=full,
        TAIL=tail,
    )
    return out, logs


def launch_backward(
    kernel: Any, dout: Tensor, qkv: Tensor, out: Tensor, logs: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """Computes `attend_backward`. kernel: `attention_backward`, as it is or wrapped for torch.compile."""
    images, tokens, width = qkv.shape
    head_width = width // (3 * heads)
    dqkv = torch.empty_like(qkv)
    sums = torch.empty(images, width, device=qkv.device, dtype=torch.float32)
    full, tail = _Tiles.of(tokens, _TILE)
    kernel[(images * heads,)](
        qkv,
        out,
        dout,
        logs,
        torch.empty_like(logs),
        dqkv,
        sums,
        tokens,
        heads,
        math.log2(math.e) / math.sqrt(head_width),
        1 / math.sqrt(head_width),
        D=head_width,
        BLOCK=_BLOCK,
        TILE=_TILE,
        FULL=full,
        TAIL=tail,
        **OPTIONS,
    )
    return dqkv, sums


__all__ = ["HEAD_WIDTHS", "MOST_TOKENS", "OPTIONS", "PackedAttention", "attend", "attend_backward", "fits"]
