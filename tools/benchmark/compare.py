"""Our loader against torchvision's and timm's: the same files, cores, batch size and kind of augmentation."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dali_vit import data as datasets
from dali_vit import loaders
from dali_vit.config import Config, DataConfig, LocalUserError, UserError
from dali_vit.distributed import Group, gather_objects, together
from dali_vit.loaders import LoaderSettings
from pipelines.loader import TrainLoader
from pipelines.order import TrainOrder
from pipelines.readers import FileList

OURS = "dali-vit"
TIMM = "timm"
TORCHVISION = {"PIL": "torchvision, PIL", "decode_image": "torchvision, decode_image"}
ROUNDS = 3

# The magnitude of the other loaders' RandAugment. What RandAugment costs hardly depends on it, and below 3 timm
# posterizes to 0 bits, which Pillow refuses.
_MAGNITUDE = 10

_PREFETCH = 2  # batches a worker works ahead, the DataLoader's default

SHARED_MEMORY = "/dev/shm"  # where torch's workers put their tensors

Batch = tuple[Tensor, Tensor]


class Unreadable(Exception):
    """An image that another loader cannot read: its path, and why."""


class Contestant(Protocol):
    """A loader that takes part in every round and rests between them."""

    cycle: int
    """Number of batches that arrive together: workers that run in step deliver one each."""

    def batches(self) -> Any:
        """Context of one round; its value is an iterator of (images, labels) on the device."""


@dataclass
class _Ours:
    loader: TrainLoader
    cycle: int = 1

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        yield self.loader


class _Files(Dataset[tuple[Any, int]]):
    """Images of a FileList, loaded by path and transformed, with their labels."""

    def __init__(self, files: FileList, load: Callable[[str], Any], transform: Callable[[Any], Any]) -> None:
        self.files, self.load, self.transform = files, load, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path = self.files.path(index)
        try:
            image = self.load(path)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # Pillow has many: OSError, SyntaxError, DecompressionBombError
            raise Unreadable(f"{path}: {' '.join(str(error).split())}") from error
        return self.transform(image), int(self.files.labels[index])


class _Order(Sampler[list[int]]):
    """The batches that our loader takes, until stopped; a pass goes on where the last one ended."""

    def __init__(self, order: TrainOrder) -> None:
        self.order, self.step, self.stopped = order, 0, False

    def __iter__(self) -> Iterator[list[int]]:
        while not self.stopped:
            yield self.order.indices(self.step).tolist()
            self.step += 1


class _Workers:
    """A DataLoader whose worker processes live from round to round."""

    def __init__(
        self,
        dataset: _Files,
        order: TrainOrder,
        *,
        workers: int,
        device: torch.device,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.cycle = workers
        self._device = device
        self._order = _Order(order)
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._order,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
            collate_fn=collate,
        )

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        self._order.stopped = False
        iterator = iter(self._loader)
        yield self._on_device(iterator)
        self._order.stopped = True
        for _ in iterator:  # until the workers have nothing left to do
            pass

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        try:
            for images, labels in batches:
                yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
        except Unreadable as error:
            what = str(error).rstrip().rsplit(f"{Unreadable.__name__}: ", 1)[-1]  # follows the worker's traceback
            raise LocalUserError(
                f"--compare: one of the other loaders, which need every image, cannot read {what}; `dali-vit verify"
                " --quarantine` moves images that are damaged, and those of a format that it does not know are to be"
                " converted"
            ) from error


def compare(
    config: Config,
    dataset: datasets.Dataset,
    settings: Callable[[], LoaderSettings],
    group: Group,
    seconds: float,
) -> dict[str, Any]:
    """Rates of all loaders in alternating rounds of `seconds` each, as `summarize` gives them.

    `settings` gives those of our loader; it is called after the other loaders have forked. Each loader is fed by as
    many threads (ours) or worker processes (the others) as --threads says, or this process has cores. Collective.
    """
    workers = loaders.num_threads(config, group)
    files = dataset.split("train")
    if not isinstance(files, FileList):
        raise UserError(f"--compare: {dataset.root} holds shards, which the other loaders cannot read; give a folder")
    together(lambda: _check_shared_memory(config, workers))
    contestants: dict[str, Contestant] = others(config, files, group, workers)
    for contestant in contestants.values():  # forks the workers, before DALI starts threads
        with contestant.batches() as batches:
            next(batches)
    loader = loaders.train_loader(dataset, config, group, settings=settings())
    contestants = {OURS: _Ours(loader), **contestants}
    rounds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, contestant in contestants.items():
            with contestant.batches() as batches:
                rate = _rate(batches, contestant.cycle, seconds, group.device)
            rounds[name].append(sum(gather_objects(rate)))
    loader.close()
    return {"workers": workers * group.world_size, **summarize(rounds)}


def _check_shared_memory(config: Config, workers: int) -> None:
    """UserError where batches handed over by the other loaders' workers do not fit; containers default to 64 MB."""
    images = workers * (_PREFETCH + 1) * config.optim.batch_size  # of all processes, but of one loader: they take turns
    needed = images * 3 * config.data.resolution**2
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"--compare: the other loaders' workers hand batches over in {SHARED_MEMORY}, which has {free >> 20:,} MB"
            f" free of the {-(-needed >> 20):,} MB that they need: give it more (docker run --shm-size), or take a"
            " smaller --batch-size"
        )


def summarize(rounds: dict[str, list[float]]) -> dict[str, Any]:
    """The comparison in numbers, from the rate of each loader in each round.

    `ratio` is the median over the rounds of our rate divided by the best other one of the same round; torchvision
    counts with the faster of its two ways of decoding, by the median rate.
    """
    medians = {name: float(np.median(rates)) for name, rates in rounds.items()}
    decode = max(TORCHVISION, key=lambda way: medians[TORCHVISION[way]])
    others = [TORCHVISION[decode], TIMM]
    ratios = [ours / max(rates) for ours, *rates in zip(rounds[OURS], *(rounds[name] for name in others), strict=True)]
    return {
        "loaders": {name: {"images_per_sec": medians[name], "rounds": rates} for name, rates in rounds.items()},
        "torchvision_decode": decode,
        "best_other": max(others, key=medians.__getitem__),
        "ratios": ratios,
        "ratio": float(np.median(ratios)),
    }


def _rate(batches: Iterator[Batch], cycle: int, seconds: float, device: torch.device) -> float:
    """Images per second of this process, over whole cycles of batches and at least `seconds`."""
    # Batches that were made ahead before the measurement must be used up first.
    for _ in range(max(5, (_PREFETCH + 1) * cycle)):
        next(batches)
    count = 0
    _synchronize(device)
    start = time.perf_counter()
    while True:
        for _ in range(cycle):
            images, _labels = next(batches)
            count += len(images)
        if time.perf_counter() - start >= seconds:
            _synchronize(device)
            return count / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def others(config: Config, files: FileList, group: Group, workers: int) -> dict[str, Contestant]:
    order = TrainOrder(len(files), config.optim.batch_size, group.rank, group.world_size, config.run.seed)

    def with_workers(load: Callable[[str], Any], transform: Callable[[Any], Any], **options: Any) -> Contestant:
        return _Workers(_Files(files, load, transform), order, workers=workers, device=group.device, **options)

    from timm.data.loader import fast_collate

    return {
        TORCHVISION["PIL"]: with_workers(_load_pil, _torchvision_transform(config.data)),
        TORCHVISION["decode_image"]: with_workers(_load_tensor, _torchvision_transform(config.data)),
        TIMM: with_workers(_load_pil, _timm_transform(config.data), collate=fast_collate),
    }


def _load_pil(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _load_tensor(path: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, ImageReadMode.RGB)


def _torchvision_transform(data: DataConfig) -> Callable[[Any], Any]:
    """torchvision's transforms v2, from a PIL image or a uint8 tensor [3, H, W] to uint8 [3, S, S]."""
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(data.resolution, scale=(0.05, 1.0)), v2.RandomHorizontalFlip()]
    if data.randaug_layers:
        steps.append(v2.RandAugment(data.randaug_layers, _MAGNITUDE))
    return v2.Compose([*steps, v2.PILToTensor()])


def _timm_transform(data: DataConfig) -> Callable[[Any], Any]:
    """timm's training transform as its prefetching loader uses it: from a PIL image to uint8 [3, S, S].

    As timm has it, each RandAugment operation is applied with probability 0.5.
    """
    from timm.data import create_transform

    policy = f"rand-m{_MAGNITUDE}-n{data.randaug_layers}" if data.randaug_layers else None
    return create_transform(
        data.resolution,
        is_training=True,
        scale=(0.05, 1.0),
        color_jitter=0.0,
        auto_augment=policy,
        use_prefetcher=True,
    )
