"""Where `verify` moves images that hurt training: from an image folder to another of the same layout, with a list."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dali_vit.config import UserError
from dali_vit.files import at_home
from dali_vit.inspection import Problem
from dali_vit.manifest import read_manifest, write_manifest
from dali_vit.process import held_signals
from dali_vit.validation import check_local

__all__ = ["LIST", "check_quarantine", "move_aside"]

LIST = "quarantined.tsv"
"""File in the quarantine folder, a line for each moved image: its path before, kind and detail of its problem."""

_STAYS = ("shared", "not read")  # kinds of problems


def check_quarantine(root: Path, quarantine: Path) -> None:
    """UserError for a folder to which images of the set at `root` cannot be moved."""
    check_local(quarantine, "--quarantine")
    folder = at_home(quarantine).absolute()
    resolved = folder.resolve()
    inside = next((n for n in ("train", "val") if (root / n).resolve() in (resolved, *resolved.parents)), None)
    if inside:
        raise UserError(f"--quarantine {quarantine} lies in {inside}/ of the set: choose a folder outside of it")
    if resolved == root.resolve():
        raise UserError(f"--quarantine {quarantine} is the set itself: choose a folder outside of it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--quarantine {quarantine} is a file: give a folder")


def move_aside(root: Path, folder: Path, problems: Sequence[Problem]) -> int:
    """Moves the images that hurt to `folder/<split>/<class>/<file>` and adds them to the list there; returns how many
    of the problems were theirs. A training image to which links in val lead stays, as val would lose it, too; and what
    could not be read, as the image may be good."""
    moved = {problem.path: problem for problem in problems if problem.hurts and problem.kind not in _STAYS}
    if not moved:
        return 0
    with held_signals() as stopped:  # else the set's manifest would count images that are gone
        _move_all(root, folder, moved, stopped)
    return sum(problem.hurts and problem.path in moved for problem in problems)


def _move_all(root: Path, folder: Path, moved: dict[str, Problem], stopped: Callable[[], bool]) -> None:
    sizes: Counter[str] = Counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LIST, "a", buffering=1, encoding="utf-8", errors="surrogateescape") as file:
            for path, problem in moved.items():
                if stopped():
                    break
                if not os.path.lexists(path):  # moved already, by another path through a link to its class folder
                    continue
                target = folder / os.path.relpath(path, root)
                target.parent.mkdir(parents=True, exist_ok=True)
                if os.path.lexists(target):  # maybe a link that leads nowhere: those are moved here, too
                    raise UserError(
                        f"--quarantine {folder} holds {os.path.relpath(path, root)} already: give a new one"
                    )
                size = _size(path)
                _move(path, target)
                sizes[problem.split] += size
                file.write("\t".join(map(_one_field, (path, problem.kind, problem.detail))) + "\n")
    except OSError as error:
        reason = error.strerror or str(error)
        if error.filename in moved:
            what = f"{error.filename} cannot be moved away ({reason})"
        else:
            what = f"--quarantine {folder}: {reason}"
        raise UserError(f"{what}; mend that and run verify again") from error
    finally:
        _lower_counts(root, moved, sizes)


def _size(path: str) -> int:
    """Size of a file in bytes; 0 for a link that leads nowhere."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _move(path: str, target: Path) -> None:
    """Moves a file; a link is moved itself, and leads to the same place. If the move fails, no copy is left behind."""
    try:
        if os.path.islink(path):
            os.symlink(os.path.join(os.path.dirname(path), os.readlink(path)), target)
            os.unlink(path)
        else:
            shutil.move(path, target)
    except shutil.SpecialFileError as error:  # which a rename would move, but not a copy to another disk
        raise UserError(f"{path} is no file and stays on its disk ({error}): remove it and run verify again") from error
    except OSError:
        if os.path.lexists(path):
            with suppress(OSError):
                target.unlink()
        raise


def _one_field(text: str) -> str:
    """Escapes what separates fields and lines, as file names may contain it."""
    return text.replace("\\", r"\\").replace("\t", r"\t").replace("\n", r"\n").replace("\r", r"\r")


def _lower_counts(root: Path, moved: dict[str, Problem], sizes: Counter[str]) -> None:
    """Subtracts images that are gone from the counts in a prepared folder's manifest."""
    manifest = read_manifest(root)
    if manifest is not None:
        gone = Counter(problem.split for path, problem in moved.items() if not os.path.lexists(path))
        splits = {
            name: replace(split, count=split.count - gone[name], bytes=split.bytes - sizes[name])
            for name, split in manifest.splits.items()
        }
        write_manifest(root, replace(manifest, splits=splits))
