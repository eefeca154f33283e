"""The stages of training apart and together: the loader alone, the step alone, and the trainer's loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmark.kernels import summarize
from benchmark.windows import Measurement, measure, warm_up
from dali_vit import data as datasets
from dali_vit import loaders
from dali_vit.blocks import LeanBlock
from dali_vit.config import Config
from dali_vit.distributed import Group, barrier
from dali_vit.loaders import LoaderSettings
from dali_vit.metrics import StepTimer, Window
from dali_vit.mixup import sample_lambda
from dali_vit.optim import create_optimizer, lr_schedule
from dali_vit.step import build_update
from pipelines.loader import TrainLoader

TrainOn = Callable[[Tensor, Tensor], None]
ROUNDS = 3
"""Rounds of `measure_randaug_cost`."""
NEVER = 1e30
"""A threshold of loss spikes that no step reaches: the search for spikes takes its usual time and finds none."""


def use_timm_blocks(model: nn.Module) -> None:
    """Makes a model's blocks timm's own, to compare with."""
    for layer in model.modules():
        if isinstance(layer, LeanBlock):
            layer.__class__ = type(layer).__bases__[0]


def training_step(config: Config, model: nn.Module, total_steps: int, group: Group) -> tuple[TrainOn, str]:
    """What the trainer does with a batch, as a function of (images, labels), and how it is compiled, in words.

    images uint8 [N, S, S, 3] and labels int64 [N] are on the group's device.
    """
    if config.optim.spike_threshold > 0:
        # After one batch has been learned by heart, the loss of others would be a spike: steps left out are faster.
        config = replace(config, optim=replace(config.optim, spike_threshold=NEVER))
    model.to(group.device)
    optimizer = create_optimizer(model, config.optim)
    update, how = build_update(config, model, optimizer, group)
    model.train()
    window, steps = Window(group), count()

    def train_on(images: Tensor, labels: Tensor) -> None:
        step = next(steps)
        lr = config.optim.lr * lr_schedule(step, total_steps=total_steps, warmup_steps=config.optim.warmup_steps)
        lam = sample_lambda(config.optim.mixup_alpha, config.run.seed, step)
        window.add(*update(images, labels, lam, lr))

    return train_on, "; ".join([how.pop("compile"), *(f"{name} {words}" for name, words in how.items())])


def measure_loader(
    config: Config, dataset: datasets.Dataset, settings: LoaderSettings, group: Group, seconds: float
) -> Measurement:
    """The training graph alone."""
    loader = loaders.train_loader(dataset, config, group, settings=settings)
    try:
        return measure_batches(loader, config, group, seconds)
    finally:
        loader.close()


def measure_batches(loader: TrainLoader, config: Config, group: Group, seconds: float) -> Measurement:
    """A loader whose batches are taken as fast as they come and dropped."""
    return measure(
        lambda: next(loader), StepTimer(group.device), images=config.optim.batch_size, seconds=seconds, group=group
    )


def measure_model(
    train_on: TrainOn, config: Config, dataset: datasets.Dataset, settings: LoaderSettings, group: Group, seconds: float
) -> Measurement:
    """The training step alone, on one real batch that stays on the device."""
    loader = loaders.train_loader(dataset, config, group, settings=settings)
    images, labels = next(loader)
    loader.close()
    return measure(
        lambda: train_on(images, labels),
        StepTimer(group.device),
        images=config.optim.batch_size,
        seconds=seconds,
        group=group,
    )


def measure_joint(
    train_on: TrainOn, config: Config, dataset: datasets.Dataset, settings: LoaderSettings, group: Group, seconds: float
) -> Measurement:
    """The trainer's loop between two log lines: a new batch for every step."""
    loader = loaders.train_loader(dataset, config, group, settings=settings)
    timer = StepTimer(group.device)

    def step() -> None:
        with timer.waiting():
            images, labels = next(loader)
        train_on(images, labels)

    try:
        return measure(step, timer, images=config.optim.batch_size, seconds=seconds, group=group)
    finally:
        loader.close()


def measure_randaug_cost(
    train_on: TrainOn, config: Config, dataset: datasets.Dataset, settings: LoaderSettings, group: Group, seconds: float
) -> dict[str, Any]:
    """What RandAugment costs training: the trainer's loop with it and without, in rounds that take turns.

    `cost` is the median over the rounds of the share of the rate that RandAugment takes.
    """
    without = replace(config, data=replace(config.data, randaug_layers=0))
    rounds: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        bare, augmented = (
            measure_joint(train_on, tried, dataset, settings, group, seconds).images_per_sec
            for tried in (without, config)
        )
        rounds.append((bare, augmented))
    costs = [1 - augmented / bare for bare, augmented in rounds]
    return {
        "without": [bare for bare, _ in rounds],
        "with": [augmented for _, augmented in rounds],
        "cost": float(np.median(costs)),
    }


def profile_joint(
    train_on: TrainOn,
    config: Config,
    dataset: datasets.Dataset,
    settings: LoaderSettings,
    group: Group,
    *,
    steps: int,
    folder: Path,
) -> tuple[Path, dict[str, Any]]:
    """Writes a trace of the trainer's loop, one file a rank; returns this rank's file and its `kernels.summarize`.

    TensorBoard's profiler plugin and https://ui.perfetto.dev open the file.
    """
    loader = loaders.train_loader(dataset, config, group, settings=settings)
    try:
        profiler, summary = profile_steps(lambda: next(loader), train_on, group, steps)
    finally:
        loader.close()
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"rank{group.rank}.pt.trace.json"
    profiler.export_chrome_trace(str(trace))
    barrier()
    return trace, summary


def profile_steps(
    batch: Callable[[], tuple[Tensor, Tensor]], train_on: TrainOn, group: Group, steps: int
) -> tuple[torch.profiler.profile, dict[str, Any]]:
    """The profile of `steps` steps, which follow those that warm up, and `kernels.summarize` of it."""
    warm_up(lambda: train_on(*batch()), group)
    timer = StepTimer(group.device)
    with torch.profiler.profile() as profiler:
        timer.reset()
        for number in range(steps):
            with torch.profiler.record_function(f"step {number}"):
                with torch.profiler.record_function("data"):
                    images, labels = batch()
                train_on(images, labels)
        _, seconds, _ = timer.read()
    return profiler, summarize(profiler, steps, seconds, on_gpu=group.device.type == "cuda")
