"""The GPU's kernels of RandAugment, run by Triton's interpreter on the CPU: test_compiled_gpu.py starts these tests.

They are in a process of their own because TRITON_INTERPRET=1 must be set before torch is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines.loader
from pipelines import compiled_gpu
from pipelines.compiled_gpu import RandAugment
from pipelines.kernels import randaugment, randaugment_gpu
from pipelines.loader import TrainLoader
from pipelines.randaugment import OPS, _settings, behind_graph
from pipelines.readers import FileList
from pipelines.train import Augment
from tests.parity.conftest import references

LEVELS = references("randaug")


def on_gpu(images: np.ndarray, uniforms: np.ndarray, settings: np.ndarray) -> np.ndarray:
    return randaugment_gpu.rand_augment(*map(torch.from_numpy, (images, uniforms, settings))).numpy()


def on_cpu(images: np.ndarray, uniforms: np.ndarray, settings: np.ndarray) -> np.ndarray:
    out = np.empty_like(images)
    for i in range(len(images)):
        randaugment.rand_augment(images[i], uniforms[i], settings, out[i])
    return out


def images_of(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Noise, noise of few levels, one even image, and one of a single bright pixel."""
    images = rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)
    images[::3] = images[::3] // 40 * 40
    images[0], images[1] = 7, 0
    images[1, size // 2, size // 2] = 200, 100, 50
    return images


@pytest.mark.parametrize("reference", LEVELS, ids=[reference.path.stem for reference in LEVELS])
def test_operations_match_the_reference(reference: Any) -> None:
    arrays, level = reference.arrays, reference.meta["level"]
    names = sorted({name.split("/")[0] for name in arrays})
    variants = sorted({name.split("/", 1)[1] for name in arrays} - {"input"})
    assert {variant.split("/")[0] for variant in variants} == set(OPS) - {"cutout"}
    images = np.stack([arrays[f"{name}/input"] for name in names])
    for variant in variants:
        op, negative = variant.split("/")[0], variant.endswith("/negative")
        draw = [(OPS.index(op) + 0.5) / len(OPS), 0.25 if negative else 0.75, 0.5, 0.5]
        uniforms = np.full((len(names), 4), draw, np.float32)
        found = on_gpu(images, uniforms, _settings(images.shape[1], level, "paper"))
        expected = np.stack([arrays[f"{name}/{variant}"] for name in names])
        most = 1 if op == "sharpness" else 0  # whose sum falls short of a whole number in the reference
        assert np.abs(found.astype(int) - expected).max() <= most, variant


@pytest.mark.parametrize("contrast", ["paper", "mean"])
@pytest.mark.parametrize(
    ("size", "magnitude"), [(1, 10), (2, 10), (65, 10), (7, 0), (96, 0), (7, 3.3), (96, 3.3), (96, 10)]
)
def test_the_policy_is_that_of_the_cpu(size: int, magnitude: float, contrast: str) -> None:
    """Bit for bit, three layers, each operation first in some of the images; 96 pixels take two blocks."""
    rng = np.random.default_rng(size)
    images, uniforms = images_of(rng, 32, size), rng.random((32, 12), dtype=np.float32)
    uniforms[:, 0] = (np.arange(32) % 16 + 0.5) / 16
    settings = _settings(size, magnitude, contrast)
    np.testing.assert_array_equal(on_gpu(images, uniforms, settings), on_cpu(images, uniforms, settings))


@pytest.mark.parametrize("contrast", ["paper", "mean"])
def test_several_blocks_of_pixels(contrast: str) -> None:
    """At 224 pixels the tables are made of four blocks, the last of them not full, and the result of ten."""
    assert 224 * 224 % randaugment_gpu.BLOCK
    rng = np.random.default_rng(0)
    images, uniforms = images_of(rng, 32, 224), rng.random((32, 4), dtype=np.float32)
    uniforms[:, 0] = (np.arange(32) % 16 + 0.5) / 16
    settings = _settings(224, 10, contrast)
    np.testing.assert_array_equal(on_gpu(images, uniforms, settings), on_cpu(images, uniforms, settings))


def test_inputs_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    images, uniforms = images_of(rng, 32, 64), rng.random((32, 8), dtype=np.float32)
    before = images.copy()
    on_gpu(images, uniforms, _settings(64, 10, "paper"))
    np.testing.assert_array_equal(images, before)


def loader(files: FileList, augment: Augment) -> TrainLoader:
    return TrainLoader(
        files,
        batch_size=6,
        image_size=48,
        seed=0,
        rank=0,
        world_size=1,
        device="cpu",
        num_threads=2,
        augment=augment,
    )


@pytest.mark.parametrize("settings", [{}, {"randaug_layers": 3, "randaug_magnitude": 4, "randaug_contrast": "mean"}])
def test_behind_the_graph_it_gives_what_it_gives_within(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of a loader that works ahead, each with its own uniforms."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(18):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (60, 70, 3)).astype(np.uint8)).save(paths[-1])
    files, augment = FileList.from_paths(paths, range(18)), Augment(**settings)
    within, plain = loader(files, augment), loader(files, Augment(randaug_layers=0))
    monkeypatch.setattr(compiled_gpu, "available", lambda size: True)
    monkeypatch.setattr(compiled_gpu, "RandAugment", lambda numbers, _: RandAugment(numbers, torch.device("cpu")))
    monkeypatch.setattr(pipelines.loader, "behind_graph", lambda _, **settings: behind_graph(0, **settings))
    behind = loader(files, augment)
    changed = 0
    for _ in range(7):
        (found, labels), (expected, expected_labels) = next(behind), next(within)
        assert torch.equal(labels, expected_labels)
        assert torch.equal(found, expected)
        changed += int((found != next(plain)[0]).any(dim=(1, 2, 3)).sum())
    assert changed > 30  # of 42 images


def test_it_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, and kernels that give something else are found out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    compiled_gpu.available.cache_clear()
    assert compiled_gpu.available(16)
    monkeypatch.setattr(randaugment_gpu, "rand_augment", lambda images, *_: images + 254)
    compiled_gpu.available.cache_clear()
    assert not compiled_gpu.available(16)
