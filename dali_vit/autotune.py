"""Finds, in about a minute, the loader settings that are fastest on this machine and these files, and remembers them.

Only settings that do not change the images are tried: number of threads and prefetch depth, and on a GPU which part of
a JPEG is decoded and by which decoder (decoders may round differently). A GPU is kept busy meanwhile: the settings that
load fastest beside training need not be fastest alone, where decoding may take the whole chip.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dali_vit import data as datasets
from dali_vit import environment, loaders
from dali_vit.compiling import on_one_line
from dali_vit.config import Config, LocalUserError
from dali_vit.distributed import Group, gather_objects, now
from dali_vit.files import cache_folder, replacing
from dali_vit.loaders import Decoder, LoaderSettings
from dali_vit.mixup import normalize
from dali_vit.trials import Trials, describe
from pipelines import windows
from pipelines.bad_samples import DecodeError
from pipelines.crop import REGIONS

log = logging.getLogger(__name__)

MAX_SECONDS = 60.0
"""Once the search has taken this long, no further settings are tried."""
_SECONDS_PER_SETTING = 1.5
_GAIN = 1.02  # rates measured in such short windows vary this much by themselves

# The hardware decoder's shares to try in each round, by the best so far. The optimum is where that decoder and CUDA's
# finish at the same time, which depends on the GPU and the number of cores; on either side of it the rate falls.
_HW_LOADS: Sequence[dict[float, tuple[float, ...]]] = (
    {0.65: (0.35, 0.85)},
    {0.65: (0.5, 0.75), 0.35: (0.5, 0.2), 0.85: (0.75, 1.0)},
    {0.2: (0.1, 0.0)},
)

_DECODERS = ("nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg-cu12")  # each has releases of its own

Work = Callable[[Tensor], object]
"""Processes a batch's images, uint8 [N, S, S, 3], while the next batches are loaded."""

Alternatives = Callable[[LoaderSettings], Sequence[LoaderSettings]]
"""Maps settings to the alternatives to compare them with, each of which differs in one value."""


def loader_settings(dataset: datasets.Dataset, config: Config, group: Group, model: nn.Module) -> LoaderSettings:
    """The loader's settings: those found here before, else those that a search finds; the defaults without autotuning.

    `--autotune` decides (`is_on`). On GPUs the model, on the group's device, runs on the loaded images during the
    search, and is left as it was. Collective: all ranks get the same settings.
    """
    engine = environment.jpeg_engine(group.device)
    if group.is_main and engine.startswith("unusable"):
        log.warning("the GPU decodes JPEGs without the engine that it has for that, %s", engine)
    defaults = common_defaults(config, group)
    if not is_on(config, group):
        return defaults
    conditions = _conditions(dataset, config, group, defaults)
    path = cache_path(conditions)
    found = gather_objects(_read(path, conditions) if group.is_main else None)[0]
    if found is not None:
        log.info("autotune: %s, as found before (%s)", describe(found), path)
        return found
    began = time.monotonic()
    trials = Trials(path.with_suffix(".trying"), group)
    with _training_like(model, group, config.run.grad_accum_steps) as work:
        rates = search(dataset, config, group, defaults, began + MAX_SECONDS, work, trials)
    trials.done()
    best = max(rates, key=rates.__getitem__)
    if rates[best] < _GAIN * rates[defaults]:
        best = defaults
    if group.is_main:
        kept = rates[best] > 0 and _write(path, conditions, best, rates[best])  # a rate of 0: no settings work
        log.info(
            "autotune: %s loads %s images/s%s, the defaults %s; %d settings tried in %.0f s, %s",
            describe(best),
            f"{rates[best]:,.0f}",
            " beside the model" if group.device.type == "cuda" else "",
            f"{rates[defaults]:,.0f}",
            len(rates),
            time.monotonic() - began,
            f"kept in {path}" if kept else "not kept",
        )
    return best


def is_on(config: Config, group: Group) -> bool:
    """Whether `--autotune` asks for a search; by default where training is on GPUs."""
    return config.run.autotune == "on" or (config.run.autotune == "auto" and group.device.type == "cuda")


def common_defaults(config: Config, group: Group) -> LoaderSettings:
    """Defaults that suit all ranks: some may have fewer cores, or be unable to decode windows alone. Collective."""
    own = loaders.default_settings(config, group)
    gathered = gather_objects((own, windows.fault() if own.decoder.region == "full" else None))
    of_ranks, faults = zip(*gathered, strict=True)
    regions = [one.decoder.region for one in of_ranks]
    region = max(regions, key=REGIONS.index)
    if group.is_main and region != regions[0]:
        rank = regions.index(region)
        log.warning("whole JPEGs are decoded, as decoding windows alone fails on rank %d (%s)", rank, faults[rank])
    threads = min(one.threads for one in of_ranks)
    return replace(of_ranks[0], threads=threads, decoder=replace(of_ranks[0].decoder, region=region))


@contextmanager
def _training_like(model: nn.Module, group: Group, parts: int = 1) -> Iterator[Work]:
    """Work that keeps a GPU as busy as a training step does; on the CPU, where it would take minutes, no work.

    It is the forward pass without compilation, over one part of the batch after the other: a third of the step's
    arithmetic, about three times as slow.
    """
    if group.device.type != "cuda":
        yield lambda images: None
        return

    @torch.no_grad()
    def forward(images: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            for part in images.chunk(parts):
                model(normalize(part))

    was_training = model.training
    model.eval()  # keeps batch norm's running statistics as they are
    try:
        yield forward
    finally:
        model.train(was_training)
        with suppress(RuntimeError):  # of a GPU that is lost, which is told of already
            torch.cuda.empty_cache()


def search(
    dataset: datasets.Dataset,
    config: Config,
    group: Group,
    defaults: LoaderSettings,
    deadline: float,
    work: Work = lambda images: None,
    trials: Trials | None = None,
) -> dict[LoaderSettings, float]:
    """Images/s over all ranks for the defaults and for each of the settings tried; 0 for settings that fail.

    One value after the other is varied on top of the best settings so far, the most important first. The deadline is a
    time of `time.monotonic`. With `trials`, settings that ended processes before count as failing. Collective.
    """
    bad_samples: set[int] = set()

    def rate(settings: LoaderSettings) -> float:
        if trials is not None and not trials.begin(settings):
            return 0.0
        found = _rate(dataset, config, group, settings, bad_samples, work)
        if trials is not None:
            trials.survived(settings)
        return found

    rates = {defaults: rate(defaults)}
    best = defaults
    for alternatives in _alternatives(vary_threads=config.run.threads is None, group=group):
        for settings in alternatives(best):
            if settings in rates:
                continue
            if gather_objects(time.monotonic() > deadline)[0]:
                return rates
            rates[settings] = rate(settings)
            if rates[settings] > _GAIN * rates[best]:
                best = settings
    return rates


def _alternatives(*, vary_threads: bool, group: Group) -> Iterator[Alternatives]:
    """For one value after the other, a function that gives the settings to compare with the best so far."""
    if group.device.type == "cuda":
        for loads in _HW_LOADS:
            yield lambda best, loads=loads: [  # type: ignore[misc]
                replace(best, decoder=replace(best.decoder, hw_decoder_load=load))
                for load in loads.get(best.decoder.hw_decoder_load, ())
            ]
        yield lambda best: [replace(best, decoder=replace(best.decoder, region="full"))]
    if vary_threads:
        yield lambda best: [
            replace(best, threads=n) for n in (best.threads + best.threads // 2, best.threads // 2) if n > 0
        ]
    yield lambda best: [replace(best, prefetch=n) for n in (3, 4)]  # never 1: training would wait for every batch


def _rate(
    dataset: datasets.Dataset,
    config: Config,
    group: Group,
    settings: LoaderSettings,
    bad_samples: set[int],
    work: Work,
) -> float:
    """Images/s of the training stream beside the work, over all ranks at the pace of the slowest; 0 where it fails.

    Samples that cannot be decoded are added to `bad_samples`, so that later measurements need not find them again.
    LocalUserError where the settings leave the GPU unusable to this process.
    """
    seconds, loader = float("inf"), None
    try:
        loader = loaders.train_loader(dataset, config, group, settings=settings, bad_samples=sorted(bad_samples))
        for _ in range(2 * settings.prefetch + 2):  # batches loaded ahead, before the measurement
            work(next(loader)[0])
        count, began = 0, now(group)
        while time.perf_counter() - began < _SECONDS_PER_SETTING:
            work(next(loader)[0])
            count += 1
        seconds = (now(group) - began) / count
    # DALI's error, as when the device's memory does not hold the buffers; or too many bad samples, which training will
    # report. If one rank raised either of them here, the other ranks would wait for it.
    except (RuntimeError, DecodeError) as error:
        log.debug("autotune: %s fails: %s", describe(settings), error)
        if environment.is_lost(group.device):
            raise LocalUserError(
                f"autotune: {describe(settings)} broke this process's use of the GPU ({on_one_line(error)}); give"
                " --autotune off, or start again: after a second such end these settings are left out"
            ) from error
    finally:
        if loader is not None:
            bad_samples.update(loader.bad_samples)
            loader.close()
    return config.optim.batch_size / max(gather_objects(seconds))


def _conditions(dataset: datasets.Dataset, config: Config, group: Group, defaults: LoaderSettings) -> dict[str, Any]:
    """All that the fastest settings may depend on."""
    versions = environment.versions()
    return {
        "gpus": environment.gpu_names() if group.device.type == "cuda" else [],
        "driver": environment.gpu_driver(),
        "cpu": f"{environment.cpu_name()} x {environment.cpu_count()}",
        "decoders": [versions[name] for name in _DECODERS] + [environment.jpeg_engine(group.device)],
        "defaults": asdict(defaults),  # which tell whether windows can be decoded alone
        "processes": [group.local_world_size, group.world_size, group.cores],
        "threads": config.run.threads,
        "data": str(dataset.root),
        "images": len(dataset.split("train")),
        "batch_size": config.optim.batch_size,
        "parts": config.run.grad_accum_steps,
        "resolution": config.data.resolution,
        "model": asdict(config.model),
        "augment": [config.data.crop, config.data.antialias, config.data.randaug_layers],
    }


def cache_path(conditions: dict[str, Any]) -> Path:
    """The file in the user's cache that keeps the settings found under these conditions."""
    digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"autotune-{digest[:16]}.json"


def _read(path: Path, conditions: dict[str, Any]) -> LoaderSettings | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["conditions"] != conditions:
            return None
        settings = kept["settings"]
        return LoaderSettings(settings["threads"], settings["prefetch"], Decoder(**settings["decoder"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("autotune: %s cannot be used and is made anew: %s", path, error)
        return None


def _write(path: Path, conditions: dict[str, Any], settings: LoaderSettings, rate: float) -> bool:
    """Keeps the settings found; returns whether the file could be written."""
    text = json.dumps({"conditions": conditions, "settings": asdict(settings), "images_per_sec": rate}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        log.warning("autotune: %s cannot be written: %s", path, error)
        return False
    return True
