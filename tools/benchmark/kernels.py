"""Where the time of a profiled step goes: kernels of the GPU, or operators on the CPU, by what they are for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import profile

# First match wins. Names are those of kernels (cuBLAS, CUTLASS, cuDNN, flash attention, Triton, DALI, NCCL) and of
# torch's operators on the CPU.
KINDS = {
    "input": r"make_tables|write_pixels|dali|nvjpeg|nvimgcodec|jpeg|huffman|idct|^data$",
    "communication": r"nccl|c10d",
    "attention": r"flash|fmha|sdpa|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitkreduce|triton_(mm|bmm|tem)|::(add|b|m)*mm(_out)?$|linear",
    "optimiser": r"adam|multi_tensor|foreach|sgd|lpnorm",
    "fused by torch.compile": r"^triton_|cpp_fused|Torch-Compiled|Compiled(Function|FxGraph)",
    "copies": r"memcpy|memset|copy_|::to$|_to_copy|::clone$|contiguous",
    "Python": r"^step \d+$|^Optimizer\.",
}
OTHER = "other"


def kind(name: str) -> str:
    """The kind in KINDS that a kernel or operator belongs to, or OTHER."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarize(profiler: profile, steps: int, seconds: float, *, on_gpu: bool) -> dict[str, Any]:
    """Milliseconds a step by kind and for the longest single names, from a profile of `steps` steps in `seconds`.

    `kinds` and `longest` are sums, on a GPU over streams that overlap. `busy` is the share of the time in which at
    least one kernel ran, and `launches` the number of kernels a step; both are None on the CPU.
    """
    busy = launches = None
    if on_gpu:
        events: list[Any] = [
            event
            for event in profiler.events() or ()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        spent = [(event.name, event.time_range.end - event.time_range.start) for event in events]
        busy = union((event.time_range.start, event.time_range.end) for event in events) / (1e6 * seconds)
        launches = len(events) / steps
    else:
        spent = [(row.key, row.self_cpu_time_total) for row in profiler.key_averages()]
    return {
        "step_ms": 1e3 * seconds / steps,
        "busy": busy,
        "launches": launches,
        "kinds": _largest((kind(name), time / steps / 1e3) for name, time in spent),
        "longest": dict(list(_largest((name, time / steps / 1e3) for name, time in spent).items())[:15]),
    }


def _largest(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums by name, largest first."""
    sums: dict[str, float] = {}
    for name, time in times:
        sums[name] = sums.get(name, 0.0) + time
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def table(summary: dict[str, Any], names: int = 8) -> str:
    """The kinds, then the longest single names, in ms a step and per cent of all."""
    total = sum(summary["kinds"].values()) or 1.0
    rows = [*summary["kinds"].items(), ("", 0.0), *list(summary["longest"].items())[:names]]
    lines = [f"{time:>9.2f} ms {100 * time / total:>5.1f} %   {name[:90]}" if name else "" for name, time in rows]
    spent = "of CPU time in operators"
    if summary["busy"] is not None:
        busy, launches = 100 * summary["busy"], summary["launches"]
        spent = f"of kernels; the GPU is busy {busy:.1f} % of the time, {launches:.0f} launches"
    return "\n".join([f"{summary['step_ms']:.2f} ms a step, {total:.2f} ms {spent}", *lines])
