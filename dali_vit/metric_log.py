"""Where scalars go: TensorBoard events and metrics.jsonl, from which a run that goes on drops what runs again."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Self

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from dali_vit.config import UserError
from dali_vit.files import dead_link, replacing

log = logging.getLogger(__name__)

_OF_EVALUATION = ("minival/", "val/", "perf/evaluation_s")
"""What the names of the scalars of an evaluation begin with."""


class MetricLog:
    """The run's scalars, images and texts: TensorBoard events and `metrics.jsonl` in the run's folder.

    `start_step` is the step the run resumes from: what an interrupted run logged past it is dropped from both files,
    because those steps run again. `evaluation_due`: the evaluation after that step runs again, too, so its scalars are
    dropped from metrics.jsonl (TensorBoard shows both, which are the same). UserError where metrics.jsonl cannot be
    opened. Where writing fails later (a full disk, a folder that became read-only), a warning says so: metrics.jsonl
    lacks the lines in question, and TensorBoard gets no more events. `now` returns where the folder is, should it be
    moved during the run; the few events that are still to be written at that moment are lost. Where metrics.jsonl is
    removed or replaced, alone or with the folder, the lines go to the file that has its name.
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
        try:
            if path.exists():
                _drop_lines_past(path, start_step, evaluation_due=evaluation_due)
            self._lines = path.open("ab", buffering=0)
        except OSError as error:
            refused = f"{path}: cannot be written ({error.strerror}); mend that and start again"
            raise UserError(dead_link(path) or refused) from error
        self._report_thread = threading.excepthook
        threading.excepthook = self._unless_of_events
        self._events: SummaryWriter | None = None
        # If the run begins again from scratch, even the sample images of step 0 are dropped.
        self._open_events(purge_step=start_step + 1 if start_step else 0)
        self._writable = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars by name at a step, counted from 1; NaN and infinity are null in metrics.jsonl."""
        # JSON has no NaN or infinity: they become null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._follow(step)
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

        def to_events(events: SummaryWriter) -> None:
            for name, value in values.items():
                events.add_scalar(name, value, step)

        self._to_tensorboard(to_events)

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

    def _follow(self, step: int) -> None:
        """Opens the file that has the name of metrics.jsonl, if that is another by now; OSError if it cannot be.

        So it is on NFS, too, which keeps what is removed, under another name, as long as it is open.
        """
        folder = self._now()
        path = folder / "metrics.jsonl"
        try:
            if os.path.samestat(path.stat(), os.fstat(self._lines.fileno())):
                return
            warning = f"{path} was replaced: what is logged from step {step} on is added to what is there now"
        except FileNotFoundError:
            warning = f"{path} was removed: a new one begins with step {step}"
        folder.mkdir(parents=True, exist_ok=True)
        before, self._lines = self._lines, path.open("ab", buffering=0)
        log.warning("%s", warning)
        with suppress(OSError):
            before.close()
        if self._events is not None and not any(folder.glob("events.out.tfevents.*")):
            self._run_dir = folder
            with suppress(OSError):
                self._events.close()
            self._open_events(purge_step=None)

    def _open_events(self, purge_step: int | None) -> None:
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
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
