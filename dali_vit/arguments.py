"""Command-line flags of eval, predict, convert, export, preview and doctor; the text under a field is its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dali_vit.config import Config

__all__ = [
    "ConvertArguments",
    "DoctorArguments",
    "EvalArguments",
    "ExportArguments",
    "PredictArguments",
    "PreviewArguments",
]


@dataclass(frozen=True)
class EvalArguments:
    """Accuracy of a checkpoint on a labelled set; on GPUs with matrix products in bfloat16, as during a run."""

    checkpoint: Path
    """Run folder (its newest checkpoint), step_* folder, .safetensors, or big_vision .npz."""
    data: str
    """Folder with val/<class>/* (train/<class>/* for other splits), shards of `prepare` (s3:// too), or `demo`."""
    gpus: int | None = None
    """GPUs to use; 0: the CPU; default: all, else the CPU."""
    split: Literal["val", "minival", "train"] = "val"
    """Images to evaluate on; `train` leaves out those of minival."""
    minival: float | None = None
    """Share of the training images held out as minival; default: the run's, or 0.01 for a file of weights."""
    v2: bool = False
    """DATA itself holds the class folders, as ImageNet-V2 does (named 0 to 999, or by class); scalars are `v2/`."""
    real: Path | None = None
    """ReaL's real.json: also report accuracy against its labels."""
    max_bad_share: float = 0.0
    """Share of the images that may be undecodable and are left out, as by train; above 0 a single one always may be."""
    batch_size: int = 256
    """Images per step and process."""
    resolution: int | None = None
    """Side of the images; default: the checkpoint's. Position embeddings are resampled."""
    threads: int | None = None
    """DALI's CPU threads per process; default: its share of the machine's cores."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class PredictArguments:
    """The likeliest classes of image files."""

    # Without the hint, tyro's help would call the argument optional, as the tuple may be empty.
    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...", help_behavior_hint="(required)")
    ]
    """Image files, or folders, of which all images at any depth are taken."""
    checkpoint: Path
    """Run folder (its newest checkpoint), step_* folder, .safetensors, or big_vision .npz."""
    top: int = 5
    """Classes to name per image."""
    gpus: int | None = None
    """1: a GPU; 0: the CPU; default: a GPU where there is one."""
    resolution: int | None = None
    """Side of the images; default: the checkpoint's. Position embeddings are resampled."""
    json: bool = False
    """Print one JSON array instead of a table."""


@dataclass(frozen=True)
class DoctorArguments:
    """What this machine has and what it will be used for."""


@dataclass(frozen=True)
class ConvertArguments:
    """Converts a big_vision .npz checkpoint to .safetensors, or back."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """.npz, or a checkpoint of ours."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """.safetensors or .npz; must not exist."""
    resolution: int | None = None
    """Resample the position embeddings for images of this side; default: the checkpoint's, 224 where it has none."""


@dataclass(frozen=True)
class ExportArguments:
    """A checkpoint as a folder that timm loads: model.safetensors and config.json."""

    checkpoint: Path
    """Run folder (its newest checkpoint), step_* folder, .safetensors, or big_vision .npz."""
    out: Path
    """Folder to create; it must either not exist yet or be empty."""
    resolution: int | None = None
    """Resample the position embeddings for images of this side."""


@dataclass(frozen=True)
class PreviewArguments:
    """Draws the images of a training step, each below the image it was made of, with its class.

    It takes every setting of `train`, and its --config FILE.
    """

    out: Path
    """PNG file to create; must not exist."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    at_step: int = 0
    """Step whose images to draw: those that a run with the same settings trains on, before Mixup."""
    images: int = 32
    """How many images of the step's batch to draw."""
