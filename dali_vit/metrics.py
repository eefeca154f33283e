"""What a run reports: scalars to TensorBoard and metrics.jsonl, and how fast it goes."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from dali_vit.config import UserError
from dali_vit.distributed import Group, sum_over_ranks
from dali_vit.files import replacing

log = logging.getLogger(__name__)

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

_OF_EVALUATION = ("minival/", "val/", "perf/evaluation_s")
"""What the names of the scalars of an evaluation begin with."""


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


class MetricLog:
    """The run's scalars, images and texts: TensorBoard events and `metrics.jsonl` in the run's folder.

    `start_step` is the step the run resumes from: what an interrupted run logged past it is dropped from both files,
    because those steps run again. `evaluation_due`: so does the evaluation after that step, whose scalars are dropped
    from metrics.jsonl (TensorBoard shows both, which are the same). UserError where metrics.jsonl cannot be rewritten.
    Where writing fails later (a full disk, a folder that became read-only), a warning says so: metrics.jsonl lacks the
    lines in question, and TensorBoard gets no more events. `now` returns where the folder is, should it be moved during
    the run; the few events that are still to be written at that moment are lost.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        now: Callable[[], Path] | None = None,
        *,
        evaluation_due: bool = False,
    ) -> None:
        self._start_step = start_step
        self._run_dir, self._now = run_dir, now or (lambda: run_dir)
        path = run_dir / "metrics.jsonl"
        if path.exists():
            _drop_lines_past(path, start_step, evaluation_due=evaluation_due)
        self._report_thread = threading.excepthook
        threading.excepthook = self._unless_of_events
        self._events: SummaryWriter | None = None
        # If the run begins again from scratch, even the sample images of step 0 are dropped.
        self._open_events(purge_step=start_step + 1 if start_step else 0)
        self._lines = path.open("ab", buffering=0)
        self._writable = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by name at a step, counted from 1; NaN and infinity are null in metrics.jsonl."""

        def to_events(events: SummaryWriter) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, step)

        self._to_tensorboard(to_events)
        # JSON has no NaN or infinity: they become null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            _append(self._lines, json.dumps({"step": step, **finite}).encode() + b"\n")
        except OSError as error:
            if self._writable:
                log.warning(
                    "%s cannot be written to (%s); training goes on without these lines",
                    self._lines.name,
                    error.strerror,
                )
            self._writable = False
        else:
            self._writable = True

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """One image, uint8 [H, W, 3]."""
        self._to_tensorboard(lambda events: events.add_image(name, image, step, dataformats="HWC"))
        self._to_tensorboard(SummaryWriter.flush)

    def text(self, name: str, text: str) -> None:
        """A block of preformatted text, at the step that the run goes on from."""
        text = text.encode(errors="backslashreplace").decode()  # a path need not be UTF-8
        self._to_tensorboard(lambda events: events.add_text(name, f"```\n{text}\n```", self._start_step))

    def flush(self) -> None:
        """Hands all that was logged so far to the system: from then on it outlives this process."""
        self._to_tensorboard(SummaryWriter.flush)

    def close(self) -> None:
        self._to_tensorboard(SummaryWriter.close)
        self._lines.close()
        threading.excepthook = self._report_thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unless_of_events(self, failed: threading.ExceptHookArgs) -> None:
        """Reports what ended a thread, except the disk's refusal of events, which `_to_tensorboard` reports."""
        if not (isinstance(failed.exc_value, OSError) and getattr(failed.thread, "exception", None)):
            self._report_thread(failed)

    def _open_events(self, purge_step: int) -> None:
        with self._warning_of_events():
            _put_events_before_now(self._run_dir)
            self._events = SummaryWriter(str(self._run_dir), purge_step=purge_step)

    def _to_tensorboard(self, write: Callable[[SummaryWriter], None]) -> None:
        if self._events is None:
            return
        with self._warning_of_events():
            if (moved := self._now()) != self._run_dir:  # the events' writer opens its file by name
                self._run_dir = moved
                with suppress(OSError):
                    self._events.close()
                self._events = SummaryWriter(str(moved))
            write(self._events)

    @contextmanager
    def _warning_of_events(self) -> Iterator[None]:
        """Gives the events up, with a warning, if the disk refuses them: that has ended the thread that writes them."""
        try:
            yield
        except OSError as error:
            log.warning("no more TensorBoard events are written (%s); training goes on", error.strerror)
            self._events = None


def _put_events_before_now(run_dir: Path) -> None:
    """Renames event files named for times ahead of now by an earlier start whose clock was ahead of this one's.

    TensorBoard reads the files in the order of their names, and this start's has to come last; a start within the same
    second as another waits for the next second. A TensorBoard that has a renamed file open may need a restart.
    """
    files = []
    for path in sorted(run_dir.glob("events.out.tfevents.*"), reverse=True):
        seconds, dot, rest = path.name.removeprefix("events.out.tfevents.").partition(".")
        if dot and seconds.isdecimal():
            files.append((path, int(seconds), rest))
    while any(stamp == int(time.time()) for _, stamp, _ in files):
        time.sleep(0.01)
    latest = int(time.time())
    names = []
    for path, stamp, rest in files:
        if stamp < latest:
            break
        latest -= 1
        names.append((path, path.with_name(f"events.out.tfevents.{latest:010d}.{rest}")))
    for path, name in reversed(names):  # the earliest first, which makes room for the next
        path.rename(name)


def _append(file: FileIO, line: bytes) -> None:
    """Writes a line whole or not at all; OSError where it cannot be written."""
    size = os.fstat(file.fileno()).st_size
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise


def _drop_lines_past(path: Path, step: int, *, evaluation_due: bool) -> None:
    """Takes out of metrics.jsonl what runs again: the lines past a step, and the evaluation after it if that is due.

    Lines that are not whole go, too. The file is written only if it changes.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
            if values["step"] > step:
                continue
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # a line cut short by a crash, or not one of ours
        if evaluation_due and values["step"] == step:
            left = {name: value for name, value in values.items() if not name.startswith(_OF_EVALUATION)}
            if len(left) < len(values):
                line = json.dumps(left)
            if len(left) == 1:  # the step
                continue
        kept.append(line + "\n")
    if "".join(kept) == text:
        return
    try:
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); mend that and start again") from error


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as `1:02:03`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
