"""A step reads no tensor's value back, and the host runs at most two steps ahead: as far as a CPU shows it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dali_vit.config import Config, ModelConfig, OptimConfig, RunConfig, UserError
from dali_vit.distributed import Group
from dali_vit.metrics import Window
from dali_vit.model import create_model
from dali_vit.optim import create_optimizer
from dali_vit.step import RunAhead, build_update

WITH_RESULTS_ON_THE_HOST = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Reads(TorchDispatchMode):
    """Notes the operations whose result the host must know to go on; each would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.name() for name in WITH_RESULTS_ON_THE_HOST):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(),
        OptimConfig(first_moment="bfloat16"),
        OptimConfig(optimizer="sgd"),
        OptimConfig(grad_clip_norm=None),
    ],
    ids=["adamw", "bfloat16 moment", "sgd", "unclipped"],
)
def test_nothing_in_a_step_reads_a_value_back(optim: OptimConfig, parts: int) -> None:
    config = Config(
        model=ModelConfig(model="mu/16"),
        optim=dataclasses.replace(optim, batch_size=8, spike_threshold=10.0),
        run=RunConfig(compile="off", grad_accum_steps=parts),
    )
    model = create_model(config.model, num_classes=10, resolution=32)
    optimizer = create_optimizer(model, config.optim)
    group = Group(0, 1, 0, 1, torch.device("cpu"))
    update, _ = build_update(config, model, optimizer, group)
    window = Window(group)
    images, labels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8), torch.arange(8)
    for _ in range(2):  # what is made once, and by the second step at the latest
        update(images, labels, 0.3, 1e-3)
    with Reads() as reads:
        for step in range(2):
            window.add(*update(images, labels, 0.4 + 0.1 * step, 1e-3))
    assert reads.found == []
    with reads:
        window.read(0, 0.0)
    assert reads.found  # a log line does, and is seen


def test_the_host_is_two_steps_ahead_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    recorded: list[int] = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking  # or the thread would spin on a core that DALI's work on

        def record(self) -> None:
            self.step = len(recorded)
            recorded.append(self.step)

        def synchronize(self) -> None:
            done.append(self.step)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    ahead = RunAhead(torch.device("cuda", 0))
    for step in range(10):
        ahead.step_is_queued()
        assert recorded == list(range(step + 1))
        assert done == list(range(step - 1))  # never the last two: the GPU does not run dry


def test_on_the_cpu_there_is_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "Event")
    for _ in range(5):
        RunAhead(torch.device("cpu")).step_is_queued()


def test_a_gpu_without_bfloat16_is_refused_on_all_ranks(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where any rank has one."""
    model = create_model(tiny_config.model, num_classes=3, resolution=32)
    optimizer = create_optimizer(model, tiny_config.optim)
    group = Group(0, 2, 0, 2, torch.device("cpu"))
    monkeypatch.setattr("dali_vit.step.gather_objects", lambda value: [value, "Tesla T4, compute capability 7.5"])
    with pytest.raises(UserError, match=r"^Tesla T4, compute capability 7.5: .*--gpus 0 for the CPU$"):
        build_update(tiny_config, model, optimizer, group)
