"""The same graphs on a GPU: what the CPU gives, on the device, and safe to hold on to."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import windows
from pipelines.crop import Decoder
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.readers import FileList
from pipelines.train import Augment
from tests import bad_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(300),
]

NUM_FILES = 40
CROP_ONLY = Augment(randaug_layers=0)
SHARED: dict[str, Any] = {"rank": 0, "world_size": 1, "num_threads": 2}


def photograph(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Smooth noise: what nvJPEG and libjpeg-turbo decode alike, unlike white noise."""
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileList:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for i in range(NUM_FILES):
        path = folder / f"{i}.JPEG"
        # One in four is of a kind that the hardware decoder does not take.
        kinds: list[dict[str, Any]] = [{}, {"subsampling": 0}, {}, {"progressive": True}]
        photograph(rng, *rng.integers(100, 500, 2)).save(path, "JPEG", quality=90, **kinds[i % 4])
        paths.append(str(path))
    return FileList.from_paths(paths, np.arange(NUM_FILES))


def train_loader(files: FileList, device: str, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {"batch_size": 16, "image_size": 96, "seed": 0, "augment": CROP_ONLY, "device": device}
    return TrainLoader(files, **(SHARED | defaults | options))


@pytest.mark.parametrize("crop", ["tensorflow", "torchvision"])
@pytest.mark.parametrize("region", ["window", "full"])
def test_training_images_are_those_of_the_cpu(files: FileList, crop: Any, region: Any) -> None:
    if region == "window" and windows.fault():
        pytest.skip(f"no windows are decoded alone here: {windows.fault()}")
    options = {"augment": Augment(crop=crop, randaug_layers=0), "decoder": Decoder(region=region)}
    on_gpu, on_cpu = (train_loader(files, device, **options) for device in ("cuda", "cpu"))
    for _ in range(4):
        (images, labels), (expected_images, expected_labels) = next(on_gpu), next(on_cpu)
        assert images.device == labels.device == torch.device("cuda", torch.cuda.current_device())
        assert torch.equal(labels.cpu(), expected_labels)
        error = (images.cpu().float() - expected_images).abs().mean(dim=(1, 2, 3))
        # Levels; another window or a flip would cost 30. Training repeats chroma, which by itself costs up to 2.7 here
        # where it was sampled down: not where it has every pixel, as in `files` every fourth.
        has_all_chroma = expected_labels % 4 == 1
        assert (error < torch.where(has_all_chroma, 3, 5)).all()


def test_randaugment_is_that_of_the_cpu(files: FileList) -> None:
    on_gpu, on_cpu = (train_loader(files, device, augment=Augment()) for device in ("cuda", "cpu"))
    errors = torch.cat([(next(on_gpu)[0].cpu().float() - next(on_cpu)[0]).abs().mean(dim=(1, 2, 3)) for _ in range(8)])
    # A difference of a level or two before equalize, posterize or solarize is a large one afterwards.
    assert errors.median() < 3
    assert (errors < 12).float().mean() > 0.9


def test_evaluation_images_are_those_of_the_cpu(files: FileList) -> None:
    on_gpu, on_cpu = (EvalLoader(files, batch_size=16, image_size=96, device=d, **SHARED) for d in ("cuda", "cpu"))
    for _ in range(2):
        counted = []
        for (images, labels), (expected_images, expected_labels) in zip(on_gpu, on_cpu, strict=True):
            assert torch.equal(labels.cpu(), expected_labels)
            assert (images.cpu().float() - expected_images).abs().mean(dim=(1, 2, 3)).max() < 3
            counted += labels[labels >= 0].tolist()
        assert counted == list(range(NUM_FILES))


# Two decoders need not give the same bits. Which of them an image goes to is to depend on the step alone.
@pytest.mark.parametrize("hw_decoder_load", [0.0, Decoder().hw_decoder_load])
def test_a_loader_made_at_any_step_continues_bit_for_bit(files: FileList, hw_decoder_load: float) -> None:
    options: dict[str, Any] = {"augment": Augment(), "decoder": Decoder(hw_decoder_load=hw_decoder_load)}
    full = train_loader(files, "cuda", **options)
    batches = [next(full) for _ in range(6)]
    resumed = train_loader(files, "cuda", **options, start_step=3)
    for step in range(3, 6):
        images, labels = next(resumed)
        assert torch.equal(images, batches[step][0])
        assert torch.equal(labels, batches[step][1])


# The hardware decoder writes when it is called, whatever is queued before it: torchcodec's pull request 1634.
@pytest.mark.parametrize("augment", [CROP_ONLY, Augment()])
@pytest.mark.parametrize("region", ["window", "full"])
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_batches_stay_valid_while_kernels_still_read_them(
    files: FileList, hw_decoder_load: float, region: Any, augment: Augment
) -> None:
    """The host runs ahead of slow kernels, dropping each batch at once: no later batch may overwrite it."""
    if region == "window" and windows.fault():
        pytest.skip(f"no windows are decoded alone here: {windows.fault()}")
    weights = torch.randn(4096, 4096, device="cuda")
    sums = []
    options: dict[str, Any] = {"decoder": Decoder(hw_decoder_load=hw_decoder_load, region=region), "augment": augment}
    loader = train_loader(files, "cuda", **options)
    for _ in range(40):
        images, _ = next(loader)
        for _ in range(20):
            weights = torch.nn.functional.normalize(weights @ weights)  # keeps the stream busy
        sums.append(images.long().sum() + (0 * weights[0, 0]).long())
        del images
    again = train_loader(files, "cuda", **options)
    expected = []
    for _ in range(40):
        images, _ = next(again)
        torch.cuda.synchronize()
        expected.append(int(images.long().sum()))
    assert [int(s) for s in sums] == expected


@pytest.mark.parametrize("augment", [CROP_ONLY, Augment()])
def test_batches_can_be_kept(files: FileList, augment: Augment) -> None:
    loader = train_loader(files, "cuda", augment=augment)
    kept = [(images, images.clone()) for images, _ in (next(loader) for _ in range(20))]
    loader.close()
    torch.cuda.synchronize()
    assert all(torch.equal(images, copy) for images, copy in kept)
    assert len({images.data_ptr() for images, _ in kept}) == 20


def test_every_format_of_imagenet_decodes(tmp_path: Path) -> None:
    image = photograph(np.random.default_rng(0), 112, 160)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    formats: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "PNG", {}),
        (image.convert("L"), "JPEG", {"quality": 95}),
        (image.convert("CMYK"), "JPEG", {"quality": 95}),
        (image, "JPEG", {"quality": 95, "exif": rotated}),
        (image, "WEBP", {"quality": 95}),
    ]
    paths, expected = [], []
    for i, (source, name, options) in enumerate(formats):
        stream = io.BytesIO()
        source.save(stream, name, **options)
        paths.append(tmp_path / f"{i}.JPEG")
        paths[-1].write_bytes(stream.getvalue())
        expected.append(np.asarray(Image.open(stream).convert("RGB"))[7:105, 31:129])
    files = FileList.from_paths(list(map(str, paths)), range(len(paths)))
    images, _ = next(iter(EvalLoader(files, batch_size=len(paths), image_size=98, device="cuda", **SHARED)))
    assert np.abs(images.cpu().numpy().astype(int) - np.array(expected)).mean(axis=(1, 2, 3)).max() < 3


def test_a_bad_file_is_left_out(files: FileList, tmp_path: Path) -> None:
    bad = tmp_path / "bad.JPEG"
    bad.write_bytes(Path(files.path(0)).read_bytes()[:1000])
    paths = [files.path(i) for i in range(1, 16)] + [str(bad)]
    loader = train_loader(FileList.from_paths(paths, range(16)), "cuda")
    labels = [next(loader)[1].cpu() for _ in range(2)]
    assert loader.bad_samples == (15,)
    assert all((batch != 15).all() for batch in labels)
    assert any((batch == -1).any() for batch in labels)


def test_an_evaluation_leaves_bad_files_out(files: FileList, tmp_path: Path) -> None:
    bad = tmp_path / "bad.JPEG"
    bad.write_bytes(Path(files.path(0)).read_bytes()[:1000])
    at = (0, 17, NUM_FILES - 1)
    paths = [str(bad) if i in at else files.path(i) for i in range(NUM_FILES)]
    options: dict[str, Any] = {"batch_size": 16, "image_size": 96, "device": "cuda", **SHARED}
    loader = EvalLoader(FileList.from_paths(paths, range(NUM_FILES)), max_bad_share=0.1, **options)
    for _ in range(2):
        labels = torch.cat([batch.cpu() for _, batch in loader])
        assert sorted(labels[labels >= 0].tolist()) == sorted(set(range(NUM_FILES)) - set(at))
    assert loader.bad_samples == at


def test_rare_formats_are_those_of_the_cpu(tmp_path: Path) -> None:
    """4:1:1 and 16-bit PNG; test_rare_images holds the CPU's to the values."""
    rows = np.linspace(0, 65535, 64 * 128 * 3).astype(">u2").reshape(64, -1)
    deep = bad_images.png(128, 64, 16, b"".join(b"\0" + row.tobytes() for row in rows))
    files = bad_images.write(tmp_path / "images", [bad_images.jpeg_411(), deep])
    options: dict[str, Any] = {"batch_size": 2, "image_size": 56, "decoder": Decoder(fast_idct=False), **SHARED}
    on_gpu, on_cpu = (
        next(iter(EvalLoader(files, device=device, **options)))[0].cpu().numpy().astype(int)
        for device in ("cuda", "cpu")
    )
    assert np.abs(on_gpu - on_cpu).mean(axis=(1, 2, 3)).max() < 3
