"""`dali-vit prepare`: a dataset in any of its usual forms becomes the set that `--data` takes.

The set is made in TARGET.partial/.set, which is renamed to TARGET once everything in it is whole. Beside it, .state
keeps a receipt for every finished part, so a run that was killed can be continued where it stopped. As nothing depends
on time, chance or the number of workers, the continued run ends in the same bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dali_vit.config import UserError
from dali_vit.environment import cpu_count
from dali_vit.files import at_home
from dali_vit.listing import IO_THREADS
from dali_vit.manifest import Manifest, read_manifest, write_manifest
from dali_vit.prepare.receipts import read_receipt, write_receipt
from dali_vit.prepare.sources import Format, Source, open_source, sample_names
from dali_vit.prepare.targets import (
    Job,
    Settings,
    check_folder,
    check_index,
    write_folder,
    write_index,
    write_shards,
)
from dali_vit.validation import MAX_THREADS, check_local
from pipelines.readers import FileList
from pipelines.shards import ShardList
from pipelines.words import counted

__all__ = ["PrepareArguments", "prepare"]

log = logging.getLogger(__name__)

_FOLDERS = (".state", ".set")  # of TARGET.partial, beside the file `lock`


@dataclass(frozen=True)
class PrepareArguments:
    """Makes a set for --data from ILSVRC's tars, an image folder, TFRecords or Hugging Face parquet."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder that holds the tars, train/<class>/*, the TFRecords or the parquet files (docs/datasets.md)."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """Folder to be made; while it is unfinished it is called TARGET.partial."""
    to: Literal["shards", "folder", "index"] = "shards"
    """`shards`: WebDataset tars, shuffled; `folder`: image folder; `index`: SOURCE's tars/TFRecords, read in place."""
    source_format: Format = "auto"
    """What SOURCE holds; auto: recognised by its files."""
    val_labels: Path | None = None
    """Text file with the class of each validation image, such as Kaggle's LOC_val_solution.csv: for a val/ without
    class folders, or instead of ILSVRC's devkit."""
    shard_mb: int = 1000
    """Average size of a shard in megabytes."""
    shorter_side: int | None = None
    """Resize larger images to this shorter side, in pixels; changes the recipe. Default: bytes stay as they are."""
    quality: int = 92
    """JPEG quality of the images that --shorter-side resizes, 1 to 95."""
    workers: int | None = None
    """Threads; default: one for each core that the process may use."""


def prepare(arguments: PrepareArguments) -> Path:
    """Carries out `dali-vit prepare`; returns the folder made.

    A target that was made from the same source with the same settings is left as it is. Raises UserError for
    what the user can mend.
    """
    _check(arguments)
    target = at_home(arguments.target).absolute()
    if target.is_symlink():
        target = target.resolve()  # make the folder that the link names, not one in the link's place
    if not target.name:
        raise UserError(f"{target} exists already: choose another TARGET")
    partial = target.with_name(target.name + ".partial")
    existing = read_manifest(target) if target.is_dir() else None
    if existing is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already: choose another TARGET, or remove it")
    try:
        with _exclusive(partial):
            _prepare(arguments, target, partial, existing)
    except OSError as error:
        where = error.filename or f"preparing {target}"  # the error of a full disk names no file
        remedy = "mend that and run the command again: it goes on where it stopped"
        if Path(str(where)).is_relative_to(at_home(arguments.source).absolute()):
            remedy += f"; to do without that file is to begin anew, with {partial} removed"
        raise UserError(f"{where}: {error.strerror or error}; {remedy}") from error
    return target


def _prepare(arguments: PrepareArguments, target: Path, partial: Path, existing: Manifest | None) -> None:
    state, folder = partial / ".state", partial / ".set"
    begun = any(state.iterdir())
    settings = Settings(
        arguments.shard_mb * 1_000_000 if arguments.to == "shards" else None, arguments.shorter_side, arguments.quality
    )
    refused = (
        f"{target} holds a set made of another source, of other images in it or with other settings: choose another"
        " TARGET, or remove it to prepare it again"
    )
    if existing is not None:
        same = all(existing.settings.get(name) == value for name, value in settings.recorded().items())
        if not same or existing.layout != arguments.to:
            raise UserError(refused)
    labels = arguments.val_labels and at_home(arguments.val_labels)
    scratch = state if existing is None else None  # what is there already is only compared
    source = open_source(
        at_home(arguments.source).absolute(), arguments.source_format, labels, scratch, in_place=arguments.to == "index"
    )
    before = (source.resized or {}).get("shorter_side", math.inf)
    if arguments.shorter_side is not None and arguments.shorter_side >= before:
        raise UserError(
            f"--shorter-side {arguments.shorter_side}: {arguments.source} was resized to {before} already; leave it"
            " out, or prepare from the original images"
        )
    plan = _fingerprint(source, arguments.to, settings)
    if existing is not None:
        claim = read_receipt(state / "plan.json")
        # What an interrupted run for another TARGET of this name has left is still of use to it.
        if not begun or (claim is not None and claim["plan"] == existing.plan):
            _remove(partial)
        elif claim is None:
            log.info(
                "%s holds what a prepare that was stopped has unpacked; remove it if that is not to go on", partial
            )
        if existing.plan != plan:
            raise UserError(refused)
        log.info("%s is there already, made of this source with these settings", target)
        return
    workers = arguments.workers or cpu_count()
    jobs = {
        name: Job(samples, name, source.classes, folder, state, settings, workers)
        for name, samples in source.splits.items()
    }
    for job in jobs.values():  # before the claim: what is refused here must not keep TARGET.partial from others
        {"shards": lambda job: None, "folder": check_folder, "index": check_index}[arguments.to](job)
    _claim(state, plan)

    splits = {}
    write = {"shards": write_shards, "folder": write_folder, "index": write_index}[arguments.to]
    for name, job in jobs.items():
        splits[name] = split = write(job)
        log.info(
            "%s: %s images of %.1f KB on average%s",
            name,
            f"{split.count:,}",
            split.mean_bytes / 1000,
            f" in {counted(len(split.shards), 'shard')}" if split.shards else "",
        )
    recorded = {**(source.resized or {}), **settings.recorded()}
    write_manifest(folder, Manifest(arguments.to, source.classes, splits, plan, recorded))
    os.sync()
    folder.rename(target)
    _remove(partial)
    log.info("%s: %s classes, ready for --data", target, f"{len(source.classes):,}")


def _check(arguments: PrepareArguments) -> None:
    for flag, value, least, most in [
        ("--shard-mb", arguments.shard_mb, 1, None),
        ("--shorter-side", arguments.shorter_side, 8, None),
        ("--quality", arguments.quality, 1, 95),
        ("--workers", arguments.workers, 1, MAX_THREADS),
    ]:
        if value is not None and (value < least or (most is not None and value > most)):
            raise UserError(f"{flag} {value}: must be {f'from {least} to {most}' if most else f'at least {least}'}")
    if arguments.shorter_side is None and arguments.quality != PrepareArguments.quality:
        raise UserError(
            f"--quality {arguments.quality}: images keep their bytes unless they are resized; "
            "give --shorter-side too, or leave --quality out"
        )
    if arguments.to == "index" and arguments.shorter_side is not None:
        raise UserError(f"--shorter-side {arguments.shorter_side}: --to index changes no image; choose --to shards")
    check_local(arguments.source, "SOURCE")
    check_local(arguments.target, "TARGET")
    if at_home(arguments.source).is_file():
        raise UserError(f"{arguments.source}: is a file; give the folder that holds it")
    if not at_home(arguments.source).is_dir():
        raise UserError(f"{arguments.source}: no such folder; give the one that holds the tars, records or images")
    source, target = (at_home(path).resolve() for path in (arguments.source, arguments.target))
    if source == target or source in target.parents:
        raise UserError(f"{arguments.target} lies within {arguments.source}: choose a TARGET outside of it")


@contextmanager
def _exclusive(partial: Path) -> Iterator[None]:
    """Locks TARGET.partial against other prepares; the kernel releases the lock even if this process is killed.

    UserError if another prepare holds the lock, or if TARGET.partial has anything that prepare did not make.
    """
    if partial.exists() and not (partial.is_dir() and {path.name for path in partial.iterdir()} <= {*_FOLDERS, "lock"}):
        raise UserError(f"{partial} is in the way, and not by prepare: rename it, or choose another TARGET")
    (partial / ".state").mkdir(parents=True, exist_ok=True)
    (partial / ".set").mkdir(exist_ok=True)
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial} is being written by another prepare: wait for it, or stop it") from None
        try:
            yield
        finally:
            # An empty .state: nothing was done that another run could continue.
            if partial.exists() and not any((partial / ".state").glob("*")):
                with suppress(OSError):
                    _remove(partial)


def _remove(partial: Path) -> None:
    """Removes what prepare made in TARGET.partial, and the folder itself if nothing else is in it."""
    for name in _FOLDERS:
        if (partial / name).is_dir():
            shutil.rmtree(partial / name)
    (partial / "lock").unlink(missing_ok=True)
    if not any(partial.iterdir()):
        partial.rmdir()


def _claim(state: Path, plan: str) -> None:
    """Records the plan by which TARGET.partial is made; UserError if it was begun by another plan."""
    path = state / "plan.json"
    begun = read_receipt(path)
    if begun is None:
        # Parts whose plan is lost may be of another one.
        for receipt in (*state.glob("train-*.json"), *state.glob("val-*.json")):
            receipt.unlink()
        parts = state.with_name(".set")
        if any(parts.iterdir()):
            shutil.rmtree(parts)
            parts.mkdir()
        write_receipt(path, {"plan": plan})
    elif begun["plan"] != plan:
        raise UserError(
            f"{state.parent} was begun with another source, other images in it or other settings: give those, or"
            " remove the folder"
        )
    else:
        log.info("going on with %s", state.parent)


def _fingerprint(source: Source, layout: str, settings: Settings) -> str:
    """SHA-256 of everything that the bytes of the target depend on; sizes stand in for the contents of images."""
    digest = hashlib.sha256()
    described: list[Any] = [layout, settings.recorded(), source.classes]
    for split, samples in source.splits.items():
        described.append([split, len(samples)])
        digest.update("\n".join(sample_names(samples, source.classes)).encode("utf-8", "surrogateescape"))
        digest.update(samples.labels.tobytes())
        if isinstance(samples, ShardList):
            # An index depends on where the source lies, a copy does not.
            described.append([shard if layout == "index" else Path(shard).name for shard in samples.shards])
            for column in (samples.shard, samples.offsets, samples.lengths):
                digest.update(np.ascontiguousarray(column).tobytes())
        else:
            digest.update(_sizes(samples).tobytes())
    digest.update(json.dumps(described, ensure_ascii=True).encode())
    return digest.hexdigest()


def _sizes(files: FileList) -> np.ndarray:
    """Size of each file in bytes, int64 [N]; UserError if one is missing, such as the target of a link."""

    def size(i: int) -> int:
        try:
            return os.stat(files.path(i)).st_size
        # Refused before the claim: after it the file would have to be put back, as without it the fingerprint differs.
        except OSError as error:
            raise UserError(f"{files.path(i)}: {error.strerror}; put it back, or remove it from the source") from error

    def sizes(first: int) -> list[int]:
        return [size(i) for i in range(first, min(first + 1000, len(files)))]

    with ThreadPoolExecutor(IO_THREADS) as pool:
        return np.array([n for some in pool.map(sizes, range(0, len(files), 1000)) for n in some], np.int64)
