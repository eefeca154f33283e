"""The choice among attention kernels, as far as a CPU can test it; tests/gpu measures them."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

import dali_vit.step
from dali_vit import attention
from dali_vit.attention import TORCH_DEFAULT, Attention, Shape, choose, choose_attention, shape_of
from dali_vit.config import Config, LocalUserError, ModelConfig, OptimConfig, RunConfig, UserError
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
    for other in ("resnet18", "vit_base_patch16_xp_224", "vit_small_patch16_18x2_224"):
        model = create_model(ModelConfig(model=f"timm:{other}"), num_classes=10, resolution=224)
        assert shape_of(model, 128) is None
        assert choose_attention("auto", model, 128, GPU, compiled=True).kernel == TORCH_DEFAULT


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


def measured(monkeypatch: pytest.MonkeyPatch, times: dict[str, float], **faults: str) -> list[tuple[Shape, list[str]]]:
    """Has kernels take so long, or fail; what is then asked to be measured."""
    asked: list[tuple[Shape, list[str]]] = []
    monkeypatch.setattr(
        attention, "measure", lambda shape, device, names: asked.append((shape, names)) or (times, faults)
    )
    return asked


def test_the_fastest_comes_first_and_the_others_stay_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, {"flash": 1.25, "cudnn": 1.0})
    before = _cur_sdpa_kernel_backends(with_priority=True)
    context, kernel, words, packed = choose_attention("auto", vit(), 64, GPU, compiled=True)
    assert asked == [(Shape(64, 196, 3, 64), ["flash", "cudnn", "efficient", "packed"])]
    assert kernel == "cudnn"
    assert words == "cudnn (flash 1.25 ms, cudnn 1.00 ms a layer)"
    assert packed is None
    for _ in range(2):  # one for every step
        with context():
            order = _cur_sdpa_kernel_backends(with_priority=True)
            assert order[0] == SDPBackend.CUDNN_ATTENTION
            assert set(order) == {*attention.BACKENDS.values(), SDPBackend.MATH}
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_the_packed_kernels_are_tried_in_a_compiled_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, {"flash": 1.0, "packed": 0.5})
    chosen = choose_attention("auto", vit(), 64, GPU, compiled=True)
    assert (chosen.kernel, chosen.words) == ("packed", "packed (flash 1.00 ms, packed 0.50 ms a layer)")
    assert chosen.packed is not None
    assert chosen.packed.__name__ == "PackedAttention"
    choose_attention("auto", vit(), 64, GPU, compiled=False)
    timm = create_model(ModelConfig("timm:vit_tiny_patch16_224"), num_classes=10, resolution=224)
    choose_attention("auto", timm, 64, GPU, compiled=True)
    assert [names for _, names in asked] == [
        [*attention.BACKENDS, "packed"],
        [*attention.BACKENDS],
        [*attention.BACKENDS],
    ]


def test_a_packed_kernel_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    measured(monkeypatch, {"flash": 1.0}, cudnn="not built", packed="OutOfResources: shared memory")
    with caplog.at_level(logging.WARNING):
        assert choose_attention("auto", vit(), 64, GPU, compiled=True).kernel == "flash"
    assert [record.getMessage() for record in caplog.records] == [
        "the packed attention is not used, as it fails here (OutOfResources: shared memory)"
    ]


def test_a_kernel_that_breaks_the_use_of_the_gpu_ends_the_run_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes after it would fail, with a traceback: CUDA's errors stay where a kernel writes as it must not."""
    broken: list[str] = []

    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access")

    def synchronize(device: torch.device) -> None:
        if broken:
            fail()

    monkeypatch.setattr(attention, "_check_packed", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    shape = Shape(64, 196, 3, 64)
    assert attention.measure(shape, GPU.device, ["packed"])[1] == {
        "packed": "RuntimeError: CUDA error: an illegal memory access"
    }
    broken.append("by the first kernel")
    with pytest.raises(
        LocalUserError, match=r"^--attention packed: .*illegal memory access.* such as --attention flash$"
    ):
        attention.measure(shape, GPU.device, ["packed"])


def test_a_kernel_that_is_asked_for_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, {"efficient": 3.0})
    assert choose_attention("efficient", vit(), 64, GPU, compiled=False).kernel == "efficient"
    assert [names for _, names in asked] == [["efficient"]]
    measured(monkeypatch, {}, cudnn="RuntimeError: not built")
    timm = create_model(ModelConfig("timm:vit_tiny_patch16_224"), num_classes=10, resolution=224)
    for wanted, model, group, message in (
        ("cudnn", vit(), GPU, "--attention cudnn: it does not run here (RuntimeError: not built); leave it out"),
        ("packed", vit(), GPU, "--attention packed: needs a step that is compiled; see --compile"),
        ("packed", timm, GPU, "--attention packed: is for models of the form VARIANT/PATCH alone; leave it out"),
        ("flash", vit(), CPU, "--attention flash: only plain ViTs on GPUs have this choice; leave it out"),
    ):
        with pytest.raises(UserError) as raised:
            choose_attention(wanted, model, 64, group, compiled=False)  # type: ignore[arg-type]
        assert str(raised.value) == message


def test_every_rank_tries_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The times are rank 0's, of the kernels that run on all; torch's first use of attention must not come later."""
    asked = measured(monkeypatch, {"cudnn": 1.0, "flash": 2.0, "efficient": 0.5}, packed="no room")
    first = {"cudnn": 2.0, "flash": 1.0, "packed": 0.1}, {"efficient": "not built"}
    monkeypatch.setattr(attention, "gather_objects", lambda value: [first, value])
    found = choose_attention("auto", vit(), 64, Group(1, 2, 1, 2, torch.device("cuda", 1)), compiled=True)
    assert [shape for shape, _ in asked] == [Shape(64, 196, 3, 64)]
    assert (found.kernel, found.words) == ("flash", "flash (cudnn 2.00 ms, flash 1.00 ms a layer)")


def test_torchs_own_choice_stays_on_a_cpu_and_where_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert choose_attention("auto", vit(), 64, CPU, compiled=True).words == "torch's choice"
    assert not caplog.records
    monkeypatch.setattr(attention, "_milliseconds", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    context, _, words, _ = choose_attention("auto", vit(), 64, GPU, compiled=False)
    assert words == TORCH_DEFAULT
    assert caplog.messages == ["none of flash, cudnn, efficient runs here: attention is torch's plain one"]
    other = Group(1, 2, 1, 2, GPU.device)
    assert choose_attention("auto", vit(), 64, other, compiled=False).words == TORCH_DEFAULT
    assert len(caplog.messages) == 1  # by rank 0
    with context():
        pass


def test_what_the_packed_kernels_are_not_made_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(attention, "_check_packed", lambda *_: None)
    monkeypatch.setattr(attention, "_milliseconds", lambda *_: 1.0)
    for shape in (Shape(64, 257, 6, 64), Shape(64, 196, 6, 80), Shape(64, 196, 3, 128)):
        assert attention.measure(shape, CPU.device, ["flash", "packed"]) == ({"flash": 1.0}, {})
        reason = "it is for at most 256 tokens, and heads of 16, 32 or 64"
        assert attention.measure(shape, CPU.device, ["packed"])[1] == {"packed": reason}
    for shape in (Shape(64, 256, 6, 64), Shape(64, 4, 2, 16)):
        assert set(attention.measure(shape, CPU.device, ["packed"])[0]) == {"packed"}


@pytest.mark.parametrize(("factor", "percent"), [(1.05, "5.0"), (float("nan"), "nan")])
@pytest.mark.parametrize(("wrong", "what"), [(None, ""), (0, "output"), (1, "gradient"), (2, "gradient of the bias")])
def test_packed_kernels_that_compute_something_else_are_left_out(
    wrong: int | None, what: str, factor: float, percent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twentieth off, where rounding to bfloat16 is a few thousandths."""
    shape = Shape(64, 196, 3, 64)

    def packed(qkv: torch.Tensor, upstream: torch.Tensor, shape: Shape, *, compiled: bool) -> object:
        assert compiled  # as in a step
        out, gradient = attention._torchs(qkv, upstream, shape)()
        results = [out.flatten(2), gradient.flatten(2), gradient.float().sum((0, 1)).flatten()]
        if wrong is not None:
            results[wrong] = results[wrong] * factor
        return lambda: tuple(results)

    monkeypatch.setattr(attention, "_packed", packed)
    if wrong is None:
        attention._check_packed(shape, CPU.device)
        return
    with pytest.raises(RuntimeError, match=f"the {what} it gives differs from torch's by {percent} %"):
        attention._check_packed(shape, CPU.device)


@pytest.mark.parametrize(("kernel", "told"), [("flash", "flash (1.00 ms a layer)"), (TORCH_DEFAULT, None)])
def test_a_run_tells_the_kernel_that_was_chosen(kernel: str, told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without attention has none to tell of."""
    chosen = Attention(nullcontext, kernel, told or kernel)
    monkeypatch.setattr(dali_vit.step, "choose_attention", lambda *_, **__: chosen)
    config = Config(model=ModelConfig(model="mu/16"), optim=OptimConfig(batch_size=4), run=RunConfig(compile="off"))
    model = create_model(config.model, num_classes=10, resolution=64)
    _, how = dali_vit.step.build_update(config, model, create_optimizer(model, config.optim), CPU)
    assert how.get("attention") == told


def test_the_kernel_is_chosen_for_a_part_of_a_processs_share_and_given_to_every_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Packed(torch.autograd.Function):
        pass

    asked: list[tuple[Any, ...]] = []

    def choose(wanted: str, model: Any, images: int, group: Group, *, compiled: bool) -> Attention:
        asked.append((wanted, images, compiled))
        return Attention(nullcontext, "packed", "packed", Packed)

    monkeypatch.setattr(dali_vit.step, "choose_attention", choose)
    monkeypatch.setattr(dali_vit.step, "SharedLoss", lambda step, device: step)
    monkeypatch.setattr(dali_vit.step, "DistributedDataParallel", lambda step, **_: step)
    monkeypatch.setattr(dali_vit.step, "forward_and_backward", lambda *_: None)
    run = RunConfig(compile="off", grad_accum_steps=2)
    config = Config(model=ModelConfig(model="mu/16"), optim=OptimConfig(batch_size=24), run=run)
    model = create_model(config.model, num_classes=10, resolution=64)
    dali_vit.step.build_update(config, model, create_optimizer(model, config.optim), Group(0, 3, 0, 3, CPU.device))
    assert asked == [("auto", 24 // 3 // 2, False)]
    assert {block.packed for block in model.blocks} == {Packed}  # type: ignore[union-attr, operator]


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
        monkeypatch.setattr(dali_vit.step, "choose_attention", lambda *_, **__: asked_for)
        torch.compiler.reset()  # like a new process
        model = create_model(config.model, num_classes=10, resolution=64)
        update, _ = dali_vit.step.build_update(config, model, create_optimizer(model, config.optim), CPU)
        update(images, labels, 0.7, 1e-3)  # compiles, and to find shapes calls all that it compiles
        with torch.profiler.profile() as profile:
            update(images, labels, 0.7, 1e-3)
        return any("flash" in event.key for event in profile.key_averages())

    assert not runs_flash("math", SDPBackend.MATH)
    assert runs_flash("flash", SDPBackend.FLASH_ATTENTION)
