"""Writes checkpoints in the background: training waits for a copy of the state, not for the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

log = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs one write at a time in a thread of its own.

    A write that fails (a full disk, a folder that became read-only) is reported and given up: earlier checkpoints stay
    on the disk, and training goes on. `close` waits for the last write and raises its error. The host copies of the
    state are kept and overwritten by the next ones, as pinning host memory takes longer than filling it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[Any]] = []
        self._copies: Any = None

    def submit(self, write: Callable[..., Any], state: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        """Calls write(**state, **arguments) later, with the tensors of `state` as they are now.

        With a state, first waits for the write under way, whose copies would be overwritten.
        """
        event = None
        if state is not None:
            self.wait()
            self._copies, event = snapshot(state, self._copies)
        given = {} if state is None else self._copies
        self._pending.append(self._thread.submit(_write, write, given, event, arguments))

    def wait(self) -> None:
        """Waits for the write under way, if any, and reports its failure as a warning."""
        try:
            self._finish()
        except OSError as error:
            log.warning(
                "a checkpoint was not written in full (%s); the ones before are untouched, training goes on", error
            )

    def close(self) -> None:
        """Waits for the last write; OSError if it failed."""
        try:
            self._finish()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the last write, even if the block was left by an error."""
        self.wait()
        self._thread.shutdown()

    def _finish(self) -> None:
        pending, self._pending = self._pending, []
        wait(pending)  # all of them, as the first that failed raises
        for write in pending:
            write.result()


def snapshot(state: Any, before: Any = None) -> tuple[Any, torch.cuda.Event | None]:
    """A copy of nested dicts and lists with its tensors in host memory, and the CUDA event after which it is complete.

    `before` is an earlier copy that is no longer needed: its tensors are overwritten where they fit. Copies from a GPU
    go into pinned memory and are queued on the training stream: the host does not wait, and the next update of the
    weights, queued behind them, cannot overtake them. (On a stream of their own, the update would have to wait for them
    all the same; they take some ten milliseconds.) Without tensors on a GPU the event is None.
    """
    event = None

    def copy(value: Any, old: Any) -> Any:
        nonlocal event
        if isinstance(value, torch.Tensor):
            on_gpu = value.device.type == "cuda"
            if on_gpu:
                event = event or torch.cuda.Event()
            if not _fits(old, value):
                old = torch.empty(value.shape, dtype=value.dtype, pin_memory=on_gpu)
            return old.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            known = old if isinstance(old, Mapping) else {}
            return {key: copy(item, known.get(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            items = old if isinstance(old, list | tuple) and len(old) == len(value) else [None] * len(value)
            return type(value)(copy(item, i) for item, i in zip(value, items, strict=True))
        return value

    copied = copy(state, before)
    if event is not None:
        event.record()
    return copied, event


def _fits(old: Any, value: torch.Tensor) -> bool:
    return (
        isinstance(old, torch.Tensor)
        and old.shape == value.shape
        and old.dtype == value.dtype
        and old.is_pinned() == (value.device.type == "cuda")
    )


def _write(
    write: Callable[..., Any], state: Mapping[str, Any], event: torch.cuda.Event | None, arguments: Mapping[str, Any]
) -> None:
    if event is not None:
        event.synchronize()
    write(**state, **arguments)
