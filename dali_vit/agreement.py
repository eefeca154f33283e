"""Checks that all processes of a run agree: each may be on a machine with its own settings and copies of the data."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from dali_vit.config import GROUPS, Config, UserError
from dali_vit.data import ImageList
from dali_vit.distributed import gather_objects
from dali_vit.names import fingerprint
from dali_vit.plan import Plan

__all__ = ["check_same_evaluation", "check_same_run", "check_same_settings"]

# Settings that may differ between machines. Whether each runs_dir leads to the same checkpoint is checked separately.
_OWN = ("data", "runs_dir", "gpus", "threads")


def check_same_run(config: Config, planned: Plan) -> None:
    """Raises UserError on every rank where ranks differ in settings, in data or in the step they would resume from.

    Such ranks would train on wrong labels, or wait in a collective that other ranks do not reach. Collective.
    """
    starts = gather_objects(planned.start)
    if len(set(starts)) > 1:
        raise UserError(
            f"--runs-dir {config.run.runs_dir}: the processes would go on from different steps"
            f" ({', '.join(map(str, starts))}); the folder must be on a file system that all nodes see"
        )
    check_same_settings(
        {
            field.name: getattr(getattr(config, group), field.name)
            for group, group_type in GROUPS.items()
            for field in dataclasses.fields(group_type)
            if field.name not in _OWN
        }
    )
    of_data = {
        "classes": _digest("\0".join(planned.dataset.classes).encode("utf-8", "surrogateescape")),
        "training images": planned.train_fingerprint,
        "val images": planned.val_fingerprint,
        "sizes of images": str(planned.dataset.resized),
    }
    _check_same_data(config.data.data, of_data)


def check_same_settings(settings: dict[str, Any]) -> None:
    """Raises UserError on every rank for the first setting that differs between ranks. Collective."""
    of_ranks = gather_objects(settings)
    for rank, theirs in enumerate(of_ranks):
        for name, value in theirs.items():
            if str(value) != str(of_ranks[0][name]):  # NaN is not equal to itself
                raise UserError(
                    f"--{name.replace('_', '-')}: rank 0 was given {of_ranks[0][name]}, rank {rank} {value}; give all"
                    " processes the same"
                )


def check_same_evaluation(
    data: str, files: ImageList, folder: Path, *, weights: int | str | None, real_labels: np.ndarray | None = None
) -> None:
    """Raises UserError on every rank where ranks differ in images, labels, the labels of --real or weights. Collective.

    folder: the folder that holds the files of a FileList; weights: step or checksum of the weights to be evaluated.
    """
    found = gather_objects(weights)
    if len(set(found)) > 1:
        raise UserError(
            f"--checkpoint: the processes found different weights ({', '.join(map(str, found))}); they must be the same"
            " on all nodes"
        )
    of_data = {"images": fingerprint(files, folder), "labels": _digest(files.labels.tobytes())}
    if real_labels is not None:
        of_data["labels of --real"] = _digest(real_labels.tobytes())
    _check_same_data(data, of_data)


def _check_same_data(data: str | None, own: Mapping[str, str | None]) -> None:
    (first, expected), *others = gather_objects((platform.node(), own))
    for rank, (node, theirs) in enumerate(others, start=1):
        differing = [name for name, value in theirs.items() if value != expected[name]]
        if differing:
            raise UserError(
                f"--data {data}: rank {rank} (on {node}) has other {differing[0]} there than rank 0 (on {first});"
                " give all nodes the same set"
            )


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()
