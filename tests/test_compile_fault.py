"""A torch.compile that does not work is found before the first step, told in a line, and done without if it may be."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dali_vit import compiling
from dali_vit.config import Config, LocalUserError, UserError
from dali_vit.distributed import Group
from dali_vit.model import create_model
from dali_vit.optim import create_optimizer
from dali_vit.step import build_update
from tests.conftest import TINY, environment
from tests.processes import dali_vit

pytestmark = pytest.mark.timeout(120)

GPU = Group(0, 1, 0, 1, torch.device("cuda", 0))


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """Forgets what was compiled before and in the block."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def with_mode(config: Config, mode: str) -> Config:
    return replace(config, run=replace(config.run, compile=mode))


def test_it_works_here() -> None:
    assert compiling.compile_fault(torch.device("cpu")) is None


def test_a_missing_compiler_is_named_before_anything_is_trained(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    arguments = ["--data", image_folder, "--runs-dir", tmp_path, "--gpus", "0", *TINY, "--steps", "4"]
    result = dali_vit("train", *arguments, "--compile", "default", anew=True)
    assert result.returncode == 2, result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("dali-vit: --compile default: torch.compile fails here (InductorError: InvalidCxxCompiler:")
    assert str(tmp_path / "none") in line
    assert line.endswith("; mend that, or give --compile off")
    assert "Traceback" not in result.stderr
    assert "step" not in result.stdout


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_what_was_asked_for_is_not_replaced(mode: str, tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compile_fault", lambda device: "no compiler")
    with pytest.raises(UserError, match=rf"^--compile {mode}: torch.compile fails here \(no compiler\)"):
        compiling.how_to_compile(with_mode(tiny_config, mode), GPU)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_where_it_works_the_mode_is_the_one_that_was_asked_for(
    mode: str, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "compile_fault", lambda device: None)
    described = f"torch.compile, {mode} mode, for which the first step waits"
    assert compiling.how_to_compile(with_mode(tiny_config, mode), GPU) == (mode, described)


def test_by_default_training_goes_without_and_says_so(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr(compiling, "compile_fault", lambda device: asked.append(device) or "no compiler")
    with caplog.at_level(logging.WARNING):
        assert compiling.how_to_compile(with_mode(tiny_config, "auto"), GPU) == (
            "off",
            "off (torch.compile fails here)",
        )
    assert asked == [GPU.device]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "torch.compile fails here (no compiler)"
    ]


def test_all_ranks_do_as_the_one_where_it_fails(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "compile_fault", lambda device: None)
    assert compiling.how_to_compile(with_mode(tiny_config, "auto"), GPU)[0] == "default"
    monkeypatch.setattr(compiling, "gather_objects", lambda fault: [fault, "no room", None])
    with caplog.at_level(logging.WARNING):
        assert compiling.how_to_compile(with_mode(tiny_config, "auto"), replace(GPU, rank=1, world_size=3))[0] == "off"
        assert not caplog.records  # rank 0 says it
        assert compiling.how_to_compile(with_mode(tiny_config, "auto"), replace(GPU, world_size=3))[0] == "off"
    assert len(caplog.records) == 1


def test_the_reason_is_one_line_without_advice_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler\nin sight\n\nSet SOME_VARIABLE=1 for more")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    assert compiling.compile_fault(torch.device("cpu")) == "RuntimeError: no compiler in sight"


def test_without_compilation_nothing_is_tried(tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compile_fault", lambda device: pytest.fail("it was"))
    assert compiling.how_to_compile(with_mode(tiny_config, "off"), GPU)[0] == "off"
    assert compiling.how_to_compile(with_mode(tiny_config, "auto"), cpu)[0] == "off"


@pytest.mark.parametrize("ending", ["", "cli.main = lambda: sys.exit(0)\ncli.run()"])
def test_workers_of_the_compiler_that_do_not_end_are_not_waited_for(ending: str) -> None:
    """The process that forks them stands still, as it now and then does by itself; torch would wait for 5 minutes."""
    program = f"""
import os, signal, sys, time, torch
from dali_vit import cli, compiling
assert compiling.compile_fault(torch.device("cpu")) is None
from torch._inductor.async_compile import AsyncCompile, _pool_set
pool = AsyncCompile.process_pool()
assert pool in _pool_set
os.kill(pool.process.pid, signal.SIGSTOP)
print(pool.process.pid, time.monotonic(), flush=True)
{ending}"""
    started = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=100, check=False
    )
    ended = time.monotonic()
    assert started.returncode == 0, started.stderr
    pid, stopped = started.stdout.split()
    assert compiling._PATIENCE < ended - float(stopped) < compiling._PATIENCE + 15
    assert not Path("/proc", pid).exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "no such layout\n\nSet TORCHDYNAMO_VERBOSE=1",
            r"^--compile default: torch cannot compile the training step here \(BackendCompilerFailed:.* layout\);"
            " give another mode, or --compile off, which is several times slower on a GPU$",
        ),
        (  # as of a kernel that is loaded where all activations are kept
            "No valid triton configs. OutOfMemoryError: CUDA out of memory.",
            "^--batch-size 8: memory does not hold 8 images at once; give --grad-accum-steps 2, ",
        ),
    ],
)
def test_a_step_that_cannot_be_compiled_is_told_of_with_what_helps(
    said: str, told: str, tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though a sum can: the launcher would start again, to the same end, where it takes that for a crash."""

    def fail(*_: object) -> None:
        raise RuntimeError(said)

    config = with_mode(tiny_config, "default")
    model = create_model(config.model, num_classes=4, resolution=32)
    monkeypatch.setattr(compiling, "compile_fault", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda step, mode: torch._dynamo.optimize(fail)(step))
    update, _ = build_update(config, model.train(), create_optimizer(model, config.optim), cpu)
    with compiling_anew(), pytest.raises(LocalUserError, match=told):
        update(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), 1.0, 1e-3)


def test_a_lack_of_memory_late_in_a_run_is_no_failed_compilation(tiny_config: Config) -> None:
    """The launcher then starts again from the last checkpoint."""

    def fail(text: str) -> None:
        raise torch._dynamo.exc.TorchDynamoException(text)

    guarded = compiling.compile_failure_as_user_error(fail, tiny_config)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        guarded("CUDA out of memory")
    with pytest.raises(LocalUserError):
        guarded("no such layout")


def test_a_mark_for_the_profiler_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """torch would, in every process of a run whose DistributedDataParallel is compiled; of other things it is to."""

    def add(x: torch.Tensor) -> torch.Tensor:
        with torch.profiler.record_function("DistributedDataParallel.forward"):
            return x + 1

    torch._logging._internal.warning_once.cache_clear()  # another test may have had it warn
    with compiling_anew():
        assert torch.compile(add, backend="eager")(torch.ones(2)).tolist() == [2, 2]
    logging.getLogger("torch._dynamo.variables.ctx_manager").warning("another")
    assert [record.getMessage() for record in caplog.records if "dynamo" in record.name] == ["another"]
