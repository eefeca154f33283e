"""Encoded images, good ones and bad ones of every kind, and loaders that read them."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from pipelines import probe
from pipelines.crop import Decoder
from pipelines.loader import TrainLoader
from pipelines.readers import FileList, Samples
from pipelines.train import Augment


class InMemory:
    """Samples whose payload is the encoded image, as with samples of shards."""

    encoded: ClassVar[bool] = True

    def __init__(self, payloads: Sequence[bytes], labels: np.ndarray, suffix: str = ".JPEG") -> None:
        self.payloads = payloads
        self.labels = labels
        self.suffix = suffix

    def __len__(self) -> int:
        return len(self.payloads)

    def path(self, index: int) -> str:
        return f"memory: {self.labels[index]}{self.suffix}"

    def subset(self, indices: Sequence[int] | np.ndarray) -> InMemory:
        return InMemory([self.payloads[i] for i in indices], self.labels[np.asarray(indices)], self.suffix)

    def payload(self, indices: np.ndarray) -> list[np.ndarray]:
        return [np.frombuffer(self.payloads[i], np.uint8) for i in indices]


def encoded(size: tuple[int, int] = (40, 30), seed: int = 0, name: str = "JPEG", **options: Any) -> bytes:
    """An image file of smooth noise; size: (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(stream, name, **options)
    return stream.getvalue()


def jpeg_bomb(width: int, height: int) -> bytes:
    data = bytearray(encoded())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_411() -> bytes:
    """A JPEG with chroma at a quarter of the width. Pillow writes none; 4:2:0 has as many blocks a unit, in 2 x 2."""
    data = bytearray(encoded((64, 128), subsampling=2))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 64, 128)
    assert data[frame + 11] == 0x22
    data[frame + 11] = 0x41
    return bytes(data)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def png_bomb(width: int, height: int) -> bytes:
    return png(width, height, 8, bytes(3 * width + 1) * 10)


BAD: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"hello, I am no image",
    "zeros": bytes(2000),
    "header alone": encoded()[:150],
    "half": encoded()[: len(encoded()) // 2],
    "without its end": encoded()[:-20],
    "half a progressive JPEG": (lambda data: data[: len(data) // 2])(encoded(progressive=True)),
    "half a PNG": (lambda data: data[: len(data) // 2])(encoded(name="PNG")),
    "a PNG with a wrong checksum": (lambda data: data[:-40] + b"?" + data[-39:])(encoded(name="PNG")),
    "60,000 x 60,000 JPEG": jpeg_bomb(60_000, 60_000),
    "30,000 x 30,000 JPEG": jpeg_bomb(30_000, 30_000),
    "60,000 x 60,000 PNG": png_bomb(60_000, 60_000),
    "30,000 x 30,000 PNG": png_bomb(30_000, 30_000),
}


def mutations(count: int) -> list[bytes]:
    """Damaged JPEGs and PNGs; some of those with flipped bits can still be decoded."""
    rng = np.random.default_rng(0)

    def flip(data: bytearray) -> None:
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))

    def truncate(data: bytearray) -> None:
        del data[rng.integers(len(data)) :]

    def overwrite_header(data: bytearray) -> None:
        data[rng.integers(300)] = int(rng.integers(256))

    def erase(data: bytearray) -> None:
        start, length = int(rng.integers(len(data) - 100)), int(rng.integers(1, 100))
        data[start : start + length] = bytes(length)

    def cut_out(data: bytearray) -> None:
        start = int(rng.integers(len(data)))
        del data[start : start + int(rng.integers(1, 200))]

    damages: list[Callable[[bytearray], None]] = [flip, truncate, overwrite_header, erase, cut_out]
    kinds: list[dict[str, Any]] = [{}, {"progressive": True}, {"subsampling": 0}, {"name": "PNG"}]
    mutated = list(BAD.values())
    while len(mutated) < count:
        i = len(mutated)
        data = bytearray(encoded(seed=i, **kinds[i // len(damages) % len(kinds)]))
        damages[i % len(damages)](data)
        mutated.append(bytes(data))
    return mutated


def write(folder: Path, contents: Sequence[bytes], suffix: str = ".JPEG") -> FileList:
    """Files 000.JPEG, 001.JPEG, ... whose labels are their numbers."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:03d}{suffix}" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return FileList.from_paths([str(path) for path in paths], np.arange(len(contents)))


def with_bad(count: int, bad: dict[int, bytes]) -> list[bytes]:
    return [bad.get(i, encoded(seed=i)) for i in range(count)]


def loader(samples: Samples, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {
        "batch_size": 8,
        "image_size": 16,
        "seed": 1,
        "rank": 0,
        "world_size": 1,
        "device": "cpu",
        "num_threads": 2,
        "augment": Augment(randaug_layers=0),
        "max_bad_share": 0.5,
    }
    return TrainLoader(samples, **(defaults | options))


def take(train: TrainLoader, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*(next(train) for _ in range(steps)), strict=True)
    return torch.stack(images), torch.stack(labels)


def assert_equal(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[0], b[0])


def undecodable(samples: Samples) -> set[str]:
    """Names of the samples that DALI does not decode as a whole image, each tried alone."""
    make = functools.partial(probe.decode_pipeline, decoder=Decoder(), device_id=None, num_threads=1)
    return {samples.path(i) for i, decodes in probe.try_samples(samples, make, batch_size=1) if not decodes}
