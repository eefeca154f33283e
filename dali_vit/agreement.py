"""What all processes of a run must have alike: each may be on a machine with settings and copies of its own."""

from __future__ import annotations

import dataclasses
import platform
from hashlib import blake2b
from pathlib import Path

from dali_vit.config import GROUPS, Config, UserError
from dali_vit.data import Dataset, ImageList
from dali_vit.distributed import gather_objects
from dali_vit.names import fingerprint

__all__ = ["check_same_evaluation", "check_same_run"]

# Where a machine has its own; which checkpoint a folder of runs holds is compared by itself.
_OWN = ("data", "runs_dir", "gpus", "threads")


def check_same_run(config: Config, dataset: Dataset, *, start: int, train_names: str, val_names: str | None) -> None:
    """UserError, on every rank alike, where ranks differ in settings, in data or in the step they would go on from.

    Each would do its own part of something else: train on wrong labels, or wait for the others where they do not.
    Collective. start: that step; the others: `names.fingerprint` of the images.
    """
    starts = gather_objects(start)
    if len(set(starts)) > 1:
        raise UserError(
            f"--runs-dir {config.run.runs_dir}: the processes would go on from different steps"
            f" ({', '.join(map(str, starts))}); the folder must be on a file system that all nodes see"
        )
    settings = {
        field.name: getattr(getattr(config, group), field.name)
        for group, group_type in GROUPS.items()
        for field in dataclasses.fields(group_type)
        if field.name not in _OWN
    }
    of_ranks = gather_objects(settings)
    for rank, theirs in enumerate(of_ranks):
        changed = [name for name, value in theirs.items() if value != of_ranks[0][name]]
        if changed:
            flag = f"--{changed[0].replace('_', '-')}"
            raise UserError(
                f"{flag}: rank 0 was given {of_ranks[0][changed[0]]}, rank {rank} {theirs[changed[0]]}; give all"
                " processes the same"
            )
    of_data = {
        "classes": _digest("\0".join(dataset.classes).encode("utf-8", "surrogateescape")),
        "training images": train_names,
        "val images": val_names,
    }
    _check_same_data(config.data.data, of_data)


def check_same_evaluation(data: str, files: ImageList, folder: Path, step: int | None) -> None:
    """UserError, on every rank alike, where ranks differ in the images, their labels, or the weights' training step.

    folder: where the files of a list of files lie. Collective.
    """
    steps = gather_objects(step)
    if len(set(steps)) > 1:
        raise UserError(
            f"--checkpoint: the processes found weights of different steps ({', '.join(map(str, steps))}); it must be"
            " the same on all nodes"
        )
    _check_same_data(data, {"images": fingerprint(files, folder), "labels": _digest(files.labels.tobytes())})


def _check_same_data(data: str | None, own: dict[str, str | None]) -> None:
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
