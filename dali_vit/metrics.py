"""How fast a run goes and how well: what is summed up between two log lines."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dali_vit.distributed import Group, sum_over_ranks

# Dense bf16 tensor-core peak, FLOP/s, from NVIDIA's datasheets (SXM parts unless named). The first entry whose words
# are in a GPU's name counts.
_PEAK_BF16 = [
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
]


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s; None where it is not known (and on the CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16 if re.search(rf"\b{part}\b", name)), None)


class StepTimer:
    """Wall time of the steps since the last reading, and the part of it spent waiting for data.

    On a GPU the wait is read off the training stream: the time between the end of one step's kernels and the
    moment the next batch is ready for the stream. While the host runs ahead of the GPU the wait is zero, however
    long the host itself waited in the loader. Nothing is synchronised before `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Starts a new window; call it after anything that is not a step (evaluation, checkpoint)."""
        self._synchronize()
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self._start, self._steps, self._waited = now, 0, 0.0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            # The whole device would be waited for with what DALI decodes ahead.
            torch.cuda.current_stream(self.device).synchronize()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context to fetch a batch in, once a step."""
        self._steps += 1
        if self.device.type == "cuda":
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            self._waits.append(events)
        else:
            start = time.perf_counter()
            yield
            self._waited += time.perf_counter() - start

    def read(self) -> tuple[int, float, float]:
        """The window's steps, its seconds and the seconds of it spent waiting for data. Starts the next window."""
        self._synchronize()
        now = time.perf_counter()
        steps, seconds = self._steps, now - self._start
        waited = self._waited + sum(a.elapsed_time(b) for a, b in self._waits) / 1e3
        self._begin(now)
        return steps, seconds, min(waited, seconds)


class Window:
    """Loss and gradient norm of the steps since the last log line, summed on the device.

    Steps whose gradient norm is not finite, which the optimiser leaves out, are counted but not summed.
    """

    def __init__(self, group: Group) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=group.device)  # loss, norm, steps taken
        self._rank, self._world_size = group.rank, group.world_size
        self._steps = self._bad_samples = 0
        self.skipped = 0
        """Steps left out, up to the last reading."""
        self.healthy = True
        """Whether the last step read was taken."""
        self.more_bad_samples = False
        """Whether a rank had found more bad samples at the last reading than at the one before."""

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Adds a step's loss and gradient norm, both 0-d on the group's device, without waiting for them.
        A norm that is not finite says that the step was left out."""
        taken = torch.isfinite(grad_norm)
        values = torch.stack([loss, grad_norm, torch.ones_like(loss)])
        self._sums += torch.where(taken, values, 0.0)
        self._last = taken
        self._steps += 1

    def read(self, bad_samples: int, waited: float) -> tuple[float, float, float]:
        """Mean loss and norm over ranks and steps taken (NaN if none was), and the longest wait; empties the window.

        bad_samples: how many this rank has found so far. Their sum over ranks tells whether any rank has found more;
        gathering which samples they are takes two messages to all ranks and stalls a GPU. waited: seconds that this
        rank has waited for data. The other ranks wait as long for the slowest one, but in the exchange of gradients,
        where it does not show. Collective.
        """
        waits = [waited if rank == self._rank else 0.0 for rank in range(self._world_size)]
        sums = sum_over_ranks(torch.cat([self._sums, self._sums.new_tensor([bad_samples, *waits])]))
        loss, grad_norm, taken, found, *waits = sums.tolist()
        taken /= self._world_size
        self.more_bad_samples, self._bad_samples = round(found) != self._bad_samples, round(found)
        self.skipped += self._steps - round(taken)
        self.healthy = bool(self._last)
        self._sums.zero_()
        self._steps = 0
        if not taken:
            return math.nan, math.nan, max(waits)
        return loss / self._world_size / taken, grad_norm / self._world_size / taken, max(waits)


def speed(
    steps: int, seconds: float, waited: float, *, batch_size: int, train_flops: float, group: Group
) -> dict[str, float]:
    """The `perf/` and `memory/` scalars of a window of steps.

    waited: seconds for data, of the rank that waited longest; train_flops: FLOP of forward and backward per image. MFU
    and memory are given on GPUs only.
    """
    rate = steps * batch_size / seconds
    scalars = {
        "perf/images_per_sec": rate,
        "perf/images_per_sec_per_gpu": rate / group.world_size,
        "perf/step_ms": 1e3 * seconds / steps,
        "perf/data_wait_pct": 100 * min(waited / seconds, 1.0),  # ranks do not read the clock at the same time
    }
    peak = peak_flops(group.device)
    if peak is not None:
        scalars["perf/mfu_pct"] = 100 * rate * train_flops / (peak * group.world_size)
    if group.device.type == "cuda":
        scalars["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(group.device) / 2**30
    return scalars
