"""timm's transformer block, written so that the kernels torch.compile makes of it move fewer bytes and compute less.

About half of the bytes that a compiled step reads and writes are activations, in kernels that the compiler makes. The
order of computation used here saves a tenth of all bytes (BENCHMARKS.md has the counts). It applies only to a model in
training mode that is being compiled; otherwise everything is timm's own, to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import linear, scaled_dot_product_attention

_COMPUTED = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2")  # by a compiled LeanBlock
_TWICE_U, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715  # of 2 u, where GELU's u = sqrt(2 / pi) (x + 0.044715 x^3)


class LeanBlock(Block):
    """timm's pre-norm block on tokens [N, T, C], as PlainViT uses it: without dropout and layer scale; GELU by tanh.

    Raises ValueError for a block with other layers, which the compiled step would silently leave out.
    """

    norm1: nn.LayerNorm
    attn: Attention
    norm2: nn.LayerNorm
    mlp: Any  # timm's Mlp, whose layers may be convolutions elsewhere
    packed: type[Function] | None = None  # in place of torch's attention; see use_packed_attention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = [layer for layer in self.named_modules() if not _is_idle(layer[1])]
        left_out = [name for name, layer in layers if name not in _COMPUTED and next(layer.children(), None) is None]
        if left_out or getattr(self.mlp.act, "approximate", "none") != "tanh":
            raise ValueError(
                f"a compiled LeanBlock does not compute {', '.join(left_out) or self.mlp.act}; add it there"
            )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        masked = attn_mask is not None or is_causal
        if masked or not (self.training and torch.compiler.is_compiling()):
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x = x + _cast(self._attention(_norm(self.norm1, x)), x.dtype)
        return x + _cast(self._mlp(_norm(self.norm2, x)), x.dtype)

    def _attention(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            layer = self.attn.qkv
            qkv = linear(x, layer.weight, layer.bias.detach())
            return _linear(self.attn.proj, self.packed.apply(qkv, layer.bias, self.attn.num_heads))
        q, k, v = _SplitHeads.apply(_linear(self.attn.qkv, x), self.attn.num_heads)  # each [N, heads, T, C / heads]
        return _linear(self.attn.proj, scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _mlp(self, x: Tensor) -> Tensor:
        return _linear(self.mlp.fc2, _Gelu.apply(_linear(self.mlp.fc1, x)))


def _is_idle(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Identity) or (isinstance(layer, nn.Dropout) and layer.p == 0)


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return _LayerNorm.apply(x, layer.weight, layer.bias, layer.eps)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return _BiasGradient.apply(linear(x, layer.weight, layer.bias.detach()), layer.bias)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else _Cast.apply(x, dtype)


def has_lean_blocks(model: nn.Module) -> bool:
    """Whether `use_packed_attention` has an effect on this model."""
    return any(isinstance(layer, LeanBlock) for layer in model.modules())


def use_packed_attention(model: nn.Module, packed: type[Function] | None) -> None:
    """Makes a compiled model's blocks compute attention by `packed`, i.e. `PackedAttention`, or by torch's (None)."""
    for layer in model.modules():
        if isinstance(layer, LeanBlock):
            layer.packed = packed


class _BiasGradient(Function):
    """The gradient of a bias that was added to `y` [N, T, C] beforehand, summed over the tokens of each image first.

    The compiler cannot fuse a sum over all N * T rows into the kernel that computes the rows, and reads them once more;
    it can fuse a sum over the token axis alone.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, dy.sum(1, dtype=ctx.dtype).sum(0)


class _Cast(Function):
    """x.to(dtype) for x [N, T, C], whose gradient is written in the shape of x.

    A matrix product reads the gradient as [N * T, C]. The compiler would use that shape for the conversion, too, would
    then not recognise the tensor that the kernel before has just written, and would read it from memory again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = x.dtype
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = dy.to(ctx.dtype).contiguous()
        images, tokens, width = dx.shape
        # as_strided makes the compiler write its input first; it would see through a view.
        return dx.as_strided((images * tokens, width), (width, 1)).view(dx.shape), None


class _Gelu(Function):
    """GELU in its tanh approximation, computed by a sigmoid: (1 + tanh(u)) / 2 = sigmoid(2 u).

    CUDA's tanh branches and takes many instructions, in kernels that only memory should limit (BENCHMARKS.md has the
    counts); the sigmoid is an exponential and a division. Like torch's, it is computed in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide, share = _Gelu._share(x)
        y = wide * share
        # In torch 2.11 a conversion to the same type, at the end of a Function that is compiled, loses the gradient.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        wide, share = _Gelu._share(x)
        slope = _TWICE_U + 3 * _TWICE_U * _CUBIC * wide * wide  # the derivative of 2 u
        return (dy * (share + wide * share * (1 - share) * slope)).to(x.dtype)

    @staticmethod
    def _share(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide, torch.sigmoid(_TWICE_U * (wide + _CUBIC * wide * wide * wide))


class _SplitHeads(Function):
    """Splits a projection [N, T, 3 * heads * D] into q, k and v [N, heads, T, D]; its gradient is one concatenation.

    Autograd would stack and permute the gradient, in a shape that a sum over the tokens cannot be fused with.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
        images, tokens, width = qkv.shape
        return qkv.view(images, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.cat([gradient.transpose(1, 2).flatten(2) for gradient in gradients], dim=-1), None


class _LayerNorm(Function):
    """LayerNorm of x [..., C], whose backward pass reads x, which is in memory anyway.

    With torch's formula the compiler keeps (x - mean) / deviation for the backward pass: another tensor of x's size, to
    be written by the forward pass. It cannot do so where x is multiplied only by values that are first known in the
    backward pass; hence x - mean is never formed there, though it would be the shorter expression.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, mean, scale, weight)
        return (wide - mean) * scale * weight + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, mean, scale, weight = ctx.saved_tensors
        scaled = dy * scale
        dweight = scaled * x - scaled * mean  # dy times the normalised x, of each token
        slope = (dweight * weight).mean(-1, keepdim=True) * scale * scale
        dnormalised = scaled * weight
        dx = dnormalised - dnormalised.mean(-1, keepdim=True) - (x * slope - mean * slope)
        rows = tuple(range(x.ndim - 1))
        return dx.to(x.dtype), dweight.sum(rows), dy.sum(rows), None


__all__ = ["LeanBlock", "has_lean_blocks", "use_packed_attention"]
