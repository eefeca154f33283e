"""The training loop, phases in the order they run: model, restore, data, logs, loop.

`plan.plan` has made the model, indexed the data set and found the checkpoint, before anything is written; `cli._train`
calls it, takes the lock on the run's folder, and calls `train`.

How a run starts: from the newest checkpoint in its own folder where there is one; else from scratch, with
weights that depend on the seed alone. Order and augmentation of the data are pure functions of (seed, step)
and so is Mixup's lambda: on the CPU, with as many processes as before, going on from a checkpoint repeats the
uninterrupted run bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing, nullcontext

import torch

from dali_vit import left_out, report
from dali_vit.agreement import check_same_run
from dali_vit.autotune import loader_settings
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group, on_main
from dali_vit.loaders import train_loader
from dali_vit.memory import oom_as_user_error, warn_of_memory, warn_of_others
from dali_vit.milestones import Milestones
from dali_vit.mixup import sample_lambda
from dali_vit.model import flops_per_image, num_parameters
from dali_vit.optim import create_optimizer, lr_schedule
from dali_vit.plan import Plan
from dali_vit.progress import Progress
from dali_vit.runfolder import log_samples, log_texts, open_folder, profiling
from dali_vit.runlock import current, how_to_go_on
from dali_vit.saving import Saver, restore, tidy_up
from dali_vit.step import build_update
from dali_vit.step_folders import best_evaluation
from dali_vit.stopping import Interrupted, Stop, Watchdog

log = logging.getLogger(__name__)

_COMPILING = 3  # steps, within which torch.compile is done and CUDA graphs are recorded


def train(config: Config, group: Group, planned: Plan, *, ends_process: bool = False) -> dict[str, float]:
    """Runs or resumes a planned run to its end and returns its last evaluation, scalars by name.

    ends_process: whether the process ends with this run, as for `Stop`. Collective over the group. Raises UserError
    where more steps or images are skipped than allowed, the last checkpoint cannot be written, or the weights have
    become infinite or NaN; DecodeError where this rank's loader finds too many bad images; and Interrupted where a
    signal or the clock stopped the run.
    """
    dataset, model, checkpoint, total = planned.dataset, planned.model, planned.checkpoint, planned.total_steps
    start = planned.start
    check_same_run(config, planned)
    # Makes the gloo group by which ranks agree on stops: nodes that cannot reach each other fail here.
    stop = Stop(group, config.run.max_hours, config.run.hang_timeout, ends_process=ends_process)
    if group.is_main:
        for remark in report.remarks(config, planned):
            log.warning("%s", remark)
    # Whether the run was stopped while it evaluated the weights of its newest checkpoint.
    evaluation_due = checkpoint is not None and checkpoint.loader["evaluation_due"]
    if checkpoint and start >= total and not evaluation_due:
        log.info("%s is finished: %s", config.run_dir, report.evaluation_line(start, total, checkpoint.metrics))
        if group.is_main:
            tidy_up(checkpoint)
        return _check_finite(checkpoint.metrics, config)

    with Watchdog(group, config.run.hang_timeout, "preparation", start):
        # Model and optimiser: float32 master weights, bf16 autocast on GPUs.
        forward_flops = flops_per_image(model, config.data.resolution)
        warn_of_memory(model, config, group)
        warn_of_others(group)
        model.to(group.device)
        optimizer = create_optimizer(model, config.optim)
        update, how = build_update(config, model, optimizer, group)

        # Restore.
        torch.manual_seed(config.run.seed + group.rank)  # drawn from only by timm models with dropout
        if checkpoint:
            restore(checkpoint, model, optimizer, group)

        # The stream of batches.
        settings = loader_settings(dataset, config, group, model)
        bad_samples = left_out.still_bad(checkpoint.loader["ranks"], dataset, config, group) if checkpoint else []
        loader = train_loader(dataset, config, group, settings=settings, start_step=start, bad_samples=bad_samples)
        next_batch = oom_as_user_error(loader.__next__, config, group)

        # The run's folder and its logs, which are rank 0's.
        writer = on_main(group, lambda: open_folder(config, start, evaluation_due))
        if writer is not None:
            summary = report.summary(
                config,
                planned,
                group,
                model=report.model_line(config.model, num_parameters(model), forward_flops, config.data.resolution),
                how=how,
                bad_samples=len(bad_samples),
                threads=settings.threads,
            )
            log.info("%s", summary)
            log_texts(writer, config, summary)

    # The loop. Contexts close in reverse order: the last checkpoint is on disk before signals end the process at once.
    watchdog = Watchdog(group, config.run.hang_timeout, "loader", start)
    saver = Saver(config, group, planned, optimizer, loader, writer)
    milestones = Milestones(config, group, planned, saver, writer, stop, watchdog)
    model.train()
    epoch_steps = len(dataset.split("train")) / config.optim.batch_size
    done = start
    with (
        stop.watching(),
        writer or nullcontext(),
        saver,
        closing(loader),
        watchdog,
        report.progress_bar(total, start, visible=group.is_main) as bar,
        profiling(config, group, total - start) as profiler,
    ):
        stop_reason = milestones.evaluate(start) if evaluation_due else None
        stop.start_clock()
        began = time.perf_counter()
        progress = Progress(
            config, group, planned, loader, saver, writer, forward_flops=forward_flops, bad_samples=bad_samples
        )
        for step in range(start, total) if not stop_reason else ():
            watchdog.enter("loader", step)
            with progress.timer.waiting():
                images, labels = next_batch()  # uint8 [N, S, S, 3], int64 [N]
            watchdog.enter("compilation" if step < start + _COMPILING else "step", step)
            if step == 0 and writer:
                log_samples(writer, config.run_dir, images)
            lr = config.optim.lr * lr_schedule(step, total_steps=total, warmup_steps=config.optim.warmup_steps)
            lam = sample_lambda(config.optim.mixup_alpha, config.run.seed, step)
            loss, grad_norm = update(images, labels, lam, lr)
            progress.window.add(loss, grad_norm)
            bar.update()
            profiler.step()

            done = step + 1
            stop_reason = stop.agreed(done) if done < total else None  # after the last step nothing is left to stop
            evaluating = done == total or _is_evaluated(done, config.run.eval_every * epoch_steps)
            saving = evaluating or stop_reason is not None or done % config.run.checkpoint_every == 0
            if saving or done % config.run.log_every == 0:
                progress.log_line(done, lr)  # reads the losses, and so whether the step was taken or left out
            if saving:
                stop_reason = milestones.save_and_evaluate(
                    done, progress, evaluating=evaluating, stop_reason=stop_reason
                )
            if stop_reason:
                break
        # No rank ends before the last checkpoint is written: launchers end the others with the first to stop.
        watchdog.enter("checkpoint", done - 1)
        saver.close()

    if stop_reason:
        raise Interrupted(f"{stop_reason} after step {done}; {how_to_go_on(config)}")
    metrics = _check_finite(milestones.metrics, config)
    if (best := best_evaluation(current(config))) and best[0] != total:
        log.info("best: %s", report.evaluation_line(best[0], total, best[1]))
    log.info("done in %s: %s", report.duration(time.perf_counter() - began), current(config))
    return metrics


def _check_finite(metrics: dict[str, float], config: Config) -> dict[str, float]:
    """The last evaluation; UserError where its loss shows that the weights are of no use, as after too high a rate."""
    if not all(math.isfinite(value) for name, value in metrics.items() if name.endswith("/loss")):
        raise UserError(f"{current(config)}: its weights have become infinite or NaN; lower --lr, with another --name")
    return metrics


def _is_evaluated(done: int, every: float) -> bool:
    """Whether step `done` has reached a multiple of `every`, which need not be a whole number; never if that is 0."""
    if every < 1:  # every step reaches one; and of the smallest numbers the quotients below are infinite
        return every > 0
    return math.floor(done / every) > math.floor((done - 1) / every)
