"""Images as a process gets them: its share of the training stream and of an evaluation, loaded as the config has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dali_vit.config import Config, UserError
from dali_vit.data import Dataset, ImageList
from dali_vit.distributed import Group
from pipelines import readers, windows
from pipelines.crop import Decoder
from pipelines.loader import EvalLoader, TooManyFiles, TrainLoader
from pipelines.train import Augment

__all__ = [
    "Decoder",
    "EvalLoader",
    "LoaderSettings",
    "TrainLoader",
    "allow_open_files",
    "default_settings",
    "eval_loader",
    "num_threads",
    "train_loader",
]


@dataclass(frozen=True)
class LoaderSettings:
    """How the training stream is made ready: what decides how fast it is, not what is in it."""

    threads: int
    """DALI's CPU threads of this process."""
    prefetch: int = 2
    """Batches that are worked ahead."""
    decoder: Decoder = field(default_factory=Decoder)


def num_threads(config: Config, group: Group) -> int:
    """DALI's CPU threads for this process."""
    return config.run.threads or group.cores


def default_settings(config: Config, group: Group) -> LoaderSettings:
    """What is loaded with where no better settings are known; a GPU that fails at windows decodes whole images."""
    whole = group.device.type == "cuda" and windows.fault() is not None
    return LoaderSettings(num_threads(config, group), decoder=Decoder(region="full" if whole else "window"))


def allow_open_files(samples: ImageList, batch_size: int) -> None:
    """Lets this process read batches of so many samples; UserError where the system does not allow it the files."""
    try:
        readers.allow_open_files(samples, batch_size)
    except TooManyFiles as error:
        raise UserError(f"--batch-size: {error}") from error


def train_loader(
    dataset: Dataset,
    config: Config,
    group: Group,
    *,
    settings: LoaderSettings | None = None,
    start_step: int = 0,
    bad_samples: Sequence[int] = (),
) -> TrainLoader:
    """The training stream of this process from a step on, as the config has it; `bad_samples` are left out."""
    data = config.data
    settings = settings or default_settings(config, group)
    train = dataset.split("train")
    allow_open_files(train, config.optim.batch_size // group.world_size)
    return TrainLoader(
        train,
        batch_size=config.optim.batch_size,
        image_size=data.resolution,
        seed=config.run.seed,
        rank=group.rank,
        world_size=group.world_size,
        device=group.device,
        num_threads=settings.threads,
        prefetch=settings.prefetch,
        decoder=settings.decoder,
        start_step=start_step,
        bad_samples=bad_samples,
        max_bad_share=data.max_bad_share,
        augment=Augment(
            crop=data.crop,
            antialias=data.antialias,
            randaug_layers=data.randaug_layers,
            randaug_magnitude=data.randaug_magnitude,
            randaug_contrast=data.randaug_contrast,
        ),
    )


def eval_loader(
    files: ImageList,
    *,
    batch_size: int,
    resolution: int,
    group: Group,
    threads: int,
    max_bad_share: float = 0.0,
) -> EvalLoader:
    """Evaluation batches of this process's share of the files; batch_size is that of one process.

    What cannot be decoded is left out up to a share of the files; by default it ends the evaluation.
    """
    allow_open_files(files, batch_size)
    return EvalLoader(
        files,
        batch_size=batch_size,
        image_size=resolution,
        rank=group.rank,
        world_size=group.world_size,
        device=group.device,
        num_threads=threads,
        max_bad_share=max_bad_share,
    )
