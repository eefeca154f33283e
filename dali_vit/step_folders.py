"""Which checkpoints a run has, by the names of their folders, and which of them are kept."""

from __future__ import annotations

import errno
import filecmp
import functools
import json
import logging
import math
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["best_evaluation", "last_step", "prune", "remove_unfinished", "step_folder", "step_folders", "warn_once"]

log = logging.getLogger(__name__)

BEST = "best"
"""Link beside the folders of a run's checkpoints that leads to the best of them."""
BEST_SPLITS = ("minival", "val")  # what "best" is judged by: the first that was evaluated


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps of a run lies."""
    return run_dir / "checkpoints" / f"step_{step:09d}"


def step_folders(folder: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((f for f in folder.iterdir() if re.fullmatch(r"step_\d{9,}", f.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that were killed while they wrote or removed a checkpoint have left.

    No process may be writing one at the same time.
    """
    for stale in (*folder.glob(".tmp-*"), *folder.glob("step_*/.dali-vit-*.tmp")):
        try:
            if stale.is_symlink() or stale.is_file():
                stale.unlink(missing_ok=True)
            else:
                shutil.rmtree(stale)
        except PermissionError as error:  # where several users have a run in turns
            warn_once(f"{stale}: cannot be removed ({error.strerror}): have its owner remove it, as it takes up room")
        except OSError:  # such as of a file that is still read over NFS: the next time
            pass


def prune(folder: Path, keep: int, written: Path) -> None:
    """Removes all checkpoints except the newest `keep`, `written` being the newest, and the best, to which it points
    the link `BEST`."""
    _undo_copy(folder)
    # Checkpoints of later steps are damaged, else the run would have resumed from them: they must displace no good one.
    folders = [f for f in step_folders(folder) if _step(f) <= _step(written)]
    scores = {candidate: score for candidate in folders if (score := _score(candidate)) is not None}
    best = max(scores, key=scores.__getitem__) if scores else None
    if best is not None:
        _link(folder / BEST, best.name)
    for candidate in folders[:-keep]:
        if candidate == best or candidate.is_symlink():
            continue
        # Renamed first, so that a reader of the run finds the checkpoint whole or not at all.
        going = folder / f".tmp-old-{candidate.name}"
        with suppress(OSError):
            os.replace(candidate, going)
            shutil.rmtree(going)


def _score(folder: Path) -> tuple[float, float, int] | None:
    """What a checkpoint's worth is compared by: accuracy, of equal ones the loss, then the later step; None if it was
    not evaluated."""
    try:
        metrics = _record(folder)["metrics"]
        split = next((split for split in BEST_SPLITS if f"{split}/top1" in metrics), None)
        if split is None:
            return None
        loss = metrics.get(f"{split}/loss", math.nan)
        return metrics[f"{split}/top1"], -loss if math.isfinite(loss) else -math.inf, _step(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: it cannot be the best, and is removed when its turn comes


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))


def best_evaluation(run_dir: Path) -> tuple[int, dict[str, float]] | None:
    """The step of a run's best checkpoint and its evaluation, scalars by name; None where there is none to be read."""
    link = run_dir / "checkpoints" / BEST
    if not link.is_symlink():  # a folder in its place may be of another run
        return None
    try:
        record = _record(link)
        return record["step"], record["metrics"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _undo_copy(folder: Path) -> None:
    """Puts the link `BEST` back where a copy of the run has a folder in its place, as copies that follow links do."""
    copy, link = folder / BEST, folder / f".tmp-{BEST}"
    if copy.is_symlink() or not copy.is_dir():
        return
    try:
        step = json.loads((copy / "checkpoint.json").read_text(encoding="utf-8"))["step"]
        original = step_folder(folder.parent, step)
        link.unlink(missing_ok=True)
        link.symlink_to(original.name)  # first: where links are not supported the folder stays
        if _same_files(copy, original):
            going = folder / f".tmp-old-{BEST}"
            os.replace(copy, going)
            os.replace(link, copy)
            shutil.rmtree(going, ignore_errors=True)
            return
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES):  # nothing can be changed here
            return
    except (ValueError, KeyError, TypeError):
        pass
    with suppress(OSError):
        link.unlink(missing_ok=True)
    warn_once(f"{copy}: is a folder, not a link to the best checkpoint, and will not be brought up to date: remove it")


@functools.cache
def warn_once(text: str) -> None:
    """Logs a warning about a run's folder, unless this process, or another here, has logged the same."""
    log.warning("%s", text, extra={"of_machine": True})


def _same_files(copy: Path, original: Path) -> bool:
    names = os.listdir(original)
    return sorted(os.listdir(copy)) == sorted(names) and not any(filecmp.cmpfiles(copy, original, names, False)[1:])


def _link(link: Path, target: str) -> None:
    """Points a link to a folder beside it; does nothing where links are not supported or something else is there."""
    temporary = link.with_name(f".tmp-{link.name}")
    with suppress(OSError):
        if os.path.lexists(link) and os.readlink(link) == target:  # readlink raises OSError for what is no link
            return
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)


def last_step(run_dir: Path) -> int | None:
    """The step of a run's last checkpoint by name, which may be damaged; None where there is none."""
    folders = step_folders(run_dir / "checkpoints")
    return _step(folders[-1]) if folders else None
