"""Window sampling against plain Python, and decoding against Pillow and torch: compiled, and by DALI's operators."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from nvidia.dali import Pipeline, fn, pipeline_def, types
from PIL import Image

from pipelines import compiled, crop
from pipelines.crop import NUM_UNIFORMS, SAMPLERS, Decoder
from pipelines.crop import _options as crop_options
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.readers import FileList
from tests.statistical import kolmogorov_smirnov_p

pytestmark = pytest.mark.timeout(120)

SIZES = [(375, 500), (500, 333), (224, 224), (64, 48), (9, 7), (1, 1), (2, 40), (40, 2), (30, 480), (480, 30)]
LARGEST = 1 - 2.0**-24  # of a float32 uniform


@pytest.fixture(autouse=True, params=["compiled", "operators"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "available", lambda: request.param == "compiled")


def sample_windows(
    kind: str, sizes: np.ndarray, uniforms: list[np.ndarray], **ranges: tuple[float, float]
) -> np.ndarray:
    """Rows (top, left, height, width) that a sampler gives for sizes [N, 2], through a pipeline of one batch."""
    sources = (sizes.astype(np.float32), *uniforms)

    @pipeline_def(batch_size=len(sizes), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> tuple:
        size, *u = fn.external_source(lambda _: sources, num_outputs=4)
        return SAMPLERS[kind](size, tuple(u), **ranges)

    return np.concatenate([output.as_array() for output in graph().run()], axis=1)


def draw(kind: str, count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.random((count, n), np.float32) for n in NUM_UNIFORMS[kind]]


def recipe_window(
    size: tuple[int, int], uniforms: list[np.ndarray], area_range: tuple[float, float]
) -> tuple[int, int, int, int]:
    """TensorFlow's five steps for one image, the attempts from the last to the first as the graph prefers them."""
    f = np.float32
    height, width = window = size
    smallest, largest = f(height * width) * f(area_range[0]), f(height * width) * f(area_range[1])
    for u_ratio, u_height in zip(uniforms[0][::-1], uniforms[1][::-1], strict=True):
        r = u_ratio * f(1.33 - 0.75) + f(0.75)
        h_min, h_max = (math.floor(np.sqrt(bound / r) + f(0.5)) for bound in (smallest, largest))
        while math.floor(f(h_max) * r + f(0.5)) > width:
            h_max -= 1
        h_max = min(h_max, height)
        h_min = min(h_min, h_max)
        h = h_min + math.floor(u_height * f(h_max - h_min + 1))
        if h * math.floor(f(h) * r + f(0.5)) < smallest:
            h += 1
        if h * math.floor(f(h) * r + f(0.5)) > largest:
            h -= 1
        w = math.floor(f(h) * r + f(0.5))
        if smallest <= h * w <= largest and h <= height and w <= width:
            window = (h, w)
            break
    return (
        math.floor(f(height - window[0]) * uniforms[2][0]),
        math.floor(f(width - window[1]) * uniforms[2][1]),
        *window,
    )


@pytest.mark.parametrize("area_range", [(0.05, 1.0), (0.25, 0.5), (0.9, 1.0)])
def test_tensorflow_windows_follow_the_recipe(area_range: tuple[float, float]) -> None:
    sizes = np.repeat(SIZES, 40, axis=0)
    uniforms = draw("tensorflow", len(sizes))
    windows = sample_windows("tensorflow", sizes, uniforms, area_range=area_range)
    expected = [recipe_window(size, [u[i] for u in uniforms], area_range) for i, size in enumerate(sizes.tolist())]
    np.testing.assert_array_equal(windows, expected)


def test_tensorflow_takes_the_whole_image_where_no_window_fits() -> None:
    # 27:1 is beyond 1.33 / 0.05 = 26.6: even the largest window is less than 5 % of the image.
    sizes = np.tile([[10, 270], [270, 10]], (8, 1))
    windows = sample_windows("tensorflow", sizes, draw("tensorflow", len(sizes)))
    np.testing.assert_array_equal(windows, np.concatenate([np.zeros_like(sizes), sizes], axis=1))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_windows_stay_inside_the_image(kind: str) -> None:
    rng = np.random.default_rng(0)
    sizes = np.concatenate([SIZES, rng.integers(1, 700, (400, 2)), [[8000, 6000]] * 6])
    for fill in (None, 0.0, LARGEST):
        uniforms = draw(kind, len(sizes)) if fill is None else [np.full_like(u, fill) for u in draw(kind, len(sizes))]
        top, left, height, width = sample_windows(kind, sizes, uniforms).T
        assert min(top.min(), left.min()) >= 0
        assert min(height.min(), width.min()) >= 1
        assert (top + height <= sizes[:, 0]).all()
        assert (left + width <= sizes[:, 1]).all()


@pytest.mark.parametrize("size", [(375, 500), (64, 48), (100, 700), (700, 100)])
def test_torchvision_windows_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    count = 4000
    torch.manual_seed(0)
    image = torch.zeros(1, *size)
    transform = torchvision.transforms.RandomResizedCrop
    expected = np.array([transform.get_params(image, [0.05, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    windows = sample_windows("torchvision", np.tile(size, (count, 1)), draw("torchvision", count))
    for i in range(4):
        assert kolmogorov_smirnov_p(windows[:, i], expected[:, i]) > 0.001


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (11, 1001), (1, 2), (2, 1)])
def test_torchvision_falls_back_to_the_centre(size: tuple[int, int]) -> None:
    image = torch.zeros(1, *size)
    transform = torchvision.transforms.RandomResizedCrop
    # An area above the image's makes every attempt fail, in torchvision as here.
    expected = transform.get_params(image, [30.0, 40.0], [3 / 4, 4 / 3])
    windows = sample_windows("torchvision", np.array([size]), draw("torchvision", 1), area_range=(30.0, 40.0))
    assert windows[0].tolist() == list(expected)


# ------------------------------------------------------------------------------------------------- decoding


def jpeg(height: int, width: int) -> bytes:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    pixels = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), (5 * x + 3 * y) % 256], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def decode(data: bytes, window: tuple[int, int, int, int], **options: Any) -> list[np.ndarray]:
    """The window decoded as is and mirrored, each [size, size, 3]."""
    defaults: dict[str, Any] = {"device": "cpu", "decoder": Decoder()}
    encoded = np.frombuffer(data, np.uint8)
    start, extent = np.array(window[:2], np.float32), np.array(window[2:], np.float32)

    @pipeline_def(batch_size=2, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> object:
        sources = ([encoded] * 2, [start] * 2, [extent] * 2, [np.bool_(False), np.bool_(True)])
        file, *rest = fn.external_source(lambda _: sources, num_outputs=4)
        return crop.decode_window(file, crop.image_size(file), *rest, **(defaults | options))

    pipeline: Pipeline = graph()
    return list(pipeline.run()[0].as_array())


def test_a_window_is_resized_as_by_torch_and_mirrored() -> None:
    data = jpeg(90, 120)
    top, left, height, width = window = (13, 17, 50, 70)
    decoder = Decoder(fast_idct=False)  # Pillow's transform
    image, mirrored = decode(data, window, size=32, antialias=False, decoder=decoder)

    pixels = np.asarray(Image.open(io.BytesIO(data)))[top : top + height, left : left + width]
    planes = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(planes, (32, 32), mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert np.abs(image - expected).max() <= 0.51
    assert np.abs(mirrored.astype(int)[:, ::-1] - image).max() <= 1

    smooth = decode(data, window, size=32, antialias=True, decoder=decoder)[0]
    low_passed = torch.nn.functional.interpolate(planes, (32, 32), mode="bilinear", antialias=True)[0]
    expected = low_passed.permute(1, 2, 0).numpy()
    # At the border DALI repeats the outermost pixels where torch leaves them out.
    assert np.abs(smooth - expected)[2:-2, 2:-2].max() <= 0.51
    assert np.abs(smooth.astype(int) - image).max() > 3


@pytest.mark.parametrize("antialias", [False, True])
def test_decoding_the_full_image_gives_the_same_window(antialias: bool) -> None:
    data, window = jpeg(90, 120), (13, 17, 50, 70)
    cut, cut_mirrored = decode(data, window, size=24, antialias=antialias)
    full, full_mirrored = decode(data, window, size=24, antialias=antialias, decoder=Decoder(region="full"))
    assert (np.array([cut, cut_mirrored]) == [full, full_mirrored]).all()


def test_fast_idct_is_the_default() -> None:
    data, window = jpeg(90, 120), (0, 0, 90, 120)
    images = [decode(data, window, size=90, antialias=False, decoder=d)[0] for d in (Decoder(), Decoder(True))]
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != decode(data, window, size=90, antialias=False, decoder=Decoder(False))[0]).any()


ALONE: dict[str, Any] = {"rank": 0, "world_size": 1, "device": "cpu", "num_threads": 1}
PIXELS = Image.fromarray(np.stack(np.broadcast_arrays(*np.ogrid[0:64, 0:96], 77), axis=-1).astype(np.uint8) * 2)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: to be turned by 90 degrees
FORMATS: dict[str, tuple[Callable[[Path], None], float]] = {
    "a PNG named JPEG": (lambda path: PIXELS.save(path, "PNG"), 0.0),
    "grey JPEG": (lambda path: PIXELS.convert("L").save(path, "JPEG", quality=95), 2.0),
    "CMYK JPEG": (lambda path: PIXELS.convert("CMYK").save(path, "JPEG", quality=95), 2.0),
    "progressive JPEG": (lambda path: PIXELS.save(path, "JPEG", quality=95, progressive=True), 2.0),
    "rotated by EXIF": (lambda path: PIXELS.save(path, "JPEG", quality=95, exif=ROTATED), 2.0),
    "WebP": (lambda path: PIXELS.save(path, "WEBP", quality=95), 0.0),
    "lossless WebP": (lambda path: PIXELS.save(path, "WEBP", lossless=True), 0.0),
    "RGBA PNG": (lambda path: PIXELS.convert("RGBA").save(path, "PNG"), 0.0),
    "palette PNG": (lambda path: PIXELS.quantize(64).save(path, "PNG"), 0.0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_imagenet_decodes_to_rgb(name: str, tmp_path: Path) -> None:
    save, tolerance = FORMATS[name]
    path = tmp_path / "image.JPEG"
    save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))  # Pillow does not turn it either

    window = (0, 16, 64, 64)  # resized to its own size
    image = decode(path.read_bytes(), window, size=64, antialias=True, decoder=Decoder(fast_idct=False))[0]
    assert np.abs(image.astype(int) - expected[:, 16:80]).mean() <= tolerance

    loader = EvalLoader(
        FileList.from_paths([str(path)], [5]),
        batch_size=1,
        image_size=56,  # the smaller side stays 64
        **ALONE,
        decoder=Decoder(fast_idct=False),
    )
    images, labels = next(iter(loader))
    assert labels.tolist() == [5]
    assert np.abs(images[0].numpy().astype(int) - expected[4:60, 20:76]).mean() <= tolerance


def test_exif_is_ignored_by_windows_of_training_too(tmp_path: Path) -> None:
    """They are drawn for the sides that the header gives: turned, they would reach out of the picture."""
    batches = []
    for name, exif in (("plain", Image.Exif()), ("rotated", ROTATED)):
        PIXELS.resize((160, 50)).save(tmp_path / name, "JPEG", quality=95, exif=exif)
        loader = TrainLoader(
            FileList.from_paths([str(tmp_path / name)], [0]),
            batch_size=32,
            image_size=32,
            seed=0,
            **ALONE,
        )
        batches.append(next(loader)[0])
        loader.close()
    assert (tmp_path / "plain").read_bytes() != (tmp_path / "rotated").read_bytes()
    assert torch.equal(*batches)


def test_the_smaller_side_of_an_evaluation_is_rounded(tmp_path: Path) -> None:
    """160 x 256 / 224 is 182.9: a picture of 183 is left as it is."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 183, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    loader = EvalLoader(
        FileList.from_paths([str(tmp_path / "image.png")], [0]),
        batch_size=1,
        image_size=160,
        **ALONE,
    )
    images, _ = next(iter(loader))
    np.testing.assert_array_equal(images[0].numpy(), pixels[20:180, 11:171])


def test_a_gpus_decoder_gets_what_was_set_and_the_cpus_what_it_knows() -> None:
    """Else a search would try settings that change nothing."""
    decoder = Decoder(fast_idct=False, region="full", fancy_upsampling=True, hw_decoder_load=0.9)
    decoder = replace(decoder, preallocate_width_hint=640, preallocate_height_hint=480, hybrid_huffman_threshold=7)
    common = {"use_fast_idct": False, "adjust_orientation": False, "output_type": types.RGB}
    assert crop_options(decoder, "cpu") == {"device": "cpu", **common}
    assert crop_options(decoder, "gpu") == {
        "device": "mixed",
        **common,
        "affine": False,
        "jpeg_fancy_upsampling": True,
        "hw_decoder_load": 0.9,
        "preallocate_width_hint": 640,
        "preallocate_height_hint": 480,
        "hybrid_huffman_threshold": 7,
    }
