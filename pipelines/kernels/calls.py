"""Compiled functions as DALI calls them: by address, with pointers to the data and shapes of its tensors."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.ccallback import CFunc

__all__ = ["BATCH", "SAMPLE", "address", "jit", "pairs_shape", "square_shape"]

jit = numba.njit(nogil=True, error_model="numpy")

_pointers, _shapes = types.CPointer(types.voidptr), types.CPointer(types.CPointer(types.int64))
# Data, shapes, ranks and number of a sample's outputs; then those of its inputs.
SAMPLE = types.void(_pointers, _shapes, types.voidptr, types.int32, _pointers, _shapes, types.voidptr, types.int32)
# Shapes, ranks and number of a batch's outputs; those of its inputs; the number of samples.
BATCH = types.void(_shapes, types.voidptr, types.int32, _shapes, types.voidptr, types.int32, types.int32)


def address(signature: Any, function: Callable[..., None]) -> int:
    """Address of the compiled function, which is cached on disk where that is writable, and stays in memory."""
    # By itself Numba compiles anew where the function's own file changed, not one with functions that it calls.
    if not function.__qualname__.endswith(_version()):
        function.__qualname__ += _version()
    try:
        compiled: CFunc = numba.cfunc(signature, cache=True)(function)
    except (RuntimeError, OSError):  # no folder for the cache, or a full disk
        compiled = numba.cfunc(signature)(function)
    _compiled.append(compiled)
    found = compiled.address
    assert found is not None
    return found


_compiled: list[CFunc] = []


@functools.cache
def _version() -> str:
    """Changes with the code in this folder; part of the names under which Numba keeps compiled functions."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return "_" + hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


@functools.cache
def pairs_shape() -> int:
    """Address of the function that gives both outputs the shape [2]."""

    def setup(out_shapes, out_ranks, num_outs, in_shapes, in_ranks, num_ins, num_samples):
        for i in range(num_outs * num_samples):
            out_shapes[i][0] = 2

    return address(BATCH, setup)


@functools.cache
def square_shape(size: int) -> int:
    """Address of the function that gives all outputs the shape [size, size, 3]."""

    def setup(out_shapes, out_ranks, num_outs, in_shapes, in_ranks, num_ins, num_samples):
        for i in range(num_samples):
            out_shapes[i][0] = out_shapes[i][1] = size
            out_shapes[i][2] = 3

    return address(BATCH, setup)
