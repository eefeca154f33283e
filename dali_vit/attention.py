"""Chooses the attention kernel, torch's or ours, that is fastest for a model on this GPU, measured when a run starts.

At 196 tokens and heads of width 64 the kernels are close; which one wins depends on the chip and on torch's version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dali_vit.blocks import has_lean_blocks
from dali_vit.compiling import on_one_line
from dali_vit.config import AttentionKernel, LocalUserError, UserError
from dali_vit.distributed import Group, gather_objects
from dali_vit.environment import is_lost

log = logging.getLogger(__name__)

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""torch's kernels; besides these there is `packed`, in dali_vit/packed_attention.py."""

TORCH_DEFAULT = "torch's choice"
"""Stands for a kernel where none was chosen."""

_GAIN = 1.03  # a smaller gain is noise: the first kernel stays
_WARM_UP, _REPEATS = 3, 10
_HEAD_START = 40_000_000  # cycles of a GPU, about 20 ms, in which Python queues all repetitions of small kernels
_CHECKED = 4  # images
_RESULTS = ("output", "gradient", "gradient of the bias")
_TOLERANCE = 1e-2  # relative error of the packed kernels' results; rounding to bfloat16 causes a few thousandths

_Run = Callable[[], tuple[Tensor, ...]]


class Shape(NamedTuple):
    """The sizes of attention in one forward pass of one process."""

    images: int
    tokens: int
    heads: int
    head_width: int


class Attention(NamedTuple):
    """The kernel that attention is to run on."""

    context: Callable[[], AbstractContextManager[object]]
    """Makes a context in which torch's attention runs on it."""
    kernel: str
    """One of BACKENDS, `packed` or TORCH_DEFAULT."""
    words: str
    """The kernel's name, and the times of all kernels measured."""
    packed: type[Function] | None = None
    """`PackedAttention`, to pass to `blocks.use_packed_attention`, where `packed` is the kernel."""


_AS_TORCH_CHOOSES = Attention(nullcontext, TORCH_DEFAULT, TORCH_DEFAULT)


def choose_attention(
    wanted: AttentionKernel, model: nn.Module, images: int, group: Group, *, compiled: bool
) -> Attention:
    """The wanted kernel or, for `auto`, the fastest at `images` images per process; `compiled`: whether the step is.

    For plain ViTs on GPUs; elsewhere torch's own choice stays. All ranks choose the same kernel. Collective; takes some
    seconds where the packed kernels have to be compiled first. UserError where the wanted kernel does not run.
    """
    shape = shape_of(model, images)
    if group.device.type != "cuda" or shape is None:
        if wanted != "auto":
            raise UserError(f"--attention {wanted}: only plain ViTs on GPUs have this choice; leave it out")
        return _AS_TORCH_CHOOSES
    if wanted == "packed" and not has_lean_blocks(model):
        raise UserError("--attention packed: is for models of the form VARIANT/PATCH alone; leave it out")
    if wanted == "packed" and not compiled:
        raise UserError("--attention packed: needs a step that is compiled; see --compile")
    packs = compiled and has_lean_blocks(model)
    names: list[str] = [wanted] if wanted != "auto" else [*BACKENDS, *(["packed"] if packs else [])]
    # Every rank measures: at the first use of attention in a process torch puts its own order of kernels above the one
    # asked for, and that must not happen while the step is traced.
    of_ranks = gather_objects(measure(shape, group.device, names))
    times = {name: time for name, time in of_ranks[0][0].items() if all(name in of_rank for of_rank, _ in of_ranks)}
    faults = {name: fault for _, of_rank in reversed(of_ranks) for name, fault in of_rank.items()}
    if not times and wanted != "auto":
        raise UserError(f"--attention {wanted}: it does not run here ({faults[wanted]}); leave it out")
    if not times:
        if group.is_main:
            log.warning("none of %s runs here: attention is torch's plain one", ", ".join(names))
        return _AS_TORCH_CHOOSES
    if "packed" in faults and group.is_main:
        log.warning("the packed attention is not used, as it fails here (%s)", faults["packed"])
    chosen = choose(times)
    words = f"{chosen} ({', '.join(f'{name} {time:.2f} ms' for name, time in times.items())} a layer)"
    if chosen == "packed":
        from dali_vit.packed_attention import PackedAttention

        return Attention(nullcontext, chosen, words, PackedAttention)
    # The other kernels follow the chosen one in the order, for inputs that it does not support.
    order = sorted([*BACKENDS.values(), SDPBackend.MATH], key=lambda backend: backend != BACKENDS[chosen])
    return Attention(partial(sdpa_kernel, order, set_priority=True), chosen, words)


def shape_of(model: nn.Module, images: int) -> Shape | None:
    """The shape of attention in `model` for so many images, or None where it is no plain ViT, ours or timm's."""
    if not isinstance(model, VisionTransformer):
        return None
    vit: Any = model  # timm's modules are typed as tensors or modules
    heads = getattr(getattr(vit.blocks[0], "attn", None), "num_heads", None)
    if heads is None:  # one of timm's that attend in parallel to the MLP
        return None
    return Shape(images, vit.patch_embed.num_patches + vit.num_prefix_tokens, heads, vit.embed_dim // heads)


def choose(times: dict[str, float]) -> str:
    """The fastest kernel by the times given, or the first one where that is hardly slower."""
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] * _GAIN < times[first] else first


def measure(shape: Shape, device: torch.device, names: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of a forward and backward pass in bfloat16 for each kernel that runs here, and why the others fail.

    The packed kernels are skipped for shapes they do not support; a reason is given only if they alone were asked for.
    LocalUserError where a kernel leaves the GPU unusable to this process, as one that writes where it must not.
    """
    times, faults = {}, {}
    for name in names:
        try:
            if name != "packed":
                with sdpa_kernel(BACKENDS[name]):
                    times[name] = _milliseconds(_torchs, shape, device)
                continue
            from dali_vit.packed_attention import HEAD_WIDTHS, MOST_TOKENS, fits

            if fits(shape.tokens, shape.head_width):
                _check_packed(shape, device)
                times[name] = _milliseconds(_packed, shape, device)
            elif names == [name]:
                widths = "{}, {} or {}".format(*HEAD_WIDTHS)
                faults[name] = f"it is for at most {MOST_TOKENS} tokens, and heads of {widths}"
        except Exception as error:  # kernels not built for this chip or these sizes; anything that Triton may raise
            faults[name] = on_one_line(error)
            log.debug("attention %s: %s", name, faults[name])
            if is_lost(device):
                raise LocalUserError(
                    f"--attention {name}: on trial it broke this process's use of the GPU ({faults[name]}); give"
                    f" another, such as --attention {'efficient' if name == 'flash' else 'flash'}"
                ) from error
    return times, faults


def _draw(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """qkv [N, T, 3 * heads * D] and the gradient of the output [N, T, heads * D], both in bfloat16."""
    width = shape.heads * shape.head_width
    generator = torch.Generator(device).manual_seed(0)
    qkv, upstream = (
        torch.randn(shape.images, shape.tokens, columns, dtype=torch.bfloat16, device=device, generator=generator)
        for columns in (3 * width, width)
    )
    return qkv, upstream


def _torchs(qkv: Tensor, upstream: Tensor, shape: Shape) -> _Run:
    """A run of torch's attention: output and gradient [N, T, 3, heads, D], in the layout of the products around it."""
    parts = qkv.view(*qkv.shape[:2], 3, shape.heads, shape.head_width).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out, *torch.autograd.grad(out, parts, upstream.view(out.shape))

    return run


def _packed(qkv: Tensor, upstream: Tensor, shape: Shape, *, compiled: bool = False) -> _Run:
    """A run of the packed attention: output, gradient and the bias's, which for other kernels is summed elsewhere."""
    from dali_vit.packed_attention import PackedAttention

    qkv = qkv.requires_grad_()
    bias = torch.zeros(qkv.shape[-1], device=qkv.device, requires_grad=True)

    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return PackedAttention.apply(qkv, bias, shape.heads)

    attention = torch.compile(attend, fullgraph=True, dynamic=False) if compiled else attend

    def run() -> tuple[Tensor, ...]:
        out = attention(qkv, bias)
        return out, *torch.autograd.grad(out, (qkv, bias), upstream)

    return run


def _milliseconds(made: Callable[[Tensor, Tensor, Shape], _Run], shape: Shape, device: torch.device) -> float:
    run = made(*_draw(shape, device), shape)
    for _ in range(_WARM_UP):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_HEAD_START)  # else a kernel that is faster than its launch would be timed by the launch
    start.record()
    for _ in range(_REPEATS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _REPEATS


def _check_packed(shape: Shape, device: torch.device) -> None:
    """Raises RuntimeError where the results on a few images differ from those of torch's plain attention in float32.

    The packed attention is compiled here, as in a step: torch may then pass the kernels numbers of other types than it
    does in a plain call.
    """
    qkv, upstream = _draw(shape._replace(images=_CHECKED), device)
    with sdpa_kernel(SDPBackend.MATH):
        out, gradient = _torchs(qkv.float(), upstream.float(), shape)()
    right = out.flatten(2), gradient.flatten(2), gradient.sum((0, 1)).flatten()
    for what, ours, torchs in zip(_RESULTS, _packed(qkv, upstream, shape, compiled=True)(), right, strict=True):
        error = float(((ours - torchs).norm() / torchs.norm()).detach())
        if not error < _TOLERANCE:
            raise RuntimeError(f"the {what} it gives differs from torch's by {100 * error:.1f} %")
