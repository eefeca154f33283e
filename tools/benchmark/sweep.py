"""Which settings of the loader are fastest on this machine and these files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmark.modes import measure_batches
from benchmark.windows import Measurement
from dali_vit import autotune, loaders
from dali_vit import data as datasets
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group, gather_objects
from pipelines.bad_samples import DecodeError
from pipelines.crop import REGIONS, Decoder, Region
from pipelines.loader import TrainLoader

# Rates closer than this are taken as equal, and the worst batch decides: windows of a second differ by as much.
EQUAL_RATES = 0.02

# What a sweep tries but training's own search (`dali_vit.autotune`) does not, and no flag sets.
NOT_FOR_TRAINING = ("preallocate_width_hint", "preallocate_height_hint", "hybrid_huffman_threshold")


@dataclass(frozen=True)
class Settings:
    """What a sweep varies."""

    threads: int
    prefetch: int
    antialias: bool
    decoder: Decoder

    def differences(self, other: Settings) -> str:
        """The settings that differ from another's, as `name value`."""
        return ", ".join(f"{key} {value}" for key, value in self.flat().items() if value != other.flat()[key])

    def flat(self) -> dict[str, Any]:
        fields = asdict(self)
        return fields | fields.pop("decoder")


@dataclass(frozen=True)
class Trial:
    """One setting of the loader and what it reached."""

    settings: Settings
    measurement: Measurement | None
    """None where the setting fails, as when the device's memory does not hold its buffers."""
    same_images: bool
    """Whether the images are those of the run's own settings; only then may the setting be named the best."""

    @property
    def images_per_sec(self) -> float:
        return self.measurement.images_per_sec if self.measurement else 0.0

    @property
    def worst_batch_ms(self) -> float:
        return self.measurement.worst_batch_ms if self.measurement else float("inf")


def sweep(
    config: Config,
    dataset: datasets.Dataset,
    group: Group,
    seconds: float,
    show: Callable[[Trial, Settings], None],
) -> tuple[list[Trial], Trial]:
    """Tries the settings one after the other, each on top of the best so far; returns all trials and the best one.

    `show` is called with each trial as it ends and with the settings the sweep began with. Collective.
    """
    on_gpu = group.device.type == "cuda"
    defaults = autotune.common_defaults(config, group)
    baseline = Settings(defaults.threads, defaults.prefetch, config.data.antialias, defaults.decoder)
    regions = REGIONS[REGIONS.index(baseline.decoder.region) :]  # whole images always decode
    trials: list[Trial] = []

    def run(settings: Settings, same_images: bool) -> Trial:
        measurement = None
        loader = _working_loader(settings, config, dataset, group)
        if loader is not None:
            try:
                measurement = measure_batches(loader, config, group, seconds)
            finally:
                loader.close()
        trials.append(Trial(settings, measurement, same_images))
        show(trials[-1], baseline)
        return trials[-1]

    best = run(baseline, True)
    if best.measurement is None:
        raise UserError("--sweep: already the settings as they are fail; without --sweep the error is shown")
    for changes in _changes(baseline, regions, on_gpu=on_gpu):
        alternatives = [change(best.settings) for change in changes]
        best = choose([best, *(run(settings, True) for settings in alternatives if settings != best.settings)])
    for settings in _other_images(best.settings):
        run(settings, False)
    return trials, best


def choose(trials: list[Trial]) -> Trial:
    """The trial with the shortest worst batch among those as fast as the fastest."""
    fastest = max(trial.images_per_sec for trial in trials)
    equal = [trial for trial in trials if trial.images_per_sec >= (1 - EQUAL_RATES) * fastest]
    return min(equal, key=lambda trial: trial.worst_batch_ms)


def to_json(trials: list[Trial], best: Trial) -> dict[str, Any]:
    """All trials, fastest first, and the settings of the best."""
    rows = [
        {
            "settings": trial.settings.flat(),
            "same_images": trial.same_images,
            "images_per_sec": trial.images_per_sec,
            "worst_batch_ms": trial.worst_batch_ms if trial.measurement else None,
        }
        for trial in sorted(trials, key=lambda trial: -trial.images_per_sec)
    ]
    return {"trials": rows, "best": best.settings.flat()}


def _changes(
    baseline: Settings, regions: Sequence[Region], *, on_gpu: bool
) -> list[list[Callable[[Settings], Settings]]]:
    """Per setting, its values to try, as changes to other settings; those that matter most come first."""

    def decoder(**values: Any) -> Callable[[Settings], Settings]:
        return lambda settings: replace(settings, decoder=replace(settings.decoder, **values))

    threads = baseline.threads
    counts = sorted({max(1, threads // 2), threads, threads + max(1, threads // 2), 2 * threads})
    changes: list[list[Callable[[Settings], Settings]]] = [
        [lambda settings, n=n: replace(settings, threads=n) for n in counts],  # type: ignore[misc]
        [decoder(region=region) for region in regions],
    ]
    if on_gpu:
        changes += [
            [decoder(hw_decoder_load=load) for load in (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.85, 1.0)],
            # What DALI's ImageNet examples preallocate: the largest sides of ImageNet's images.
            [decoder(preallocate_width_hint=w, preallocate_height_hint=h) for w, h in ((0, 0), (5980, 6430))],
            [decoder(hybrid_huffman_threshold=pixels) for pixels in (10_000, 100_000, 1_000_000, 10_000_000)],
        ]
    # Never 1: with nothing worked ahead, training waits for every batch, which the loader alone does not show.
    changes.append([lambda settings, n=n: replace(settings, prefetch=n) for n in (2, 3, 4)])  # type: ignore[misc]
    return changes


def _other_images(settings: Settings) -> list[Settings]:
    """Settings that give other pixels: tried to see what they cost, but never chosen."""
    decoder = settings.decoder
    return [
        replace(settings, antialias=not settings.antialias),
        replace(settings, decoder=replace(decoder, fast_idct=not decoder.fast_idct)),
    ]


def _working_loader(settings: Settings, config: Config, dataset: datasets.Dataset, group: Group) -> TrainLoader | None:
    """A loader of these settings that has given its first batches, or None if that fails on any rank."""
    loader = None
    try:
        loader = _loader(settings, config, dataset, group)
        for _ in range(settings.prefetch + 2):
            next(loader)
        works = True
    except (RuntimeError, DecodeError):  # too many bad samples: if one rank raised that, the others would wait for it
        works = False
    if all(gather_objects(works)):
        return loader
    if loader is not None:
        loader.close()
    return None


def _loader(settings: Settings, config: Config, dataset: datasets.Dataset, group: Group) -> TrainLoader:
    config = replace(config, data=replace(config.data, antialias=settings.antialias))
    loading = loaders.LoaderSettings(settings.threads, settings.prefetch, settings.decoder)
    return loaders.train_loader(dataset, config, group, settings=loading)
