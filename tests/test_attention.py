"""The choice among torch's attention kernels, as far as a CPU goes; tests/gpu measures."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

import dali_vit.step
from dali_vit import attention
from dali_vit.attention import Attention, Shape, choose, fastest_attention, shape_of
from dali_vit.config import Config, ModelConfig, OptimConfig, RunConfig
from dali_vit.distributed import Group
from dali_vit.model import create_model
from dali_vit.optim import create_optimizer
from tests.conftest import needs_a_compiler

GPU = Group(0, 1, 0, 1, torch.device("cuda", 0))  # nothing here touches the device
CPU = Group(0, 1, 0, 1, torch.device("cpu"))


def vit(**sizes: str) -> torch.nn.Module:
    return create_model(ModelConfig(model="Ti/16", **sizes), num_classes=10, resolution=224)  # type: ignore[arg-type]


def test_shape_is_that_of_a_step() -> None:
    assert shape_of(vit(), 128) == Shape(images=128, tokens=196, heads=3, head_width=64)
    assert shape_of(vit(pool="tok"), 7) == Shape(images=7, tokens=197, heads=3, head_width=64)
    resnet = create_model(ModelConfig(model="timm:resnet18"), num_classes=10, resolution=64)
    assert shape_of(resnet, 128) is None


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"flash": 1.0, "cudnn": 0.9, "efficient": 1.5}, "cudnn"),
        ({"flash": 1.0, "cudnn": 0.99, "efficient": 1.5}, "flash"),
        ({"cudnn": 2.0, "efficient": 1.0}, "efficient"),
        ({"efficient": 3.0}, "efficient"),
    ],
)
def test_the_fastest_is_chosen_unless_by_a_hair(times: dict[str, float], chosen: str) -> None:
    assert choose(times) == chosen


def test_the_fastest_comes_first_and_the_others_stay_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(
        attention, "measure", lambda shape, device: shapes.append(shape) or {"flash": 1.25, "cudnn": 1.0}
    )
    before = _cur_sdpa_kernel_backends(with_priority=True)
    context, kernel, words = fastest_attention(vit(), 64, GPU)
    assert shapes == [Shape(64, 196, 3, 64)]
    assert kernel == "cudnn"
    assert words == "cudnn (flash 1.25 ms, cudnn 1.00 ms a layer)"
    for _ in range(2):  # one for every step
        with context():
            order = _cur_sdpa_kernel_backends(with_priority=True)
            assert order[0] == SDPBackend.CUDNN_ATTENTION
            assert set(order) == {*attention.BACKENDS.values(), SDPBackend.MATH}
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_every_rank_tries_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to choose, but because torch's first use of attention in a process must not come later."""
    tried = []
    monkeypatch.setattr(attention, "measure", lambda shape, device: tried.append(shape) or {"cudnn": 2.0})
    monkeypatch.setattr(attention, "gather_objects", lambda value: [{"flash": 1.0}, value])
    found = fastest_attention(vit(), 64, Group(1, 2, 1, 2, torch.device("cuda", 1)))
    assert tried == [Shape(64, 196, 3, 64)]
    assert found.kernel == "flash"  # as on rank 0


def test_torchs_own_choice_stays_on_a_cpu_and_where_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert fastest_attention(vit(), 64, CPU).words == "torch's choice"
    assert not caplog.records
    monkeypatch.setattr(attention, "_milliseconds", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
    context, _, words = fastest_attention(vit(), 64, GPU)
    assert words == "torch's choice"
    assert "none of flash, cudnn, efficient runs here" in caplog.text
    with context():
        pass


@needs_a_compiler
def test_what_another_run_compiled_does_not_decide_on_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps what it compiled on disk, for all processes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = Config(model=ModelConfig(model="mu/16"), optim=OptimConfig(batch_size=4), run=RunConfig(compile="default"))
    images, labels = torch.zeros(4, 64, 64, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)

    def runs_flash(kernel: str, backend: SDPBackend) -> bool:
        asked_for = Attention(partial(sdpa_kernel, backend), kernel, kernel)
        monkeypatch.setattr(dali_vit.step, "fastest_attention", lambda *_: asked_for)
        torch.compiler.reset()  # like a new process
        model = create_model(config.model, num_classes=10, resolution=64)
        update, _ = dali_vit.step.build_update(config, model, create_optimizer(model, config.optim), CPU)
        update(images, labels, 0.7, 1e-3)  # compiles, and to find shapes calls all that it compiles
        with torch.profiler.profile() as profile:
            update(images, labels, 0.7, 1e-3)
        return any("flash" in event.key for event in profile.key_averages())

    assert not runs_flash("math", SDPBackend.MATH)
    assert runs_flash("flash", SDPBackend.FLASH_ATTENTION)
