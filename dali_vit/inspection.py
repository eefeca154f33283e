"""What is wrong with encoded images: Pillow reads their headers, and DALI decodes them, as it does for training."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from dali_vit.config import UserError
from dali_vit.listing import FORMATS
from pipelines import probe
from pipelines.bad_samples import DecodeError
from pipelines.crop import Decoder
from pipelines.eval import MAX_ASPECT_RATIO
from pipelines.words import one_line

__all__ = [
    "KINDS",
    "Problem",
    "find_undecodable",
    "inspect_header",
    "no_messages_beside_ours",
    "why_undecodable",
]


KINDS = {
    "no file": "is a link that leads to no file, or a pipe or a device",
    "not read": "could not be read, and stays: see to the disk and its permissions, and run verify again",
    "empty": "has no bytes",
    "not an image": "is of no format that DALI decodes",
    "truncated": "ends too early",
    "damaged": "cannot be decoded",
    "too large": "has more pixels than --max-megapixels",
    "too long": "is so long and thin that an evaluation refuses it",
    "duplicate": "is in val, too, byte for byte",
    "shared": "is val's image itself, by a link: leave it to one of the two",
    "checksum": "is not the shard that prepare wrote: copy it again",
    "CMYK": "is decoded to RGB",
    "floats": "has floats for pixels, of which those above 1 become white: look at it with `preview`",
    "other format": "is decoded as what it is",
}
"""Every kind of problem that is reported, and what it means."""

_HARMLESS = ("CMYK", "floats", "other format")


@dataclass(frozen=True)
class Problem:
    """Something wrong with one image or shard."""

    kind: str
    """One of KINDS."""
    split: str
    path: str
    detail: str

    @property
    def hurts(self) -> bool:
        """Whether it makes training or its evaluation worse."""
        return self.kind not in _HARMLESS


class _InMemory:
    """Encoded images as samples."""

    encoded: ClassVar[bool] = True

    def __init__(self, images: Sequence[bytes]) -> None:
        self._images = images
        self.labels = np.zeros(len(images), np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def subset(self, indices: Sequence[int] | np.ndarray) -> _InMemory:
        return _InMemory([self._images[i] for i in indices])

    def path(self, index: int) -> str:
        return f"image {index}"

    def payload(self, indices: np.ndarray) -> list[np.ndarray]:
        return [np.frombuffer(self._images[i], np.uint8) for i in indices]


def inspect_header(data: bytes, name: str, max_pixels: float) -> tuple[list[tuple[str, str]], bool]:
    """Kind and detail of each problem that shows without decoding the image, and whether the image may be decoded: not
    if it is empty, too large, or has no header of a format that DALI decodes."""
    if not data:
        return [("empty", "0 bytes")], False
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
            return [("truncated", f"{len(data)} bytes hold no whole header")], False
        return [("not an image", f"begins with {data[:8]!r}")], False
    except Image.DecompressionBombError as error:
        return [("too large", one_line(error))], False
    except MemoryError:
        raise
    except Exception as error:  # each format's parser raises its own
        return [("damaged", one_line(error))], False
    with image:
        kind = "JPEG" if image.format == "MPO" else image.format
        if kind not in FORMATS.values():
            return [("not an image", f"{kind}, which DALI does not decode")], False
        if image.width * image.height > max_pixels:
            return [("too large", f"{image.width} x {image.height} pixels")], False
        problems = [("CMYK", f"{kind} of {image.mode}")] if image.mode == "CMYK" else []
        if image.mode == "F":  # DALI takes what is above 1 for white
            problems.append(("floats", f"{kind} of float32"))
        if round(256 * MAX_ASPECT_RATIO * min(image.size) / max(image.size)) < 224:
            problems.append(("too long", f"{image.width} x {image.height} pixels"))
    suffix = os.path.splitext(name)[1].lower()
    if FORMATS.get(suffix, kind) != kind:
        problems.append(("other format", f"{kind} named {suffix}"))
    return problems, True


def find_undecodable(images: Sequence[bytes], num_threads: int) -> list[int]:
    """Indices of the images that DALI does not decode, rising; UserError if it does not decode good ones either."""
    make = functools.partial(probe.decode_pipeline, decoder=Decoder(), device_id=None, num_threads=num_threads)
    with _no_messages():
        failed = [i for i, decodes in probe.try_samples(_InMemory(images), make) if not decodes]
        if failed and not probe.decodes_good_images(make):
            raise UserError("DALI decodes no image here, not even one that is good: memory or threads may be short")
    return failed


@contextmanager
def _no_messages() -> Iterator[None]:
    """Suppresses the messages that the decoders' libraries print about images without naming them."""
    with open(os.devnull, "w") as nowhere, _stderr_to(nowhere.fileno()):
        yield


@contextmanager
def no_messages_beside_ours() -> Iterator[None]:
    """Holds back the libraries' messages until the block ends; a DecodeError, which names the image, drops them.

    So does whoever reads no further, by closing the generator that the block is in, or by Ctrl-C.
    """
    kept = os.memfd_create("stderr")
    try:
        with _stderr_to(kept):
            yield
    except (DecodeError, GeneratorExit, KeyboardInterrupt):
        os.truncate(kept, 0)
        raise
    finally:
        os.lseek(kept, 0, os.SEEK_SET)
        with open(kept, "rb") as messages, contextlib.suppress(OSError):
            sys.stderr.write(messages.read().decode(errors="replace"))


@contextmanager
def _stderr_to(descriptor: int) -> Iterator[None]:
    """Redirects what is written to stderr, also by libraries, which know nothing of `sys.stderr`."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        os.dup2(descriptor, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


def why_undecodable(data: bytes) -> tuple[str, str]:
    """Kind and detail of an image that DALI does not decode, by Pillow's error; MemoryError if memory runs out."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:
        early = "truncated" in str(error) or "unexpected end" in str(error).lower()
        return "truncated" if early else "damaged", one_line(error)
    return "damaged", "DALI does not decode it, though Pillow does"
