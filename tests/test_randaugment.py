"""RandAugment: the operations against plain numpy on awkward images, the policy through the real graph.

Everything is tested twice: as the compiled loops that a CPU runs, and as the operators that a GPU runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

from pipelines import compiled
from pipelines import randaugment_ops as ops
from pipelines.order import TrainOrder
from pipelines.randaugment import NUM_UNIFORMS_PER_LAYER, OPS, apply_op, rand_augment
from tests.randaugment_expected import EXPECTED, awkward_images, blend, expected_geometric, luminance, photo
from tests.statistical import chi_square_uniform_p

pytestmark = pytest.mark.timeout(120)

LARGEST = 1 - 2.0**-24  # of a float32 uniform
VARIANTS = [(name, negative) for name in OPS for negative in (False, True)]


@pytest.fixture(autouse=True, params=["compiled", "operators"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(compiled, "available", lambda: request.param == "compiled")
    return request.param


def run(images: np.ndarray, *graphs: Callable[[Any], Any]) -> list[np.ndarray]:
    """The output of each function of a DALI node for images [N, S, S, 3], in one pipeline on the CPU."""

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> tuple:
        node = fn.external_source(lambda _: images, layout="HWC")
        return tuple(graph(node) for graph in graphs)

    return [output.as_array() for output in pipeline().run()]


def run_policy(images: np.ndarray, u: np.ndarray, *, batch_size: int | None = None, **settings: Any) -> np.ndarray:
    """rand_augment of images [N, S, S, 3] with uniforms [N, layers * NUM_UNIFORMS_PER_LAYER]."""
    batch_size = batch_size or len(images)
    assert len(images) % batch_size == 0

    def source(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(step * batch_size, (step + 1) * batch_size)
        return np.ascontiguousarray(images[rows]), u[rows].astype(np.float32)

    @pipeline_def(
        batch_size=batch_size, num_threads=2, device_id=None, prefetch_queue_depth=1, enable_conditionals=True
    )
    def pipeline() -> Any:
        node, uniforms = fn.external_source(source, num_outputs=2, layout=["HWC", ""])
        return rand_augment(node, uniforms, image_size=images.shape[1], **settings)

    pipe = pipeline()
    return np.concatenate([pipe.run()[0].as_array() for _ in range(len(images) // batch_size)])


def run_op(images: np.ndarray, name: str, **settings: Any) -> np.ndarray:
    return run(images, lambda node: apply_op(node, name, image_size=images.shape[1], **settings))[0]


GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def test_operations_are_big_visions() -> None:
    assert len(OPS) == len(set(OPS)) == 16
    assert set(OPS) == {*EXPECTED, *GEOMETRIC, "cutout"}


@pytest.mark.parametrize(("size", "magnitude"), [*itertools.product((224, 64, 50), (10, 7.3, 5, 2, 0)), (272, 7.3)])
def test_value_operations_stay_within_a_level_on_every_pixel(size: int, magnitude: float) -> None:
    images = awkward_images(size)
    stacked = np.stack(list(images.values()))
    graphs = [lambda node, name=name: apply_op(node, name, image_size=size, magnitude=magnitude) for name in EXPECTED]
    for name, outputs in zip(EXPECTED, run(stacked, *graphs), strict=True):
        for kind, image, output in zip(images, stacked, outputs, strict=True):
            difference = np.abs(output.astype(int) - EXPECTED[name](image, magnitude / 10))
            assert difference.max() <= 1, f"{name} at {magnitude} on {kind}"


@pytest.mark.parametrize("magnitude", [1, 4])
def test_sharpness_is_exact_on_most_pixels(magnitude: float) -> None:
    """Which rounds to a level on others, by how the blend is ordered at small and at large factors."""
    images = np.stack(list(awkward_images(64).values()))
    expected = np.stack([EXPECTED["sharpness"](image, magnitude / 10) for image in images])
    assert (run_op(images, "sharpness", magnitude=magnitude) == expected).mean() > 0.63


@pytest.mark.parametrize("name", ["solarize", "solarize_add"])
def test_levels_are_cut_off_and_not_rounded(name: str) -> None:
    """256 x 0.78 and 110 x 0.78 have fractions above a half."""
    images = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(1, 64, 64, 3)
    np.testing.assert_array_equal(run_op(images, name, magnitude=7.8)[0], EXPECTED[name](images[0], 0.78))


@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("magnitude", [10, 7.3, 5, 2, 0.03, 0])
def test_geometric_operations_take_the_right_pixels(size: int, magnitude: float, form: str) -> None:
    y, x = np.mgrid[:size, :size]
    coded = np.stack([y, x, np.full_like(x, 7)], axis=-1).astype(np.uint8)  # not 7 where filled
    graphs = [
        lambda node, name=name, negative=negative: apply_op(
            node, name, image_size=size, magnitude=magnitude, negative=negative
        )
        for name in GEOMETRIC
        for negative in (False, True)
    ]
    outputs = run(coded[None], *graphs)
    for i, output in enumerate(outputs):
        name, sign = GEOMETRIC[i // 2], 1 - 2 * (i % 2)
        wrong = (output[0] != expected_geometric(coded, name, magnitude / 10, sign)).any(axis=-1).mean()
        exact = name.startswith("translate") or (form == "compiled" and name.startswith("shear"))
        assert wrong <= (0 if exact else 0.003), f"{name} {sign} at {magnitude}: {wrong:.3%}"


@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("magnitude", [10, 7.3, 5, 0.03])
def test_no_paste_is_empty(size: int, magnitude: float) -> None:
    """multi_paste's GPU kernel does not end a region of no pixels."""
    for sign in (1, -1):
        tables = [ops.shear_repairs(name, magnitude / 10, sign, size) for name in ("shear_x", "shear_y")]
        if shift := ops.translation(magnitude / 10, sign):
            tables += [ops.translation_pastes(axis, shift, size) for axis in (0, 1)]
        assert min(table[2].min() for table in tables) > 0


@pytest.mark.parametrize("size", [224, 64])
@pytest.mark.parametrize("magnitude", [10, 3, 0.2])
def test_cutout_covers_a_square_about_its_center(size: int, magnitude: float) -> None:
    image, half = photo(size)[None], int(4 * magnitude)
    for center in [(0.5, 0.5), (0.0, 0.0), (LARGEST, LARGEST), (0.1, 0.93), (0.999, 0.3)]:
        expected = image.copy()
        row, column = (int(c * size) for c in center)
        expected[:, max(row - half, 0) : row + half, max(column - half, 0) : column + half] = 128
        output = run_op(image, "cutout", magnitude=magnitude, center=center)
        np.testing.assert_array_equal(output, expected, err_msg=str(center))


def test_cutout_center_is_uniform() -> None:
    """2^15 draws; a row or column 20 % too likely or unlikely among 32 is found with probability > 0.99."""
    size, count = 32, 1 << 15
    u = TrainOrder(count, count, 0, 1, seed=3).uniforms(0, NUM_UNIFORMS_PER_LAYER)
    u[:, 0] = (OPS.index("cutout") + 0.5) / 16
    output = run_policy(np.zeros((count, size, size, 3), np.uint8), u, layers=1, magnitude=0.25)
    filled = output[..., 0] == 128  # half-side 1: rows and columns center - 1 and center
    rows, columns = (filled.any(axis=axis) for axis in (2, 1))
    for axis, found in enumerate((rows, columns)):
        last = size - 1 - np.argmax(found[:, ::-1], axis=1)
        np.testing.assert_array_equal(last, np.floor(u[:, 2 + axis] * size))
        assert chi_square_uniform_p(np.bincount(last, minlength=size)) > 1e-3


def test_contrast_mean_blends_with_the_mean_of_the_image() -> None:
    images = np.stack(list(awkward_images(64).values()))
    output = run_op(images, "contrast", magnitude=10, contrast="mean")
    for image, result in zip(images, output, strict=True):
        expected = blend(np.full_like(image, int(luminance(image)[..., 0].mean())), image, 1.9)
        assert np.abs(result.astype(int) - expected).max() <= 1


def test_the_last_pixel_of_an_odd_number_counts() -> None:
    """Of 17 x 17 pixels all but the last are 0: that one is the brightest, and equalize makes it white."""
    image = np.zeros((1, 17, 17, 3), np.uint8)
    image[0, -1, -1] = 200
    expected = np.where(image == 200, 255, 0)
    np.testing.assert_array_equal(run_op(image, "equalize", magnitude=10), expected)


def test_the_mean_of_a_gray_image_is_its_level() -> None:
    """Then contrast changes nothing."""
    image = np.full((1, 10, 10, 3), 100, np.uint8)
    np.testing.assert_array_equal(run_op(image, "contrast", magnitude=0, contrast="mean"), image)


def variants_of(images: np.ndarray, magnitude: float, center: tuple[float, float]) -> np.ndarray:
    """Each operation with each sign on each image: [32, N, S, S, 3]."""
    graphs = [
        lambda node, name=name, negative=negative: apply_op(
            node, name, image_size=images.shape[1], magnitude=magnitude, negative=negative, center=center
        )
        for name, negative in VARIANTS
    ]
    return np.stack(run(images, *graphs))


def uniforms_for(rows: np.ndarray, rng: np.random.Generator, center: tuple[float, float]) -> np.ndarray:
    """Uniforms [N, layers * NUM_UNIFORMS_PER_LAYER] that draw the variants [N, layers], as near the edges as not."""
    u = np.empty((*rows.shape, NUM_UNIFORMS_PER_LAYER), np.float32)
    within = rng.choice(np.array([0, 0.3, 1 - 2.0**-20]), (2, *rows.shape))
    u[..., 0] = (rows // 2 + within[0]) / 16
    u[..., 1] = (1 - rows % 2 + within[1]) / 2
    u[..., 2:] = center
    return u.reshape(len(rows), -1)


@pytest.mark.parametrize(("layers", "magnitude", "size"), [(1, 5, 64), (2, 10, 64), (3, 3.3, 40), (1, 10, 224)])
def test_policy_is_the_operations_in_the_order_drawn(layers: int, magnitude: float, size: int) -> None:
    """Bit-equal, for all 256 pairs of operations where there are two layers."""
    rng, center = np.random.default_rng(layers), (0.31, 0.64)
    count = 256 if layers == 2 else 64
    images = np.stack([photo(size, seed) for seed in range(8)])[np.arange(count) % 8]
    drawn = rng.integers(0, 32, (count, layers))
    if layers == 2:
        drawn[:, 0] = drawn[:, 0] % 2 + 2 * (np.arange(256) // 16)
        drawn[:, 1] = drawn[:, 1] % 2 + 2 * (np.arange(256) % 16)
    output = run_policy(images, uniforms_for(drawn, rng, center), layers=layers, magnitude=magnitude)
    for layer in range(layers):
        images = variants_of(images, magnitude, center)[drawn[:, layer], np.arange(count)]
    np.testing.assert_array_equal(output, images)


def test_policy_draws_operations_uniformly_signs_fairly_and_layers_independently() -> None:
    """2^15 of TrainOrder's draws through the graph, whose output tells what was drawn.

    An operation 15 % too likely or unlikely is found with probability > 0.9, a sign of 52 % with > 0.99.
    """
    count, size, magnitude, center = 1 << 15, 24, 2, (0.4, 0.6)
    image = photo(size, 6)[None]
    u = TrainOrder(count, count, 0, 1, seed=5).uniforms(0, 2 * NUM_UNIFORMS_PER_LAYER)
    u = u.reshape(count, 2, NUM_UNIFORMS_PER_LAYER)
    u[..., 2:] = center
    once = variants_of(image, magnitude, center)[:, 0]
    twice = variants_of(once, magnitude, center).swapaxes(0, 1)  # [first, second, S, S, 3]
    op, negative = np.floor(u[..., 0] * 16).astype(int), u[..., 1] < 0.5
    drawn = 2 * op + negative
    images = np.broadcast_to(image, (count, *image.shape[1:]))
    output = run_policy(images, u.reshape(count, -1), batch_size=1 << 12, magnitude=magnitude)
    assert (output == twice[drawn[:, 0], drawn[:, 1]]).all()

    geometric = [i for i, (name, _) in enumerate(VARIANTS) if name in GEOMETRIC]
    distinct = {once[i].tobytes() for i in range(0, 32, 2)} | {once[i].tobytes() for i in geometric}
    assert len(distinct) == 16 + len(GEOMETRIC), "the image tells operations and signs apart"
    for layer in range(2):
        assert chi_square_uniform_p(np.bincount(op[:, layer], minlength=16)) > 1e-3
        assert abs(negative[:, layer].mean() - 0.5) < 0.0091  # 3.3 standard deviations
    assert chi_square_uniform_p(np.bincount(op[:, 0] * 16 + op[:, 1], minlength=256)) > 1e-3
    assert chi_square_uniform_p(np.bincount(2 * negative[:, 0] + negative[:, 1], minlength=4)) > 1e-3


@pytest.mark.filterwarnings("ignore:The external source node")  # the uniforms are not used
def test_no_layers_leave_the_images_alone() -> None:
    images = photo(32)[None]
    np.testing.assert_array_equal(run_policy(images, np.zeros((1, 1)), layers=0), images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": -1}, "layers"),
        ({"magnitude": -0.1}, "magnitude"),
        ({"magnitude": 10.5}, "magnitude"),
        ({"magnitude": math.nan}, "magnitude"),
        ({"contrast": "median"}, "contrast"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_policy(photo(32)[None], np.zeros((1, 8)), **settings)


def test_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'blur'.*auto_contrast"):
        run_op(photo(32)[None], "blur", magnitude=10)
