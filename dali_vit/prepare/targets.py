"""The layouts that prepare writes: WebDataset shards, image folders, and mere indexes.

A split is cut into parts, each written by one thread and confirmed by a receipt, a small JSON file; a part that
has its receipt is not written again.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from dali_vit.config import UserError
from dali_vit.listing import folder_name, is_image
from dali_vit.manifest import Shard, Split, save_index
from dali_vit.prepare.receipts import read_receipt, write_receipt
from dali_vit.prepare.sources import not_in_place, read_sample, sample_names
from pipelines.readers import FileList
from pipelines.shards import ImageList, ShardList

__all__ = [
    "Job",
    "Settings",
    "as_8_bits",
    "check_folder",
    "check_index",
    "shrink",
    "write_folder",
    "write_index",
    "write_shards",
]

# Seed of the order in which samples lie in the shards: the same for everyone.
_SHUFFLE_SEED = 0
_LONGEST_SUFFIX = 8  # characters: the header of a tar has room for 100 bytes of a member's name
# Bytes of a sample in a tar besides the image: two headers, the class, half a block of padding.
_TAR_OVERHEAD = 512 + 256 + 2 * 512
_FOLDER_PART = 1000
_LONGEST_NAME = 255  # bytes, on Linux's file systems
_INDEX_VERSION = "v1.2"  # of DALI's wds2idx

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the bytes of a set depend on besides its source."""

    shard_bytes: int | None
    shorter_side: int | None
    quality: int

    def recorded(self) -> dict[str, Any]:
        """The settings in force, as the manifest records them."""
        packing = {} if self.shard_bytes is None else {"shard_bytes": self.shard_bytes, "shuffle_seed": _SHUFFLE_SEED}
        resized = {} if self.shorter_side is None else {"shorter_side": self.shorter_side, "quality": self.quality}
        return packing | resized


@dataclass(frozen=True, eq=False)
class Job:
    """One split to be written."""

    samples: ImageList
    split: str
    """`train` or `val`."""
    classes: tuple[str, ...]
    folder: Path
    """The set's folder."""
    state: Path
    """Folder of the receipts and of what is being written."""
    settings: Settings
    workers: int
    """Threads."""

    def image(self, index: int) -> bytes:
        """Encoded image of a sample as the target gets it: resized if --shorter-side asks for it."""
        data = read_sample(self.samples, index)
        side = self.settings.shorter_side
        return data if side is None else shrink(data, side, self.settings.quality)


# Writes a part and returns its receipt; gives up, by raising any exception, once the event is set.
Part = Callable[[threading.Event, "tqdm[Any]"], dict[str, Any]]


def as_8_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits of a grey image of 16 bits, which Pillow itself would clip; any other image unchanged."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode.startswith("I") else image


def shrink(data: bytes, shorter_side: int, quality: int) -> bytes:
    """An image resized (bicubic, antialiased) to a shorter side in pixels, in its own format.

    An image that is no larger or cannot be decoded is returned unchanged: leaving it out is up to `verify`. A TIFF with
    an orientation is returned unchanged, too, as Pillow would turn it. Of 16 bits the upper 8 are kept, as DALI does.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            scale = shorter_side / min(image.size)
            if scale >= 1:
                return data
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            if image.format == "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return data
            kept = as_8_bits(image)
            small = (kept if kept.mode in ("RGB", "L") else kept.convert("RGB")).resize(size, Image.Resampling.BICUBIC)
            out = io.BytesIO()
            # A TIFF keeps its compression, and JPEG is the only compression with a quality.
            takes_quality = image.format != "TIFF" or image.info.get("compression") == "jpeg"
            options = {"quality": quality} if takes_quality else {}
            # The orientation is in the Exif data.
            small.save(out, image.format, exif=image.info.get("exif", b""), **options)
            return out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return data


def write_shards(job: Job) -> Split:
    """Writes `split/shard-000000.tar` and so on, an index for DALI beside each, and the split's own index.

    The samples are shuffled over all shards, which hold about equally many. A sample's members are `<place>.jpg` (or
    the suffix the image had) and `<place>.cls`, the class index in decimal, as in WebDataset.
    """
    samples, shard_bytes = job.samples, job.settings.shard_bytes
    assert shard_bytes is not None
    target = job.folder / job.split
    target.mkdir(exist_ok=True)
    names = sample_names(samples, job.classes)
    order = np.random.Generator(np.random.PCG64(_SHUFFLE_SEED)).permutation(len(samples))
    probes = np.unique(np.linspace(0, len(samples) - 1, 256, dtype=int))
    mean = np.mean([len(job.image(i)) for i in probes.tolist()]) + _TAR_OVERHEAD
    count = min(max(1, round(len(samples) * mean / shard_bytes)), max(1, len(samples)))
    cuts = np.linspace(0, len(samples), count + 1).astype(int).tolist()
    paths = [target / f"shard-{i:06d}.tar" for i in range(count)]

    def part(number: int) -> Part:
        chosen = range(cuts[number], cuts[number + 1])
        return lambda stop, bar: _write_shard(job, paths[number], names, order, chosen, stop, bar)

    receipts = _carry_out(job, [part(i) for i in range(count)], cuts)

    offsets, lengths = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
    shard = np.empty(len(samples), np.int32)
    shards = []
    for i, (path, receipt) in enumerate(zip(paths, receipts, strict=True)):
        chosen = order[cuts[i] : cuts[i + 1]]
        offsets[chosen], lengths[chosen] = _read_dali_index(path.with_suffix(".idx"))
        shard[chosen] = i
        shards.append(Shard(f"{job.split}/{path.name}", len(chosen), path.stat().st_size, receipt["sha256"]))
    files, labels = tuple(s.file for s in shards), samples.labels
    placed = ShardList(files, FileList.from_paths(names, labels), shard, offsets, lengths, labels)
    checksum = save_index(job.folder / f"{job.split}.index.npz", placed)
    return Split(len(samples), int(lengths.sum()), checksum, tuple(shards))


def check_folder(job: Job) -> None:
    """UserError if an image folder cannot hold the samples, or its listing would leave some out."""
    names = sample_names(job.samples, job.classes)
    parts = chain(map(folder_name, job.classes), (part for name in names for part in name.split("/", 1)))
    impossible = next((part for part in parts if not _is_name(part)), None)
    if impossible is not None:
        raise UserError(f"{job.split} has {impossible[:80]!r}, which no folder can hold: choose --to shards")
    if len(set(names)) < len(names):
        raise UserError(f"{job.split} has several images of the same class and name: choose --to shards")
    lost = next((name for name in names if not is_image(name.rsplit("/", 1)[1])), None)
    if lost is not None:
        raise UserError(f"{job.split} has {lost}, which a folder's listing would leave out: choose --to shards")


def _is_name(name: str) -> bool:
    """Whether a file or folder can have this name, and lies where it is put then."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name) and len(os.fsencode(name)) <= _LONGEST_NAME


def write_folder(job: Job) -> Split:
    """Writes `split/<class>/<file>`."""
    names, target = sample_names(job.samples, job.classes), job.folder / job.split
    for name in job.classes:
        (target / folder_name(name)).mkdir(parents=True, exist_ok=True)
    cuts = [*range(0, len(names), _FOLDER_PART), len(names)]

    def part(number: int) -> Part:
        def write(stop: threading.Event, bar: tqdm[Any]) -> dict[str, Any]:
            written = 0
            for i in range(cuts[number], cuts[number + 1]):
                _check_stop(stop)
                data = job.image(i)
                (target / names[i]).write_bytes(data)
                written += len(data)
                bar.update()
            return {"bytes": written}

        return write

    receipts = _carry_out(job, [part(i) for i in range(len(cuts) - 1)], cuts)
    return Split(len(names), sum(receipt["bytes"] for receipt in receipts))


def check_index(job: Job) -> None:
    """UserError for an image folder."""
    if not isinstance(job.samples, ShardList):
        raise not_in_place()


def write_index(job: Job) -> Split:
    """Writes an index alone: where the images lie in the source's own tars or TFRecords."""
    samples = job.samples
    assert isinstance(samples, ShardList)
    counts = np.bincount(samples.shard, minlength=len(samples.shards)).tolist()
    shards = [
        Shard(path, count, os.path.getsize(path), None) for path, count in zip(samples.shards, counts, strict=True)
    ]
    checksum = save_index(job.folder / f"{job.split}.index.npz", samples)
    return Split(len(samples), int(samples.lengths.sum()), checksum, tuple(shards))


def _carry_out(job: Job, parts: list[Part], cuts: list[int]) -> list[dict[str, Any]]:
    """Writes the parts that have no receipt yet; returns the receipts of all parts."""
    stop = threading.Event()
    paths = [job.state / f"{job.split}-{i:06d}.json" for i in range(len(parts))]
    receipts = {i: receipt for i, path in enumerate(paths) if (receipt := read_receipt(path)) is not None}
    if receipts:
        log.info("%s: %d of %d parts are done already", job.split, len(receipts), len(parts))
    done = sum(cuts[i + 1] - cuts[i] for i in receipts)
    with (
        tqdm(total=cuts[-1], initial=done, desc=job.split, unit=" images", disable=None) as bar,
        ThreadPoolExecutor(job.workers) as pool,
    ):
        futures = {pool.submit(part, stop, bar): i for i, part in enumerate(parts) if i not in receipts}
        try:
            for future in as_completed(futures):
                i = futures[future]
                receipts[i] = future.result()
                write_receipt(paths[i], receipts[i])
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [receipts[i] for i in range(len(parts))]


def _check_stop(stop: threading.Event) -> None:
    if stop.is_set():
        raise InterruptedError("another part failed")


def _write_shard(
    job: Job,
    path: Path,
    names: list[str],
    order: np.ndarray,
    places: range,
    stop: threading.Event,
    bar: tqdm[Any],
) -> dict[str, Any]:
    """Writes a shard and its DALI index under temporary names, then renames them; the receipt has the checksum."""
    temporary, index = job.state / path.name, job.state / f"{path.stem}.idx"
    digest = sha256()
    position = 0
    lines = [f"{_INDEX_VERSION} {len(places)}"]
    with open(temporary, "wb") as file:
        for place, i in zip(places, order[places.start : places.stop].tolist(), strict=True):
            _check_stop(stop)
            fields = []
            label = str(job.samples.labels[i]).encode()
            for extension, data in ((_extension(names[i]), job.image(i)), ("cls", label)):
                name = f"{place:09d}.{extension}"
                header = _tar_header(name, len(data))
                for piece in (header, data, bytes(-len(data) % tarfile.BLOCKSIZE)):
                    file.write(piece)
                    digest.update(piece)
                fields.append(f"{extension} {position + len(header)} {len(data)} {name}")
                position += len(header) + len(data) + -len(data) % tarfile.BLOCKSIZE
            lines.append(" ".join(fields))
            bar.update()
        end = bytes(2 * tarfile.BLOCKSIZE)
        file.write(end)
        digest.update(end)
    index.write_text("\n".join(lines) + "\n")
    index.rename(path.with_suffix(".idx"))
    temporary.rename(path)
    return {"sha256": digest.hexdigest()}


def _tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _extension(name: str) -> str:
    """Suffix of an image's member: that of the image's name, but `jpg` for .jpeg and for a missing or odd suffix."""
    suffix = os.path.splitext(name)[1].lower().lstrip(".")
    odd = not suffix.isalnum() or len(suffix) > _LONGEST_SUFFIX
    return "jpg" if odd or suffix == "jpeg" else suffix


def _read_dali_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offset and length of each image of a shard, int64 [samples]."""
    fields = path.read_text().split()
    columns = (fields[2 + start :: 8] for start in (1, 2))  # <version> <samples>, then two times four fields a line
    offsets, lengths = (np.array(column, np.int64) for column in columns)
    assert len(offsets) == int(fields[1]), path
    return offsets, lengths
