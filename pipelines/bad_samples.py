"""Samples that cannot be read or decoded: which they are, and how many of them may be passed over."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence

import numpy as np

from pipelines import probe
from pipelines.crop import Decoder
from pipelines.readers import Samples
from pipelines.words import some

__all__ = ["BadSamples", "DecodeError", "has_end_of_jpeg", "is_whole_jpeg", "most_allowed", "still_bad"]

log = logging.getLogger("dali_vit.data")  # among the training's own messages

# If this many samples are tried and all fail, the cause may be a lost disk or device instead of the samples.
_SUSPICIOUS = 16


class DecodeError(ValueError):
    """Samples cannot be read or decoded, and must not be passed over."""

    def __init__(self, message: str, paths: Sequence[str]) -> None:
        super().__init__(message)
        self.paths = list(paths)
        """Names of the samples."""


def most_allowed(max_share: float, count: int) -> int:
    """How many of `count` samples may be bad: up to the share, and 1 in any case, unless the share is 0."""
    return max(int(max_share * count + 1e-6), int(max_share > 0))  # the product may have been rounded down


class BadSamples:
    """What is known of the samples that cannot be read or decoded.

    indices: the samples already known to be bad. make: builds a pipeline on the loader's device that fails at a bad
    sample; make_on_cpu: the same on the CPU, for loaders of a GPU alone, as libjpeg-turbo refuses every JPEG that was
    cut short and other decoders may not. Raises DecodeError when more samples are bad than the share max_share of all
    (1 is allowed in any case, unless the share is 0), and ValueError for arguments out of range.
    """

    def __init__(
        self,
        samples: Samples,
        make: probe.MakePipeline,
        indices: Sequence[int],
        max_share: float,
        make_on_cpu: probe.MakePipeline | None = None,
    ) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_bad_share is {max_share}: it must be within [0, 1]")
        if not all(0 <= index < len(samples) for index in indices):
            raise ValueError(f"bad_samples holds other indices than those of the {len(samples)} samples")
        self._samples, self._make, self._make_on_cpu = samples, make, make_on_cpu or make
        self._max = most_allowed(max_share, len(samples))
        self.mask = np.zeros(len(samples), bool)
        """Which samples are bad, bool [N]; it changes in place."""
        self.mask[list(indices)] = True
        self.tried = self.mask.copy()
        """Which samples are known to be good or bad, bool [N]; a sample that only a GPU has decoded is not."""
        self._check_share()

    @property
    def indices(self) -> tuple[int, ...]:
        """Indices of the bad samples, rising."""
        return tuple(np.flatnonzero(self.mask).tolist())

    def find(self, indices: np.ndarray, *, failed: bool) -> bool:
        """Tries samples and marks the bad ones, each named in a warning; returns whether there are any.

        failed: a pipeline has just failed, presumably at one of these samples. If nothing can be read any more, or a
        good image fails as well, none of them is to blame. If not `failed`, the samples are tried on the CPU.
        """
        # After a failure, samples that were tried before are tried again: a file may have been removed since.
        indices = indices[~(self.mask[indices] if failed else self.tried[indices])]
        if len(indices) == 0:
            return False
        # Where no bad sample may be passed over, the error is to name them all.
        at_most = self._max - int(self.mask.sum()) if self._max else len(indices)
        # After a failure, samples are tried on the loader's device: it may be the only one that cannot decode them.
        make = self._make if failed else self._make_on_cpu
        places, tried = _undecodable(self._samples.subset(indices), make, at_most)
        bad = indices[places]
        if failed and len(bad) == tried > min(at_most, _SUSPICIOUS - 1) and not self._are_to_blame(bad):
            return False
        if len(bad) and not self._max:
            names = [self._samples.path(i) for i in bad.tolist()]
            raise DecodeError(f"cannot read, decode or crop {some(names)}: replace or remove the file", names)
        if make is self._make_on_cpu:
            self.tried[indices[:tried]] = True
        self.tried[bad] = True
        self.mask[bad] = True
        for index in bad.tolist():
            log.warning(
                "%s cannot be read, decoded or cropped: left out; the next start tries it again",
                self._samples.path(index),
            )
        self._check_share()
        return len(bad) > 0

    def _are_to_blame(self, indices: np.ndarray) -> bool:
        """Whether any of these samples, which all failed, can be read at all, and the device decodes a good image."""
        if all(_contents(self._samples, payload) is None for payload in self._samples.payload(indices)):
            return False
        return probe.decodes_good_images(self._make)

    def cut_short(self, indices: np.ndarray, last_bytes: np.ndarray) -> np.ndarray:
        """Indices of a batch's JPEGs that lack the end marker and were never tried, rising.

        indices: of the batch's samples, int64 [N], -1 where a row is padding; last_bytes: of the samples' files, uint8
        [N, bytes]. The first rows of a JPEG that was cut short still decode: whether decoding fails depends on the
        window that was drawn, and on the device's decoder.
        """
        suspects = np.flatnonzero(~has_end_of_jpeg(last_bytes) & (indices >= 0))
        if len(suspects) == 0:  # nearly always
            return suspects
        found = np.unique(indices[suspects])
        found = found[~self.tried[found]]
        # Only these are read once more: a trial takes as long as a step, and cameras may write something after the end.
        payloads = self._samples.payload(found)
        suspicious = np.array([_may_be_cut_short(self._samples, payload) for payload in payloads], bool)
        self.tried[found[~suspicious]] = True
        return found[suspicious]

    def _check_share(self) -> None:
        bad = self.indices
        if len(bad) > self._max:
            names = [self._samples.path(i) for i in bad]
            raise DecodeError(
                f"{len(bad)} of {len(self._samples)} samples cannot be read, decoded or cropped, more than"
                f" the {self._max} that are passed over (--max-bad-share): {some(names)}; put good ones in"
                " their place, or prepare shards again (`dali-vit verify` lists all), or go on with a higher share",
                names,
            )


def still_bad(
    samples: Samples, indices: Sequence[int], *, device_id: int | None, num_threads: int, seconds: float
) -> list[int]:
    """Which samples that were bad before still are, in order: whole images are tried on the CPU, then on a GPU, if any.

    Samples that are not reached within `seconds` count as bad: each bad one takes 20 ms.
    """
    deadline = time.monotonic() + seconds
    left = np.array(indices, np.int64)
    good = np.ones(len(left), bool)
    for device in dict.fromkeys((None, device_id)):
        make = functools.partial(probe.decode_pipeline, decoder=Decoder(), device_id=device, num_threads=num_threads)
        tried = np.flatnonzero(good)
        good[:] = False
        for place, decodes in probe.try_samples(samples.subset(left[tried]), make):
            good[tried[place]] = decodes
            if time.monotonic() > deadline:
                break
    return [int(index) for index in left[~good]]


def _undecodable(samples: Samples, make: probe.MakePipeline, at_most: int) -> tuple[list[int], int]:
    """Places of the samples that fail when tried alone, and how many were tried.

    The trial ends at the first failure beyond at_most; while every sample has failed, only after _SUSPICIOUS of them.
    """
    bad: list[int] = []
    tried = 0
    for tried, (place, decodes) in enumerate(probe.try_samples(samples, make), start=1):
        if not decodes:
            bad.append(place)
        all_failed = len(bad) == tried
        if (tried == _SUSPICIOUS) if all_failed else (len(bad) > at_most):
            break
    return bad, tried


def has_end_of_jpeg(last_bytes: np.ndarray) -> np.ndarray:
    """Whether an end-of-image marker is among the last bytes of files, [N, bytes] -> bool [N]."""
    return ((last_bytes[:, :-1] == 0xFF) & (last_bytes[:, 1:] == 0xD9)).any(axis=1)


def is_whole_jpeg(contents: bytes) -> bool:
    """Whether an end-of-image marker follows on a JPEG's first scan; those of thumbnails in its header do not count.

    Within a scan the marker's two bytes cannot occur (ITU-T T.81, B.1.1.5).
    """
    position = 2
    while position + 4 <= len(contents) and contents[position] == 0xFF:
        marker = contents[position + 1]
        if marker == 0xDA:
            return contents.find(b"\xff\xd9", position) >= 0
        # A marker may be preceded by any number of bytes of 255; a segment's length includes its own two bytes.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(contents[position + 2 : position + 4], "big")
    return False


def _may_be_cut_short(samples: Samples, payload: np.ndarray) -> bool:
    """False for whole JPEGs and for other formats, which are always decoded whole; a file's name does not tell which it
    is. True for what cannot be read any more."""
    contents = _contents(samples, payload)
    return contents is None or (contents[:2] == b"\xff\xd8" and not is_whole_jpeg(contents))


def _contents(samples: Samples, payload: np.ndarray) -> bytes | None:
    """An encoded image; None if it cannot be read."""
    if samples.encoded:
        return payload.tobytes()
    try:
        with open(payload.tobytes(), "rb") as file:
            return file.read()
    except OSError:
        return None
