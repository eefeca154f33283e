"""How a run ends before its last step: by a signal, by the clock, or because a rank hangs."""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dali_vit.distributed import PATIENCE, Group, collective_timeout
from dali_vit.launch import hang_up_is_ignored

HUNG = 70  # EX_SOFTWARE: the watchdog ended the process
_STANDSTILL = 2.0  # seconds: if a thread that only sleeps wakes up this late, the whole process was stopped
_PREPARATION = 600.0  # seconds: settings are tried and kernels compiled, however short a step is
# SIGHUP comes when a terminal is closed; schedulers are often told to send SIGUSR1 before a job's time is over.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(Exception):
    """The run stopped early and can be started again; the message says where it stopped."""


__all__ = ["Interrupted", "Stop", "Watchdog"]


class Stop:
    """Whether the run is to stop after this step: because a signal came, or because its hours are over.

    The first SIGTERM, SIGINT, SIGHUP or SIGUSR1 is remembered; a second one ends the process at once. All ranks agree
    on the step: `agreed` is collective, and on GPUs, where agreeing costs time, the ranks do it only every 10 steps.
    The hours begin with `start_clock`. ends_process: whether the process ends with a run that is stopped: then the
    signals stay handled so until it does, and repeats within a second change no exit code.
    """

    def __init__(
        self, group: Group, max_hours: float | None, hang_timeout: float, *, ends_process: bool = False
    ) -> None:
        self._ends_process = ends_process
        self._seconds, self._deadline = (max_hours or math.inf) * 3600, math.inf
        self._signal: str | None = None
        self._first = 0.0
        self._world_size = group.world_size
        # On the CPU the ranks wait for each other at every step anyway; on GPUs the hosts run ahead.
        self._every = 1 if group.device.type == "cpu" else 10
        self._gloo: Any = None
        if group.world_size > 1:
            self._gloo = dist.new_group(backend="gloo", timeout=collective_timeout(hang_timeout))

    def start_clock(self) -> None:
        """Call it before the first step, but after an evaluation that is made up for: one that takes longer than the
        hours would never end if the clock ran meanwhile."""
        self._deadline = time.monotonic() + self._seconds

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handles the signals while the body runs, even while the main thread is held up outside of Python."""
        # Python runs its handlers in the main thread, which may hang in a read. The wake-up descriptor is written to as
        # the signal arrives, and a thread of our own listens to it.
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        handled = [n for n in _SIGNALS if n != signal.SIGHUP or not hang_up_is_ignored()]
        if signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL:  # it has a meaning of its own here
            handled.remove(signal.SIGUSR1)
        before = {number: signal.signal(number, lambda *_: None) for number in handled}
        descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(receiver, handled), name="signals", daemon=True).start()
        try:
            yield
        finally:
            if self._signal is not None and self._ends_process:
                sender.detach()  # it stays open
            else:
                signal.set_wakeup_fd(descriptor)
                for number, handler in before.items():
                    signal.signal(number, handler)
                sender.close()

    def _listen(self, receiver: socket.socket, handled: Collection[int]) -> None:
        with receiver:
            while received := receiver.recv(1):
                if received[0] not in handled:
                    continue
                # A terminal and a launcher may both pass on one Ctrl-C: repeats within a second count as one.
                if self._signal is not None and time.monotonic() - self._first > 1:
                    os._exit(128 + received[0])
                if self._signal is None:
                    self._first, self._signal = time.monotonic(), signal.Signals(received[0]).name

    def agreed(self, step: int) -> str | None:
        """The `reason` to stop after `step` steps, or None to go on; on GPUs the ranks ask only every 10 steps."""
        return None if step % self._every else self.reason()

    def reason(self) -> str | None:
        """Why the run is to stop, as this rank knows it; None, on all ranks or on none, to go on. Collective."""
        late = time.monotonic() >= self._deadline
        reason = 2 if self._signal else 1 if late else 0
        if self._gloo is not None:
            shared = torch.tensor(reason)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._gloo)
            reason = int(shared)
        return (None, "--max-hours are over", f"stopped by {self._signal or 'a signal to another rank'}")[reason]


class Watchdog:
    """Ends a process that makes no progress, naming the stage it hangs in.

    Ranks that merely wait for a hanging rank are in the stage "step": they are given half as long again, so that the
    hanging rank reports first. What comes before the first step is given ten minutes in any case, and torch.compile may
    search for the fastest kernels, for which it is given six times as long. Time in which the whole process stands
    still (Ctrl-Z, or a scheduler that suspends jobs) does not count.
    """

    def __init__(self, group: Group, seconds: float, stage: str, step: int) -> None:
        self._rank, self._seconds = group.rank, seconds
        self.enter(stage, step)
        self._ended = threading.Event()
        if seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, stage: str, step: int) -> None:
        """Called whenever a stage begins: one of PATIENCE."""
        self._stage, self._step, self._since = stage, step, time.monotonic()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        interval, before = min(1.0, self._seconds / 10), time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - before > interval + _STANDSTILL:
                self._since += now - before
            before = now
            patience = self._seconds * PATIENCE[self._stage]
            if self._stage == "preparation":
                patience = max(patience, _PREPARATION)
            stalled = now - self._since
            if stalled > patience:
                sys.stderr.write(
                    f"dali-vit: rank {self._rank} hangs in the {self._stage} of step {self._step + 1} for"
                    f" {stalled:.0f} s (--hang-timeout {self._seconds:g}); see below where\n"
                )
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(HUNG)
