"""The training loop, phases in the order they run: data, model, restore, loop, evaluation, checkpoint.

How a run starts: from the newest checkpoint in its own folder where there is one; else from scratch, with
weights that depend on the seed alone. Order and augmentation of the data are pure functions of (seed, step)
and so is Mixup's lambda: going on from a checkpoint repeats the uninterrupted run bit for bit.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dali_vit import checkpoint as checkpoints
from dali_vit import data as datasets
from dali_vit import report
from dali_vit.config import Config, UserError, differences, to_yaml, total_steps, validate
from dali_vit.distributed import Group, barrier, gather_objects, sum_over_ranks
from dali_vit.environment import describe_environment
from dali_vit.evaluate import evaluate
from dali_vit.metrics import MetricLog, StepTimer, duration
from dali_vit.mixup import sample_lambda
from dali_vit.model import create_model, flops_per_image, num_parameters
from dali_vit.optim import create_optimizer, lr_schedule
from dali_vit.step import build_update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A run whose settings, data and folder have been found usable; nothing has been written yet."""

    dataset: datasets.Dataset
    model: torch.nn.Module
    total_steps: int
    checkpoint: checkpoints.Checkpoint | None
    """Where the run goes on from; None: from scratch."""


def plan(config: Config, world_size: int) -> Plan:
    """Checks everything a user can get wrong, before anything is written; raises UserError."""
    validate(config)
    batch_size = config.optim.batch_size
    if batch_size % world_size:
        divisible = -(-batch_size // world_size) * world_size
        raise UserError(f"--batch-size {batch_size}: not divisible by {world_size} processes; use {divisible}")
    if config.data.data is None:
        raise UserError("--data: missing; give a folder with train/ and val/, or `--data demo`")
    checkpoint = checkpoints.newest(config.run_dir)
    if checkpoint is not None:
        _check_resumable(config, checkpoint)
    with _user_errors():
        dataset = datasets.load_dataset(config.data.data, minival=config.data.minival)
        train_files = dataset.split("train")
        for files in (train_files, dataset.val):
            if files is not None:
                datasets.check_images(files)
        model = create_model(
            config.model,
            num_classes=len(dataset.classes),
            resolution=config.data.resolution,
            seed=config.run.seed,
        )
    if checkpoint is not None and checkpoint.classes != dataset.classes:
        raise UserError(
            f"--data {config.data.data}: its classes differ from those {config.run_dir} was begun with;"
            " choose another --name"
        )
    total = total_steps(config.optim, len(train_files))
    lr_schedule(0, total_steps=total, warmup_steps=config.optim.warmup_steps)  # refuses a warm-up that is too long
    return Plan(dataset, model, total, checkpoint)


def train(config: Config, group: Group) -> dict[str, float]:
    """Runs or resumes a run to its end and returns its last evaluation, scalars by name.

    Collective over the group. Raises UserError for what `plan` finds and for a loss that is not finite.
    """
    prepared = plan(config, group.world_size)
    dataset, model, checkpoint, total = (
        prepared.dataset,
        prepared.model,
        prepared.checkpoint,
        prepared.total_steps,
    )
    start = checkpoint.step if checkpoint else 0
    if checkpoint and start >= total:
        log.info("%s is finished: %s", config.run_dir, report.evaluation_line(start, total, checkpoint.metrics))
        return checkpoint.metrics

    # Model and optimiser: float32 master weights, bf16 autocast on GPUs.
    forward_flops = flops_per_image(model, config.data.resolution)
    model.to(group.device)
    optimizer = create_optimizer(model, config.optim)
    update, compiled = build_update(config, model, optimizer, group)

    # Restore.
    torch.manual_seed(config.run.seed + group.rank)  # drawn from only by timm models with dropout
    metrics: dict[str, float] = {}
    if checkpoint:
        _restore(checkpoint, model, optimizer, group)
        metrics = checkpoint.metrics

    # Folder, logs and the stream of batches.
    loader = datasets.train_loader(dataset, config, group, start_step=start)
    writer = None
    if group.is_main:
        _write_run_files(config)
        writer = MetricLog(config.run_dir, start)
        summary = report.summary(
            config,
            dataset,
            group,
            model=report.model_line(config.model, num_parameters(model), forward_flops, config.data.resolution),
            compiled=compiled,
            total_steps=total,
            start_step=start,
            threads=datasets.num_threads(config, group),
        )
        log.info("%s", summary)
        writer.text("config", to_yaml(config))
        writer.text("summary", summary)

    def save(step: int) -> None:
        random_states = gather_objects(_random_state(group))
        if group.is_main:
            checkpoints.save(
                config.run_dir,
                step=step,
                config=config,
                classes=dataset.classes,
                model_state=model.state_dict(),
                trainer_state={"optimizer": optimizer.state_dict(), "rng": random_states},
                loader_state=loader.state_dict(),
                metrics=metrics,
            )
        barrier()

    # The loop. Sums stay on the device between log lines, because reading them stalls the GPU.
    model.train()
    epoch_steps = len(dataset.split("train")) / config.optim.batch_size
    evaluations = _evaluation_steps(config.run.eval_every, epoch_steps, total)
    timer, window = StepTimer(group.device), Window(group, start)
    began = time.perf_counter()
    with _progress_bar(total, start, visible=group.is_main) as progress:
        for step in range(start, total):
            with timer.waiting():
                images, labels = next(loader)  # uint8 [N, S, S, 3], int64 [N]
            if step == 0 and writer:
                _log_samples(writer, config.run_dir, images)
            lr = config.optim.lr * lr_schedule(step, total_steps=total, warmup_steps=config.optim.warmup_steps)
            lam = sample_lambda(config.optim.mixup_alpha, config.run.seed, step)
            loss, grad_norm = update(images, labels, lam, lr)
            window.add(loss, grad_norm)
            progress.update()

            done = step + 1
            evaluating = done in evaluations
            saving = evaluating or done % config.run.checkpoint_every == 0 or done == total
            if not saving and done % config.run.log_every:
                continue
            seconds, waited = timer.read()
            loss_mean, grad_norm_mean = window.read(done, config.run_dir)
            if writer:
                scalars = {"train/loss": loss_mean, "train/lr": lr, "train/grad_norm": grad_norm_mean}
                scalars |= report.speed(
                    timer.steps,
                    seconds,
                    waited,
                    batch_size=config.optim.batch_size,
                    train_flops=3 * forward_flops,  # the backward pass costs twice the forward
                    group=group,
                )
                writer.scalars(done, scalars)
                eta = (total - done) * (time.perf_counter() - began) / (done - start)
                log.info("%s", report.progress_line(done, total, done / epoch_steps, scalars, eta))
            if evaluating:
                metrics = evaluate_splits(model, dataset, config, group)
                if writer:
                    writer.scalars(done, metrics)
                    log.info("%s", report.evaluation_line(done, total, metrics))
            if saving:
                save(done)
            timer.reset()

    loader.close()
    if writer:
        writer.close()
        log.info("done in %s: %s", duration(time.perf_counter() - began), config.run_dir)
    return metrics


def evaluate_splits(
    model: torch.nn.Module, dataset: datasets.Dataset, config: Config, group: Group
) -> dict[str, float]:
    """`<split>/top1`, `/top5` and `/loss` on minival and val, as far as the data set has them."""
    metrics: dict[str, float] = {}
    for name, files in (("minival", dataset.minival), ("val", dataset.val)):
        if files is None:
            continue
        batches = datasets.eval_loader(
            files,
            batch_size=config.optim.batch_size // group.world_size,
            resolution=config.data.resolution,
            group=group,
            threads=datasets.num_threads(config, group),
        )
        result = evaluate(model, batches, group.device)
        batches.close()
        metrics |= {f"{name}/{key}": value for key, value in result.items() if key != "count"}
    return metrics


class Window:
    """Loss and gradient norm summed on the device since the last log line."""

    def __init__(self, group: Group, step: int) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=group.device)
        self._world_size = group.world_size
        self._first = step

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        self._sums += torch.stack([loss.detach(), grad_norm])

    def read(self, step: int, run_dir: Path) -> tuple[float, float]:
        """Means over ranks and steps; UserError, on every rank alike, if one was not finite."""
        steps = step - self._first
        loss, grad_norm = (sum_over_ranks(self._sums) / (self._world_size * steps)).tolist()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            kept = checkpoints.newest(run_dir)
            raise UserError(
                f"the {'gradient norm' if math.isfinite(loss) else 'loss'} is not finite between steps"
                f" {self._first + 1} and {step}; lower --lr; last good checkpoint:"
                f" {kept.path if kept else 'none yet'}"
            )
        self._sums.zero_()
        self._first = step
        return loss, grad_norm


def _check_resumable(config: Config, checkpoint: checkpoints.Checkpoint) -> None:
    if not config.run.resume:
        raise UserError(f"{config.run_dir}: exists; choose another --name, or drop --no-resume to go on with it")
    changed = differences(checkpoint.config, config)
    if changed:
        raise UserError(
            f"{config.run_dir}: was begun with other settings ({'; '.join(changed)});"
            " choose another --name, or give the same settings to go on with it"
        )


def _restore(
    checkpoint: checkpoints.Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> None:
    state = checkpoint.trainer_state()
    model.load_state_dict(checkpoint.model_state())
    optimizer.load_state_dict(state["optimizer"])
    if len(state["rng"]) == group.world_size:  # another number of ranks draws anew, from seed and rank
        torch.set_rng_state(state["rng"][group.rank]["cpu"])
        if group.device.type == "cuda" and "cuda" in state["rng"][group.rank]:
            torch.cuda.set_rng_state(state["rng"][group.rank]["cuda"], group.device)


def _random_state(group: Group) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if group.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(group.device)
    return states


def _evaluation_steps(every: float, epoch_steps: float, total: int) -> set[int]:
    """Steps after which to evaluate: each multiple of `every` epochs, rounded up, and the last step."""
    steps = {total}
    if every:
        count = int(total / (every * epoch_steps))
        steps |= {min(math.ceil(i * every * epoch_steps), total) for i in range(1, count + 1)}
    return steps


def _log_samples(writer: MetricLog, run_dir: Path, images: torch.Tensor) -> None:
    grid = report.image_grid(images)
    writer.image("samples/train", grid, 0)
    (run_dir / "samples").mkdir(exist_ok=True)
    Image.fromarray(grid).save(run_dir / "samples" / "train.png")


def _write_run_files(config: Config) -> None:
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (config.run_dir / "env.txt").write_text(describe_environment(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--runs-dir {config.run.runs_dir}: cannot write there ({error.strerror})") from error


@contextmanager
def _progress_bar(total: int, start: int, *, visible: bool) -> Iterator[tqdm]:
    """A bar with the time left on a terminal; in a log file the lines alone."""
    shown = visible and sys.stderr.isatty()
    with (
        logging_redirect_tqdm(loggers=[logging.getLogger("dali_vit")]),
        tqdm(total=total, initial=start, disable=not shown, unit="step", dynamic_ncols=True) as bar,
    ):
        yield bar


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turns the ValueError with which a module refuses a value into the error shown to the user."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
