"""Every RandAugment operation on the GPU, compiled and as DALI's operators, against the CPU, and the whole policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

from pipelines import compiled_gpu
from pipelines.randaugment import OPS, _settings, apply_op, rand_augment
from tests.randaugment_expected import photo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(300),
]


def test_the_kernels_run_here() -> None:
    assert compiled_gpu.available(224)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("magnitude", [5, 10])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_operation_is_that_of_the_cpu(name: str, negative: bool, magnitude: int, compiled: bool) -> None:
    """Compiled, bit for bit."""
    photos = np.stack([photo(224, seed) for seed in range(4)])

    @pipeline_def(batch_size=4, num_threads=2, device_id=0, prefetch_queue_depth=1, enable_conditionals=True)
    def graph() -> Any:
        images = fn.external_source(lambda _: photos, layout="HWC")
        settings: dict[str, Any] = {"image_size": 224, "magnitude": magnitude, "negative": negative}
        return tuple(apply_op(node, name, **settings, compiled=compiled) for node in (images, images.gpu()))

    pipeline = graph()
    pipeline.build()
    on_cpu, on_gpu = pipeline.run()
    error = np.abs(on_cpu.as_array().astype(int) - on_gpu.as_cpu().as_array())
    if compiled:
        assert (error == 0).all()
    else:
        assert (error <= 1).mean() >= 0.995


def test_a_batch_of_more_images_than_a_grid_has_rows() -> None:
    """CUDA takes 65,535 in all dimensions of a grid but the first."""
    from pipelines.kernels import randaugment_gpu

    images = torch.zeros(70_000, 8, 8, 3, dtype=torch.uint8, device="cuda")
    invert = torch.full((70_000, 4), 2.5 / 16, device="cuda")
    assert bool((randaugment_gpu.rand_augment(images, invert, torch.zeros(44, device="cuda")) == 255).all())


def test_the_mean_of_an_image_whose_sum_32_bits_do_not_hold() -> None:
    from pipelines.kernels import randaugment, randaugment_gpu

    images = np.full((1, 3000, 3000, 3), 255, np.uint8)
    images[0, :50] = 100
    uniforms = np.full((1, 4), (OPS.index("contrast") + 0.5) / 16, np.float32)
    settings = _settings(3000, 10, "mean")
    expected = np.empty_like(images)
    randaugment.rand_augment(images[0], uniforms[0], settings, expected[0])
    found = randaugment_gpu.rand_augment(*(torch.from_numpy(array).cuda() for array in (images, uniforms, settings)))
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("size", [64, 224, 65])
def test_the_policy_is_that_of_the_cpu(size: int) -> None:
    """Bit for bit, over batches that DALI works ahead on, each with uniforms of its own."""
    batches, count = 8, 128
    rng = np.random.default_rng(0)
    photos = np.stack([photo(size, seed) for seed in range(count)])
    uniforms = [rng.random((count, 8), dtype=np.float32) for _ in range(batches)]

    @pipeline_def(batch_size=count, num_threads=2, device_id=0, enable_conditionals=True)
    def graph() -> Any:
        images, u = fn.external_source(lambda i: (photos, uniforms[i % batches]), num_outputs=2, layout=["HWC", ""])
        return tuple(rand_augment(node, u, image_size=size, compiled=True) for node in (images, images.gpu()))

    pipeline = graph()
    pipeline.build()
    for _ in range(3 * batches):
        on_cpu, on_gpu = pipeline.run()
        np.testing.assert_array_equal(on_gpu.as_cpu().as_array(), on_cpu.as_array())
