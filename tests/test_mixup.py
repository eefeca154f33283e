"""Mixup's lambda, partner and labels, and the compiled part of the step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from dali_vit.config import ModelConfig
from dali_vit.mixup import mixup_cross_entropy, normalize, normalize_and_mix, sample_lambda
from dali_vit.model import create_model
from dali_vit.step import TrainStep


def folded_beta_cdf(x: np.ndarray, alpha: float) -> np.ndarray:
    """P(max(b, 1 - b) <= x) for b ~ Beta(alpha, alpha) and x in [0.5, 1].

    By symmetry the integral of (t (1 - t))^(alpha - 1) over [1 - x, 0.5], normalised; t = v^(1 / alpha) takes away
    the pole at 0, and what is left is smooth enough for the trapezoidal rule.
    """
    v = np.linspace(0, 0.5**alpha, 200_001)
    integrand = (1 - v ** (1 / alpha)) ** (alpha - 1)
    integral = np.concatenate([[0], np.cumsum((integrand[1:] + integrand[:-1]) / 2)])
    return 1 - np.interp((1 - x) ** alpha, v, integral / integral[-1])


def ks_statistic(sample: np.ndarray, alpha: float) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of the sample from the folded Beta; above 1.95 p < 0.001."""
    n, cdf = len(sample), folded_beta_cdf(np.sort(sample), alpha)
    distance = max((cdf - np.arange(n) / n).max(), (np.arange(1, n + 1) / n - cdf).max())
    return float(math.sqrt(n) * distance)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_lambda_is_a_folded_beta(alpha: float) -> None:
    """20,000 steps; the same test rejects an alpha wrong by a fifth and a Beta that is not folded."""
    sample = np.array([sample_lambda(alpha, seed=0, step=step) for step in range(20_000)])
    assert sample.min() >= 0.5
    assert sample.max() <= 1.0
    assert ks_statistic(sample, alpha) < 1.95
    assert ks_statistic(sample, 1.2 * alpha) > 1.95
    unfolded = np.random.default_rng(0).beta(alpha, alpha, 20_000)
    assert ks_statistic(np.clip(unfolded, 0.5, 1.0), alpha) > 1.95
    # The second moment, whose value needs no integral: E (lambda - 1/2)^2 = 1 / (4 (2 alpha + 1)).
    deviation = (sample - 0.5) ** 2
    assert abs(deviation.mean() - 1 / (4 * (2 * alpha + 1))) < 4 * deviation.std() / math.sqrt(20_000)
    assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 4 / math.sqrt(20_000)


def test_lambda_is_a_pure_function_of_seed_and_step() -> None:
    np.random.seed(3)  # noqa: NPY002  (the global state must play no part)
    drawn = [sample_lambda(0.2, seed, step) for seed in (0, 1) for step in (0, 1, 10**6)]
    assert drawn == [sample_lambda(0.2, seed, step) for seed in (0, 1) for step in (0, 1, 10**6)]
    assert len(set(drawn)) == 6
    # A resumed run must draw what it would have drawn before, on any version of numpy.
    golden = [0.9586801082, 0.9979207782, 0.8852365506, 0.9992329659, 0.5185534865, 0.9572080701]
    assert drawn == pytest.approx(golden, abs=1e-9)


def test_alpha_zero_is_off() -> None:
    assert sample_lambda(0.0, 0, 0) == 1.0


def test_normalize_gives_channels_first_in_minus_one_to_one() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 1, 2, 3).contiguous()
    images = normalize(pixels)
    assert images.shape == (256, 3, 1, 2)
    assert images.dtype == torch.float32
    assert torch.equal(images[:, 0, 0, 0], torch.arange(256).float() / 127.5 - 1)
    assert images.min() == -1
    assert images.max() == 1


def random_images(n: int, side: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_partner_is_the_image_before() -> None:
    pixels = random_images(5)
    images = normalize(pixels)
    mixed = normalize_and_mix(pixels, torch.tensor(0.75))
    for i in range(5):
        torch.testing.assert_close(mixed[i], 0.75 * images[i] + 0.25 * images[i - 1])  # of the first: the last


def test_lambda_one_changes_no_bit() -> None:
    pixels = random_images(5)
    assert torch.equal(normalize_and_mix(pixels, torch.tensor(1.0)), normalize(pixels))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_is_that_of_mixed_labels(label_smoothing: float) -> None:
    """Against torch's cross-entropy with soft targets, which big_vision mixes as one-hot vectors."""
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([3, 0, 9, 9, 1, 4])
    one_hot = F.one_hot(labels, 10).float()
    targets = 0.7 * one_hot + 0.3 * one_hot[[5, 0, 1, 2, 3, 4]]
    expected = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    torch.testing.assert_close(mixup_cross_entropy(logits, labels, torch.tensor(0.7), label_smoothing), expected)


def test_label_minus_one_adds_nothing_by_hand() -> None:
    """Two classes with probabilities 1/4 and 3/4 in every row; rows 1 and 2 of four have no label."""
    logits = torch.tensor([[0.0, math.log(3)]]).repeat(4, 1)
    labels = torch.tensor([0, -1, -1, 1])
    zero, one = math.log(4), math.log(4 / 3)
    # Row 0: its own 0, and 1 of row 3. Row 1: only 0 of row 0. Row 2: nothing. Row 3: only its own 1.
    expected = (0.75 * zero + 0.25 * one + 0.25 * zero + 0.75 * one) / 4
    assert mixup_cross_entropy(logits, labels, torch.tensor(0.75)).item() == pytest.approx(expected, rel=1e-6)
    # Smoothing spreads 0.1 of each label that is there over both classes: weights 1, 0.25, 0 and 0.75.
    expected = 0.9 * expected + 0.1 * (1 + 0.25 + 0.75) / 4 * (zero + one) / 2
    assert mixup_cross_entropy(logits, labels, torch.tensor(0.75), 0.1).item() == pytest.approx(expected, rel=1e-6)
    assert mixup_cross_entropy(logits, torch.full((4,), -1), torch.tensor(0.75), 0.1).item() == 0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradients_elsewhere_do_not_feel_label_minus_one(label_smoothing: float) -> None:
    def gradient(labels: list[int]) -> torch.Tensor:
        logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
        mixup_cross_entropy(logits, torch.tensor(labels), torch.tensor(0.7), label_smoothing).backward()
        assert logits.grad is not None
        return logits.grad

    usual, masked = gradient([3, 0, 9, 9, 1, 4]), gradient([3, 0, -1, -1, 1, 4])
    assert torch.equal(masked[[0, 1, 5]], usual[[0, 1, 5]])
    assert torch.equal(masked[3], torch.zeros(10))
    assert (masked[2] != usual[2]).any()
    assert (masked[4] != usual[4]).any()


def test_loss_is_float32_whatever_the_logits() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = mixup_cross_entropy(logits, torch.arange(4), torch.tensor(1.0))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mixup_cross_entropy(logits.float(), torch.arange(4), torch.tensor(1.0)))


def train_step(name: str, autocast: torch.dtype | None = None) -> TrainStep:
    sizes: dict[str, Any] = {} if name.startswith("timm:") else {"width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64}
    model = create_model(ModelConfig(model=name, **sizes), num_classes=10, resolution=32)
    return TrainStep(model, autocast=autocast)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["Ti/8", "timm:test_resnet"])
def test_step_is_one_graph_and_a_new_lambda_compiles_nothing(name: str) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(train_step(name), backend=counter, fullgraph=True)
    images, labels = random_images(4, 32), torch.arange(4)
    for lam in (1.0, 0.5, 0.75, 0.9):
        compiled(images, labels, torch.tensor(lam)).backward()
    assert counter.frame_count == 1


def test_autocast_leaves_parameters_gradients_and_loss_in_float32() -> None:
    step = train_step("Ti/8", autocast=torch.bfloat16)
    types = []
    step.model.get_submodule("blocks.0.mlp.fc1").register_forward_hook(lambda m, i, o: types.append(o.dtype))
    loss = step(random_images(4, 32), torch.arange(4), torch.tensor(0.8))
    loss.backward()
    assert types == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert {p.dtype for p in step.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in step.parameters() if p.grad is not None} == {torch.float32}
    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)  # the last layer starts at zero
