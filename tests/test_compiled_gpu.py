"""RandAugment's kernels for a GPU, as far as a CPU can test them: interpreted, compiled, laid out, and done without."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines import compiled_gpu
from pipelines.randaugment import OPS, apply_op, rand_augment
from tests.conftest import environment, run_interpreted

pytestmark = pytest.mark.timeout(300)

NUM_INTERPRETED = 24


def test_interpreted_they_give_what_the_cpu_gives() -> None:
    assert run_interpreted("check_randaugment_gpu.py", timeout=280) >= NUM_INTERPRETED


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_they_compile_for_every_gpu(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A100, H100 and H200, B200: Triton brings its assembler, which needs no GPU. No product is fused with a sum."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pipelines.kernels import randaugment_gpu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    inputs = {"images": "*u8", "uniforms": "*fp32", "settings": "*fp32", "tables": "*u8"}
    kernels: list[tuple[Any, dict[str, str]]] = [
        (randaugment_gpu.make_tables, inputs),
        (randaugment_gpu.write_pixels, {**inputs, "out": "*u8"}),
    ]
    for kernel, arguments in kernels:
        source = ASTSource(
            kernel,
            signature={**arguments, "layer": "i32", "layers": "i32", "SIZE": "constexpr", "BLOCK": "constexpr"},
            constexprs={"SIZE": 224, "BLOCK": randaugment_gpu.BLOCK},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=randaugment_gpu.OPTIONS)
        assert len(compiled.asm["cubin"]) > 1000
        ptx = compiled.asm["ptx"]
        assert "fma" not in ptx, "a product and a sum rounded as one would give other bytes than the CPU"
        assert not re.search(r"\bdiv\.(full|approx)", ptx), "a division that is not rounded correctly, likewise"


def test_without_them_the_graph_can_be_laid_out_for_a_gpu() -> None:
    """DALI checks devices and arguments when it makes the graph; running it needs a GPU."""

    @pipeline_def(batch_size=2, num_threads=1, device_id=0, enable_conditionals=True)
    def pipeline() -> Any:
        images, u = fn.external_source(
            lambda _: (), num_outputs=2, layout=["HWC", ""], dtype=[types.UINT8, types.FLOAT]
        )
        images = images.gpu()
        outputs = [rand_augment(images, u, image_size=64, contrast=contrast) for contrast in ("paper", "mean")]
        outputs += [apply_op(images, name, image_size=64, magnitude=4) for name in OPS]
        assert all(output.device == "gpu" for output in outputs)
        return tuple(outputs)

    pipeline()


def test_no_operator_of_a_graph_is_compiled_for_a_gpu() -> None:
    @pipeline_def(batch_size=2, num_threads=1, device_id=0)
    def pipeline() -> Any:
        images = types.Constant(np.zeros((64, 64, 3), np.uint8), device="gpu", layout="HWC")
        return apply_op(images, "invert", image_size=64, magnitude=4, compiled=True)

    with pytest.raises(ValueError, match="behind_graph has it for a GPU"):
        pipeline()


def test_where_they_fail_the_operators_stay_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C compiler\nfound")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compiled_gpu, "try_out", fail)
    compiled_gpu.available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not compiled_gpu.available(224)
            assert not compiled_gpu.available(224)
    finally:
        compiled_gpu.available.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "RandAugment runs as DALI's own operators, as its Triton kernels fail here (RuntimeError: no C compiler found)"
    ]


def test_where_the_kernels_hang_dalis_operators_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compiled_gpu, "try_out", lambda size, device_id: released.wait())
    monkeypatch.setattr(compiled_gpu, "_PATIENCE", 0.2)
    compiled_gpu.available.cache_clear()
    try:
        assert not compiled_gpu.available(224)
    finally:
        compiled_gpu.available.cache_clear()
        released.set()
    assert [record.message for record in caplog.records] == [
        "RandAugment runs as DALI's own operators, as its Triton kernels fail here (they have not run after 0.2 s)"
    ]


@pytest.mark.timeout(60)
def test_kernels_that_hang_do_not_keep_the_program_from_ending() -> None:
    program = """
import threading, torch
from dali_vit import process
from pipelines import compiled_gpu

def hang(size, device_id):
    begun.set()
    threading.Event().wait()

def main():
    assert not compiled_gpu.available(224)
    assert begun.is_set()

begun = threading.Event()
torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
compiled_gpu.try_out, compiled_gpu._PATIENCE = hang, 2.0
process.run(main, "program")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, env=environment(), check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "have not run after 2 s" in ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_nothing_is_tried_or_said(caplog: pytest.LogCaptureFixture) -> None:
    compiled_gpu.available.cache_clear()
    with caplog.at_level(logging.DEBUG):
        assert not compiled_gpu.available(224)
    assert not caplog.records
