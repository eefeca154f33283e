"""Training goes on past what cannot be decoded: nothing else moves, whoever finds it, and whenever."""

from __future__ import annotations

import io
import logging
import resource
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline
from PIL import Image

from pipelines.crop import MAX_PIXELS, Decoder
from pipelines.loader import DecodeError, EvalLoader, TrainLoader
from pipelines.readers import FileList, Samples
from pipelines.train import Augment

pytestmark = pytest.mark.timeout(240)

LOGGER = "dali_vit.data"


class InMemory:
    """Samples whose payload is the encoded image, as those of shards are."""

    encoded: ClassVar[bool] = True

    def __init__(self, payloads: Sequence[bytes], labels: np.ndarray) -> None:
        self.payloads = payloads
        self.labels = labels

    def __len__(self) -> int:
        return len(self.payloads)

    def path(self, index: int) -> str:
        return f"memory: {self.labels[index]}.JPEG"

    def subset(self, indices: Sequence[int] | np.ndarray) -> InMemory:
        return InMemory([self.payloads[i] for i in indices], self.labels[np.asarray(indices)])

    def payload(self, indices: np.ndarray) -> list[np.ndarray]:
        return [np.frombuffer(self.payloads[i], np.uint8) for i in indices]


def encoded(size: tuple[int, int] = (40, 30), seed: int = 0, name: str = "JPEG", **options: Any) -> bytes:
    """An image file of smooth noise, (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(stream, name, **options)
    return stream.getvalue()


def jpeg_bomb(width: int, height: int) -> bytes:
    data = bytearray(encoded())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
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
    """Damaged JPEGs and PNGs; of those with flipped bits some can still be decoded."""
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


def write(folder: Path, contents: Sequence[bytes]) -> FileList:
    """Files 000.JPEG, 001.JPEG, ... whose labels are their numbers."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:03d}.JPEG" for i in range(len(contents))]
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


def test_300_mutated_images_do_not_end_a_run(tmp_path: Path) -> None:
    """Two epochs; what is found on the way is what was bad from the start, on one rank and on two."""
    contents = [encoded(seed=i) for i in range(300)] + mutations(300)
    files = write(tmp_path / "images", contents)
    steps, options = 2 * 600 // 40, {"batch_size": 40}
    alone = loader(files, **options)
    images, labels = take(alone, steps)

    bad = alone.bad_samples
    assert 150 < len(bad) < 300
    assert min(bad) >= 300
    assert set(range(300, 300 + len(BAD))) <= set(bad)
    for epoch in labels.reshape(2, 600).tolist():
        assert sorted(label for label in epoch if label >= 0) == sorted(set(range(600)) - set(bad))
        assert epoch.count(-1) == len(bad)

    assert_equal(take(loader(files, bad_samples=bad, **options), steps), (images, labels))
    ranks = [loader(files, rank=rank, world_size=2, **options) for rank in range(2)]
    streams = [take(rank, steps) for rank in ranks]
    assert_equal((torch.cat([s[0] for s in streams], 1), torch.cat([s[1] for s in streams], 1)), (images, labels))
    assert set(ranks[0].bad_samples) | set(ranks[1].bad_samples) == set(bad)
    in_memory = loader(InMemory(contents, files.labels), **options)
    assert_equal(take(in_memory, steps // 2), (images[: steps // 2], labels[: steps // 2]))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_named_once_and_replaced(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write(tmp_path / "good", with_bad(12, {}))
    files = write(tmp_path / "bad", with_bad(12, {7: BAD[kind]}))
    train = loader(files, batch_size=4)
    with caplog.at_level(logging.WARNING, LOGGER):
        images, labels = take(train, 9)  # three epochs
    assert [record.message for record in caplog.records] == [
        f"{files.path(7)} cannot be read or decoded: left out for the rest of the run"
    ]
    assert train.bad_samples == (7,)
    assert train.state_dict()["bad_samples"] == [7]

    expected_images, expected_labels = take(loader(good, batch_size=4), 9)
    replaced = expected_labels == 7
    assert replaced.sum() == 3
    assert torch.equal(labels, torch.where(replaced, -1, expected_labels))
    assert torch.equal(images[~replaced], expected_images[~replaced])
    assert (images[replaced] == 128).all()


def test_a_missing_file_and_one_that_goes_missing(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(64, {}))
    Path(files.path(3)).unlink()
    train = loader(files, batch_size=16)
    take(train, 4)
    assert train.bad_samples == (3,)
    Path(files.path(60)).unlink()
    _, labels = take(train, 8)
    assert train.bad_samples == (3, 60)
    assert (labels == -1).sum() >= 3


def test_resumed_at_any_step_with_what_was_known_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loader._LOOK_AHEAD", 0)
    files = write(tmp_path / "images", with_bad(40, dict.fromkeys((5, 17, 31), BAD["without its end"])))
    options: dict[str, Any] = {"batch_size": 4}
    train = loader(files, **options)
    batches, states = [], []
    for _ in range(20):
        states.append(train.state_dict())
        batches.append(next(train))
    assert (states[0]["bad_samples"], states[-1]["bad_samples"]) == ([], [5, 17, 31])
    assert any(len(state["bad_samples"]) in (1, 2) for state in states)
    for start in (1, 5, 9):
        resumed = loader(files, start_step=start, bad_samples=states[start]["bad_samples"], **options)
        for step in range(start, start + 4):
            assert_equal(next(resumed), batches[step])


def test_jpegs_with_something_after_their_end_are_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are tried once only."""
    contents = with_bad(12, {i: encoded(seed=i) + bytes(100) for i in range(0, 12, 2)})
    contents[1] = encoded(seed=1, name="PNG")
    train = loader(write(tmp_path / "images", contents), batch_size=12)
    runs: list[Pipeline] = []
    run = Pipeline.run

    def recording_run(pipeline: Pipeline) -> Any:
        runs.append(pipeline)
        return run(pipeline)

    monkeypatch.setattr(Pipeline, "run", recording_run)
    _, labels = take(train, 5)
    assert train.bad_samples == ()
    assert torch.equal(labels.sort().values, torch.arange(12).expand(5, 12))
    assert len(runs) == 5 + 1


# ---------------------------------------------------------------------------------------------------- limits


def test_too_large_a_share_ends_the_run(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(100, dict.fromkeys((10, 20, 30, 40), BAD["text"])))
    assert len(loader(files, bad_samples=range(29), max_bad_share=0.29).bad_samples) == 29  # 0.29 * 100 is below 29
    take(loader(files, max_bad_share=0.04), 13)
    train = loader(files, max_bad_share=0.03)
    with pytest.raises(DecodeError, match=r"4 of 100 samples .* more than the 3 .* `dali-vit verify") as error:
        take(train, 13)
    assert sorted(error.value.paths) == [files.path(i) for i in (10, 20, 30, 40)]
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="closed"):
        next(train)
    with pytest.raises(DecodeError, match="3 of 100 samples"):
        loader(files, bad_samples=[1, 2, 3], max_bad_share=0.02)


def test_one_bad_sample_is_allowed_in_a_small_set_unless_none_is(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(12, {4: BAD["text"]}))
    take(loader(files, max_bad_share=0.01), 3)
    with pytest.raises(DecodeError, match="1 of 12 samples"):
        take(loader(files, max_bad_share=0.0), 3)
    files = write(tmp_path / "images", with_bad(12, {4: BAD["text"], 5: BAD["half"]}))
    with pytest.raises(DecodeError, match="2 of 12 samples"):
        take(loader(files, max_bad_share=0.01), 3)


def test_a_lost_disk_is_not_blamed_on_the_samples(caplog: pytest.LogCaptureFixture) -> None:
    for count in (3, 1000):
        files = FileList.from_paths([f"/nowhere/{i}.jpg" for i in range(count)], np.arange(count))
        with pytest.raises(RuntimeError, match="/nowhere/"):
            next(loader(files, max_bad_share=0.1))
    assert not caplog.records


def test_arguments_are_checked(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(4, {}))
    with pytest.raises(ValueError, match=r"max_bad_share is 1.5"):
        loader(files, max_bad_share=1.5)
    for index in (-1, 4):
        with pytest.raises(ValueError, match="bad_samples"):
            loader(files, bad_samples=[index])


# ----------------------------------------------------------------------------------------------------- bombs


@pytest.mark.parametrize("kind", [kind for kind in BAD if " x " in kind])
def test_a_bomb_takes_no_memory(kind: str, tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(16, {3: BAD[kind]}))
    take(loader(files), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    take(loader(files), 2)
    batches = EvalLoader(files, batch_size=4, image_size=16, rank=0, world_size=1, device="cpu", num_threads=1)
    with pytest.raises(DecodeError) as error:
        list(batches)
    assert error.value.paths == [files.path(3)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_large_photograph_is_no_bomb(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (8000, 8000), 77).save(path)
    assert MAX_PIXELS > 8000 * 8000
    train = loader(FileList.from_paths([str(path)], [2]), batch_size=1)
    images, labels = next(train)
    assert labels.tolist() == [2]
    assert (images == 77).all()


def test_evaluation_refuses_a_strip_that_scaled_up_would_be_a_bomb(tmp_path: Path) -> None:
    files = write(tmp_path / "images", [encoded((3000, 40)), encoded((60_000, 1))])
    batches = iter(EvalLoader(files, batch_size=1, image_size=64, rank=0, world_size=1, device="cpu", num_threads=1))
    assert next(batches)[1].tolist() == [0]
    with pytest.raises(DecodeError) as error:
        next(batches)
    assert error.value.paths == [files.path(1)]


# ----------------------------------------------------------------------------------------------- rare formats


def jpeg_411() -> bytes:
    """Chroma at a quarter of the width, which Pillow does not write: 4:2:0 has as many blocks in a unit, in 2 x 2."""
    data = bytearray(encoded((64, 128), subsampling=2))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 64, 128)
    assert data[frame + 11] == 0x22
    data[frame + 11] = 0x41
    return bytes(data)


def test_rare_formats_decode_to_rgb(tmp_path: Path) -> None:
    """Besides those of test_crop."""
    values = np.random.default_rng(0).integers(0, 2**16, (64, 128, 3), np.uint16)
    grey = np.random.default_rng(1).integers(0, 2**16, (64, 128), np.uint16)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG")
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    contents = [jpeg_411(), png(128, 64, 16, rows), stream.getvalue()]
    expected = [
        np.asarray(Image.open(io.BytesIO(contents[0])).convert("RGB")).astype(float),
        values / 257,
        np.broadcast_to(grey[:, :, None], (64, 128, 3)) / 257,
    ]
    files = write(tmp_path / "images", contents)
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "device": "cpu", "num_threads": 1}
    batches = EvalLoader(files, batch_size=3, image_size=56, decoder=Decoder(fast_idct=False), **options)
    images, _ = next(iter(batches))  # the smaller side stays 64
    for image, pixels in zip(images.numpy(), expected, strict=True):
        assert np.abs(image - pixels[4:60, 36:92]).mean() < 1
    train = loader(files, batch_size=3)
    assert sorted(next(train)[1].tolist()) == [0, 1, 2]
    assert train.bad_samples == ()
