"""Attention of short sequences in two Triton kernels, on q, k and v as their one product leaves them in memory.

torch's kernels are made for long sequences. Of the 196 tokens of a ViT they make 256 both ways, add up the gradient of
q in float32 in memory, and give the gradients of q, k and v apart, which one more kernel has to put together. Here a
program has all tokens of a head: the gradient of q stays in its registers, all three are written where the next product
reads them, with the sums that the gradient of the bias needs, and only 208 of the 256 columns are computed. The order
of all sums is fixed: the same input gives the same bits.

Importing this needs Triton, which comes with torch's builds for GPUs. `dali_vit.attention` decides, by a measurement,
whether a run uses it.
"""

# mypy: disable-error-code="assignment"
# Tuples of tiles grow in the kernels, one a step.

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.library import triton_op, wrap_triton

MOST_TOKENS = 256  # of which the gradient of q, head by head, fits into the registers of a program
HEAD_WIDTHS = (16, 32, 64)
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
"""Of the backward kernel. More stages would copy its many small loads ahead, and wait for them."""

_BLOCK = 64  # rows of a product of Hopper's tensor cores
_TILE = 32  # queries that the backward pass takes at once


# Triton 3.9 says that its default, which is meant here, will be another one day.
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION is unset")


class _Tiles(NamedTuple):
    """How tokens are cut: into `full` tiles and one of `tail` rows, the least power of two from 16 that is enough."""

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
    """softmax(q k^T / sqrt(D)) v of qkv [N, T, 3 * heads * D] to [N, T, heads * D], both in memory in that order.

    `bias` [3 * heads * D] is in qkv already; it is given for its gradient. See `fits` for T and D.
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

    Besides, of each query, the logarithm to base 2 of the sum of its exponentials, float32 [N * heads, T rounded up].
    """
    return launch_forward(wrap_triton(attention_forward), qkv, heads)


@triton_op("dali_vit::attend_backward", mutates_args={})
def attend_backward(dout: Tensor, qkv: Tensor, out: Tensor, logs: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The gradient of `attend`'s qkv [N, T, 3 * heads * D]; its sums over the tokens, float32 [N, 3 * heads * D]."""
    return launch_backward(wrap_triton(attention_backward), dout, qkv, out, logs, heads)


def launch_forward(kernel: Any, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """`attend` by `attention_forward`, as it is or wrapped for torch.compile."""
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
    """`attend_backward` by `attention_backward`, as it is or wrapped for torch.compile."""
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


@triton.jit
def attention_forward(
    qkv,
    out,
    logs,
    tokens,
    heads,
    padded,
    scale,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A block of queries of a head. The blocks of a head follow each other, as they read the same keys and values."""
    blocks: tl.constexpr = FULL + (TAIL > 0)
    sequence = tl.program_id(0) // blocks
    image = (sequence // heads).to(tl.int64)
    head = sequence % heads
    row = 3 * heads * D
    qkv += image * tokens * row + head * D
    out += image * tokens * heads * D + head * D
    first = tl.program_id(0) % blocks * BLOCK
    q = _rows(qkv, first, tokens, row, D, BLOCK)
    weighted = tl.zeros((BLOCK, D), tl.float32)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(FULL):
        weighted, top, total = _attend_to(
            q, qkv + heads * D, i * BLOCK, tokens, row, scale, weighted, top, total, D, BLOCK, True
        )
    if TAIL > 0:
        weighted, top, total = _attend_to(
            q, qkv + heads * D, FULL * BLOCK, tokens, row, scale, weighted, top, total, D, TAIL, False
        )
    queries = first + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    tl.store(
        out + queries[:, None] * heads * D + columns[None, :],
        (weighted / total[:, None]).to(out.dtype.element_ty),
        mask=(queries < tokens)[:, None],
    )
    # For the backward pass what lies beyond the last query has no share in anything: 2^(s - infinity) = 0.
    logs += sequence.to(tl.int64) * padded
    tl.store(logs + queries, tl.where(queries < tokens, top + tl.log2(total), float("inf")), mask=queries < padded)


@triton.jit
def _attend_to(
    q,
    keys,
    first,
    tokens,
    row,
    scale,
    weighted,
    top,
    total,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The running sums of softmax (Milakov and Gimelshein, arXiv 1805.02867) with `SIZE` keys more."""
    k = _rows(keys, first, tokens, row, D, SIZE)
    v = _rows(keys + row // 3, first, tokens, row, D, SIZE)
    s = tl.dot(q, tl.trans(k)) * scale
    if not WHOLE:
        s = tl.where((first + tl.arange(0, SIZE) < tokens)[None, :], s, -float("inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(top - higher)
    weighted = tl.dot(p.to(v.dtype), v, weighted * shrink[:, None])
    return weighted, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def attention_backward(
    qkv,
    out,
    dout,
    logs,
    deltas,
    dqkv,
    sums,
    tokens,
    heads,
    scale,
    factor,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
):
    """A head of an image: block of keys by block of keys, and of each, tile of queries by tile of queries.

    All products are of the transpose, keys by queries: the keys' gradients then take the exponentials from registers,
    and the queries of the last tile are columns, of which the tensor cores take eight where they take 64 rows.
    """
    sequence = tl.program_id(0).to(tl.int64)
    image = sequence // heads
    head = sequence % heads
    row = 3 * heads * D
    at = image * tokens * row + head * D
    qkv += at
    dqkv += at
    at = image * tokens * heads * D + head * D
    out += at
    dout += at
    padded: tl.constexpr = FULL * TILE + TAIL
    logs += sequence * padded
    deltas += sequence * padded
    qs = ()
    dos = ()
    dqs = ()
    for i in tl.static_range(FULL):
        q, do = _queries(qkv, out, dout, deltas, i * TILE, tokens, heads, D, TILE)
        qs += (q,)
        dos += (do,)
        dqs += (tl.zeros((D, TILE), tl.float32),)
    if TAIL > 0:
        q, do = _queries(qkv, out, dout, deltas, FULL * TILE, tokens, heads, D, TAIL)
        qs += (q,)
        dos += (do,)
        dqs += (tl.zeros((D, TAIL), tl.float32),)
    tl.debug_barrier()  # other threads of the program read the deltas again
    k_sums = tl.zeros((D,), tl.float32)
    v_sums = tl.zeros((D,), tl.float32)
    for j in tl.range(tl.cdiv(padded, BLOCK)):
        start = j * BLOCK
        inside = (start + tl.arange(0, BLOCK) < tokens)[:, None]
        k = _rows(qkv + heads * D, start, tokens, row, D, BLOCK)
        v = _rows(qkv + 2 * heads * D, start, tokens, row, D, BLOCK)
        dk = tl.zeros((BLOCK, D), tl.float32)
        dv = tl.zeros((BLOCK, D), tl.float32)
        added = ()
        for i in tl.static_range(FULL):
            dq, dk, dv = _tile(qs[i], dos[i], logs, deltas, i * TILE, k, v, inside, scale, dqs[i], dk, dv, TILE)
            added += (dq,)
        if TAIL > 0:
            dq, dk, dv = _tile(
                qs[FULL], dos[FULL], logs, deltas, FULL * TILE, k, v, inside, scale, dqs[FULL], dk, dv, TAIL
            )
            added += (dq,)
        dqs = added
        dk = dk * factor
        # What lies beyond the last key is 0 in both.
        k_sums += tl.sum(dk, 0)
        v_sums += tl.sum(dv, 0)
        _put_rows(dqkv + heads * D, dk, start, tokens, row, D, BLOCK)
        _put_rows(dqkv + 2 * heads * D, dv, start, tokens, row, D, BLOCK)
    q_sums = tl.zeros((D,), tl.float32)
    for i in tl.static_range(FULL):
        dq = tl.trans(dqs[i] * factor)
        q_sums += tl.sum(dq, 0)
        _put_rows(dqkv, dq, i * TILE, tokens, row, D, TILE)
    if TAIL > 0:
        dq = tl.trans(dqs[FULL] * factor)
        q_sums += tl.sum(dq, 0)
        _put_rows(dqkv, dq, FULL * TILE, tokens, row, D, TAIL)
    sums += image * row + head * D
    columns = tl.arange(0, D)
    tl.store(sums + columns, q_sums)
    tl.store(sums + heads * D + columns, k_sums)
    tl.store(sums + 2 * heads * D + columns, v_sums)


@triton.jit
def _queries(qkv, out, dout, deltas, first, tokens, heads, D: tl.constexpr, SIZE: tl.constexpr):
    """q and the gradient of the output of some queries. Their products of output and its gradient go to `deltas`."""
    q = _rows(qkv, first, tokens, 3 * heads * D, D, SIZE)
    do = _rows(dout, first, tokens, heads * D, D, SIZE)
    o = _rows(out, first, tokens, heads * D, D, SIZE)
    tl.store(deltas + first + tl.arange(0, SIZE), tl.sum(do.to(tl.float32) * o.to(tl.float32), 1))
    return q, do


@triton.jit
def _tile(q, do, logs, deltas, first, k, v, inside, scale, dq, dk, dv, SIZE: tl.constexpr):
    """The gradients with what `SIZE` queries and a block of keys have to do with each other."""
    at = first + tl.arange(0, SIZE)
    s = tl.dot(k, tl.trans(q))
    dp = tl.dot(v, tl.trans(do))
    p = tl.where(inside, tl.exp2(s * scale - tl.load(logs + at)[None, :]), 0.0)
    ds = (p * (dp - tl.load(deltas + at)[None, :])).to(q.dtype)
    dv = tl.dot(p.to(do.dtype), do, dv)
    dk = tl.dot(ds, q, dk)
    dq = tl.dot(tl.trans(k), ds, dq)
    return dq, dk, dv


@triton.jit
def _rows(base, first, tokens, row, D: tl.constexpr, SIZE: tl.constexpr):
    """[SIZE, D] at `base`, 0 beyond the last token."""
    rows = first + tl.arange(0, SIZE)
    return tl.load(base + rows[:, None] * row + tl.arange(0, D)[None, :], mask=(rows < tokens)[:, None], other=0.0)


@triton.jit
def _put_rows(base, values, first, tokens, row, D: tl.constexpr, SIZE: tl.constexpr):
    rows = first + tl.arange(0, SIZE)
    at = base + rows[:, None] * row + tl.arange(0, D)[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=(rows < tokens)[:, None])


__all__ = ["HEAD_WIDTHS", "MOST_TOKENS", "OPTIONS", "PackedAttention", "attend", "attend_backward", "fits"]
