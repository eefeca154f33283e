"""The training step on a GPU: compiled in every way it trains alike, and nothing in it waits for the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dali_vit.attention import BACKENDS, fastest_attention, measure, shape_of
from dali_vit.config import Config, ModelConfig, OptimConfig, RunConfig
from dali_vit.distributed import Group
from dali_vit.model import create_model
from dali_vit.optim import create_optimizer
from dali_vit.step import Update, build_update
from pipelines.loader import TrainLoader
from pipelines.readers import FileList
from pipelines.train import Augment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(600),
]

CONFIG = Config(model=ModelConfig(model="Ti/16"), optim=OptimConfig(batch_size=64, lr=1e-3))
STEPS = 6


def make_update(mode: Any) -> tuple[Update, Group]:
    """The update of a fresh model, compiled in a way, and its process group of one."""
    config = replace(CONFIG, run=RunConfig(compile=mode))
    torch.manual_seed(0)
    torch.compiler.reset()
    group = Group(0, 1, 0, 1, torch.device("cuda", 0))
    model = create_model(config.model, num_classes=100, resolution=224).to(group.device)
    update, _ = build_update(config, model, create_optimizer(model, config.optim), group)
    return update, group


def losses(mode: Any, *, sync: str = "default") -> list[float]:
    """Of the first steps on fixed batches; `sync`: of `torch.cuda.set_sync_debug_mode` once all is compiled."""
    update, group = make_update(mode)
    images = torch.randint(0, 256, (64, 224, 224, 3), dtype=torch.uint8, device=group.device)
    labels = torch.randint(0, 100, (64,), device=group.device)
    found = []
    for step in range(STEPS):
        if step == 4:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(sync)
        loss, _ = update(images, labels, 0.7 + 0.05 * step, 1e-3)
        found.append(loss)
    torch.cuda.set_sync_debug_mode("default")
    return torch.stack(found).tolist()


def test_nothing_in_the_step_waits_for_the_gpu() -> None:
    try:
        losses("default", sync="error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_compiled_it_trains_as_without(mode: str) -> None:
    np.testing.assert_allclose(losses(mode), losses("off"), rtol=2e-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_it_trains_as_without_on_what_the_loader_gives(mode: str, tmp_path: Path) -> None:
    """CUDA graphs are captured while DALI takes buffers back and works ahead."""
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{i}.jpg") for i in range(64)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (80, 100, 3), np.uint8)).save(path)
    files = FileList.from_paths(paths, np.arange(64))
    shared: dict[str, Any] = {"batch_size": 32, "image_size": 224, "seed": 0, "rank": 0, "world_size": 1}

    def train(mode: Any) -> list[float]:
        update, group = make_update(mode)
        loader = TrainLoader(files, device=group.device, num_threads=2, augment=Augment(), **shared)
        found = [update(*next(loader), 0.7, 1e-3)[0] for _ in range(12)]
        loader.close()
        return torch.stack(found).tolist()

    losses = train(mode)
    np.testing.assert_allclose(losses, train("off"), rtol=2e-2)
    assert len(set(losses)) == len(losses)


def test_an_attention_kernel_is_chosen_by_measurement() -> None:
    group = Group(0, 1, 0, 1, torch.device("cuda", 0))
    model = create_model(CONFIG.model, num_classes=100, resolution=224)
    shape = shape_of(model, 64)
    assert shape is not None
    times = measure(shape, group.device)
    assert set(times) <= set(BACKENDS)
    assert times
    assert all(0 < milliseconds < 100 for milliseconds in times.values())
    words = fastest_attention(model, 64, group).words
    assert words.split()[0] in times
