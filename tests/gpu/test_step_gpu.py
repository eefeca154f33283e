"""The training step on a GPU: compiled in every way it trains alike, and nothing in it waits for the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dali_vit.attention import BACKENDS, Shape, choose_attention, measure, shape_of
from dali_vit.config import Config, LocalUserError, ModelConfig, OptimConfig, RunConfig
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


def make_update(mode: Any, parts: int = 1, attention: Any = "auto") -> tuple[Update, Group]:
    """The update of a fresh model, compiled in a way, and its process group of one."""
    config = replace(CONFIG, run=RunConfig(compile=mode, grad_accum_steps=parts, attention=attention))
    torch.manual_seed(0)
    torch.compiler.reset()
    group = Group(0, 1, 0, 1, torch.device("cuda", 0))
    model = create_model(config.model, num_classes=100, resolution=224).to(group.device)
    update, _ = build_update(config, model, create_optimizer(model, config.optim), group)
    return update, group


def losses(mode: Any, *, sync: str = "default", parts: int = 1, attention: Any = "auto") -> list[float]:
    """Of the first steps on fixed batches; `sync`: of `torch.cuda.set_sync_debug_mode` once all is compiled."""
    update, group = make_update(mode, parts, attention)
    generator = torch.Generator(group.device).manual_seed(0)
    images = torch.randint(0, 256, (64, 224, 224, 3), dtype=torch.uint8, device=group.device, generator=generator)
    labels = torch.randint(0, 100, (64,), device=group.device, generator=generator)
    found = []
    for step in range(STEPS):
        if step == 4:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(sync)
        loss, _ = update(images, labels, 0.7 + 0.05 * step, 1e-3)
        found.append(loss)
    torch.cuda.set_sync_debug_mode("default")
    return torch.stack(found).tolist()


@pytest.mark.parametrize("parts", [1, 4])
def test_nothing_in_the_step_waits_for_the_gpu(parts: int) -> None:
    try:
        losses("default", sync="error", parts=parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_parts_it_trains_as_whole_in_less_memory() -> None:
    """A quarter of the activations, which are most of what 64 images take, and the gradients besides."""
    found, peaks = [], []
    for parts in (1, 4):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found.append(losses("default", parts=parts))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    np.testing.assert_allclose(found[1], found[0], rtol=2e-2)
    assert peaks[1] < 0.5 * peaks[0]


def test_a_batch_that_memory_does_not_hold_is_named() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    try:
        with pytest.raises(LocalUserError, match=r"--batch-size 64: the memory of GPU 0 .* --grad-accum-steps 2, "):
            losses("off")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.timeout(1500)  # "max" tries out kernels for minutes
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
def test_compiled_it_trains_as_without(mode: str) -> None:
    np.testing.assert_allclose(losses(mode), losses("off"), rtol=2e-2)


def test_in_parts_it_trains_as_whole_in_cuda_graphs() -> None:
    """Gradients that a replay has written are added to while the next part is replayed."""
    np.testing.assert_allclose(losses("reduce-overhead", parts=4), losses("off"), rtol=2e-2)


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
    times, faults = measure(shape, group.device, [*BACKENDS, "packed"])
    assert set(times) | set(faults) == {*BACKENDS, "packed"}
    assert "packed" in times, faults
    assert all(0 < milliseconds < 100 for milliseconds in times.values())
    words = choose_attention("auto", model, 64, group, compiled=True).words
    assert words.split()[0] in times


@pytest.mark.parametrize(
    ("tokens", "heads", "head_width"), [(196, 6, 64), (197, 3, 64), (49, 12, 64), (256, 2, 32), (64, 2, 16), (1, 2, 16)]
)
def test_packed_attention_is_torchs_and_the_same_every_time(tokens: int, heads: int, head_width: int) -> None:
    """Nearer to float32 than 1 %; and flash attention, whose sums come in any order, is no measure of the bits."""
    from dali_vit.attention import _check_packed, _draw, _packed

    shape, device = Shape(16, tokens, heads, head_width), torch.device("cuda", 0)
    _check_packed(shape, device)
    run = _packed(*_draw(shape, device), shape)
    first = run()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))


@pytest.mark.parametrize("attention", [*BACKENDS, "packed"])
def test_with_every_attention_kernel_it_trains_alike(attention: Any) -> None:
    np.testing.assert_allclose(losses("default", attention=attention), losses("off"), rtol=2e-2)
