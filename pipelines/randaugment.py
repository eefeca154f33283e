"""RandAugment as big_vision runs it: per layer one of 16 operations, uniformly, at one fixed magnitude.

All randomness comes in as uniforms, `NUM_UNIFORMS_PER_LAYER` per layer and sample: which operation, its sign, and for
cutout the centre (row, column). The operations themselves are in `randaugment_ops`. Samples part into a few branches
of a DALI conditional, so that each kind of operation runs once per layer over the samples that drew it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode

from pipelines import randaugment_ops as ops

OPS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "cutout",
    "solarize_add",
)  # in big_vision's order
NUM_UNIFORMS_PER_LAYER = 4
MAX_MAGNITUDE = 10
_CONTRASTS = ("paper", "mean")

# (images, row: 2 * operation + negative, center) -> images
_Branch = Callable[[DataNode, "DataNode | int", DataNode], DataNode]


def rand_augment(
    images: DataNode,
    u: DataNode,
    *,
    image_size: int,
    layers: int = 2,
    magnitude: float = 10,
    contrast: str = "paper",
) -> DataNode:
    """Apply `layers` random operations to every image, one after the other.

    images: uint8 [image_size, image_size, 3], on either device; u: float32 [layers * NUM_UNIFORMS_PER_LAYER] in
    [0, 1), on the CPU; magnitude: 0 to 10; contrast: "paper" blends towards a constant grey as the published results
    did (big_vision issue 109), "mean" towards the mean of the image. To be called within a pipeline definition with
    `enable_conditionals=True`. Raises ValueError. Source: recipe.md; big_vision's `pp/autoaugment.py`.
    """
    if layers < 0:
        raise ValueError(f"RandAugment cannot have {layers} layers: 0 turns it off")
    branches = _branches(image_size, magnitude, contrast)
    functions = [function for _, function in branches]
    branch_of_row = np.zeros(2 * len(OPS), np.int32)
    for i, (rows, _) in enumerate(branches):
        branch_of_row[rows] = i
    table = types.Constant(branch_of_row)
    for layer in range(layers):
        first = layer * NUM_UNIFORMS_PER_LAYER
        op = fn.cast(dali_math.floor(u[first] * float(len(OPS))), dtype=types.INT32)
        row = op * 2 + fn.cast(u[first + 1] < 0.5, dtype=types.INT32)
        images = _dispatch(images, table[row], row, u[first + 2 : first + 4], functions, 0)
    return images


def apply_op(
    images: DataNode,
    name: str,
    *,
    image_size: int,
    magnitude: float,
    negative: bool = False,
    center: tuple[float, float] = (0.5, 0.5),
    contrast: str = "paper",
) -> DataNode:
    """Apply the operation `name` to every image: the policy's own branch, with the draw given.

    images, image_size, magnitude, contrast: as in `rand_augment`; negative: the other sign of a geometric operation;
    center: of cutout, (row, column) as fractions of the size in [0, 1). Raises ValueError.
    """
    if name not in OPS:
        raise ValueError(f"RandAugment has no operation {name!r}: choose from {', '.join(OPS)}")
    row = _rows(name)[int(negative)]
    function = next(function for rows, function in _branches(image_size, magnitude, contrast) if row in rows)
    return function(images, row, types.Constant(np.array(center, np.float32)))


def _branches(size: int, magnitude: float, contrast: str) -> list[tuple[list[int], _Branch]]:
    """The branches of a layer: the rows (see `_rows`) that take it, and what runs there."""
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"RandAugment's magnitude is from 0 to {MAX_MAGNITUDE}, not {magnitude}")
    if contrast not in _CONTRASTS:
        raise ValueError(f"RandAugment's contrast is one of {', '.join(_CONTRASTS)}, not {contrast!r}")
    strength = magnitude / MAX_MAGNITUDE
    factor = ops.enhancement_factor(strength)
    affine = {"invert": (-1.0, 255.0), "brightness": (factor, 0.0)}  # multiplier, addend
    alike: dict[str, Callable[[DataNode], DataNode]] = {  # what needs nothing of the draw
        "auto_contrast": ops.auto_contrast,
        "equalize": ops.equalize,
        "posterize": partial(ops.posterize, strength=strength),
        "color": partial(ops.color, strength=strength),
        "sharpness": partial(ops.sharpness, strength=strength, size=size),
        "solarize_add": partial(ops.solarize_add, strength=strength),
    }
    if contrast == "paper":
        affine["contrast"] = (factor, (1 - factor) * ops.contrast_constant(size))
    else:
        alike["contrast"] = partial(ops.contrast_with_mean, strength=strength)
    if ops.solarize_threshold(strength) == 0:
        affine["solarize"] = affine["invert"]
    else:
        alike["solarize"] = partial(ops.solarize, strength=strength)

    num_rows = 2 * len(OPS)
    multipliers, addends = np.zeros((2, num_rows), np.float32)
    for name, values in affine.items():
        for row in _rows(name):
            multipliers[row], addends[row] = values
    matrices = np.zeros((num_rows, 2, 3), np.float32)
    strips: dict[int, np.ndarray] = {}
    for name in ("rotate", "shear_x", "shear_y"):
        for row, sign in zip(_rows(name), (1, -1)):  # noqa: B905 (autograph's zip knows no strict)
            matrices[row] = ops.warp_matrix(name, strength, sign, size)
            strips[row] = np.zeros((3, 1, 2)) if name == "rotate" else ops.shear_strips(name, strength, sign, size)
    num_pastes = max(table.shape[1] for table in strips.values())
    repairs = np.zeros((num_rows, 3, num_pastes, 2), np.int32)
    for row, table in strips.items():
        repairs[row, :, : table.shape[1]] = table
    pastes = np.zeros((num_rows, 3, 2, 2), np.int32)
    for name in ("translate_x", "translate_y"):
        for row, sign in zip(_rows(name), (1, -1)):  # noqa: B905
            pastes[row] = ops.translation(name, strength, sign, size)

    def multiply_add(images: DataNode, row: DataNode | int, center: DataNode) -> DataNode:
        return ops.multiply_add(images, types.Constant(multipliers)[row], types.Constant(addends)[row])

    def warp(images: DataNode, row: DataNode | int, center: DataNode) -> DataNode:
        return ops.warp(images, types.Constant(matrices)[row])

    def warp_and_repair(images: DataNode, row: DataNode | int, center: DataNode) -> DataNode:
        return ops.repair(warp(images, row, center), types.Constant(repairs)[row], num_pastes)

    def translate(images: DataNode, row: DataNode | int, center: DataNode) -> DataNode:
        return ops.translate(images, types.Constant(pastes)[row], size)

    def cutout(images: DataNode, row: DataNode | int, center: DataNode) -> DataNode:
        return ops.cutout(images, strength, center, size)

    branches: list[tuple[list[int], _Branch]] = [
        ([row for name in affine for row in _rows(name)], multiply_add),
        ([row for row, table in strips.items() if table.shape[1] == 1], warp),
        ([row for name in ("translate_x", "translate_y") for row in _rows(name)], translate),
        (list(_rows("cutout")), cutout),
    ]
    if num_pastes > 1:
        branches.append(([row for row, table in strips.items() if table.shape[1] > 1], warp_and_repair))
    for name, op in alike.items():
        branches.append((list(_rows(name)), lambda images, row, center, op=op: op(images)))
    return branches


def _rows(name: str) -> tuple[int, int]:
    """The rows of an operation in the tables: as it is, and negated."""
    return 2 * OPS.index(name), 2 * OPS.index(name) + 1


def _dispatch(
    images: DataNode,
    branch: DataNode,
    row: DataNode,
    center: DataNode,
    branches: Sequence[_Branch],
    first: int,
) -> DataNode:
    """Send each sample through branches[branch - first]: a balanced tree, so that a sample is handed on few times."""
    if len(branches) == 1:
        return branches[0](images, row, center)
    half = len(branches) // 2
    if branch < first + half:
        images = _dispatch(images, branch, row, center, branches[:half], first)
    else:
        images = _dispatch(images, branch, row, center, branches[half:], first + half)
    return images
