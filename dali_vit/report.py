"""How a run describes itself in text: the opening remarks and summary, log lines, warnings, the time left."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dali_vit.config import Config, DataConfig, ModelConfig, OptimConfig
from dali_vit.data import Dataset
from dali_vit.distributed import Group
from dali_vit.environment import why_no_gpu
from dali_vit.listing import other_val
from dali_vit.manifest import MANIFEST
from dali_vit.plan import Plan
from dali_vit.structure import remarks_on_files, val_without_images
from dali_vit.variants import TIMM_PREFIX
from pipelines.words import counted

log = logging.getLogger(__name__)

_FEW_TO_CHOOSE_BY = 100  # images; of so many, the standard error of top-1 is up to 5 points


def model_line(config: ModelConfig, parameters: int, forward_flops: float, resolution: int) -> str:
    """A model in words; forward_flops: of the forward pass of one image of `resolution` pixels a side."""
    if config.model.startswith(TIMM_PREFIX):
        kind = config.model
    else:
        kind = f"ViT-{with_sizes(config)} {config.pool}, {config.posemb}, {config.head} head"
    millions, gflop = (f"{x:.2f}" if x >= 1 else f"{x:.2g}" for x in (parameters / 1e6, forward_flops / 1e9))
    return f"{kind}, {millions} M parameters, {gflop} GFLOP at {resolution} px"


def augmentation(config: DataConfig) -> str:
    """Crop and RandAugment in words."""
    randaug = f"RandAugment({config.randaug_layers}, {config.randaug_magnitude:g})"
    return f"{config.crop} crop, {randaug if config.randaug_layers else 'no RandAugment'}"


def optimisation(config: OptimConfig) -> str:
    """Optimiser, schedule and what the loss is changed by, in words."""
    optimizer = {"adamw": "AdamW", "sgd": "SGD"}[config.optimizer]
    words = f"{optimizer}, lr {config.lr:g} after {counted(config.warmup_steps, 'step')} of warm-up"
    words += f", weight decay {config.weight_decay:g}"
    return words + (f", label smoothing {config.label_smoothing:g}" if config.label_smoothing else "")


def with_sizes(config: ModelConfig) -> str:
    """The model's name, and the sizes that override those its name stands for."""
    sizes = {"width": config.width, "depth": config.depth, "heads": config.num_heads, "MLP": config.mlp_dim}
    own = ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)
    return f"{config.model} ({own})" if own else config.model


def remarks(config: Config, planned: Plan) -> list[str]:
    """Remarks on settings and data that are allowed but may not be what the user meant. Lists the folders of a small
    set."""
    dataset, total_steps, found = planned.dataset, planned.total_steps, []
    if config.data.data == "demo" and (os.path.isdir("demo/train") or os.path.isfile(f"demo/{MANIFEST}")):
        found.append("--data demo is the dataset drawn on first use; for the folder demo/ that is here give ./demo")
    decay, rate = config.optim.weight_decay, config.optim.lr
    if config.optim.optimizer == "adamw" and decay > rate:
        found.append(
            f"--weight-decay {decay:g} is not multiplied by --lr: torch and timm call it {decay / rate:g}; what they"
            f" call 0.1 is {0.1 * rate:g} here"
        )
    if len(dataset.classes) == 1:
        found.append(f"{dataset.root} has but one class, {dataset.classes[0]}: there is nothing to tell it from")
    if planned.has_other_val_images:
        found.append(f"{dataset.root}: val has other images than before; what is measured on it is not to be compared")
    if not dataset.counts.get("val"):
        minival = dataset.counts.get("minival")
        what = ": minival alone is evaluated" if minival else ", and --minival leaves none: nothing is evaluated"
        if name := other_val(dataset.root):
            what += f"; if {name}/ is meant, rename it to val/"
        found.append(f"{dataset.root} has no val/{what}")
    else:
        if absent := val_without_images(dataset):
            found.append(absent)
        if config.data.minival and not dataset.counts.get("minival"):
            images = dataset.counts["train"]
            found.append(
                f"--minival {config.data.minival:g} of {counted(images, 'training image')} is none:"
                " the best checkpoint is chosen by val"
            )
    if config.run.eval_every and config.data.data != "demo" and (few := _few_to_choose_by(dataset)):
        found.append(few)
    images = len(dataset.split("train"))
    if config.optim.batch_size > images:
        found.append(
            f"--batch-size {config.optim.batch_size}: the training set has but"
            f" {counted(images, 'image')}, which each step repeats; give a smaller one"
        )
    folders = (dataset.root / split / name for split in ("train", "val") for name in dataset.classes)
    found += remarks_on_files(dataset.root, dataset.split("train"), folders)
    warmup = config.optim.warmup_steps
    if 2 * warmup > total_steps:
        share = 100 * warmup / total_steps
        found.append(
            f"--warmup-steps {warmup}: {share:.0f} % of the run's {total_steps} steps are at a rate below --lr;"
            f" ImageNet's 90 epochs have 9 %, here {total_steps // 11}"
        )
    return found


def _few_to_choose_by(dataset: Dataset) -> str | None:
    """A remark on how few images the best checkpoint is chosen by, with what helps if anything does; else None."""
    counts = dataset.counts
    split = "minival" if counts.get("minival") else "val"
    images = counts.get(split, 0)
    if not 0 < images < _FEW_TO_CHOOSE_BY:
        return None
    share = math.ceil(100 * _FEW_TO_CHOOSE_BY / (counts["train"] + counts.get("minival", 0))) / 100
    remedies = [f"--minival {share:g}"] if share <= 0.5 else []
    if split == "minival" and counts.get("val", 0) >= _FEW_TO_CHOOSE_BY:
        remedies.append("--minival 0, by which val chooses")
    remark = f"the best checkpoint is chosen by the {counted(images, 'image')} of {split}, much by chance"
    return f"{remark}; give {', or '.join(remedies)}" if remedies else remark


def summary(
    config: Config,
    planned: Plan,
    group: Group,
    *,
    model: str,
    how: Mapping[str, str],
    bad_samples: int,
    threads: int,
) -> str:
    """What will be trained, on what, how (as `build_update` says) and for how long: one `name  value` line each."""
    dataset, total_steps, checkpoint = planned.dataset, planned.total_steps, planned.checkpoint
    counts = ", ".join(f"{name} {count:,}" for name, count in dataset.counts.items())
    on_gpu = group.device.type == "cuda"
    device = torch.cuda.get_device_name(group.device) if on_gpu else "CPU"
    unasked = "" if on_gpu or config.run.gpus == 0 else f"; no GPU is used: {why_no_gpu()}"
    classes = counted(len(dataset.classes), "class", "classes")
    on_threads = counted(threads, "thread")
    precision = f"bf16 autocast, {config.model.residual} residual stream"
    epochs = total_steps * config.optim.batch_size / len(dataset.split("train"))
    rows = {
        "run": f"{config.run_dir} (recipe {config.run.recipe}, seed {config.run.seed})",
        "data": f"{dataset.root}: {counts} images, {classes}",
        "input": f"{augmentation(config.data)}, Mixup {config.optim.mixup_alpha:g};"
        f" DALI on the {'GPU' if on_gpu else 'CPU'}, {on_threads}",
        "model": model,
        "optimiser": optimisation(config.optim),
        "devices": f"{group.world_size} x {device}, {precision if on_gpu else 'float32'}{unasked}",
        **how,
        "length": f"{counted(total_steps, 'step')} of {counted(config.optim.batch_size, 'image')}"
        f" ({epochs:{'.1f' if epochs >= 1 else '.2g'}} epochs)",
    }
    if checkpoint is not None:
        rows["resuming"] = f"after step {checkpoint.step:,}"
        if bad_samples:
            rows["resuming"] += f", {counted(bad_samples, 'image')} left out"
        before = checkpoint.loader["world_size"]
        if before != group.world_size:
            processes = counted(group.world_size, "process", "processes")
            rows["resuming"] += (
                f", with {processes} instead of {before}: batch size and data order stay,"
                f" {config.optim.batch_size // group.world_size} images a process instead of"
                f" {config.optim.batch_size // before}"
            )
    return "\n".join(f"{name:<9} {value}" for name, value in rows.items())


class StarvationWarning:
    """Warns once that training waits for data, and says what helps.

    Steps are judged as many together as a log line usually has, `steps`: log lines at checkpoints may have a single
    one. The first log line's are not judged, as queues are filled in them.
    """

    LIMIT = 10.0  # percent of wall time

    def __init__(self, *, steps: int, in_shards: bool, autotuned: bool) -> None:
        self._steps, self._first, self._said = steps, True, False
        self._count, self._seconds, self._waited = 0, 0.0, 0.0
        self._help = "" if in_shards else " shards on a local disk (`dali-vit prepare`),"
        self._help += "" if autotuned else " `--autotune on`, which looks for the fastest settings,"

    def check(self, count: int, seconds: float, waited: float) -> None:
        """Takes how many steps there were since the last call, how long they took and how long they waited for data."""
        if self._first:
            self._first = False
            return
        self._count += count
        self._seconds += seconds
        self._waited += waited
        if self._count < self._steps:
            return
        data_wait_pct = 100.0 * min(self._waited / self._seconds, 1.0)  # ranks do not read the clock at the same time
        self._count, self._seconds, self._waited = 0, 0.0, 0.0
        if data_wait_pct > self.LIMIT and not self._said:
            self._said = True
            log.warning(
                "training waits for data %.0f %% of the time: more --threads (a machine with more cores),%s GPUs that"
                " decode JPEGs in hardware (A100, H100 and later) or, as another recipe, fewer --randaug-layers would"
                " help; tools/bench_throughput.py, in a checkout, measures the loader and the step by themselves",
                data_wait_pct,
                self._help,
            )


class TimeLeft:
    """Seconds to the end of a run, by the mean of all steps except the first log line's, which torch.compile slows.

    The time of evaluations and checkpoints is included, as more of them are to come.
    """

    def __init__(self, total: int, start: int) -> None:
        self._total, self._step, self._time = total, start, time.perf_counter()
        self._first = True

    def after(self, done: int) -> float:
        """Call it once a log line."""
        now = time.perf_counter()
        left = (self._total - done) * (now - self._time) / (done - self._step)
        if self._first:
            self._first, self._step, self._time = False, done, now
        return left


@contextmanager
def progress_bar(total: int, start: int, *, visible: bool) -> Iterator[tqdm]:
    """A progress bar with the time left where stderr is a terminal; a log file gets only the log lines."""
    shown = visible and sys.stderr.isatty()
    with (
        logging_redirect_tqdm(loggers=[logging.getLogger("dali_vit")]),
        tqdm(total=total, initial=start, disable=not shown, unit="step", dynamic_ncols=True) as bar,
    ):
        yield bar


def progress_line(step: int, total: int, epoch: float, scalars: Mapping[str, float], eta: float) -> str:
    """The log line of a window of steps. scalars: `train/loss`, `train/lr` and what `speed` gives; eta: seconds."""
    parts = [
        f"step {step:>{len(str(total))}}/{total}",
        f"epoch {epoch:.2f}",
        f"loss {_short(scalars['train/loss'])}",
        f"lr {scalars['train/lr']:.2e}",
        f"{scalars['perf/images_per_sec']:,.0f} img/s",
        f"data wait {scalars['perf/data_wait_pct']:.1f} %",
    ]
    if "perf/mfu_pct" in scalars:
        parts.append(f"MFU {scalars['perf/mfu_pct']:.1f} %")
    return " | ".join([*parts, f"ETA {duration(eta)}"])


def evaluation_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """The log line of an evaluation; metrics as `evaluate_splits` gives them, of any splits or none."""
    parts = []  # none where nothing was evaluated
    for split in sorted({name.split("/")[0] for name in metrics}):
        values = {name.split("/")[1]: value for name, value in metrics.items() if name.startswith(f"{split}/")}
        parts.append(f"{split} top1 {values['top1']:.2f} % top5 {values['top5']:.2f} % loss {_short(values['loss'])}")
        if bad := round(values.get("bad_samples", 0)):
            parts[-1] += f" ({counted(bad, 'image')} left out)"
    return " | ".join([f"step {step:>{len(str(total))}}/{total}", *parts])


def _short(loss: float) -> str:
    return f"{loss:.4f}" if abs(loss) < 1e5 else f"{loss:.4g}"  # a diverging run's loss may have 38 digits


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as `1:02:03`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
