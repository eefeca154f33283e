"""torch.compile: whether it works here, and how it is left at the program's end."""

from __future__ import annotations

import atexit
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from dali_vit.config import Config, UserError
from dali_vit.distributed import Group, gather_objects

__all__ = ["compile_fault", "how_to_compile"]

log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds that torch.compile's workers have to end


def how_to_compile(config: Config, group: Group) -> tuple[str, str]:
    """The mode of torch.compile or `off`, and that in words. Collective."""
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
    """What keeps torch.compile from working on a device, in one line, such as a missing C compiler; None if nothing.

    A sum is compiled: a second, or for the first time on a machine half a minute on the CPU.
    """
    atexit.unregister(_limit_compile_workers)
    # Of a machine with CUDA's compiler and no GPU it warns that there is none, which is told elsewhere.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(torch.add)(torch.ones(2, device=device), 1)
    except Exception as error:  # of any of the many things that have to fit together
        # What follows an empty line is advice to torch's developers.
        return " ".join(f"{type(error).__name__}: {error}".split("\n\n")[0].split())
    finally:
        atexit.register(_limit_compile_workers)  # after torch's own, which runs later then
    return None


def _limit_compile_workers() -> None:
    """Has the end of the program wait a few seconds for torch.compile's workers, in place of five minutes.

    The process that forks them may stand still when it is to end (seen with torch 2.11); torch waits 300 s for it.
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
