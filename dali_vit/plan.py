"""What a run will be: its settings, data and folder, found usable before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dali_vit import checkpoint as checkpoints
from dali_vit import data as datasets
from dali_vit.accumulation import next_divisor
from dali_vit.config import Config, UserError, differences, total_steps
from dali_vit.loaders import allow_open_files
from dali_vit.model import check_forward, create_model, flops_per_image, no_such_images
from dali_vit.names import fingerprint
from dali_vit.optim import lr_schedule
from dali_vit.runfolder import check_own, check_writable
from dali_vit.step_folders import last_step
from dali_vit.validation import given_data
from dali_vit.variants import TIMM_PREFIX, check_config


@dataclass(frozen=True)
class Plan:
    """A run whose settings, data and folder have been found usable; nothing has been written yet."""

    dataset: datasets.Dataset
    model: torch.nn.Module
    total_steps: int
    checkpoint: checkpoints.Checkpoint | None
    """Where the run goes on from; None: from scratch."""
    train_fingerprint: str
    """`names.fingerprint` of the training images, on which the order of the stream depends."""
    val_fingerprint: str | None
    """Likewise of val's; None without any."""

    @property
    def start(self) -> int:
        """The step to go on from; 0 from scratch."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def has_other_val_images(self) -> bool:
        """Whether the run goes on, but with other images in val than those it was evaluated on."""
        return self.checkpoint is not None and self.checkpoint.loader["val_names"] != self.val_fingerprint


def plan(config: Config, world_size: int, *, writes: bool = True) -> Plan:
    """Checks everything a user can get wrong, before anything is written; raises UserError.

    writes: whether this process is to write the run's folder, which other machines may not have, and benchmarks do not.
    """
    check_config(config)
    images_at_once = _images_at_once(config, world_size)
    data = given_data(config)
    checkpoint = _own_checkpoint(config)
    if checkpoint is None and writes:
        check_writable(config)
    dataset = datasets.load_dataset(data, minival=config.data.minival)
    if checkpoint is None and writes:
        _check_apart(config, dataset)
    train_files = dataset.split("train")
    allow_open_files(train_files, config.optim.batch_size // world_size)
    datasets.check_images(train_files, config.data.max_bad_share)
    if dataset.val is not None:
        datasets.check_images(dataset.val, config.data.max_bad_share)
    model = create_model(
        config.model, num_classes=len(dataset.classes), resolution=config.data.resolution, seed=config.run.seed
    )
    if config.model.model.startswith(TIMM_PREFIX):
        _check_timm_model(config, model, images_at_once)
    train_fingerprint = fingerprint(train_files, dataset.root / "train")
    if checkpoint is not None:
        _check_same_images(config, checkpoint, dataset, train_fingerprint)
    total = total_steps(config.optim, len(train_files))
    if total == 1 and config.optim.warmup_steps:
        raise UserError(f"--warmup-steps {config.optim.warmup_steps}: the run has but one step, at a rate of 0; give 0")
    try:
        lr_schedule(0, total_steps=total, warmup_steps=config.optim.warmup_steps)  # refuses a warm-up that is too long
    except UserError as error:  # as of --epochs: `validate` has refused one of --steps
        batch = f"a smaller --batch-size than {config.optim.batch_size}, or "
        more = f"{batch if config.optim.batch_size > world_size else ''}more --epochs"
        raise UserError(f"{error}; {more}, make more steps of {len(train_files):,} images") from error
    val_fingerprint = None if dataset.val is None else fingerprint(dataset.val, dataset.root / "val")
    return Plan(dataset, model, total, checkpoint, train_fingerprint, val_fingerprint)


def _images_at_once(config: Config, world_size: int) -> int:
    """Images of a forward pass of one process; UserError where the batch does not divide so."""
    batch_size = config.optim.batch_size
    if batch_size % world_size:
        divisible = -(-batch_size // world_size) * world_size
        raise UserError(f"--batch-size {batch_size}: not divisible by {world_size} processes; use {divisible}")
    share, parts = batch_size // world_size, config.run.grad_accum_steps
    if share % parts:
        fitting = next_divisor(share, parts)
        raise UserError(f"--grad-accum-steps {parts}: does not divide a process's {share} images; use {fitting}")
    return share // parts


def _check_apart(config: Config, dataset: datasets.Dataset) -> None:
    """UserError for a run that would lie where the next start looks for classes, and find one without images."""
    run_dir = config.run_dir.resolve()
    for split in ("train", "val"):
        folder = (dataset.root / split).resolve()
        if isinstance(dataset.train, datasets.ShardList) or not run_dir.is_relative_to(folder):
            continue
        first = "".join(run_dir.relative_to(folder).parts[:1])
        if not first.startswith(".") and first not in dataset.classes:
            raise UserError(
                f"--runs-dir {config.run.runs_dir}: {run_dir} lies in {folder}, whose folders are classes;"
                " choose another"
            )


def _own_checkpoint(config: Config) -> checkpoints.Checkpoint | None:
    """The checkpoint to go on from, None to begin from scratch; UserError for a folder that allows neither."""
    checkpoint = checkpoints.newest(config.run_dir)
    if checkpoint is not None:
        _check_resumable(config, checkpoint)
    elif not config.run.resume and (config.run_dir / "metrics.jsonl").exists():
        raise UserError(
            f"{config.run_dir}: holds metrics of a run without a checkpoint; choose another --name, remove the folder,"
            " or drop --no-resume to begin the run again"
        )
    else:
        check_own(config)
    return checkpoint


def _check_timm_model(config: Config, model: torch.nn.Module, images_at_once: int) -> None:
    """UserError where a model of timm's takes no images of the run's size, or not so few of them."""
    try:
        flops_per_image(model, config.data.resolution)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise no_such_images(config.model, config.data.resolution, error) from error
    if images_at_once == 1:
        _check_single_images(config, model)


def _check_single_images(config: Config, model: torch.nn.Module) -> None:
    """UserError where a model with batch norm is to train on one image at a time, which has no variance at 1 x 1."""
    try:
        check_forward(model.train(), config.data.resolution, images=1)
    except ValueError as error:
        parts = config.run.grad_accum_steps
        flag = f"--grad-accum-steps {parts}" if parts > 1 else f"--batch-size {config.optim.batch_size}"
        raise UserError(
            f"{flag}: leaves a process one image at a time, of which {config.model.model}'s batch norm has no"
            " statistics; give it two or more"
        ) from error


def up_to_date(planned: Plan, config: Config) -> Plan:
    """The plan, with the newest checkpoint as of now: a process that ran the same run may have written it since.

    To be called once no other process can. Raises UserError as `plan` does.
    """
    last, known = last_step(config.run_dir), planned.checkpoint
    if last is None or (known is not None and last <= known.step):
        return planned
    checkpoint = checkpoints.newest(config.run_dir)
    if checkpoint is not None:
        _check_resumable(config, checkpoint)
        _check_same_images(config, checkpoint, planned.dataset, planned.train_fingerprint)
    return replace(planned, checkpoint=checkpoint)


def _check_resumable(config: Config, checkpoint: checkpoints.Checkpoint) -> None:
    if not config.run.resume:
        raise UserError(f"{config.run_dir}: exists; choose another --name, or drop --no-resume to go on with it")
    changed = differences(checkpoint.config, config)
    if changed:
        raise UserError(
            f"{config.run_dir}: was begun with other settings ({'; '.join(changed)});"
            " choose another --name, or give the same settings to go on with it, or remove the folder to begin anew"
        )


def _check_same_images(
    config: Config, checkpoint: checkpoints.Checkpoint, dataset: datasets.Dataset, train_fingerprint: str
) -> None:
    """UserError where the stream of the checkpoint's run cannot go on with these images, which may lie elsewhere."""
    if checkpoint.classes != dataset.classes:
        raise UserError(
            f"--data {config.data.data}: its classes differ from those {config.run_dir} was begun with;"
            " choose another --name"
        )
    count, before = len(dataset.split("train")), checkpoint.loader["ranks"][0]["num_samples"]
    if before != count:
        remedy = "put back what was removed, under the same names" if count < before else "remove what was added"
        raise UserError(
            f"--data {config.data.data}: {count} training images, {config.run_dir} was begun with {before};"
            f" {remedy}, or choose another --name"
        )
    if (was := checkpoint.loader["resized"]) != dataset.resized:
        how = [
            f"resized to a shorter side of {resized['shorter_side']} pixels at JPEG quality {resized['quality']}"
            if resized
            else "never resized"
            for resized in (dataset.resized, was)
        ]
        raise UserError(
            f"--data {config.data.data}: its images were {how[0]}, those {config.run_dir} was begun with were {how[1]};"
            " give those, or choose another --name"
        )
    if checkpoint.loader["train_names"] != train_fingerprint:
        raise UserError(
            f"--data {config.data.data}: as many training images as {config.run_dir} was begun with, but other names"
            " or classes of some; put back what was moved or renamed, or choose another --name"
        )
