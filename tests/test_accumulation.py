"""A batch in parts gives the whole batch's gradients; the error of a batch that does not fit in memory has a remedy."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dali_vit.step
from dali_vit import accumulation, cli, memory, plan
from dali_vit.accumulation import next_divisor
from dali_vit.config import Config, LocalUserError, ModelConfig, UserError
from dali_vit.distributed import Group
from dali_vit.model import create_model, kept_bytes_per_image
from dali_vit.optim import create_optimizer
from dali_vit.step import build_update
from dali_vit.validation import validate
from pipelines.probe import LackOfMemory

LAMBDA = 0.7


def gradients(config: Config, cpu: Group, parts: int, monkeypatch) -> tuple[float, list[torch.Tensor], list[int]]:
    """Loss and gradients of a step on random images, one of them without a label; and the sizes of the parts."""
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, grad_accum_steps=parts))
    model = create_model(config.model, num_classes=4, resolution=32, seed=1).double()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))  # zeros would hide the rest
    sizes, found = [], []
    model.patch_embed.register_forward_hook(lambda layer, given, made: sizes.append(len(given[0])))
    monkeypatch.setattr(dali_vit.step, "normalize_and_mix", lambda *given: mixing(*given).double())
    monkeypatch.setattr(
        dali_vit.step, "optimizer_step", lambda *_: found.extend(p.grad for p in model.parameters()) or torch.ones(())
    )
    update, _ = build_update(config, model.train(), create_optimizer(model, config.optim), cpu)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    loss, _ = update(images, torch.tensor([0, 1, 2, 3, -1, 1, 1, 0]), LAMBDA, 1e-3)
    return loss.item(), found, sizes


mixing = dali_vit.step.normalize_and_mix


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_add_up_to_the_whole(parts, label_smoothing, tiny_config, cpu, monkeypatch):
    """In float64, but for the pixels and the logits: equal to a millionth, where a partner of the part would show."""
    optim = dataclasses.replace(tiny_config.optim, label_smoothing=label_smoothing)
    config = dataclasses.replace(tiny_config, optim=optim)
    loss, whole, sizes = gradients(config, cpu, 1, monkeypatch)
    assert sizes == [8]
    in_parts, added_up, sizes = gradients(config, cpu, parts, monkeypatch)
    assert sizes == parts * [8 // parts]
    assert in_parts == pytest.approx(loss, rel=1e-6)
    for one, other in zip(added_up, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item() + 1e-9)


@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_are_exchanged_with_the_last_part_alone(parts):
    held_back, exchanged = [], []

    class Replicas:
        @contextlib.contextmanager
        def no_sync(self):
            held_back.append(1)
            yield
            held_back.pop()

    def step(images, *_):
        exchanged.append(not held_back)
        return images.float().mean() * torch.ones((), requires_grad=True)

    passes = accumulation.forward_and_backward(step, parts, Replicas())
    passes(torch.zeros(8, 2, 2, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), torch.tensor(0.7))
    assert exchanged == [False] * (parts - 1) + [True]


def test_label_smoothing_reaches_the_loss(tiny_config, cpu):
    model = create_model(tiny_config.model, num_classes=4, resolution=32, seed=1).train()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(2))  # of zeros it is log 4 anyway
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    labels, lam = torch.tensor([0, 1, 2, 3, 3, 1, 1, 0]), torch.tensor(LAMBDA)
    config = dataclasses.replace(tiny_config, optim=dataclasses.replace(tiny_config.optim, label_smoothing=0.1))
    update, _ = build_update(config, model, create_optimizer(model, config.optim), cpu)
    smoothed, hard = (dali_vit.step.TrainStep(model, label_smoothing=s)(images, labels, lam).item() for s in (0.1, 0.0))
    assert abs(smoothed - hard) > 1e-3
    assert update(images, labels, LAMBDA, 0.0)[0].item() == pytest.approx(smoothed, rel=1e-6)


@pytest.mark.parametrize(
    ("number", "least", "expected"), [(8, 2, 2), (8, 3, 4), (12, 5, 6), (7, 2, 7), (128, 1, 1), (10, 11, 10)]
)
def test_next_divisor(number, least, expected):
    assert next_divisor(number, least) == expected


def with_parts(config: Config, parts: int, **run: Any) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, grad_accum_steps=parts, **run))


def test_parts_must_divide_the_share_of_a_process(tiny_config):
    with pytest.raises(UserError, match=r"^--grad-accum-steps 3: does not divide a process's 8 images; use 4$"):
        plan.plan(with_parts(tiny_config, 3), 1)
    with pytest.raises(UserError, match=r"^--grad-accum-steps 9: does not divide a process's 4 images; use 4$"):
        plan.plan(with_parts(tiny_config, 9), 2)
    plan.plan(with_parts(tiny_config, 4), 2)
    with pytest.raises(UserError, match="--grad-accum-steps 0: must be at least 1"):
        validate(with_parts(tiny_config, 0))


@pytest.mark.parametrize(
    ("name", "resolution", "parts", "world_size", "flag"),
    [
        ("timm:resnet18", 32, 8, 1, "--grad-accum-steps 8"),
        ("timm:resnet18", 32, 4, 2, "--grad-accum-steps 4"),
        ("timm:resnet18", 32, 1, 8, "--batch-size 8"),
        ("timm:resnet18", 64, 8, 1, None),  # whose last layer has 2 x 2 places
        ("timm:resnet18", 32, 4, 1, None),
        ("mu/16", 64, 8, 1, None),
    ],
)
def test_batch_norm_takes_no_single_image(name, resolution, parts, world_size, flag, tiny_config):
    """Where it is left one place of one image, in training."""
    config = dataclasses.replace(
        with_parts(tiny_config, parts),
        model=ModelConfig(name),
        data=dataclasses.replace(tiny_config.data, resolution=resolution),
    )
    if flag is None:
        plan.plan(config, world_size)
        return
    with pytest.raises(UserError) as raised:
        plan.plan(config, world_size)
    expected = f"{flag}: leaves a process one image at a time, of which {name}'s batch norm has no statistics;"
    assert str(raised.value) == f"{expected} give it two or more"


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_do_not_go_with_parts(mode, tiny_config):
    validate(with_parts(tiny_config, 1, compile=mode))
    with pytest.raises(UserError, match=f"--compile {mode}: its CUDA graphs do not go with --grad-accum-steps"):
        validate(with_parts(tiny_config, 2, compile=mode))


class Full(dali_vit.step.TrainStep):
    """Memory holds two images at once, for the first `steps` more."""

    steps = 0

    def forward(self, images: torch.Tensor, *arguments: Any) -> torch.Tensor:
        Full.steps -= 1
        if len(images) > 2 and Full.steps < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().forward(images, *arguments)


@pytest.fixture
def full(monkeypatch):
    monkeypatch.setattr(dali_vit.step, "TrainStep", Full)
    monkeypatch.setattr(Full, "steps", 0)


def trained(config: Config, cpu: Group, steps: int) -> None:
    model = create_model(config.model, num_classes=4, resolution=32)
    update, _ = build_update(config, model.train(), create_optimizer(model, config.optim), cpu)
    for _ in range(steps):
        update(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), 1.0, 1e-3)


def test_a_batch_that_memory_does_not_hold_is_named_with_the_next_number_of_parts(full, tiny_config, cpu):
    message = "--batch-size 8: memory does not hold {} images at once; give {}a smaller batch or more GPUs"
    for parts, images, remedy in [(1, 8, "--grad-accum-steps 2, "), (2, 4, "--grad-accum-steps 4, ")]:
        with pytest.raises(LocalUserError) as raised:
            trained(with_parts(tiny_config, parts), cpu, 1)
        assert str(raised.value) == message.format(images, remedy)
    trained(with_parts(tiny_config, 4), cpu, 1)


def test_a_batch_that_the_loader_has_no_memory_for_is_named_alike(tiny_config, cpu):
    def load() -> None:
        raise LackOfMemory("CUDA allocation failed")

    guarded = memory.oom_as_user_error(load, tiny_config, cpu)
    for _ in range(10):
        with pytest.raises(LocalUserError, match="--batch-size 8: memory does not hold 8 images being loaded beside 8"):
            guarded()
    with pytest.raises(LackOfMemory):
        guarded()


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12",
    ],
)
def test_a_lack_of_memory_has_many_names(said, tiny_config, cpu):
    def fail(error: str) -> None:
        raise RuntimeError(error)

    guarded = memory.oom_as_user_error(fail, tiny_config, cpu)
    with pytest.raises(LocalUserError, match="--batch-size 8: memory does not hold 8 images at once"):
        guarded(said)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        guarded("CUDA error: an illegal memory access was encountered")


def test_what_was_held_for_long_is_no_mistake_of_the_user(full, tiny_config, cpu):
    """The launcher then starts again from the last checkpoint, which it does not after a mistake."""
    Full.steps = 9
    with pytest.raises(LocalUserError):
        trained(tiny_config, cpu, 10)
    Full.steps = 10
    with pytest.raises(torch.OutOfMemoryError):
        trained(tiny_config, cpu, 11)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_each_rank_says_for_itself_what_its_memory_does_not_hold(rank, monkeypatch, capsys):
    def fail(argv: list[str]) -> int:
        raise LocalUserError("--batch-size 8: the memory of GPU 1 does not hold it")

    monkeypatch.setattr(cli, "_dispatch", fail)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "dali-vit: --batch-size 8: the memory of GPU 1 does not hold it\n"


def test_a_step_on_the_cpu_that_takes_more_memory_than_there_is_is_warned_of(tiny_config, cpu, monkeypatch, caplog):
    model = create_model(tiny_config.model, num_classes=4, resolution=32)
    needed = 8 * kept_bytes_per_image(model, 32)
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    memory.warn_of_memory(model, tiny_config, cpu)
    assert caplog.text == ""
    monkeypatch.setattr(memory, "available_memory", lambda: needed / 3)
    memory.warn_of_memory(model, tiny_config, cpu)
    (record,) = caplog.records
    assert "a step of 8 images takes about" in record.getMessage()
    assert "give --grad-accum-steps 4 or a smaller --batch-size" in record.getMessage()
    caplog.clear()
    memory.warn_of_memory(model, with_parts(tiny_config, 4), cpu)
    assert caplog.text == ""


def test_other_processes_on_a_gpu_are_warned_of_and_what_cuda_takes_is_not(tiny_config, cpu, monkeypatch, caplog):
    group = dataclasses.replace(cpu, device=torch.device("cuda", 1))
    model = create_model(tiny_config.model, num_classes=4, resolution=32)
    gib = 2**30
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H", total_memory=80 * gib))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((80 - 2 * device.index) * gib, 80 * gib))
    memory.warn_of_others(group)
    assert caplog.text == ""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (17 * gib, 80 * gib))
    memory.warn_of_memory(model, tiny_config, group)  # of the CPU's
    memory.warn_of_others(group)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the memory of GPU 1 (H, 80 GiB) is used by other processes, which hold 63.0 GiB: expect low rates or too"
        " little memory; nvidia-smi names them"
    )


def test_a_run_may_go_on_with_another_number_of_parts(tiny_config):
    from dali_vit.config import differences

    assert differences(tiny_config, with_parts(tiny_config, 4)) == []


def test_memory_is_that_of_all_processes_of_a_machine_and_of_a_part_of_a_batch(tiny_config, cpu, monkeypatch, caplog):
    model = create_model(tiny_config.model, num_classes=4, resolution=32)
    image = kept_bytes_per_image(model, 32)
    two = dataclasses.replace(cpu, world_size=2, local_world_size=2)
    monkeypatch.setattr(memory, "available_memory", lambda: 7 * image)
    memory.warn_of_memory(model, tiny_config, two)  # 4 images each
    assert "a step of 8 images takes about" in caplog.text
    caplog.clear()
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * image)
    memory.warn_of_memory(model, with_parts(tiny_config, 2), cpu)  # 4 at a time
    assert "give --grad-accum-steps 4 or" in caplog.text


@pytest.mark.parametrize(
    ("ranks", "parts", "error", "told"),
    [
        (2, 1, "CUDA error: out of memory", "4 images at once; give --grad-accum-steps 2, a"),
        (2, 4, "CUDA error: out of memory", "1 image at once; give a"),
        (1, 8, "CUDA error: out of memory", "1 image at once; give a"),
        (1, 2, None, "8 images being loaded beside 4 being trained on; give --grad-accum-steps 4, a"),
        (2, 2, None, "4 images being loaded beside 2 being trained on; give --grad-accum-steps 4, a"),
    ],
)
def test_what_memory_does_not_hold_is_a_processs_share_in_parts(ranks, parts, error, told, tiny_config, cpu):
    def fail() -> None:
        raise LackOfMemory("DALI's") if error is None else RuntimeError(error)

    group = dataclasses.replace(cpu, world_size=ranks)
    guarded = memory.oom_as_user_error(fail, with_parts(tiny_config, parts), group)
    with pytest.raises(LocalUserError) as refused:
        guarded()
    assert str(refused.value) == f"--batch-size 8: memory does not hold {told} smaller batch or more GPUs"


def test_memory_is_that_of_one_of_several_machines_and_told_of_once(tiny_config, cpu, monkeypatch, caplog):
    model = create_model(tiny_config.model, num_classes=4, resolution=32)
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    two_machines = dataclasses.replace(cpu, world_size=4, local_world_size=2)
    memory.warn_of_memory(model, tiny_config, dataclasses.replace(two_machines, rank=1))
    assert caplog.text == ""
    memory.warn_of_memory(model, tiny_config, two_machines)
    assert "a step of 4 images takes about" in caplog.text
