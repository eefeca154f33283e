"""The transformer block of the compiled step against timm's and torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from dali_vit import blocks
from dali_vit.blocks import LeanBlock
from dali_vit.config import ModelConfig
from dali_vit.model import create_model
from dali_vit.step import TrainStep
from tests.conftest import needs_a_compiler

IMAGES, TOKENS, WIDTH, HEADS = 3, 5, 16, 2


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output.double() * draw(*output.shape, seed=9)).sum(), inputs)


def test_layer_norm_is_torchs_in_float64():
    x, weight, bias = draw(IMAGES, TOKENS, WIDTH), draw(WIDTH, seed=1), draw(WIDTH, seed=2)
    expected = layer_norm(x, [WIDTH], weight, bias, 1e-6)
    result = blocks._LayerNorm.apply(x, weight, bias, 1e-6)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    for ours, torchs in zip(gradients(result, x, weight, bias), gradients(expected, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0])
def test_layer_norm_in_float32_is_as_exact_as_torchs_where_the_mean_is_large(mean):
    exact = (draw(64, 196, 384).detach() + mean).requires_grad_(), draw(384, seed=1), draw(384, seed=2)
    wanted = gradients(layer_norm(exact[0], [384], exact[1], exact[2], 1e-6), *exact)
    single = tuple(value.detach().float().requires_grad_() for value in exact)
    torchs = gradients(layer_norm(single[0], [384], single[1], single[2], 1e-6), *single)
    ours = gradients(blocks._LayerNorm.apply(*single, 1e-6), *single)
    for want, torch_gives, we_give in zip(wanted, torchs, ours, strict=True):
        error, usual = ((given - want).norm() / want.norm() for given in (we_give, torch_gives))
        assert error < max(4 * usual, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_computes_in_float32_whatever_the_tokens_are(dtype):
    x, weight, bias = draw(IMAGES, TOKENS, WIDTH, dtype=dtype), *(draw(WIDTH, dtype=torch.float32) for _ in range(2))
    result = blocks._LayerNorm.apply(x, weight, bias, 1e-6)
    torch.testing.assert_close(result, layer_norm(x.float(), [WIDTH], weight, bias, 1e-6), rtol=1e-5, atol=1e-5)
    assert [gradient.dtype for gradient in gradients(result, x, weight, bias)] == [dtype, torch.float32, torch.float32]


def test_gelu_is_torchs_in_float64():
    x = torch.linspace(-60, 60, 100_001, dtype=torch.float64).requires_grad_()
    expected, result = gelu(x, approximate="tanh"), blocks._Gelu.apply(x)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*(gradients(y, x)[0] for y in (result, expected)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_computed_in_float32_and_next_to_as_exact_as_torchs(dtype):
    single = (8 * draw(100_000)).detach().to(dtype).requires_grad_()
    exact = single.detach().double().requires_grad_()
    wanted, torchs, ours = gelu(exact, approximate="tanh"), gelu(single, approximate="tanh"), blocks._Gelu.apply(single)
    assert ours.dtype == dtype
    results = zip(*([y, *gradients(y, x)] for y, x in ((wanted, exact), (torchs, single), (ours, single))), strict=True)
    for want, torch_gives, we_give in results:
        error, usual = ((given.double() - want).norm() for given in (we_give, torch_gives))
        # Where the slope is next to 1, what is left to it cancels out, to 2e-6, as it does to 1e-6 with tanh.
        assert error < max(1.1 * usual, 5e-7 * want.norm())


def test_the_gradient_of_a_bias_is_the_sum_over_all_tokens():
    x, weight, bias = draw(IMAGES, TOKENS, 7), draw(WIDTH, 7, seed=1), draw(WIDTH, seed=2)
    result = blocks._BiasGradient.apply(linear(x, weight, bias.detach()), bias)
    expected = linear(x, weight, bias)
    assert torch.equal(result, expected)
    for ours, autograds in zip(gradients(result, x, weight, bias), gradients(expected, x, weight, bias), strict=True):
        torch.testing.assert_close(ours, autograds, rtol=1e-12, atol=1e-12)


def test_a_bias_sums_what_is_short_in_its_own_type():
    y, bias = draw(64, 196, 4, dtype=torch.bfloat16), draw(4, dtype=torch.float32)
    (gradient,) = torch.autograd.grad(blocks._BiasGradient.apply(y, bias), bias, torch.ones_like(y))
    assert gradient.tolist() == [64 * 196] * 4  # bfloat16 would stop at 256


def test_heads_are_split_as_timm_splits_them_and_put_together_again():
    qkv = draw(IMAGES, TOKENS, 3 * WIDTH)
    expected = qkv.reshape(IMAGES, TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    result = blocks._SplitHeads.apply(qkv, HEADS)
    assert all(torch.equal(ours, timms) for ours, timms in zip(result, expected, strict=True))
    assert torch.equal(*(gradients(torch.stack(tuple(heads)), qkv)[0] for heads in (result, expected)))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cast_rounds_its_gradient_to_the_type_of_what_was_cast(transposed):
    x = draw(IMAGES, TOKENS, WIDTH, dtype=torch.bfloat16)
    result = blocks._Cast.apply(x, torch.float32)
    assert torch.equal(result, x.float())
    upstream = torch.randn(IMAGES, WIDTH, TOKENS).mT if transposed else torch.randn(IMAGES, TOKENS, WIDTH)
    (gradient,) = torch.autograd.grad(result, x, upstream)
    assert torch.equal(gradient, upstream.bfloat16())


def model(**overrides) -> nn.Module:
    made = create_model(ModelConfig("mu/16", depth=2, **overrides), num_classes=10, resolution=64)
    with torch.no_grad():
        for parameter in made.parameters():  # biases of zero and scales of one would hide mistakes
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return made


def timms(made: nn.Module) -> nn.Module:
    for layer in made.modules():
        if isinstance(layer, LeanBlock):
            layer.__class__ = type(layer).__bases__[0]
    return made


def test_the_models_blocks_are_these():
    assert [type(layer) for layer in model().get_submodule("blocks").children()] == [LeanBlock] * 2


@pytest.mark.parametrize("training", [False, True])
def test_without_the_compiler_a_model_is_timms_to_the_bit(training):
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    results = []
    for made in (model(), timms(model())):
        logits = made.train(training)(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(made.parameters()))])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def step_of(made: nn.Module, *, autocast: torch.dtype | None, compiled: bool) -> list[Tensor]:
    """The loss of one batch and the gradient of each parameter, in float64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (6,), generator=generator)
    step = TrainStep(made.train(), autocast=autocast)
    torch.compiler.reset()
    loss = (torch.compile(step) if compiled else step)(images, labels, torch.tensor(0.7))
    return [value.double() for value in (loss, *torch.autograd.grad(loss, list(made.parameters())))]


@needs_a_compiler
@pytest.mark.parametrize("overrides", [{}, {"pool": "tok"}, {"residual": "bfloat16"}], ids=str)
def test_the_compiled_step_gives_timms_gradients(overrides):
    results = [step_of(model(**overrides), autocast=None, compiled=compiled) for compiled in (True, False)]
    for ours, timms in zip(*results, strict=True):
        assert (ours - timms).norm() < 2e-5 * timms.norm() + 1e-7


@needs_a_compiler
@pytest.mark.parametrize("mask", [{"is_causal": True}, {"attn_mask": torch.eye(16, dtype=torch.bool)}], ids=str)
def test_a_masked_block_is_timms(mask):
    block, tokens = model().train().get_submodule("blocks.0"), draw(2, 16, 32, dtype=torch.float32)
    torch.compiler.reset()
    expected = block(tokens, **mask)
    torch.testing.assert_close(torch.compile(block)(tokens, **mask), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(block(tokens), expected, rtol=1e-3)


@needs_a_compiler
@pytest.mark.parametrize("overrides", [{}, {"residual": "bfloat16"}], ids=str)
def test_in_bfloat16_the_compiled_step_is_as_near_to_float32_as_timms(overrides):
    exact = step_of(model(), autocast=None, compiled=False)
    ours = step_of(model(**overrides), autocast=torch.bfloat16, compiled=True)
    usual = step_of(timms(model(**overrides)), autocast=torch.bfloat16, compiled=False)
    assert abs(ours[0] - exact[0]) < 0.02 * exact[0]
    errors = [
        sum((given - want).square().sum() for given, want in zip(gradients, exact, strict=True)).sqrt()
        for gradients in (ours, usual)
    ]
    assert errors[0] < 1.25 * errors[1]


def test_in_evaluation_a_compiled_block_is_timms(monkeypatch):
    block = LeanBlock(32, 2, act_layer=partial(nn.GELU, approximate="tanh")).eval()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(LeanBlock, "_attention", lambda *_: pytest.fail("not timm's"))
    tokens = torch.randn(2, 5, 32)
    assert torch.equal(block(tokens), Block.forward(block, tokens))


@pytest.mark.parametrize(
    ("settings", "layer"),
    [
        ({"init_values": 1e-5}, "ls1, ls2"),
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, "attn.q_norm, attn.k_norm"),
        ({"proj_drop": 0.1}, "attn.proj_drop, mlp.drop1, mlp.drop2"),
        ({"attn_drop": 0.1}, "attn.attn_drop"),
        ({"drop_path": 0.1}, "drop_path1, drop_path2"),
        ({"act_layer": nn.GELU}, r"GELU\(approximate='none'\)"),
        ({"act_layer": nn.ReLU}, r"ReLU\(\)"),
    ],
)
def test_a_block_that_the_compiled_step_would_compute_otherwise_is_refused(settings, layer):
    with pytest.raises(ValueError, match=f"^a compiled LeanBlock does not compute {layer}; add it there$"):
        LeanBlock(32, 2, **{"act_layer": partial(nn.GELU, approximate="tanh"), **settings})
