"""Schedule, weight decay, clipping and the optimisers, against formulas written out by hand."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import pytest
import torch
from torch import Tensor, nn

from dali_vit.config import ModelConfig, OptimConfig
from dali_vit.model import create_model
from dali_vit.optim import clip_grad_norm, create_optimizer, decay_groups, lr_schedule, optimizer_step, set_lr

VIT = ModelConfig(model="Ti/8", pool="tok", posemb="learn", width=32, depth=1, num_heads=2, mlp_dim=64)
OPTIMIZERS = {
    "adamw": OptimConfig(),
    "adamw-bfloat16": OptimConfig(first_moment="bfloat16"),
    "sgd": OptimConfig(optimizer="sgd", lr=0.1),
}


def vit() -> nn.Module:
    return create_model(VIT, num_classes=10, resolution=32)


def test_schedule() -> None:
    """The paper's: linear warm-up from 0 over 10,000 steps (the first step has lr 0), cosine to 0 at the last."""
    total, warmup = 112_603, 10_000
    factors = [lr_schedule(step, total_steps=total, warmup_steps=warmup) for step in range(total + 1)]
    assert factors[0] == 0
    assert factors[5000] == 0.5
    assert factors[warmup] == max(factors) == 1
    assert factors[total] == 0
    assert 0 <= factors[total - 1] < 1e-7
    for step in range(warmup, total, 997):
        expected = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
        assert factors[step] == pytest.approx(expected, abs=2e-7)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_schedule_without_warmup_and_of_one_step() -> None:
    assert lr_schedule(0, total_steps=4, warmup_steps=0) == 1
    assert lr_schedule(2, total_steps=4, warmup_steps=0) == pytest.approx(0.5)
    assert lr_schedule(0, total_steps=1, warmup_steps=10) == 0


def test_warmup_must_end_before_the_run() -> None:
    with pytest.raises(ValueError, match="--warmup-steps 10: must be below the run's 10 steps"):
        lr_schedule(0, total_steps=10, warmup_steps=10)


@pytest.mark.parametrize("first_moment", ["float32", "bfloat16"])
def test_the_settings_reach_the_optimizer(first_moment) -> None:
    config = OptimConfig(beta1=0.8, beta2=0.95, eps=1e-5, first_moment=first_moment)
    for group in create_optimizer(torch.nn.Linear(2, 2), config).param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-5)


def test_weight_decay_applies_to_kernels_only() -> None:
    model = vit()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group] for group in decay_groups(model))
    assert decayed == [
        "patch_embed.proj.weight",
        *("blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"),
        *("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"),
        *("head.weight", "pre_logits.weight"),
    ]
    assert sorted(decayed + others) == sorted(names.values())
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= set(others)


def test_weight_decay_of_a_resnet_leaves_batch_norm_out() -> None:
    model = create_model(ModelConfig(model="timm:resnet50"), num_classes=10, resolution=64)
    decayed, others = decay_groups(model)
    assert len(decayed) == 54  # 53 convolutions and the classifier
    assert all(p.ndim >= 2 for p in decayed)
    assert all(p.ndim == 1 for p in others)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_type_of_the_moment_matters_with_momentum_alone(beta1: float) -> None:
    ends = []
    for name in ("adamw", "adamw-bfloat16"):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        optimizer = create_optimizer(model, dataclasses.replace(OPTIMIZERS[name], beta1=beta1))
        set_lr(optimizer, 0.1)
        for _ in range(3):
            for p in model.parameters():
                p.grad = p.detach() ** 2 + 0.1
            optimizer_step(optimizer, None)
        ends.append(model.weight.detach())
    assert torch.equal(*ends) == (beta1 == 0)


@pytest.mark.parametrize("name", ["adamw", "adamw-bfloat16"])
def test_adamw_decays_by_schedule_but_not_by_lr(name: str) -> None:
    """With gradients of zero only the decay is left: half way up the schedule p loses 0.5e-4 of itself."""
    model = vit()
    config = dataclasses.replace(OPTIMIZERS[name], lr=0.003)
    optimizer = create_optimizer(model, config)
    before = [[p.detach().clone() for p in group] for group in decay_groups(model)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    set_lr(optimizer, config.lr * 0.5)
    optimizer_step(optimizer, 1.0)
    after = decay_groups(model)
    for p, old in zip(after[0], before[0], strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.5 * 1e-4), rtol=2e-7, atol=0)
    assert all(torch.equal(p, old) for p, old in zip(after[1], before[1], strict=True))


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)]


def run(model: nn.Linear, optimizer: torch.optim.Optimizer, steps: range, lr: float = 0.01) -> None:
    for step in steps:
        model.weight.grad, model.bias.grad = gradients(step)
        set_lr(optimizer, lr)
        optimizer_step(optimizer, None)


def linear() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(4, 3)


@pytest.mark.parametrize(("name", "momentum"), [("adamw", 0.9), ("adamw-bfloat16", 0.9), ("adamw-bfloat16", 0.8)])
def test_adamw_follows_the_formula(name: str, momentum: float) -> None:
    model, config = linear(), dataclasses.replace(OPTIMIZERS[name], beta1=momentum)
    expected = [p.detach().double() for p in (model.weight, model.bias)]
    low_precision = config.first_moment == "bfloat16"
    run(model, create_optimizer(model, config), range(5))

    mu, nu = [torch.zeros_like(p) for p in expected], [torch.zeros_like(p) for p in expected]
    # 0.9 and 0.8 in bfloat16
    beta1 = {0.9: 0.8984375, 0.8: 0.80078125}[momentum] if low_precision else momentum
    for step in range(5):
        for i, (p, g) in enumerate(zip(expected, gradients(step), strict=True)):
            new_mu = beta1 * mu[i] + (1 - momentum) * g.double()
            nu[i] = 0.999 * nu[i] + 0.001 * g.double() ** 2
            update = (new_mu / (1 - momentum ** (step + 1))) / ((nu[i] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p -= 0.01 * update + 0.01 * (0.1 * p if i == 0 else 0)  # the kernel decays by 1e-4 / lr, the bias does not
            mu[i] = new_mu.bfloat16().double() if low_precision else new_mu
    # A float32 sum that falls on the edge between two bfloat16 values may round to the other one.
    tolerance = 1e-4 if low_precision else 1e-6
    torch.testing.assert_close(model.weight.detach().double(), expected[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(model.bias.detach().double(), expected[1], rtol=0, atol=tolerance)


def test_sgd_is_momentum_with_coupled_decay() -> None:
    model = linear()
    expected = [p.detach().double() for p in (model.weight, model.bias)]
    run(model, create_optimizer(model, OptimConfig(optimizer="sgd", weight_decay=0.01, momentum=0.8)), range(4), lr=0.1)
    buffers = [torch.zeros_like(p) for p in expected]
    for step in range(4):
        for i, (p, g) in enumerate(zip(expected, gradients(step), strict=True)):
            buffers[i] = 0.8 * buffers[i] + g.double() + (0.01 * p if i == 0 else 0)
            p -= 0.1 * buffers[i]
    torch.testing.assert_close(model.weight.detach().double(), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.bias.detach().double(), expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_on_from_a_saved_state_repeats_every_bit(name: str) -> None:
    whole = linear()
    optimizer = create_optimizer(whole, OPTIMIZERS[name])
    run(whole, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = copy.deepcopy(whole)
    run(whole, optimizer, range(3, 6))

    file.seek(0)
    restored = create_optimizer(resumed, OPTIMIZERS[name])
    restored.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, restored, range(3, 6))
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_the_first_moment_keeps_no_more_than_bfloat16_holds() -> None:
    model = linear()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw-bfloat16"])
    run(model, optimizer, range(3))
    for state in optimizer.state.values():
        assert torch.equal(state["exp_avg"], state["exp_avg"].bfloat16())
        assert not torch.equal(state["exp_avg_sq"], state["exp_avg_sq"].bfloat16())


def test_learning_rate_zero_changes_no_parameter() -> None:
    for config in OPTIMIZERS.values():
        model, untouched = linear(), linear()
        run(model, create_optimizer(model, config), range(1), lr=0.0)
        assert torch.equal(model.weight, untouched.weight)


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def parameters_with_gradients(*values: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = torch.tensor(v)
    return [*parameters, nn.Parameter(torch.zeros(1))]  # and one without


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1 / 13), (26.0, 1.0), (13.0, 1.0), (None, 1.0), (6.5, 0.5)])
def test_clipping_is_by_the_global_norm(max_norm: float | None, scale: float) -> None:
    parameters = parameters_with_gradients([3.0, 4.0], [12.0])
    norm = clip_grad_norm(parameters, max_norm)
    assert norm.item() == 13
    assert norm.ndim == 0
    assert gradient(parameters[0]).tolist() == pytest.approx([3 * scale, 4 * scale], rel=1e-7)
    assert gradient(parameters[1]).tolist() == pytest.approx([12 * scale], rel=1e-7)


def test_clipping_adds_nothing_to_a_small_norm() -> None:
    """torch's clip_grad_norm_ adds 1e-6, which would be a thousandth of this one."""
    parameters = parameters_with_gradients([3e-4, 4e-4], [12e-4])
    clip_grad_norm(parameters, 1e-4)
    assert gradient(parameters[1]).tolist() == pytest.approx([12e-4 / 13], rel=1e-6)


def test_clipping_of_gradients_that_are_zero_or_not_finite() -> None:
    zero = parameters_with_gradients([0.0, 0.0])
    assert clip_grad_norm(zero, 1.0) == 0
    assert gradient(zero[0]).tolist() == [0, 0]
    for value in (math.nan, math.inf):
        bad = parameters_with_gradients([1.0, value])
        assert not clip_grad_norm(bad, 1.0).isfinite()
        assert not gradient(bad[0]).isfinite().all()


def test_optimizer_step_clips_and_clears() -> None:
    model = linear()
    optimizer = create_optimizer(model, OptimConfig(optimizer="sgd", weight_decay=0.0))
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.full((3, 4), 2.0), torch.zeros(3)
    set_lr(optimizer, 1.0)
    assert optimizer_step(optimizer, 1.0).item() == pytest.approx(math.sqrt(48))
    torch.testing.assert_close(model.weight.detach(), before - 2 / math.sqrt(48))
    assert model.weight.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update_never_waits_for_the_gpu(name: str) -> None:
    model = linear().cuda()
    optimizer = create_optimizer(model, OPTIMIZERS[name])
    grads = [[g.cuda() for g in gradients(step)] for step in range(3)]
    loss = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for weight, bias in grads:
            model.weight.grad, model.bias.grad = weight, bias
            set_lr(optimizer, 0.01)
            optimizer_step(optimizer, 1.0, loss, 10.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_step_that_is_left_out_leaves_no_trace(name: str) -> None:
    """torch's fused SGD leaves its momentum uninitialised then: memory that was freed shows here as NaN."""
    config = dataclasses.replace(OPTIMIZERS[name], lr=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stumbling = nn.Linear(1000, 100)
    healthy = copy.deepcopy(stumbling)
    freed = [torch.full((100, 1000), math.nan) for _ in range(20)]
    del freed
    for model, values in [(stumbling, (math.inf, 1.0, 2.0)), (healthy, (1.0, 2.0))]:
        optimizer = create_optimizer(model, config)
        for value in values:
            for p in model.parameters():
                p.grad = torch.full_like(p, value)
            set_lr(optimizer, 0.1)
            optimizer_step(optimizer, None)
    for found, expected in zip(stumbling.parameters(), healthy.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_an_optimizer_that_would_take_the_steps_that_are_left_out_is_refused() -> None:
    """torch's fused ones alone read found_inf."""
    layer = nn.Linear(2, 2)
    for p in layer.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(TypeError, match=r"^AdamW is not fused: "):
        optimizer_step(torch.optim.AdamW(layer.parameters()), 1.0)
    assert layer.weight.isfinite().all()
