"""Every RandAugment operation on the GPU against the same graph on the CPU, at both signs and two magnitudes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

from pipelines.randaugment import OPS, apply_op
from tests.test_randaugment import photo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("magnitude", [5, 10])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_operation_is_that_of_the_cpu(name: str, negative: bool, magnitude: int) -> None:
    photos = np.stack([photo(224, seed) for seed in range(4)])

    @pipeline_def(batch_size=4, num_threads=2, device_id=0, prefetch_queue_depth=1)
    def graph() -> Any:
        images = fn.external_source(lambda _: photos, layout="HWC")
        settings: dict[str, Any] = {"image_size": 224, "magnitude": magnitude, "negative": negative, "compiled": False}
        return apply_op(images, name, **settings), apply_op(images.gpu(), name, **settings)

    pipeline = graph()
    pipeline.build()
    on_cpu, on_gpu = pipeline.run()
    error = np.abs(on_cpu.as_array().astype(int) - on_gpu.as_cpu().as_array())
    assert (error <= 1).mean() >= 0.995
