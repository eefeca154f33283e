"""Every RandAugment operation on the GPU, compiled and as DALI's operators, against the CPU, and the whole policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

from pipelines import compiled_gpu
from pipelines.randaugment import OPS, _settings, apply_op, behind_graph, draw_of
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
        on_cpu = apply_op(images, name, **settings, compiled=compiled)
        return on_cpu if compiled else (on_cpu, apply_op(images.gpu(), name, **settings))

    pipeline = graph()
    pipeline.build()
    on_cpu, *on_gpu = pipeline.run()
    if compiled:
        kernels = behind_graph(0, image_size=224, layers=1, magnitude=magnitude, contrast="paper")
        assert kernels is not None
        uniforms = torch.from_numpy(draw_of(name, negative=negative)).expand(4, -1).contiguous()
        found = kernels(torch.from_numpy(photos).cuda(), uniforms.cuda()).cpu().numpy()
        np.testing.assert_array_equal(found, on_cpu.as_array())
    else:
        error = np.abs(on_cpu.as_array().astype(int) - on_gpu[0].as_cpu().as_array())
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
    """Bit for bit, batch after batch, each with uniforms of its own."""
    from pipelines.kernels import randaugment

    count = 128
    rng = np.random.default_rng(0)
    photos = np.stack([photo(size, seed) for seed in range(count)])
    kernels = behind_graph(0, image_size=size, layers=2, magnitude=10, contrast="paper")
    assert kernels is not None
    images = torch.from_numpy(photos).cuda()
    drawn = [rng.random((count, 8), dtype=np.float32) for _ in range(8)]
    found = [kernels(images, torch.from_numpy(uniforms).cuda()) for uniforms in drawn]
    settings, expected = _settings(size, 10, "paper"), np.empty_like(photos)
    for uniforms, augmented in zip(drawn, found, strict=True):
        for i in range(count):
            randaugment.rand_augment(photos[i], uniforms[i], settings, expected[i])
        np.testing.assert_array_equal(augmented.cpu().numpy(), expected)
    np.testing.assert_array_equal(images.cpu().numpy(), photos)
