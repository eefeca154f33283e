"""`dali-vit verify`: reads and decodes every image of a set and says what is wrong with it."""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from dali_vit.config import UserError
from dali_vit.data import Dataset
from dali_vit.environment import cpu_count
from dali_vit.files import at_home, file_sha256
from dali_vit.inspection import KINDS, Problem, find_undecodable, inspect_header, why_undecodable
from dali_vit.listing import LeftOut, left_out, other_val
from dali_vit.manifest import read_manifest
from dali_vit.prepare.sources import read_sample
from dali_vit.quarantine import LIST, check_quarantine, move_aside
from dali_vit.structure import load_with_faults, val_without_images
from dali_vit.validation import MAX_THREADS, check_range
from pipelines.crop import MAX_PIXELS
from pipelines.readers import FileList
from pipelines.shards import ImageList, ShardList
from pipelines.words import one_line

__all__ = ["KINDS", "Problem", "Report", "VerifyArguments", "verify"]

log = logging.getLogger(__name__)

_CHUNK = 256  # images that are decoded together, while the next are read
# Of links that lead nowhere and of what is no regular file; other errors may pass, or are of the disk or permissions.
_NO_FILE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL)
_SHOWN = 20  # problems of a kind in the log
_MOST_LINKS = 40  # from link to link; Linux follows no more


@dataclass(frozen=True)
class VerifyArguments:
    """Reads and decodes every image of a set; exit code 2 if anything would hurt training."""

    path: Annotated[str | Path, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Image folder, or set made by prepare (s3:// too)."""
    quarantine: Path | None = None
    """Image folders: move images that would hurt training into this folder, and list them in quarantined.tsv there."""
    max_megapixels: float = 100.0
    """Images of more megapixels are reported as too large, and not decoded; at most 178.9, as training leaves out what
    is larger."""
    workers: int | None = None
    """Threads; default: one for each core that the process may use."""
    json: bool = False
    """Print one JSON object instead of a summary."""


@dataclass(frozen=True)
class Report:
    """What verify found."""

    counts: dict[str, int]
    """Images of each split."""
    problems: tuple[Problem, ...]
    """In the order of the set."""
    quarantined: int = 0
    """How many problems hurt and were moved aside with their images."""
    left_out: tuple[LeftOut, ...] = ()
    """Files in class folders that belong to no split: remarks, as they do not hurt training."""
    refused: tuple[str, ...] = ()
    """Faults of the classes for which training refuses the set as it is now, after images were moved aside."""

    @property
    def exit_code(self) -> int:
        """0 for a set that can be trained on as it is now, else 2."""
        return 2 if self.refused or sum(problem.hurts for problem in self.problems) > self.quarantined else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values: `images`, `problems` by kind, `quarantined`, `found` (each problem), `left_out`, `refused`."""
        kinds = Counter(problem.kind for problem in self.problems)
        return {
            "images": self.counts,
            "problems": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
            "quarantined": self.quarantined,
            "found": [asdict(problem) for problem in self.problems],
            "left_out": [asdict(files) for files in self.left_out],
            "refused": list(self.refused),
        }


def verify(arguments: VerifyArguments) -> Report:
    """Carries out `dali-vit verify` and logs a summary; UserError for a set that cannot be listed."""
    if not 0 < arguments.max_megapixels <= MAX_PIXELS / 1e6:
        raise UserError(
            f"--max-megapixels {arguments.max_megapixels:g}: must be above 0 and at most {MAX_PIXELS // 10**5 / 10:g},"
            " as larger images are decoded by none of the commands"
        )
    if arguments.workers is not None:
        check_range("--workers", arguments.workers, 1, MAX_THREADS)
    dataset, refused = load_with_faults(arguments.path)
    if arguments.quarantine is not None:
        check_quarantine(dataset.root, arguments.quarantine)
    splits = {name: s for name, s in (("train", dataset.train), ("val", dataset.val)) if s is not None}
    workers = arguments.workers or cpu_count()
    found: dict[str, list[tuple[int, Problem]]] = {}
    digests: dict[str, np.ndarray] = {}
    with _pillow_without_limit():
        for name, samples in splits.items():
            found[name], digests[name] = _inspect_split(name, samples, arguments.max_megapixels * 1e6, workers)
    if "val" in splits:
        found["train"] += _duplicates(splits["train"], splits["val"], digests["train"], digests["val"])
    problems = [p for name in splits for _, p in sorted(found[name], key=lambda item: item[0])]
    problems += _check_shards(dataset, workers)
    remarks = left_out(
        dataset.root / name / folder
        for name, samples in splits.items()
        if isinstance(samples, FileList)
        for folder in dataset.classes
    )

    moved = 0
    if arguments.quarantine is not None:
        if any(isinstance(samples, ShardList) for samples in splits.values()):
            log.info("nothing is moved out of shards: mend the source, remove %s and prepare it again", dataset.root)
        else:
            moved = move_aside(dataset.root, at_home(arguments.quarantine).absolute(), problems)
    if moved:
        refused = _refused(arguments.path)
    report = Report({name: len(samples) for name, samples in splits.items()}, tuple(problems), moved, remarks, refused)
    _summarise(report, arguments.quarantine)
    left = dataset if not moved or refused else load_with_faults(arguments.path)[0]
    if not refused and (absent := val_without_images(left)):
        log.warning("%s", absent)
    if "val" not in splits and (meant := other_val(dataset.root)):
        log.warning("%s has no val/; if %s/ is meant, rename it to val/", dataset.root, meant)
    return report


@contextmanager
def _pillow_without_limit() -> Iterator[None]:
    """Switches off Pillow's guard against huge images, which would raise before their size is known."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings of odd Exif data
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _naming_lack_of_memory(path: str) -> Iterator[None]:
    """Makes a MemoryError a UserError: the image is not at fault, so it must not be reported and moved aside."""
    try:
        yield
    except MemoryError:
        raise UserError(f"{path}: memory does not suffice to decode it; free some and start again") from None


def _inspect_split(
    split: str, samples: ImageList, max_pixels: float, workers: int
) -> tuple[list[tuple[int, Problem]], np.ndarray]:
    """All problems, each with the index of its image, and a hash of every image's bytes, uint64 [N]."""
    digests = np.zeros(len(samples), np.uint64)
    found: list[tuple[int, Problem]] = []

    def read(i: int) -> tuple[bytes | None, list[tuple[str, str]]]:
        """The encoded image, if it is to be decoded, and the problems that show without decoding it."""
        try:
            data = read_sample(samples, i)
        except OSError as error:
            kind = "no file" if error.errno in _NO_FILE else "not read"
            return None, [(kind, one_line(error.strerror or error))]
        digests[i] = int.from_bytes(blake2b(data, digest_size=8).digest(), "big")
        with _naming_lack_of_memory(samples.path(i)):
            problems, decodable = inspect_header(data, samples.path(i), max_pixels)
        return data if decodable else None, problems

    starts = range(0, len(samples), _CHUNK)
    chunks = [range(start, min(start + _CHUNK, len(samples))) for start in starts] or [range(0)]
    with tqdm(total=len(samples), desc=split, unit=" images", disable=None) as bar, ThreadPoolExecutor(workers) as pool:
        reading = pool.map(read, chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], range(0)], strict=True):
            results = dict(zip(chunk, reading, strict=True))
            reading = pool.map(read, following)
            images = {i: data for i, (data, _) in results.items() if data is not None}
            places = list(images)
            for place in find_undecodable(list(images.values()), workers):
                i = places[place]
                with _naming_lack_of_memory(samples.path(i)):
                    results[i] = None, [why_undecodable(images[i])]
            found += [
                (i, Problem(kind, split, samples.path(i), detail))
                for i, (_, problems) in results.items()
                for kind, detail in problems
            ]
            bar.update(len(chunk))
    return found, digests


def _in_threads(task: Callable[[int], Any], items: range, workers: int) -> list[Any]:
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(task, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _duplicates(
    train: ImageList, val: ImageList, train_digests: np.ndarray, val_digests: np.ndarray
) -> list[tuple[int, Problem]]:
    """Index and problem of training images that have a validation image's bytes, or to which a link in val leads."""
    in_val = {int(digest): i for i, digest in enumerate(val_digests)}
    twins = np.flatnonzero(np.isin(val_digests, train_digests)).tolist()
    files = {entry: val.path(i) for i in twins for entry in _entries(val.path(i))}
    found = []
    for i in np.flatnonzero(np.isin(train_digests, val_digests)).tolist():
        twin = in_val[int(train_digests[i])]
        try:
            data = read_sample(train, i)
            if not data or data != read_sample(val, twin):
                continue
        except OSError:  # reported already
            continue
        path = train.path(i)
        problem = Problem("duplicate", "train", path, f"the same bytes as {val.path(twin)}")
        if other := files.get(next(_entries(path))):
            problem = Problem("shared", "train", path, f"the same file as {other}")
        found.append((i, problem))
    return found


def _entries(path: str) -> Iterator[str]:
    """Where a path leads: the entry it names in its folder, then, as long as that is a link, the entry it links to."""
    for _ in range(_MOST_LINKS):
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        yield path
        if not os.path.islink(path):
            return
        path = os.path.join(os.path.dirname(path), os.readlink(path))


def _check_shards(dataset: Dataset, workers: int) -> list[Problem]:
    """A problem for each shard whose checksum is not the manifest's."""
    manifest = read_manifest(dataset.root)
    splits = manifest.splits if manifest else {}
    shards = [(name, shard) for name, split in splits.items() for shard in split.shards if shard.sha256]
    sums = _in_threads(lambda i: file_sha256(dataset.root / shards[i][1].file), range(len(shards)), workers)
    return [
        Problem(
            "checksum",
            split,
            str(dataset.root / shard.file),
            f"SHA-256 is {found[:12]}..., was {str(shard.sha256)[:12]}...",
        )
        for (split, shard), found in zip(shards, sums, strict=True)
        if found != shard.sha256
    ]


def _refused(path: str | Path) -> tuple[str, ...]:
    try:
        return load_with_faults(path)[1]
    except UserError as error:  # nothing is left to be listed
        return (str(error),)


def _summarise(report: Report, quarantine: Path | None) -> None:
    total = sum(report.counts.values())
    for kind, meaning in KINDS.items():
        found = [problem for problem in report.problems if problem.kind == kind]
        if found:
            log.info("%s (%s): %s", kind, meaning, f"{len(found):,}")
            for problem in found[:_SHOWN]:
                log.info("  %s  %s", problem.path, problem.detail)
            if len(found) > _SHOWN:
                log.info("  and %s more: --json lists all", f"{len(found) - _SHOWN:,}")
    for files in report.left_out:
        log.info("%s", files)
    if report.quarantined:
        moved = f"{report.quarantined:,} {'problem' if report.quarantined == 1 else 'problems'}"
        log.info("%s moved to %s and listed in %s there", moved, quarantine, LIST)
    for reason in report.refused:
        log.info("training refuses the set: %s", reason)
    hurt = sum(problem.hurts for problem in report.problems) - report.quarantined + len(report.refused)
    what = f"{hurt:,} {'problem' if hurt == 1 else 'problems'}" if hurt else "nothing"
    images = "image" if total == 1 else "images"
    log.info("%s %s of %s: %s that would hurt training", f"{total:,}", images, ", ".join(report.counts), what)
