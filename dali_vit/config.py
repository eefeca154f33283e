"""Every setting of a run: its type, its default (the paper's 90-epoch ViT-S/16) and its one-line meaning.

The docstring under a field is its help text on the command line. The defaults reproduce *Better plain ViT
baselines for ImageNet-1k* (arXiv 2205.01580), except for `antialias` and `first_moment`, which make no measurable
difference, and `spike_threshold`, which leaves out steps that big_vision would take. Steps whose gradient is not finite
and images that cannot be decoded are left out, too. On GPUs matrix products are in bfloat16, and the JPEG decoder used
in training repeats chroma (`pipelines.crop.Decoder`). `dali_vit.recipes` states what other recipes change.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dali_vit.files import at_home

CompileMode = Literal["auto", "off", "default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]
"""How the training step is compiled: auto, off or one of torch.compile's modes."""

WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""The modes that record CUDA graphs."""


AttentionKernel = Literal["auto", "flash", "cudnn", "efficient", "packed"]
"""What computes attention in training: auto, one of torch's kernels or dali_vit/packed_attention.py (`packed`)."""


class UserError(ValueError):
    """A mistake the user can mend: one line that names the flag, file or value and the remedy."""


class LocalUserError(UserError):
    """A UserError that may occur on one rank and not on others: each rank on which it occurs reports it itself."""


_MENDABLE = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def mendable(error: OSError) -> UserError | None:
    """The UserError for the operating system's refusal of a file; None where the cause may be a defect of ours."""
    if error.filename is None or error.errno not in _MENDABLE:
        return None
    return UserError(f"{os.fsdecode(error.filename)}: {error.strerror}; {_MENDABLE[error.errno]}")


def operational(default: Any) -> Any:
    """A field that may change when a run is resumed: the weights of a healthy run do not depend on it."""
    return field(default=default, metadata={"operational": True})


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are augmented."""

    data: str | None = operational(None)
    """Folder with train/<class>/* and val/<class>/*, shards that `prepare` made (s3://bucket/prefix too), or `demo`."""
    resolution: int = 224
    """Side of the square training and evaluation images, in pixels."""
    minival: float = 0.01
    """Share of the training images held out for decisions; the same images on every machine."""
    max_bad_share: float = operational(0.01)
    """Largest share of train, minival or val that may be undecodable, and is left out; above 0 one image always may."""
    crop: Literal["tensorflow", "torchvision"] = "tensorflow"
    """Sampling of the Inception crop, of 5 % of the area or more: TensorFlow's (the paper's) or torchvision's."""
    antialias: bool = True
    """Low-pass filter when the crop is made smaller (big_vision: off, which mup-vit found to make no difference)."""
    randaug_layers: int = 2
    """RandAugment operations applied to each image; 0 switches RandAugment off."""
    randaug_magnitude: float = 10.0
    """Strength of the RandAugment operations, 0 to 10."""
    randaug_contrast: Literal["paper", "mean"] = "paper"
    """`paper`: contrast blends with a fixed grey, as the reference does; `mean`: with the image's mean."""


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    model: str = "S/16"
    """VARIANT/PATCH of a plain ViT (mu, Ti, S, M, B, L, So400m, H, g, G), or timm:NAME for any classifier of timm."""
    pool: Literal["gap", "tok"] = "gap"
    """Global average pooling, or the [cls] token."""
    posemb: Literal["sincos2d", "learn"] = "sincos2d"
    """Position embeddings: fixed 2-D sine-cosine, or learned."""
    head: Literal["mlp", "linear"] = "mlp"
    """`mlp`: dense + tanh before the classifier; `linear`: the classifier alone."""
    width: int | None = None
    """Token width; overrides the variant's."""
    depth: int | None = None
    """Number of blocks; overrides the variant's."""
    num_heads: int | None = None
    """Attention heads; overrides the variant's."""
    mlp_dim: int | None = None
    """Hidden width of the MLP blocks; overrides the variant's."""
    residual: Literal["float32", "bfloat16"] = "float32"
    """Type of the residual stream where matrix products are in bfloat16, on GPUs; bfloat16 moves fewer bytes."""


@dataclass(frozen=True)
class OptimConfig:
    """Length, batch, optimiser, schedule, Mixup."""

    epochs: float | None = 90.0
    """Passes over the training images (steps = round(epochs x images / batch size)); excludes --steps."""
    steps: int | None = None
    """Training steps; excludes --epochs."""
    batch_size: int = 1024
    """Images per step over all GPUs."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW with decoupled weight decay, or SGD with momentum."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """Decay per step at peak, scaled by the schedule but not by lr (1e-4 at 1e-3 is torch's 0.1); sgd: L2."""
    warmup_steps: int = 10_000
    """Steps of linear warm-up from 0; the cosine to 0 follows."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    momentum: float = 0.9
    """Momentum of SGD."""
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """Type that Adam's first moment is rounded to after each step (big_vision: bfloat16); it is stored as float32."""
    grad_clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down; None switches clipping off."""
    spike_threshold: float = operational(10.0)
    """Skip steps whose loss is so many standard deviations above its running mean (docs/distributed.md); 0: none."""
    label_smoothing: float = 0.0
    """Share of each label spread over all classes."""
    mixup_alpha: float = 0.2
    """Mixup's Beta(alpha, alpha); 0 switches Mixup off."""


@dataclass(frozen=True)
class RunConfig:
    """How the run is carried out. Only --seed is meant to change what is learned. Two others change it slightly: the
    number of processes, as Mixup pairs images within a process's share, and --grad-accum-steps, with batch norm."""

    recipe: str = operational("s16-90ep")
    """Recipe that supplies every default; the help of `dali-vit train` lists them."""
    name: str | None = operational(None)
    """Name of the run's folder; default: the recipe's name."""
    runs_dir: Path = operational(Path("runs"))
    """Folder that holds the runs."""
    seed: int = 0
    """Seed of the initial weights, the data order, the augmentation and Mixup."""
    gpus: int | None = operational(None)
    """GPUs on this machine, one process each; 0: the CPU; default: all, else the CPU."""
    threads: int | None = operational(None)
    """DALI's CPU threads per process; default: its share of the machine's cores, or what --autotune finds."""
    autotune: Literal["auto", "on", "off"] = operational("auto")
    """Search for the loader's fastest settings at the start, about a minute, kept for later runs; auto: on GPUs."""
    compile: CompileMode = operational("auto")
    """torch.compile of the step; auto: default on GPUs, off on the CPU; reduce-overhead, max-autotune: CUDA graphs."""
    attention: AttentionKernel = operational("auto")
    """Kernel of attention in a plain ViT's training on GPUs; auto: the fastest, measured at the start."""
    resume: bool = operational(True)
    """Go on from the newest checkpoint of a run that exists; --no-resume refuses such a run."""
    log_every: int = operational(50)
    """Steps between log lines and scalars."""
    eval_every: float = operational(2.0)
    """Epochs between evaluations on minival and val (big_vision: 2,500 steps, 2 epochs of 1,024); 0: at the end."""
    checkpoint_every: int = operational(1000)
    """Steps between checkpoints; one is also written before each evaluation and at the end."""
    keep_checkpoints: int = operational(3)
    """Number of newest checkpoints to keep, besides the best by minival top-1 (without a minival, by val top-1)."""
    grad_accum_steps: int = operational(1)
    """Parts to split a GPU's share of a batch into: less memory, the same step except for rounding and batch norm."""
    max_hours: float | None = operational(None)
    """Stop after this many hours with a checkpoint and exit code 75; started again, the run goes on."""
    max_restarts: int = operational(3)
    """How often a run with two or more --gpus restarts its processes from the last checkpoint after one has died."""
    max_skipped_steps: int = operational(10)
    """Steps that may be left out for a gradient that is not finite or a loss spike before the run stops."""
    hang_timeout: float = operational(600.0)
    """Seconds without progress after which a process names the stage it hangs in and ends; 0: never."""
    profile: int = operational(0)
    """Steps to trace, after the first 10 (in a shorter run, the last), into profile/ in the run's folder; 0: none."""


@dataclass(frozen=True)
class Config:
    """A resolved training run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    @property
    def run_dir(self) -> Path:
        """The run's folder: `runs_dir` with ~ expanded, and in it the name, or else the recipe's."""
        return at_home(self.run.runs_dir) / (self.run.name or self.run.recipe)


GROUPS: dict[str, Any] = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig, "run": RunConfig}
"""The types of Config's fields by name."""


def total_steps(optim: OptimConfig, num_images: int) -> int:
    """Steps of the whole run; the stream is infinite, so epochs are not rounded down to full batches."""
    if optim.steps is not None:
        return optim.steps
    assert optim.epochs is not None
    return max(1, round(optim.epochs * num_images / optim.batch_size))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The config as plain YAML/JSON values, one dictionary per group."""
    groups = dataclasses.asdict(config)
    return {
        group: {key: str(value) if isinstance(value, Path) else value for key, value in fields.items()}
        for group, fields in groups.items()
    }


def from_dict(groups: dict[str, dict[str, Any]]) -> Config:
    """The inverse of `to_dict`; fields that are missing take their default, unknown ones raise UserError."""
    resolved: dict[str, Any] = {}
    for group, group_type in GROUPS.items():
        values = dict(groups.get(group, {}))
        known = {f.name for f in dataclasses.fields(group_type)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"config has unknown fields ({', '.join(unknown)}): another version wrote it")
        if "runs_dir" in values:
            values["runs_dir"] = Path(values["runs_dir"])
        resolved[group] = group_type(**values)
    return Config(**resolved)


def to_yaml(config: Config) -> str:
    """The text of a run's config.yaml, which `--config` takes: every field, including those at their default."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(old: Config, new: Config) -> list[str]:
    """`--flag old -> new` for every setting that differs and would change the trained weights."""
    lines = []
    for group, group_type in GROUPS.items():
        for f in dataclasses.fields(group_type):
            if f.metadata.get("operational"):
                continue
            before, after = (getattr(getattr(c, group), f.name) for c in (old, new))
            if before != after:
                lines.append(f"--{f.name.replace('_', '-')} {before} -> {after}")
    return lines
