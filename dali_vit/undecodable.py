"""Why images cannot be used: those that end an evaluation or a prediction, or that it leaves out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dali_vit.data import ImageList
from dali_vit.files import dead_link
from dali_vit.inspection import KINDS, inspect_header, why_undecodable
from dali_vit.prepare.sources import read_sample
from pipelines.bad_samples import DecodeError
from pipelines.crop import MAX_PIXELS

__all__ = ["faults_of", "saying_why"]

_MEANINGS = KINDS | {"too large": f"has more than the {MAX_PIXELS:,} pixels that are decoded"}
_SHOWN = 3  # as many as other messages name


@contextmanager
def saying_why(samples: ImageList, instead: str = "") -> Iterator[None]:
    """Turns a DecodeError of samples into one that says what is wrong with the first three of them.

    instead: another remedy than to replace or remove them. The loader's warnings, which name each sample without saying
    why, are suppressed.
    """
    log = logging.getLogger("dali_vit.data")
    log.addFilter(_is_of_no_sample)
    try:
        yield
    except DecodeError as error:
        names = error.paths
        them = "it" if len(names) == 1 else "them"
        raise DecodeError(f"{faults_of(samples, names)}: replace or remove {them}{instead}", names) from error
    finally:
        log.removeFilter(_is_of_no_sample)


def faults_of(samples: ImageList, names: Sequence[str]) -> str:
    """What is wrong with the first three of the samples of these names, and how many more there are."""
    faults = [f"{name} {_reason(samples, name)}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        faults.append(f"and {len(names) - _SHOWN} more cannot be used")
    return "; ".join(faults)


def _is_of_no_sample(record: logging.LogRecord) -> bool:
    return record.module != "bad_samples"


def _reason(samples: ImageList, name: str) -> str:
    try:
        data = read_sample(samples, next(i for i in range(len(samples)) if samples.path(i) == name))
        kind, detail = _fault(data, name)
    except OSError as error:
        if lost := dead_link(name):
            return lost.removeprefix(f"{name} ").rpartition(": ")[0]  # without its remedy: ours follows
        return f"cannot be read ({error.strerror or error})"
    except MemoryError:
        return "is too large for the memory there is"
    return f"{_MEANINGS[kind]} ({detail})"


def _fault(data: bytes, name: str) -> tuple[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings of large images and odd Exif data
        problems, decodable = inspect_header(data, name, MAX_PIXELS)
        fatal = [problem for problem in problems if not decodable or problem[0] == "too long"]
        return fatal[0] if fatal else why_undecodable(data)
