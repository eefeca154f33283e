"""The kernels of attention, run by Triton's interpreter on the CPU: test_packed_attention.py starts these tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dali_vit import packed_attention
from dali_vit.attention_kernels import attention_backward, attention_forward
from dali_vit.blocks import use_packed_attention
from dali_vit.config import ModelConfig
from dali_vit.model import create_model
from dali_vit.packed_attention import PackedAttention

SHAPES = [  # images, tokens, heads, head width
    (2, 196, 2, 64),  # ViT-S/16's tokens: three blocks and four more, six tiles and four more
    (1, 197, 1, 64),  # with [cls]
    (1, 49, 2, 64),  # B/32's: less than a block
    (1, 256, 1, 32),  # the most, in whole blocks and tiles
    (1, 64, 1, 16),
    (1, 63, 2, 16),  # of no size that the hardware likes
    (1, 241, 1, 16),
    (3, 17, 1, 16),
    (2, 1, 2, 16),
]


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch wraps kernels for its compiler, and would not take interpreted ones."""
    forward, backward = packed_attention.launch_forward, packed_attention.launch_backward
    monkeypatch.setattr(packed_attention, "attend", lambda *args: forward(attention_forward, *args))
    monkeypatch.setattr(packed_attention, "attend_backward", lambda *args: backward(attention_backward, *args))


def attend(qkv: Tensor, heads: int) -> Tensor:
    """The same by torch."""
    images, tokens, width = qkv.shape
    q, k, v = qkv.view(images, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# NumPy, which interprets, has no bfloat16; with float16 the kernels round in the same places.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("images", "tokens", "heads", "head_width"), SHAPES)
def test_output_and_gradients_are_torchs_in_float64(
    images: int, tokens: int, heads: int, head_width: int, dtype: torch.dtype, tolerance: float
) -> None:
    width = heads * head_width
    qkv = draw(images, tokens, 3 * width, seed=0, dtype=dtype).requires_grad_()
    upstream = draw(images, tokens, width, seed=1, dtype=dtype)
    bias = torch.zeros(3 * width, requires_grad=True)
    out = PackedAttention.apply(qkv, bias, heads)
    assert out.dtype == dtype
    gradient, bias_gradient = torch.autograd.grad(out, (qkv, bias), upstream)
    exact = qkv.detach().double().requires_grad_()
    expected = attend(exact, heads)
    (right,) = torch.autograd.grad(expected, exact, upstream.double())
    largest = right.abs().max().item()
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
    assert (gradient - right).abs().max() <= tolerance * largest
    # The sum's own rounding grows with the number of its terms, at worst.
    assert (bias_gradient - right.sum((0, 1))).abs().max() <= tolerance * largest * (images * tokens) ** 0.5


@pytest.mark.parametrize("key", [-70.0, 70.0])
def test_no_size_of_the_products_overflows(key: float) -> None:
    """All scaled products of queries and keys are about 1,225 below 0, or above; those with keys past the last are 0.

    The products are sums of multiples of 1/256, exact in float32 in whatever order a processor's library adds them up:
    an error of a product would be that of its exponential. The first column of queries and of keys makes them large;
    its gradients are sums of terms that cancel.
    """
    qkv = (16 * draw(1, 50, 48, seed=0, dtype=torch.float32)).round() / 16
    qkv[..., 0], qkv[..., 16] = 70.0, key
    qkv.requires_grad_()
    upstream = draw(1, 50, 16, seed=1, dtype=torch.float32)
    (gradient,) = torch.autograd.grad(PackedAttention.apply(qkv, torch.zeros(48), 1), qkv, upstream)
    exact = qkv.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(attend(exact, 1), exact, upstream.double())
    assert gradient.isfinite().all()
    others = [column for column in range(48) if column not in (0, 16)]
    error = (gradient - right)[..., others].abs().max() / right[..., others].abs().max()
    # Scaled to logarithms of base 2 the products are 1,770, with less than four digits behind the point in float32.
    assert error <= 1e-4


def test_a_model_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the blocks take their way in a compiled step
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gradients = []
    for packed in (None, PackedAttention):
        model = create_model(ModelConfig("mu/16", depth=2), num_classes=10, resolution=64, seed=1).train()
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter += 0.1 * draw(*parameter.shape, seed=index, dtype=torch.float32)
        use_packed_attention(model, packed)
        model(images).logsumexp(1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, torchs in gradients[0].items():
        assert torchs is not None
        torch.testing.assert_close(gradients[1][name], torchs, rtol=1e-4, atol=2e-5 * torchs.abs().max().item())
