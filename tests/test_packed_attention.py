"""The kernels of attention for a GPU, as far as a CPU allows: interpreted, compiled, and called by a compiled step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(300)

NUM_INTERPRETED = 21
MULTIPROCESSOR = {80: 164, 90: 228}  # KiB of shared memory in a multiprocessor of A100 and H100


def test_interpreted_they_are_torchs_attention() -> None:
    assert run_interpreted("check_packed_attention.py", timeout=280) >= NUM_INTERPRETED


@pytest.mark.parametrize("capability", MULTIPROCESSOR)
def test_they_compile_for_a_gpu(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for S/16 at 224 pixels. On Hopper every product is one of its tensor cores, and two programs of the backward
    pass fit into a multiprocessor, so that one computes while the other waits."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dali_vit import packed_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = dict.fromkeys(("qkv", "out", "dout", "dqkv"), "*bf16") | dict.fromkeys(
        ("logs", "deltas", "sums"), "*fp32"
    )
    numbers = dict.fromkeys(("tokens", "heads", "padded"), "i32") | dict.fromkeys(("scale", "factor"), "fp32")
    kernels: list[tuple[Any, dict[str, int], dict[str, int]]] = [
        (packed_attention.attention_forward, {"D": 64, "BLOCK": 64, "FULL": 3, "TAIL": 16}, {}),
        (
            packed_attention.attention_backward,
            {"D": 64, "BLOCK": 64, "TILE": 32, "FULL": 6, "TAIL": 16},
            packed_attention.OPTIONS,
        ),
    ]
    for kernel, sizes, options in kernels:
        types = {**tensors, **numbers, **dict.fromkeys(sizes, "constexpr")}
        source = ASTSource(
            kernel,
            signature={name: types[name] for name in kernel.arg_names},
            constexprs=sizes,
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in tensors},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000
        products = "wgmma.mma_async" if capability == 90 else "mma.sync"
        assert products in compiled.asm["ptx"]
        # CUDA keeps a KiB of each program's for itself.
        fitting = MULTIPROCESSOR[capability] // (compiled.metadata.shared / 1024 + 1)
        assert fitting >= (2 if capability == 90 else 1)
