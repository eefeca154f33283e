"""Attention's kernels for a GPU, as far as a CPU can test them: interpreted, compiled, called by a compiled step."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.backends.distributed import DDPOptimizer

from dali_vit.blocks import use_packed_attention
from dali_vit.config import ModelConfig
from dali_vit.model import create_model
from dali_vit.step import TrainStep
from tests.conftest import run_interpreted

pytest.importorskip("triton")
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")]

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

    from dali_vit import attention_kernels, packed_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tensors = dict.fromkeys(("qkv", "out", "dout", "dqkv"), "*bf16") | dict.fromkeys(
        ("logs", "deltas", "sums"), "*fp32"
    )
    numbers = dict.fromkeys(("tokens", "heads", "padded"), "i32")  # a float would be one of 64 bits by torch 2.11
    scale = {"scale": math.log2(math.e) / 8}
    kernels: list[tuple[Any, dict[str, float], dict[str, int]]] = [
        (attention_kernels.attention_forward, {**scale, "D": 64, "BLOCK": 64, "FULL": 3, "TAIL": 16}, {}),
        (
            attention_kernels.attention_backward,
            {**scale, "factor": 1 / 8, "D": 64, "BLOCK": 64, "TILE": 32, "FULL": 6, "TAIL": 16},
            packed_attention.OPTIONS,
        ),
    ]
    for kernel, sizes, options in kernels:
        assert {parameter.name for parameter in kernel.params if parameter.is_constexpr} == set(sizes)
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


def forward_by_torch(_: Any, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """What the kernels compute, but on any device."""
    q, k, v = _split(qkv, heads)
    products = q @ k.mT / q.shape[-1] ** 0.5
    logs = products.logsumexp(-1)
    out = ((products - logs[..., None]).exp() @ v).transpose(1, 2).flatten(2)
    return out.contiguous(), logs.flatten(0, 1).clone()


def backward_by_torch(
    _: Any, dout: Tensor, qkv: Tensor, out: Tensor, logs: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    (q, k, v), scale = _split(qkv, heads), (qkv.shape[-1] // (3 * heads)) ** -0.5
    do, o = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (dout, out))
    shares = (q @ k.mT * scale - logs.view(*q.shape[:3], 1)).exp()
    slopes = shares * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale
    parts = slopes @ k, slopes.mT @ q, shares.mT @ do
    dqkv = torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1)
    return dqkv, dqkv.sum(1)


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    return qkv.view(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("parted", [False, True])
def test_a_compiled_step_trains_alike_with_them(parted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the kernels themselves: also where a step for several GPUs is parted into graphs by its gradients."""
    from dali_vit import packed_attention

    shapes = []

    def forward(kernel: Any, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        shapes.append((tuple(qkv.shape), heads))
        return forward_by_torch(kernel, qkv, heads)

    monkeypatch.setattr(packed_attention, "launch_forward", forward)
    monkeypatch.setattr(packed_attention, "launch_backward", backward_by_torch)

    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    parting = DDPOptimizer(bucket_bytes_cap=40_000, first_bucket_cap=20_000, backend_compile_fn=compiler)

    def gradients(packed: Any) -> dict[str, Tensor | None]:
        torch.compiler.reset()
        model = create_model(ModelConfig("mu/16", depth=2), num_classes=10, resolution=64).train()
        _disturb(model)
        use_packed_attention(model, packed)
        step = torch.compile(TrainStep(model), backend=parting.compile_fn if parted else compiler)
        images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        step(images, torch.arange(4), torch.tensor(0.7)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torchs, ours = gradients(None), gradients(packed_attention.PackedAttention)
    assert set(shapes) == {((4, 16, 96), 2)}
    assert len(graphs) >= 6 if parted else len(graphs) == 2
    for name, expected in torchs.items():
        assert expected is not None
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_they_are_checked_as_a_compiled_step_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from dali_vit import attention, packed_attention

    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(packed_attention, "launch_forward", forward_by_torch)
    monkeypatch.setattr(packed_attention, "launch_backward", backward_by_torch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    torch.compiler.reset()
    attention._check_packed(attention.Shape(64, 20, 2, 16), torch.device("cpu"))
    assert len(graphs) == 1


def _disturb(model: nn.Module) -> None:
    """Biases of zero and scales of one would hide mistakes."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
