"""Every deterministic RandAugment operation against big_vision's output at the file's level, both signs."""

from __future__ import annotations

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

from pipelines.randaugment import OPS, apply_op
from tests.parity.conftest import OURS, Reference

pytestmark = pytest.mark.timeout(120)

# Of DALI's operators the share of pixels within one level. The reference decides in float32 which pixel is the nearest,
# and truncates twice in sharpness: how many of the pixels are touched by that is another question of other pictures.
SHARE = 0.999
SHARE_OF_OTHER_FILES = {"sharpness": 0.995, "rotate": 0.995, "shear_x": 0.995, "shear_y": 0.995}


@pytest.mark.parametrize("compiled", [True, False])
def test_operations_match_the_reference(randaug_reference: Reference, compiled: bool) -> None:
    """Compiled they are the reference's bit for bit, but for sharpness, where its sum falls short of a whole number."""
    names = sorted({name.split("/")[0] for name in randaug_reference.arrays})
    variants = sorted({name.split("/", 1)[1] for name in randaug_reference.arrays} - {"input"})
    assert {variant.split("/")[0] for variant in variants} == set(OPS) - {"cutout"}
    inputs = np.stack([randaug_reference.arrays[f"{name}/input"] for name in names])
    level = randaug_reference.meta["level"]
    shares = {} if randaug_reference.path.parent == OURS else SHARE_OF_OTHER_FILES

    @pipeline_def(batch_size=len(names), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> tuple:
        images = fn.external_source(lambda _: inputs, layout="HWC")
        return tuple(
            apply_op(
                images,
                variant.split("/")[0],
                image_size=inputs.shape[1],
                magnitude=level,
                negative=variant.endswith("/negative"),
                compiled=compiled,
            )
            for variant in variants
        )

    outputs = [output.as_array() for output in graph().run()]
    for variant, output in zip(variants, outputs, strict=True):
        for i, name in enumerate(names):
            expected = randaug_reference.arrays[f"{name}/{variant}"].astype(int)
            op = variant.split("/")[0]
            if compiled and op != "sharpness":
                np.testing.assert_array_equal(output[i], expected, err_msg=f"{name}/{variant}")
            within = np.abs(output[i].astype(int) - expected).max(axis=-1) <= 1
            least = 1 if compiled else shares.get(op, SHARE)
            assert within.mean() >= least, f"{name}/{variant}: {within.mean():.4%} of the pixels within one level"
