"""Decompression bombs take no memory, and formats that are rare decode to RGB."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from pipelines import crop
from pipelines.crop import MAX_PIXELS, Decoder
from pipelines.loader import DecodeError, EvalLoader
from pipelines.readers import FileList
from tests.bad_images import BAD, encoded, jpeg_411, loader, png, take, with_bad, write
from tests.conftest import environment

pytestmark = pytest.mark.timeout(240)

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


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("whole", [True, False])
def test_more_pixels_than_allowed_are_refused_before_decoding(
    whole: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a graph for a GPU the part that is the CPU's: the bytes go on as they are, or the pipeline fails."""
    image = np.frombuffer(encoded((30, 20)), np.uint8)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph() -> Any:
        file = fn.external_source(lambda: [image])
        start, window = types.Constant(np.zeros(2, np.float32)), types.Constant(np.full(2, 8, np.float32))
        size = crop.image_size(file)
        if whole:
            return crop.refuse_too_large(file, size, device)
        options: dict[str, Any] = {"size": 8, "antialias": True, "decoder": Decoder()}
        return crop.decode_window(file, size, start, window, None, device="cpu", **options)

    monkeypatch.setattr(crop, "MAX_PIXELS", 600)
    (output,) = graph().run()
    assert not whole or np.array_equal(output.as_array()[0], image)
    monkeypatch.setattr(crop, "MAX_PIXELS", 599)
    with pytest.raises(RuntimeError):
        graph().run()


def test_bombs_among_good_images_crash_no_process(tmp_path: Path) -> None:
    """Refused by the decoder of windows, as many as these crashed nearly every process."""
    files = write(tmp_path / "images", [encoded((160, 60 if i < 31 else 40)) for i in range(32)])
    paths = [files.path(i) for i in range(32)]
    program = f"""
from pipelines import crop
from tests.bad_images import loader
from pipelines.readers import FileList
crop.MAX_PIXELS = 8000
for seed in range(24):
    train = loader(FileList.from_paths({paths}, range(32)), seed=seed, batch_size=32, num_threads=1, max_bad_share=1)
    labels = next(train)[1]
    assert set(labels[labels >= 0].tolist()) == {{31}}, labels
    train.close()
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr


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
