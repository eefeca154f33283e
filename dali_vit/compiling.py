"""torch.compile: whether it works on this machine, and how its worker processes are ended at the program's end."""

from __future__ import annotations

import atexit
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from dali_vit.config import Config, LocalUserError, UserError
from dali_vit.distributed import Group, gather_objects
from dali_vit.memory import is_lack_of_memory

__all__ = ["compile_failure_as_user_error", "compile_fault", "how_to_compile", "on_one_line"]

log = logging.getLogger(__name__)

# Triton 3.9 warns that its default, which is wanted here, will change one day.
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION is unset")

# Each process would warn of a mark for the profiler that DistributedDataParallel sets.
logging.getLogger("torch._dynamo.variables.ctx_manager").addFilter(
    lambda record: "Profiler record function" not in record.getMessage()
)

_PATIENCE = 5.0  # seconds that torch.compile's workers are given to end


def how_to_compile(config: Config, group: Group) -> tuple[str, str]:
    """The mode of torch.compile or `off`, and a description of it for the run's summary. Collective."""
    wanted = config.run.compile
    if wanted == "off":
        return "off", "off (--compile off)"
    if wanted == "auto" and group.device.type != "cuda":
        return "off", "off (on the CPU it takes longer than it saves; --compile default switches it on)"
    fault = next(filter(None, gather_objects(compile_fault(group.device))), None)
    if fault is None:
        mode = "default" if wanted == "auto" else wanted
        return mode, f"torch.compile, {mode} mode, for which the first step waits"
    if wanted != "auto":
        raise UserError(f"--compile {wanted}: torch.compile fails here ({fault}); mend that, or give --compile off")
    if group.is_main:
        log.warning("torch.compile fails here (%s): training goes without it, several times slower on a GPU", fault)
    return "off", "off (torch.compile fails here)"


def compile_fault(device: torch.device) -> str | None:
    """Why torch.compile does not work on a device, in one line, such as a missing C compiler; None if it works.

    A sum is compiled, which takes a second; for the first time on a machine, half a minute on the CPU.
    """
    atexit.unregister(_limit_compile_workers)
    # On a machine with CUDA's compiler but no GPU, torch would warn of the missing GPU, which is reported elsewhere.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(torch.add)(torch.ones(2, device=device), 1)
    except Exception as error:  # torch.compile needs many things that fit together, each of which may fail
        return on_one_line(error)
    finally:
        atexit.register(_limit_compile_workers)  # registered after torch's own, it runs before it
    return None


def compile_failure_as_user_error(work: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """Wraps `work`, a compiled training step: LocalUserError where it cannot be compiled, though a sum can."""

    def guarded(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except TorchDynamoException as error:
            if is_lack_of_memory(error):  # late in a run, when a restart may help
                raise
            raise LocalUserError(
                f"--compile {config.run.compile}: torch cannot compile the training step here ({on_one_line(error)});"
                " give another mode, or --compile off, which is several times slower on a GPU"
            ) from error

    return guarded


def on_one_line(error: Exception) -> str:
    """An error by its type and message, without what follows an empty line: advice to torch's developers."""
    return " ".join(f"{type(error).__name__}: {error}".split("\n\n")[0].split())


def _limit_compile_workers() -> None:
    """Makes the program wait at its end for torch.compile's workers a few seconds instead of five minutes.

    The process that forks the workers may hang when told to end (seen with torch 2.11); torch waits 300 s for it.
    """
    compiler = sys.modules.get("torch._inductor.async_compile")
    for pool in getattr(compiler, "_pool_set", ()):
        process = getattr(pool, "process", None)
        if isinstance(process, subprocess.Popen):
            process.wait = partial(_wait_or_kill, process.wait, process.kill)  # type: ignore[method-assign]


def _wait_or_kill(wait: Callable[..., int], kill: Callable[[], None], timeout: float | None = None) -> int:
    try:
        return wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        kill()
        return wait()
