"""Time, loss and gradient norm since the last log line, kept on the device; `log_line` reads, checks and logs them."""

from __future__ import annotations

import logging

from dali_vit import autotune, left_out, report
from dali_vit.config import Config, UserError
from dali_vit.data import ShardList
from dali_vit.distributed import Group, gather_objects
from dali_vit.loaders import TrainLoader
from dali_vit.metric_log import MetricLog
from dali_vit.metrics import StepTimer, Window, speed
from dali_vit.plan import Plan
from dali_vit.saving import Saver

__all__ = ["Progress"]

log = logging.getLogger(__name__)


class Progress:
    """What the steps since the last log line have come to: the loop fills `timer` and `window`, a log line reads them.

    Sums stay on the device in between, because reading them stalls a GPU. The clock of the first step starts here.
    writer: rank 0's; forward_flops: of an image; bad_samples: the training samples known to be left out.
    """

    def __init__(
        self,
        config: Config,
        group: Group,
        planned: Plan,
        loader: TrainLoader,
        saver: Saver,
        writer: MetricLog | None,
        *,
        forward_flops: float,
        bad_samples: list[int],
    ) -> None:
        self._config, self._group, self._loader, self._saver, self._writer = config, group, loader, saver, writer
        self._dataset, self._total = planned.dataset, planned.total_steps
        self._train_flops = 3 * forward_flops  # the backward pass costs twice the forward
        self._bad_samples = bad_samples
        self._starving = report.StarvationWarning(
            steps=config.run.log_every,
            in_shards=isinstance(self._dataset.split("train"), ShardList),
            autotuned=autotune.is_on(config, group),
        )
        self.timer, self.window = StepTimer(group.device), Window(group)
        self._start = loader.step
        self._time_left = report.TimeLeft(self._total, self._start)

    def log_line(self, done: int, lr: float) -> None:
        """Logs the steps since the last call, of which the last was at the rate lr and is the run's `done`-th.

        UserError, on every rank alike, where more steps or images were left out than may be. Collective.
        """
        count, seconds, waited = self.timer.read()
        loss, grad_norm, waited = self.window.read(len(self._loader.bad_samples), waited)
        self._check_skipped(range(done - count, done))
        if self.window.more_bad_samples:
            self._bad_samples = left_out.of_all_ranks(gather_objects(self._loader.state_dict()))
            left_out.check_share(
                len(self._bad_samples),
                len(self._dataset.split("train")),
                "train",
                max_bad_share=self._config.data.max_bad_share,
                data=self._config.data.data,
            )
        if self._writer is None:
            return
        batch_size = self._config.optim.batch_size
        epoch = done * batch_size / len(self._dataset.split("train"))
        # In TensorBoard runs of different batch sizes can be compared by epoch alone.
        scalars = {"train/loss": loss, "train/lr": lr, "train/grad_norm": grad_norm, "train/epoch": epoch}
        scalars |= speed(
            count, seconds, waited, batch_size=batch_size, train_flops=self._train_flops, group=self._group
        )
        scalars |= {"train/skipped_steps": self.window.skipped, "data/bad_samples": len(self._bad_samples)}
        self._writer.scalars(done, scalars)
        left = self._time_left.after(done)
        log.info("%s", report.progress_line(done, self._total, epoch, scalars, left))
        self._starving.check(count, seconds, waited)

    def _check_skipped(self, steps: range) -> None:
        """UserError, on every rank alike, once more steps were left out than allowed, or where a whole run was."""
        skipped, config = self.window.skipped, self._config
        if skipped > config.run.max_skipped_steps or skipped == self._total:
            kept = self._saver.newest()
            remedy = "lower --lr"
            if self._start == 0 and skipped == steps.stop:
                remedy = "not one was taken, so that --lr is not to blame; try --compile off, or another --model"
            raise UserError(
                f"{skipped} steps were left out, the last of them between steps {steps.start + 1} and {steps.stop}:"
                f" the gradient was not finite or the loss a spike (--max-skipped-steps {config.run.max_skipped_steps},"
                f" --spike-threshold {config.optim.spike_threshold:g}); {remedy};"
                f" last good checkpoint: {kept.path if kept else 'none yet'}"
            )
