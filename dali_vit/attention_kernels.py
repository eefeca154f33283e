"""The two Triton kernels of `dali_vit.packed_attention`, which calls them and says what they are for."""

# mypy: disable-error-code="assignment"
# Tuples of tiles grow in the kernels by one tile per loop step, so their type changes.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attention_backward", "attention_forward"]


@triton.jit
def attention_forward(
    qkv,
    out,
    logs,
    tokens,
    heads,
    padded,
    scale: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Computes a block of queries of a head. A head's programs are consecutive, as they read the same keys and values.

    scale: log2(e) / sqrt(D), a constant here, as torch 2.11 would pass a number from a compiled step as float64.
    """
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
    # Infinity beyond the last query: in the backward pass such rows then contribute nothing, as 2^(s - infinity) = 0.
    logs += sequence.to(tl.int64) * padded
    tl.store(logs + queries, tl.where(queries < tokens, top + tl.log2(total), float("inf")), mask=queries < padded)


@triton.jit
def _attend_to(
    q,
    keys,
    first,
    tokens,
    row,
    scale: tl.constexpr,
    weighted,
    top,
    total,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Updates the running sums of softmax (Milakov and Gimelshein, arXiv 1805.02867) with `SIZE` more keys."""
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
    scale: tl.constexpr,
    factor: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Computes the gradients of a head of an image, going over all tiles of queries for each block of keys.

    All products are transposed, keys by queries: the keys' gradients then take the exponentials from registers, and the
    queries of the last tile are columns, which the tensor cores take in eights, while they take rows in 64s.
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
    tl.debug_barrier()  # the deltas that one thread has stored are read by others below
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
        # Rows beyond the last key are 0 in dk and dv.
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
    """q and the output's gradient for `SIZE` queries; stores the dot products of output and gradient in `deltas`."""
    q = _rows(qkv, first, tokens, 3 * heads * D, D, SIZE)
    do = _rows(dout, first, tokens, heads * D, D, SIZE)
    o = _rows(out, first, tokens, heads * D, D, SIZE)
    tl.store(deltas + first + tl.arange(0, SIZE), tl.sum(do.to(tl.float32) * o.to(tl.float32), 1))
    return q, do


@triton.jit
def _tile(q, do, logs, deltas, first, k, v, inside, scale: tl.constexpr, dq, dk, dv, SIZE: tl.constexpr):
    """Adds the contributions of `SIZE` queries and a block of keys to the gradients."""
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
    """Loads rows [SIZE, D] from token `first` on; rows beyond the last token are 0."""
    rows = first + tl.arange(0, SIZE)
    return tl.load(base + rows[:, None] * row + tl.arange(0, D)[None, :], mask=(rows < tokens)[:, None], other=0.0)


@triton.jit
def _put_rows(base, values, first, tokens, row, D: tl.constexpr, SIZE: tl.constexpr):
    rows = first + tl.arange(0, SIZE)
    at = base + rows[:, None] * row + tl.arange(0, D)[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=(rows < tokens)[:, None])
