"""Whole optimisations of big_vision replayed through the trainer's own step: `build_update`, `lr_schedule` and the
optimiser of `create_optimizer`, called as dali_vit/train.py calls them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import dali_vit.step
from dali_vit import big_vision
from dali_vit.config import Config, OptimConfig, RunConfig
from dali_vit.distributed import Group
from dali_vit.model import create_model
from dali_vit.optim import create_optimizer, lr_schedule
from dali_vit.step import TrainStep, build_update
from tests.conftest import needs_a_compiler
from tests.parity.conftest import Reference

CPU = Group(0, 1, 0, 1, torch.device("cpu"))


class Tolerance(NamedTuple):
    """Relative, per step for scalars and per tensor for the final parameters."""

    scalars: float
    parameters: float
    key_bias: float = 5e-3  # their gradient is zero in exact arithmetic: Adam amplifies rounding errors


TOLERANCES = {"float32": Tolerance(1e-4, 1e-4), "bfloat16": Tolerance(3e-3, 2e-3)}


class Replay(NamedTuple):
    losses: list[float]
    grad_norms: list[float]
    lrs: list[float]
    final: dict[str, np.ndarray]


def replay(
    reference: Reference,
    *,
    steps: int | None = None,
    compile_mode: str = "off",
    residual: str = "float32",
    parts: int = 1,
) -> Replay:
    """Trains from the file's initial parameters on its images, labels and lambdas, as train.py does."""
    meta, arrays = reference.meta, reference.arrays
    optim = OptimConfig(
        lr=meta["lr"],
        weight_decay=meta["wd"],
        grad_clip_norm=meta["grad_clip_norm"],
        warmup_steps=meta["warmup_steps"],
        first_moment=meta["mu_dtype"],
    )
    optim = dataclasses.replace(optim, batch_size=meta["batch_size"])
    config = Config(optim=optim, run=RunConfig(compile=compile_mode, grad_accum_steps=parts))  # type: ignore[arg-type]
    model_config = dataclasses.replace(reference.model_config(), residual=residual)  # type: ignore[arg-type]
    model = create_model(model_config, num_classes=meta["num_classes"], resolution=meta["resolution"])
    state, unmapped = big_vision.from_big_vision(reference.tree("init"), model)
    assert unmapped == []
    model.load_state_dict(state)
    torch.compiler.reset()  # else every replay counts towards the limit on recompilations
    update, _ = build_update(config, model.train(), create_optimizer(model, optim), CPU)

    images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    batch, total = meta["batch_size"], meta["total_steps"]
    result = Replay([], [], [], {})
    for step in range(steps or total):
        first = batch * (step % (len(images) // batch))
        rows = slice(first, first + batch)
        lr = optim.lr * lr_schedule(step, total_steps=total, warmup_steps=optim.warmup_steps)
        loss, grad_norm = update(images[rows], labels[rows], float(arrays["mixup_lambda"][step]), lr)
        result.losses.append(loss.item())
        result.grad_norms.append(grad_norm.item())
        result.lrs.append(lr)
    return result._replace(final=big_vision.to_big_vision(model))


@pytest.mark.parametrize("parts", [1, 4])
def test_replay_follows_the_reference(trajectory_reference: Reference, parts: int) -> None:
    tolerance = TOLERANCES[trajectory_reference.meta["mu_dtype"]]
    result, expected = replay(trajectory_reference, parts=parts), trajectory_reference.arrays
    np.testing.assert_allclose(result.lrs, expected["lr"], rtol=1e-6, atol=0)
    np.testing.assert_allclose(result.losses, expected["loss"], rtol=tolerance.scalars)
    np.testing.assert_allclose(result.grad_norms, expected["grad_norm"], rtol=tolerance.scalars)

    final = trajectory_reference.tree("final")
    assert result.final.keys() == final.keys()
    for name, array in final.items():
        bound = tolerance.key_bias if name.endswith("/key/bias") else tolerance.parameters
        assert np.linalg.norm(result.final[name] - array) <= bound * np.linalg.norm(array), name


@needs_a_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mode", "parts"), [("default", 1), ("default", 2), ("reduce-overhead", 1)])
def test_compiled_step_equals_the_eager_one(trajectory_reference: Reference, mode: str, parts: int) -> None:
    """Five steps: the learning rate is 0 at the first, so four of them change the parameters."""
    eager = replay(trajectory_reference, steps=5)
    compiled = replay(trajectory_reference, steps=5, compile_mode=mode, parts=parts)
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=1e-5)
    np.testing.assert_allclose(compiled.grad_norms, eager.grad_norms, rtol=1e-4)


@needs_a_compiler
@pytest.mark.timeout(300)
@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_compiled_bfloat16_step_stays_near_the_reference(
    trajectory_reference: Reference, monkeypatch: pytest.MonkeyPatch, residual: str
) -> None:
    """What a GPU runs, in all but the device: bf16 autocast under torch.compile, the losses within 2 %."""

    def with_autocast(*args: Any, **options: Any) -> TrainStep:  # on the CPU the trainer leaves it off
        return TrainStep(*args, **{**options, "autocast": torch.bfloat16})

    monkeypatch.setattr(dali_vit.step, "TrainStep", with_autocast)
    result = replay(trajectory_reference, compile_mode="default", residual=residual)
    np.testing.assert_allclose(result.losses, trajectory_reference.arrays["loss"], rtol=2e-2)
