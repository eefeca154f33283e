"""Checkpoints and evaluations during a run: when the weights are saved, evaluated, and what is logged of it."""

from __future__ import annotations

import itertools
import logging
import time

from dali_vit import report
from dali_vit.config import Config
from dali_vit.distributed import Group
from dali_vit.evaluate import evaluate_splits
from dali_vit.loaders import EvalLoader
from dali_vit.metric_log import MetricLog
from dali_vit.plan import Plan
from dali_vit.progress import Progress
from dali_vit.saving import Saver
from dali_vit.stopping import Interrupted, Stop, Watchdog

__all__ = ["Milestones"]

log = logging.getLogger(__name__)


class Milestones:
    """Checkpoints and evaluations of a run. All ranks make one and call the same of its methods; writer is rank 0's."""

    def __init__(
        self,
        config: Config,
        group: Group,
        planned: Plan,
        saver: Saver,
        writer: MetricLog | None,
        stop: Stop,
        watchdog: Watchdog,
    ) -> None:
        self._config, self._group, self._planned = config, group, planned
        self._saver, self._writer, self._stop, self._watchdog = saver, writer, stop, watchdog
        self._eval_loaders: dict[str, EvalLoader] = {}
        self.metrics: dict[str, float] = {}
        """The last evaluation, scalars by name: empty before the first, and where the data has nothing to evaluate."""

    def save_and_evaluate(
        self, done: int, progress: Progress, *, evaluating: bool, stop_reason: str | None
    ) -> str | None:
        """Saves the weights after `done` steps; then evaluates them, if `evaluating` and no stop is pending.

        Returns the reason to stop: the one given, or one that came up during the evaluation; None to go on. Where the
        last step was skipped the weights may have begun to diverge: they replace no good ones, unless the run ends
        with them. Collective.
        """
        saved = progress.window.healthy or stop_reason is not None or done == self._planned.total_steps
        if saved:
            self._watchdog.enter("checkpoint", done - 1)
            began = time.perf_counter()
            self._saver.save(done, evaluation_due=evaluating)
            progress.timer.reset()  # waits for the copy on a GPU
            if self._writer is not None:
                self._writer.scalars(done, {"perf/checkpoint_stall_ms": 1e3 * (time.perf_counter() - began)})
        elif self._group.is_main:
            log.warning("no checkpoint at step %d, because that step was left out", done)

        if evaluating and not stop_reason:
            stop_reason = self.evaluate(done, saved=saved)
            if stop_reason and not saved:  # a run that ends keeps what it has
                self._saver.save(done, evaluation_due=True)
            progress.timer.reset()
        return stop_reason

    def evaluate(self, done: int, *, saved: bool = True) -> str | None:
        """Evaluates the weights after `done` steps, of which there is a checkpoint if `saved`. Returns None, or why the
        run is to stop: then the evaluation was broken off. Collective."""
        batches = itertools.count(1)

        def before_batch() -> None:
            self._watchdog.enter("evaluation", done - 1)
            if reason := self._stop.agreed(next(batches)):
                raise Interrupted(reason)

        self._watchdog.enter("evaluation", done - 1)
        planned, began = self._planned, time.perf_counter()
        try:
            self.metrics = evaluate_splits(
                planned.model, planned.dataset, self._config, self._group, self._eval_loaders, before_batch
            )
        except Interrupted as stopped:
            return str(stopped)
        if self.metrics:  # a data set may have neither val nor minival
            log.info("%s", report.evaluation_line(done, planned.total_steps, self.metrics))
            if self._writer is not None:
                self._writer.scalars(done, {**self.metrics, "perf/evaluation_s": time.perf_counter() - began})
        if saved:  # after the log, which a run that goes on from here does not write again
            self._saver.add_metrics(done, self.metrics)
        return None
