"""Checkpoints written beside the training: the step waits for a copy of the state, not for the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs one write at a time in a thread of its own.

    A write that fails (a full disk, a folder that became read-only) is reported and given up: what is on the disk
    stays, and training goes on. `close` waits for the last write and raises its error.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def submit(self, write: Callable[..., Path], state: Mapping[str, Any], **arguments: Any) -> None:
        """Calls write(**state, **arguments) later, with the tensors of `state` as they are now."""
        self.wait()
        copied, event = snapshot(state)
        self._pending = self._thread.submit(_write, write, copied, event, arguments)

    def wait(self) -> None:
        """Waits for the write under way, if any, and reports its failure as a warning."""
        try:
            self._finish()
        except OSError as error:
            log.warning("no checkpoint was written (%s); the ones before are untouched, training goes on", error)

    def close(self) -> None:
        """Waits for the last write; OSError if it failed."""
        try:
            self._finish()
        finally:
            self._thread.shutdown()

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def snapshot(state: Any) -> tuple[Any, torch.cuda.Event | None]:
    """A copy of nested dicts and lists whose tensors lie in host memory, and the event that says it is complete.

    From a GPU the copies go into pinned memory, queued behind the work already on the stream: nothing waits here.
    """
    event = None

    def copy(value: Any) -> Any:
        nonlocal event
        if isinstance(value, torch.Tensor):
            if value.device.type != "cuda":
                return value.detach().clone()
            event = event or torch.cuda.Event()
            pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            return pinned.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {key: copy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copy(item) for item in value)
        return value

    copied = copy(state)
    if event is not None:
        event.record()
    return copied, event


def _write(
    write: Callable[..., Path], state: Mapping[str, Any], event: torch.cuda.Event | None, arguments: Mapping[str, Any]
) -> Path:
    if event is not None:
        event.synchronize()
    return write(**state, **arguments)
