"""TFRecords and parquet as sources of images.

In a TFRecord an encoded image lies in one piece, so its place in the file is all that has to be known. Parquet
compresses its columns page by page, so its images are first unpacked into TARGET.partial.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dali_vit.config import UserError
from dali_vit.files import flush
from dali_vit.manifest import made_up_name
from dali_vit.prepare.receipts import read_receipt, write_receipt
from dali_vit.prepare.sources import Row, Source, byte_ranges, safe_name
from dali_vit.prepare.tfrecord import num_records, read_tfrecord
from pipelines.words import some, why_not_imported

__all__ = ["open_parquet", "open_tfrecords"]

log = logging.getLogger(__name__)

# NAME-IIIII-of-NNNNN; Hugging Face's `datasets` once added a fingerprint, which differs from file to file.
_NUMBERED = re.compile(r"(.*?)(\d+)-of-(\d+)(-[0-9a-f]{16})?([^/]*)")
# Hugging Face's ImageNet adds the class to the name that a file has in ILSVRC's tars.
_WITH_WNID = re.compile(r"(.+)_(n\d{8})(\.\w+)")

_MOST_CLASSES = 1_000_000  # each of which gets a name, with images or without

# How the pointer begins that a clone without Git LFS has in a large file's place.
_LFS = b"version https://git-lfs"

# A record whose class has no index yet: (shard, offset, length, label as recorded, class name, file name).
_Record = tuple[int, int, int, int, str | None, str]


def open_tfrecords(root: Path) -> Source:
    """Images of `*train*` and `*val*` TFRecords, as TensorFlow Datasets or the Inception scripts write them.

    Classes are named by `image/class/synset` if all records have it, else by the lines of `label.labels.txt`, else by
    the labels' numbers.
    """
    files = [
        path for path in _files(root) if not path.name.endswith((".json", ".txt", ".parquet", ".md", ".csv", ".tsv"))
    ]
    shards: dict[str, list[str]] = {}
    records: dict[str, list[_Record]] = {}
    for split, paths in _by_split(root, files, "TFRecords").items():
        shards[split] = [str(path) for path in paths]
        noted = {folder: num_records(folder) for folder in {path.parent for path in paths}}
        records[split], empty = [], []
        for i, path in enumerate(tqdm(paths, desc=f"{split} records", unit=" files", disable=None)):
            before = len(records[split])
            records[split] += [(i, *record) for record in read_tfrecord(path)]
            count = len(records[split]) - before
            expected = noted[path.parent].get(path.name, count)
            if count != expected:
                raise UserError(
                    f"{path} holds {count:,} records, not the {expected:,} that dataset_info.json beside it says: fetch"
                    " it again"
                )
            if count == 0 and path.name not in noted[path.parent]:
                empty.append(str(path))
        if empty:
            log.warning("empty: %s; if they should not be, fetch them and prepare the set again", some(empty))
    return _assemble(root, shards, records, _label_names(root))


def open_parquet(root: Path, scratch: Path | None) -> Source:
    """Images of `*train*` and `*val*` parquet files with columns `image` (struct of `bytes`, `path`) and `label`.

    Classes are named by the Hugging Face metadata in the files, or else by the labels' numbers. The classes and files
    of Hugging Face's ImageNet-1k get ILSVRC's names, as from any other source. Without `scratch` the images are
    listed, and cannot be read.
    """
    files = [path for path in _files(root) if path.name.endswith(".parquet")]
    shards: dict[str, list[str]] = {}
    records: dict[str, list[_Record]] = {}
    names: Any = None
    paths_of = _by_split(root, files, "parquet files")
    for paths in paths_of.values():  # before the first is unpacked
        _check_parquet(paths)
    for split, paths in paths_of.items():
        shards[split], records[split] = [], []
        for i, path in enumerate(tqdm(paths, desc=f"{split} parquet", unit=" files", disable=None)):
            unpacked, rows, names = _unpack_parquet(
                path, (scratch or Path()) / f"parquet-{split}-{i:05d}.bin", scratch is not None
            )
            shards[split].append(str(unpacked))
            records[split] += [(i, offset, length, label, None, name) for offset, length, label, name in rows]
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        log.warning("%s names its classes by %s, not by a list of texts: they are numbered", root, str(names)[:80])
        names = None
    return _assemble(root, shards, *_with_names_of_ilsvrc(records, names))


def _with_names_of_ilsvrc(
    records: dict[str, list[_Record]], label_names: list[str] | None
) -> tuple[dict[str, list[_Record]], list[str] | None]:
    """Renames files NAME_WNID.JPEG to NAME.JPEG and names the labels by the WNIDs.

    Minival, the order within a class and ReaL's labels depend on these names. Returns records and label names unchanged
    unless all files agree on the WNID of every label.
    """
    renamed: dict[str, list[_Record]] = {}
    wnids: dict[int, str] = {}
    for split, rows in records.items():
        renamed[split] = []
        for shard, offset, length, label, class_name, name in rows:
            match = _WITH_WNID.fullmatch(name)
            if match is None or wnids.setdefault(label, match[2]) != match[2]:
                return records, label_names
            renamed[split].append((shard, offset, length, label, class_name, match[1] + match[3]))
    named = [wnids[label] for label in sorted(wnids)]
    # Every label must have a WNID, in a folder's order: else classes would have other numbers than from other sources.
    if sorted(wnids) != list(range(len(label_names or wnids))) or named != sorted(set(named)):
        return records, label_names
    return renamed, named


def _files(root: Path) -> list[Path]:
    return sorted(path for path in (*root.glob("*"), *root.glob("*/*")) if path.is_file() and path.name[0] != ".")


def _by_split(root: Path, files: list[Path], what: str) -> dict[str, list[Path]]:
    """Files by split: their own or their folder's name has the word `train` or `val`; UserError if some are missing."""
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for path in files:
        for split, known in (("train", {"train"}), ("val", {"val", "validation", "valid"})):
            if known & _words(root, path):
                splits[split].append(path)
                break
    if not splits["train"]:
        raise UserError(f"{root} has no {what} with 'train' in their names: give the folder that holds them")
    for paths in splits.values():
        _check_complete(root, paths)
    tests = [path for path in files if "test" in _words(root, path) and path not in splits["train"]]
    if tests and not splits["val"]:
        log.warning(
            "%s has no %s with 'val' in their names, so train alone is prepared: if those with 'test' are meant, such"
            " as %s, rename them",
            root,
            what,
            tests[0].relative_to(root),
        )
    return {split: paths for split, paths in splits.items() if paths}


def _words(root: Path, path: Path) -> set[str]:
    """The words of a file's and its folder's names, in lower case."""
    return set(re.split(r"[^a-z]+", path.relative_to(root).as_posix().lower()))


def _check_complete(root: Path, paths: list[Path]) -> None:
    """UserError unless all N files of every NAME-IIIII-of-NNNNN are there; other names do not tell their number."""
    found: dict[tuple[str, str], dict[str, set[int]]] = {}
    for path in paths:
        if match := _NUMBERED.fullmatch(path.relative_to(root).as_posix()):
            name, number, total, fingerprint, suffix = match.groups()
            totals = found.setdefault((name, f"-*{suffix}" if fingerprint else suffix), {})
            totals.setdefault(total, set()).add(int(number))
    for (name, suffix), totals in found.items():
        patterns = [f"{name}*-of-{total}{suffix}" for total in totals]
        if len(patterns) > 1:
            raise UserError(f"{root} has files of several sets, {' and '.join(patterns)}: keep those of one")
        ((total, numbers),) = totals.items()
        # TensorFlow and Hugging Face count from 0, but others who name files in this way may count from 1.
        missing = min((set(range(first, first + int(total))) - numbers for first in (0, 1)), key=len)
        if missing:
            example = f"{name}{min(missing):0{len(total)}d}-of-{total}{suffix}"
            verb, more, them = ("is", "", "it") if len(missing) == 1 else ("are", ", ...", "them")
            raise UserError(
                f"{root}: {len(missing)} of {int(total)} files of {patterns[0]} {verb} missing "
                f"({example}{more}); download {them}"
            )


def _assemble(
    root: Path, shards: dict[str, list[str]], records: dict[str, list[_Record]], label_names: list[str] | None
) -> Source:
    """Gives every class an index, and every image a name that is unique within its class."""
    for split, found in records.items():
        if not found:
            raise UserError(f"{root}: its {split} files hold no images; fetch them again")
    everything = [record for found in records.values() for record in found]
    if all(record[4] for record in everything):
        synsets = sorted({record[4] for record in everything if record[4]})
        index = {name: i for i, name in enumerate(synsets)}
        labels = {split: [index[str(record[4])] for record in rows] for split, rows in records.items()}
        classes = _folder_names(synsets)
    else:
        labels = {split: [record[3] for record in rows] for split, rows in records.items()}
        lowest, highest = (f(label for row in labels.values() for label in row) for f in (min, max))
        if label_names is None and lowest < 0:
            raise UserError(f"label {lowest}: images without a class cannot be trained on; leave them out")
        if label_names is None and highest - lowest >= _MOST_CLASSES:
            raise UserError(f"{root} has labels from {lowest} to {highest}: number the classes from 0 or 1 on")
        if label_names is None:
            # Inception's labels begin at 1.
            labels = {split: [label - lowest for label in row] for split, row in labels.items()}
            width = len(str(highest))
            label_names = [f"{label:0{width}d}" for label in range(lowest, highest + 1)]
        elif lowest < 0 or highest >= len(label_names):
            label = lowest if lowest < 0 else highest
            raise UserError(f"label {label} is none of the {len(label_names)} classes, which count from 0")
        classes = _folder_names(label_names)
    splits: dict[str, Any] = {}
    for split, found in records.items():
        names = [record[5] for record in found]
        if len({(label, name) for label, name in zip(labels[split], names, strict=True)}) < len(names) or "" in names:
            names = [made_up_name(shards[split][record[0]], record[1]) for record in found]
        rows: list[Row] = [
            (record[0], record[1], record[2], label, name)
            for record, label, name in zip(found, labels[split], names, strict=True)
        ]
        splits[split] = byte_ranges(shards[split], rows, classes)
    return Source(tuple(classes), splits)


def _folder_names(names: list[str]) -> list[str]:
    """The names, made unique and valid as names of folders."""
    safe = [safe_name(name) for name in names]
    counts = Counter(safe)
    taken = {name for name, count in counts.items() if count == 1}
    unique = []
    for i, name in enumerate(safe):
        if counts[name] > 1:
            name = f"{name}_{i}"
            while name in taken:
                name += "_"
            taken.add(name)
        unique.append(name)
    return unique


def _label_names(root: Path) -> list[str] | None:
    """Class names that TensorFlow Datasets writes beside its records."""
    for path in (root / "label.labels.txt", *sorted(root.glob("*/label.labels.txt"))):
        if path.is_file():
            text = path.read_text(encoding="utf-8").rstrip("\n")
            return text.split("\n") if text else None
    return None


def _check_parquet(paths: list[Path]) -> None:
    """UserError for a file that is no parquet, or has other columns than those of images and labels."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{paths[0]}: parquet takes pyarrow, and {why_not_imported('pyarrow', error)}") from error
    for path in paths:
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(f"{path} is what Git LFS puts in a file's place: download the file by `git lfs pull`")
        try:
            columns = parquet.read_schema(path).names
        except (ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        if not {"image", "label"} <= set(columns):
            raise UserError(
                f"{path} has the columns {', '.join(columns)}, not image and label: give files as Hugging Face's"
                " ImageNet has them"
            )


def _damaged(path: Path, error: Exception) -> Exception:
    """What to raise for an error of pyarrow's: it has OSErrors of its own, which unlike the system's have no number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return UserError(f"{path} is not a whole parquet file ({' '.join(str(error).split())}): download it again")


def _unpack_parquet(path: Path, target: Path, write: bool = True) -> tuple[Path, list[tuple[int, int, int, str]], Any]:
    """Writes all images to one file, or only lists them; returns it, their rows (offset, length, label, name) and the
    class names."""
    from pyarrow import ArrowException, parquet

    receipt = target.with_suffix(".json")
    try:
        with parquet.ParquetFile(path) as file:
            names = _class_names((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            about = path.stat()
            origin = [str(path), about.st_size, about.st_mtime_ns]
            done = read_receipt(receipt) if write else None
            if done is not None and done["origin"] == origin:  # else the receipt is of an earlier source
                rows = done["rows"]
            else:
                rows, position, without_bytes = [], 0, 0
                # What it says of the file is true no longer, should this be stopped before there is a new one.
                if write:
                    receipt.unlink(missing_ok=True)
                    flush(receipt.parent)
                with open(target if write else os.devnull, "wb") as out:
                    for batch in file.iter_batches(256, columns=["image", "label"]):
                        for row in batch.to_pylist():
                            if row["image"] is None:  # has no name, without which the others would lose theirs, too
                                raise UserError(f"{path}: row {len(rows)}, from 0, has no image: remove the row")
                            data, name = row["image"]["bytes"] or b"", os.path.basename(row["image"].get("path") or "")
                            if not isinstance(row["label"], int):
                                raise UserError(f"{path}: {name or 'an image'} has the label {row['label']!r}")
                            out.write(data)
                            rows.append((position, len(data), row["label"], name))
                            position += len(data)
                            without_bytes += row["image"]["bytes"] is None
                if rows and without_bytes == len(rows):  # single ones are left to training, which tells of them
                    raise UserError(f"{path} has paths of images, not their bytes: give files that hold the images")
                if write:
                    write_receipt(receipt, {"origin": origin, "rows": rows})
    except (ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: its column image has no bytes ({error}): give files as Hugging Face's ImageNet has them"
        ) from error
    return target, [tuple(row) for row in rows], names


def _class_names(metadata: bytes) -> Any:
    """What Hugging Face's metadata of a file name the classes by; None where they do not."""
    try:
        found = json.loads(metadata)
    except (ValueError, RecursionError):
        return None
    for key in ("info", "features", "label", "names"):
        found = found.get(key) if isinstance(found, dict) else None
    return found
