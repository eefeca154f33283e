"""Images that a run leaves out because they cannot be read, decoded or cropped."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from shlex import quote
from typing import Any

from dali_vit import data as datasets
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group, gather_objects, together
from dali_vit.loaders import num_threads
from pipelines.bad_samples import most_allowed
from pipelines.bad_samples import still_bad as still_undecodable
from pipelines.words import some

__all__ = ["check_share", "of_all_ranks", "still_bad"]

log = logging.getLogger(__name__)

_SECONDS = 60.0  # for trying left-out images again, while launchers and other nodes wait


def of_all_ranks(loader_states: Iterable[dict[str, Any]]) -> list[int]:
    """Indices of the training samples that any rank has found undecodable, rising."""
    return sorted({index for state in loader_states for index in state["bad_samples"]})


def still_bad(
    loader_states: Iterable[dict[str, Any]], dataset: datasets.Dataset, config: Config, group: Group
) -> list[int]:
    """Indices of the left-out samples that still cannot be decoded when a run goes on, rising.

    A file may have been mended, or a disk may have been away for a moment. Collective: the ranks share the work, and
    all get the same result.
    """
    before = of_all_ranks(loader_states)
    if not before:
        return []
    log.info("%d training images were left out: they are tried again", len(before))
    samples = dataset.split("train")

    def found() -> list[int]:
        own = before[group.rank :: group.world_size]
        threads = num_threads(config, group)
        return still_undecodable(samples, own, device_id=group.device.index, num_threads=threads, seconds=_SECONDS)

    still = sorted(itertools.chain.from_iterable(gather_objects(together(found))))
    if good := [samples.path(index) for index in before if index not in set(still)]:
        log.info("%d of them can be decoded now and are used again: %s", len(good), some(good))
    return still


def check_share(bad: int, count: int, split: str, *, max_bad_share: float, data: str | None) -> None:
    """UserError, on every rank alike, if the ranks together have found more bad images in a split than the allowed
    share.

    bad: how many they have found among the split's `count` images; data: the set that `verify` is advised for, if any.
    """
    again = f"or prepare shards again (`dali-vit verify {quote(data)}` lists all), " if data else ""
    if bad > most_allowed(max_bad_share, count):
        raise UserError(
            f"{bad} of {count} images of {split} cannot be read, decoded or cropped (--max-bad-share"
            f" {max_bad_share:g}): put good ones in their place, {again}or go on with a higher share"
        )
