"""How fast a step repeats: warmed up, then timed in windows of about a second, the same way on every device."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dali_vit.distributed import Group, gather_objects
from dali_vit.environment import usable_cores
from dali_vit.metrics import StepTimer

WARMUP_STEPS = 5  # compilation and DDP need two steps, a loader's queue as many as it is deep
WINDOW_SECONDS = 1.0
WINDOW_STEPS = 5
_SLOW_STEP_SECONDS = 5.0


def busy_cores(seconds: float = 0.5, stat: Path = Path("/proc/stat")) -> float:
    """How many of the cores that this process may use are busy while it sleeps; 0 where the system does not tell.
    Source: proc_stat(5)."""
    cores = {f"cpu{number}" for number in usable_cores()}

    def ticks() -> np.ndarray:
        lines = [line.split() for line in stat.read_text(encoding="utf-8").splitlines()]
        # user, nice, system, idle, iowait, irq, softirq and steal; what guests take is in user already.
        return np.array([row[1:9] for row in lines if row[:1] and row[0] in cores], np.int64).sum(axis=0)

    try:
        before = ticks()
        time.sleep(seconds)
        passed = ticks() - before
        return len(cores) * (1.0 - float(passed[3:5].sum() / passed.sum())) if passed.sum() > 0 else 0.0
    except (OSError, ValueError, IndexError):  # as in containers that number their cores anew
        return 0.0


@dataclass(frozen=True)
class Measurement:
    """The windows of one measurement; a window lasts as long as on the slowest rank, as ranks train in step."""

    window_seconds: tuple[float, ...]
    window_images: int
    """Images in each window, over all ranks."""
    worst_batch_ms: float
    """The longest step of any window on any rank."""
    wait_fraction: float
    """Share of the time that the rank with the longest wait waits for data; the other ranks wait for that rank."""

    @property
    def rates(self) -> np.ndarray:
        """Images per second of each window, over all ranks."""
        return self.window_images / np.array(self.window_seconds)

    @property
    def images_per_sec(self) -> float:
        return float(np.median(self.rates))

    def to_json(self) -> dict[str, Any]:
        """Rates in images/s over all ranks: the median over the windows, its extremes and the interquartile range."""
        low, high = np.percentile(self.rates, [25, 75])
        return {
            "images_per_sec": self.images_per_sec,
            "min": float(self.rates.min()),
            "max": float(self.rates.max()),
            "spread": float(high - low),
            "worst_batch_ms": self.worst_batch_ms,
            "windows": self.rates.tolist(),
            "window_images": self.window_images,
        }


def measure(step: Callable[[], object], timer: StepTimer, *, images: int, seconds: float, group: Group) -> Measurement:
    """Repeats a step until windows of at least `seconds` in all are measured.

    The windows follow one another, as many as should be needed, and nothing between them waits for the device. During
    such a wait, a loader that works ahead would finish a batch, free of charge to the next window, and begin no other.

    images is the number per step over all ranks. A step that fetches data does so within `timer.waiting()` if its data
    wait is to be measured. Collective: every rank takes the same number of steps.
    """
    warm_up(step, group)
    steps = WINDOW_STEPS
    while (took := max(sum(durations) for durations, _ in _repeat(step, timer, steps))) < WINDOW_SECONDS:
        steps *= 2
    expected = took / steps  # seconds of one step
    steps = max(WINDOW_STEPS, math.ceil(steps * WINDOW_SECONDS / took))

    lengths: list[float] = []
    worst = waited = total = 0.0
    while sum(lengths) < seconds:
        count = math.ceil((seconds - sum(lengths)) / (steps * expected))
        ranks = _repeat(step, timer, count * steps)
        for first in range(0, count * steps, steps):
            lengths.append(max(sum(durations[first : first + steps]) for durations, _ in ranks))
        worst = max(worst, *(max(durations) for durations, _ in ranks))
        waited += max(wait for _, wait in ranks)
        total += max(sum(durations) for durations, _ in ranks)
    return Measurement(tuple(lengths), steps * images, 1e3 * worst, waited / total)


def warm_up(step: Callable[[], object], group: Group) -> None:
    """Runs the first steps, which compile and fill queues; gives a hint if steps are so slow that one would give up."""
    for number in range(WARMUP_STEPS):
        began = time.perf_counter()
        step()
        took = time.perf_counter() - began
        if number == 2 and took > _SLOW_STEP_SECONDS and group.is_main:
            print(f"a step takes {took:.0f} s: a smaller --batch-size answers sooner", file=sys.stderr)


def _repeat(step: Callable[[], object], timer: StepTimer, steps: int) -> list[tuple[list[float], float]]:
    """Seconds of each step and the seconds of data wait, for each rank; it synchronises only at both ends."""
    timer.reset()
    marks = [_mark(timer.device)]
    for _ in range(steps):
        step()
        marks.append(_mark(timer.device))
    _, _, waited = timer.read()
    return gather_objects(([_seconds(a, b) for a, b in pairwise(marks)], waited))


def _mark(device: torch.device) -> Any:
    """A point in time: seconds, or an event in the GPU's stream of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return start.elapsed_time(end) / 1e3 if isinstance(start, torch.cuda.Event) else end - start
