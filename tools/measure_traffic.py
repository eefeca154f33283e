#!/usr/bin/env python3
"""Bytes that the compiled training step reads and writes, counted in the code that torch.compile makes for an H200.

    tools/measure_traffic.py --batch-size 1024

No GPU is needed: nothing is run, and each kernel is assumed to read and write each of its tensors once. The figures
leave out what a GPU's caches save, how near to its bandwidth a kernel comes, the optimiser's bytes, and the sums that
flash attention keeps in memory inside. The step is compiled with timm's blocks, with those of dali_vit/blocks.py, and
with the latter and the attention of dali_vit/packed_attention.py. It relies on internals of torch 2.11 and 2.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from benchmark import command  # first, see there

# isort: split

import torch
from benchmark import modes, report
from torch import Tensor, nn

from dali_vit.blocks import use_packed_attention
from dali_vit.config import ModelConfig, UserError
from dali_vit.environment import describe_environment
from dali_vit.model import create_model
from dali_vit.packed_attention import PackedAttention
from dali_vit.step import TrainStep

GPU = torch.device("cuda", 0)
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=140 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
)
BLOCKS = {"timm": "timm's blocks", "lean": "lean blocks", "packed": "packed attention"}
_aten = torch.ops.aten


class Counted(Exception):
    """Ends a step whose compilation is over."""


@command.telling_mistakes("measure_traffic.py")
def main() -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--model", default="S/16", help="as for dali-vit train; default: %(default)s")
    parser.add_argument("--depth", type=int, help="blocks of the model; default: the model's own")
    parser.add_argument(
        "--residual",
        default="float32",
        choices=["float32", "bfloat16"],
        help="as for dali-vit train; default: %(default)s",
    )
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS, help="default: all")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    report.check_json(arguments.json)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: must be at least 1")
    config = ModelConfig(arguments.model, depth=arguments.depth, residual=arguments.residual)

    result: dict[str, Any] = {
        "environment": describe_environment(),
        "config": {name: getattr(arguments, name) for name in ("model", "depth", "residual", "batch_size")},
    }
    print(f"{'MB an image':<18} {'forward':>10} {'backward':>10} {'both':>10} {'generated kernels':>20}")
    for blocks in arguments.blocks:
        model = create_model(config, num_classes=1000, resolution=224)
        if blocks == "timm":
            modes.use_timm_blocks(model)
        use_packed_attention(model, PackedAttention if blocks == "packed" else None)
        name = BLOCKS[blocks]
        forward, backward = count_bytes(model, arguments.batch_size)
        counts = [forward["all"], backward["all"], forward["all"] + backward["all"]]
        counts.append(forward["generated"] + backward["generated"])
        result[name] = {"forward": forward, "backward": backward}
        figures = [f"{count / arguments.batch_size / 1e6:.1f}" for count in counts]
        print(f"{name:<18} {figures[0]:>10} {figures[1]:>10} {figures[2]:>10} {figures[3]:>20}", flush=True)
    if arguments.json is not None:
        report.write_json(arguments.json, result)


def count_bytes(model: nn.Module, batch_size: int) -> list[dict[str, int]]:
    """Bytes that the forward and the backward pass of a step on 224 x 224 pixels move: {"all", "generated"} of each.

    `generated` leaves out matrix products and attention.
    """
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor import compile_fx, ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    counts: list[dict[str, int]] = []

    def compile_inner(graph: torch.fx.GraphModule, inputs: list[Any], **keywords: Any) -> Any:
        with pretended_gpu():
            inputs = move_to_gpu(graph, inputs, detect_fake_mode(inputs))
            return compile_fx.compile_fx_inner(graph, inputs, **keywords)

    def compile_to_module(lowering: Any) -> Any:
        lowering.codegen()
        total, nodes, _ = lowering.count_bytes()
        extern = [(node.node, 4 * words) for node, words in nodes if isinstance(node, ExternKernelSchedulerNode)]
        # The compiler assumes that a kernel of ours also reads what it writes.
        written = [
            arg for node, _ in extern if isinstance(node, ir.UserDefinedTritonKernel) for arg in node.mutable_args
        ]
        twice = sum(int(arg.get_numel()) * arg.get_dtype().itemsize for arg in written)
        counts.append({"all": total - twice, "generated": total - sum(count for _, count in extern)})
        lowering.cache_key = lowering.cache_path = ""
        lowering.cache_linemap = []
        return SimpleNamespace(call=stop, __file__="")

    def stop(_: Any) -> None:
        raise Counted

    step = TrainStep(model.train(), autocast=torch.bfloat16)
    batch = torch.empty(batch_size, 224, 224, 3, dtype=torch.uint8), torch.zeros(batch_size, dtype=torch.long)
    torch.compiler.reset()
    with (
        patch("torch._inductor.graph.GraphLowering.compile_to_module", compile_to_module),
        patch("torch._inductor.graph.GraphLowering._compile_to_module", compile_to_module),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),  # no kernel is compiled
        torch._functorch.config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
    ):
        backend = lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=compile_inner)  # noqa: E731
        try:
            with pretended_driver():
                torch.compile(step, backend=backend)(*batch, torch.ones(()))
        except Counted:
            return counts
    raise RuntimeError("the step was compiled and then run by something else than its kernels")


def move_to_gpu(graph: torch.fx.GraphModule, inputs: list[Any], mode: Any) -> list[Any]:
    """Turns a graph that was traced on the CPU into one for a GPU, with flash attention; returns its inputs there."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    for node in graph.graph.nodes:
        node.args = tuple(GPU if isinstance(value, torch.device) else value for value in node.args)
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
        if node.target is _aten._scaled_dot_product_flash_attention_for_cpu.default:
            node.target = _aten._scaled_dot_product_flash_attention.default
            node.args = node.args[:3]
        elif node.target is _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            with graph.graph.inserting_before(node):
                # The random state of dropout, which is off.
                state = graph.graph.call_function(
                    _aten.empty.memory_format, ([2],), {"dtype": torch.uint64, "device": GPU}
                )
            tokens = node.args[1].meta["val"].shape[-2]
            node.target = _aten._scaled_dot_product_flash_attention_backward.default
            node.args = (*node.args[:6], None, None, tokens, tokens, 0.0, False, state, state)
    graph.recompile()
    for node in graph.graph.nodes:
        for known in ("val", "tensor_meta"):  # values on the CPU
            node.meta.pop(known, None)
    with mode, torch.no_grad():
        moved = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
            if isinstance(value, Tensor)
            else value
            for value in inputs
        ]
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*moved)
    return moved


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """A context in which the compiler finds an H200 that it can generate code for."""
    found: dict[str, Any] = {
        "torch.cuda.is_available": True,
        "torch.cuda.current_device": 0,
        "torch.cuda.get_device_properties": H200,
        "torch.cuda.device": nullcontext(),
        "torch.cuda.get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "torch._dynamo.device_interface.CudaInterface.get_device_properties": H200,
        "torch._dynamo.device_interface.CudaInterface.Worker.get_device_properties": H200,
        "torch._subclasses.fake_tensor.init_gpu_context": None,
        "torch._inductor.scheduler.has_triton": True,
    }
    with ExitStack() as stack:
        for name, value in found.items():
            stack.enter_context(patch(name, staticmethod(lambda *_, _value=value, **__: _value)))
        yield


@contextmanager
def pretended_driver() -> Iterator[None]:
    """A context in which Triton takes the GPU to be an H200."""
    import triton.runtime
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 10 * H200.major + H200.minor, H200.warp_size),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
    with patch.object(triton.runtime.driver, "_active", driver):
        yield


if __name__ == "__main__":
    command.run(main)
