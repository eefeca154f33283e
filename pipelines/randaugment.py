"""RandAugment as big_vision runs it: each layer applies one of 16 operations, drawn uniformly, at one fixed magnitude.

All randomness comes in as uniforms, `NUM_UNIFORMS_PER_LAYER` per layer and sample. They choose the operation, its sign
and, for cutout, the centre (row, column). The operations themselves are in `randaugment_ops`. A DALI conditional
splits the samples into branches, so that each kind of operation runs once per layer over the samples that drew it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from pipelines import compiled as loops
from pipelines import compiled_gpu as loops_gpu
from pipelines import randaugment_ops as ops

__all__ = [
    "MAX_MAGNITUDE",
    "NUM_UNIFORMS_PER_LAYER",
    "OPS",
    "apply_op",
    "behind_graph",
    "draw_of",
    "rand_augment",
]

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

_Variant = tuple[str, int]  # an operation and its sign, 1 or -1


class _Branch(NamedTuple):
    """Variants that run together."""

    variants: list[_Variant]
    apply: Callable[[DataNode, DataNode | int, DataNode], DataNode]
    """(images, which of the variants, center in pixels) -> images."""


def rand_augment(
    images: DataNode,
    u: DataNode,
    *,
    image_size: int,
    layers: int = 2,
    magnitude: float = 10,
    contrast: str = "paper",
    compiled: bool | None = None,
) -> DataNode:
    """Apply `layers` random operations to every image, one after the other.

    images: uint8 [image_size, image_size, 3], on either device; u: float32 [layers * NUM_UNIFORMS_PER_LAYER] in
    [0, 1), on the CPU; magnitude: 0 to 10; contrast: "paper" blends towards a constant grey as the published results
    did (big_vision issue 109), "mean" towards the mean of the image. On the CPU, Numba compiles the operations if
    `compiled` is true, or is None and Numba can be used. Otherwise, and on a GPU (but see `behind_graph`), they are
    DALI's operators, which need a pipeline definition with `enable_conditionals=True`. Raises ValueError for any other
    magnitude or contrast, fewer than 0 layers, and `compiled` on a GPU. Source: big_vision's `pp/autoaugment.py`.
    """
    if layers < 0:
        raise ValueError(f"RandAugment cannot have {layers} layers: 0 turns it off")
    _check(magnitude, contrast)
    if layers == 0:
        return images
    if _is_compiled(images, compiled):
        return loops.rand_augment(images, u, _settings(image_size, magnitude, contrast), size=image_size)
    branches = _branches(image_size, magnitude, contrast)
    chosen, indices, draws = _draw(u, layers, image_size, branches)
    for layer in range(layers):
        images = _apply_chosen(images, branches, chosen[layer, 0], indices[layer, 0], draws[layer])
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
    compiled: bool | None = None,
) -> DataNode:
    """Apply the operation `name` to every image, by the policy's own branch, with a given draw.

    images, image_size, magnitude, contrast, compiled: as in `rand_augment`; negative: whether a geometric operation
    has the negative sign; center: of cutout, (row, column) as fractions of the size in [0, 1). Raises ValueError for an
    unknown operation, and where `rand_augment` does.
    """
    if name not in OPS:
        raise ValueError(f"RandAugment has no operation {name!r}: choose from {', '.join(OPS)}")
    _check(magnitude, contrast)
    if _is_compiled(images, compiled):
        u = types.Constant(draw_of(name, negative=negative, center=center))
        return loops.rand_augment(images, u, _settings(image_size, magnitude, contrast), size=image_size)
    variant = (name, -1 if negative else 1)
    branch = next(b for b in _branches(image_size, magnitude, contrast) if variant in b.variants)
    pixel = np.floor(np.array(center, np.float32) * np.float32(image_size))
    return branch.apply(images, branch.variants.index(variant), types.Constant(pixel))


def draw_of(name: str, *, negative: bool = False, center: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Uniforms, float32 [NUM_UNIFORMS_PER_LAYER], that draw an operation; negative and center as in `apply_op`."""
    return np.array([(OPS.index(name) + 0.5) / len(OPS), 0.25 if negative else 0.75, *center], np.float32)


def behind_graph(
    device_id: int | None, *, image_size: int, layers: int, magnitude: float, contrast: str
) -> loops_gpu.RandAugment | None:
    """RandAugment for the batches that a graph outputs; None where RandAugment is part of the graph, or off.

    Triton compiles it, for a GPU on which that works. The other arguments, and the errors, are as in `rand_augment`.
    """
    _check(magnitude, contrast)
    if device_id is None or layers == 0 or not loops_gpu.available(image_size):
        return None
    return loops_gpu.RandAugment(_settings(image_size, magnitude, contrast), torch.device("cuda", device_id))


def _is_compiled(images: DataNode, wanted: bool | None) -> bool:
    if images.device == "gpu":
        if wanted:
            raise ValueError("RandAugment is compiled on the CPU alone: behind_graph has it for a GPU")
        return False
    return loops.available() if wanted is None else wanted


def _check(magnitude: float, contrast: str) -> None:
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"RandAugment's magnitude is from 0 to {MAX_MAGNITUDE}, not {magnitude}")
    if contrast not in _CONTRASTS:
        raise ValueError(f"RandAugment's contrast is one of {', '.join(_CONTRASTS)}, not {contrast!r}")


def _settings(size: int, magnitude: float, contrast: str) -> np.ndarray:
    """The numbers that the magnitude decides, float32 [44], for `kernels.randaugment`.

    Blend factor, grey of contrast (-1: the image's), posterize's mask, solarize's threshold, solarize_add's addend,
    half the side of cutout; then, each for a negative and a positive sign, the pixels of the translations [2] and the
    destination-to-source matrices of rotate, shear_x and shear_y [3, 2, 6].
    """
    strength = magnitude / MAX_MAGNITUDE
    grey = min(size * size // 256, 255) if contrast == "paper" else -1
    mask = ops.posterize_mask(strength)
    numbers = [ops.enhancement_factor(strength), grey, mask, ops.solarize_threshold(strength)]
    numbers += [int(strength * 110), int(strength * 40), *(ops.translation(strength, sign) for sign in (-1, 1))]
    warps = [ops.warp_matrix(n, strength, sign, size) for n in ("rotate", "shear_x", "shear_y") for sign in (-1, 1)]
    return np.concatenate([numbers, *(matrix[:2].ravel() for matrix in warps)]).astype(np.float32)


# DALI rewrites the source of every function called within a pipeline definition, so that `if` takes nodes. Only
# `_apply_chosen` needs that, and rewriting the other functions would take seconds.


@do_not_convert
def _draw(u: DataNode, layers: int, size: int, branches: Sequence[_Branch]) -> tuple[DataNode, DataNode, DataNode]:
    """For each layer the branch and the index of its variant, [layers, 1]; operation, sign and center, [layers, 4].

    All layers at once, as on the CPU DALI takes 1 us a sample for an operation on a number, and as long on an array.
    """
    variants = [(name, sign) for name in OPS for sign in (-1, 1)]
    places = [next((i, b.variants.index(v)) for i, b in enumerate(branches) if v in b.variants) for v in variants]
    keys = list(range(len(variants)))
    scale = types.Constant(np.array([[len(OPS), 2, size, size]], np.float32))
    draws = dali_math.floor(fn.reshape(u, shape=[layers, NUM_UNIFORMS_PER_LAYER]) * scale)
    drawn = fn.cast(fn.coord_transform(draws, M=[2, 1, 0, 0]), dtype=types.INT32)  # of variants
    chosen = fn.lookup_table(drawn, keys=keys, values=[place[0] for place in places], dtype=types.INT32)
    indices = fn.lookup_table(drawn, keys=keys, values=[place[1] for place in places], dtype=types.INT32)
    return chosen, indices, draws


def _apply_chosen(
    images: DataNode, branches: Sequence[_Branch], chosen: DataNode, index: DataNode, draw: DataNode
) -> DataNode:
    """Send each sample through the branch that it drew.

    The conditionals follow one another: nested ones would take a third longer, as every node and constant that a branch
    uses would be split on each level above it.
    """
    for i, branch in enumerate(branches):
        if chosen == i:
            images = _apply(branch, images, index, draw)
    return images


@do_not_convert
def _apply(branch: _Branch, images: DataNode, index: DataNode, draw: DataNode) -> DataNode:
    return branch.apply(images, index, draw[2:4])


@do_not_convert
def _branches(size: int, magnitude: float, contrast: str) -> list[_Branch]:
    """All operations with both signs, grouped by what can run together."""
    strength = magnitude / MAX_MAGNITUDE
    inverting = ["invert"]
    affine = {"brightness": ops.brightness_terms(strength)}
    alone: dict[str, Callable[[DataNode], DataNode]] = {
        "auto_contrast": partial(ops.auto_contrast, size=size),
        "equalize": partial(ops.equalize, size=size),
        "posterize": partial(ops.posterize, strength=strength, size=size),
        "color": partial(ops.color, strength=strength, size=size),
        "sharpness": partial(ops.sharpness, strength=strength, size=size),
        "solarize_add": partial(ops.solarize_add, strength=strength),
    }
    if ops.solarize_threshold(strength) == 0:
        inverting.append("solarize")
    else:
        alone["solarize"] = partial(ops.solarize, strength=strength)
    if contrast == "paper":
        affine["contrast"] = ops.contrast_terms(strength, size)
    else:
        alone["contrast"] = partial(ops.contrast_with_mean, strength=strength)

    return [
        _affine_branch(affine),
        _uniform_branch(inverting, partial(ops.invert, size=size)),
        *_translation_branches(strength, size),
        *_warp_branches(strength, size),
        _cutout_branch(strength, size),
        *(_uniform_branch([name], apply) for name, apply in alone.items()),
    ]


def _signed(names: Sequence[str]) -> list[_Variant]:
    return [(name, sign) for name in names for sign in (1, -1)]


def _uniform_branch(names: list[str], apply: Callable[[DataNode], DataNode]) -> _Branch:
    """Operations that do the same whatever was drawn."""
    return _Branch(_signed(names), lambda images, index, center: apply(images))


def _affine_branch(terms: dict[str, tuple[float, float]]) -> _Branch:
    variants = _signed(list(terms))
    multipliers, addends = np.array([terms[name] for name, _ in variants], np.float32).T.copy()
    return _Branch(
        variants,
        lambda images, index, center: ops.multiply_add(images, _row(multipliers, index), _row(addends, index)),
    )


def _translation_branches(strength: float, size: int) -> list[_Branch]:
    """translate_x and translate_y; at the smallest magnitudes some variants move nothing."""
    axes = {"translate_x": 1, "translate_y": 0}
    still: list[_Variant] = []
    moving: dict[_Variant, np.ndarray] = {}
    for name, sign in _signed(list(axes)):
        shift = ops.translation(strength, sign)
        if shift == 0:
            still.append((name, sign))
        else:
            moving[name, sign] = ops.translation_pastes(axes[name], shift, size)
    branches = []
    if still:
        branches.append(_Branch(still, lambda images, index, center: images))
    if moving:
        table = np.stack(list(moving.values()))
        branches.append(
            _Branch(
                list(moving),
                lambda images, index, center: ops.paste([images, ops.grey(images, size)], _row(table, index)),
            )
        )
    return branches


def _warp_branches(strength: float, size: int) -> list[_Branch]:
    """Rotations and shears; the shears that need repair (see `ops.shear_repairs`) have a branch of their own."""
    plain = _signed(["rotate"])
    repaired: dict[_Variant, np.ndarray] = {}
    for variant in _signed(["shear_x", "shear_y"]):
        repairs = ops.shear_repairs(variant[0], strength, variant[1], size)
        if repairs.shape[1] > 1:
            repaired[variant] = repairs
        else:
            plain.append(variant)

    def matrices(variants: list[_Variant]) -> np.ndarray:
        return np.stack([ops.raised_warp_matrix(name, strength, sign, size) for name, sign in variants]).astype(
            np.float32
        )

    plain_matrices = matrices(plain)
    branches = [_Branch(plain, lambda images, index, center: ops.warp(images, _row(plain_matrices, index)))]
    if repaired:
        variants = list(repaired)
        repaired_matrices = matrices(variants)
        count = max(table.shape[1] for table in repaired.values())
        missing = [((0, 0), (0, count - table.shape[1]), (0, 0)) for table in repaired.values()]
        pastes = np.stack([np.pad(t, m, mode="edge") for t, m in zip(repaired.values(), missing, strict=True)])

        def warp_and_repair(images: DataNode, index: DataNode | int, center: DataNode) -> DataNode:
            warped = ops.warp(images, _row(repaired_matrices, index))
            return ops.paste([warped] * count, _row(pastes, index))

        branches.append(_Branch(variants, warp_and_repair))
    return branches


def _cutout_branch(strength: float, size: int) -> _Branch:
    return _Branch(_signed(["cutout"]), lambda images, index, center: ops.cutout(images, strength, center, size))


def _row(table: np.ndarray, index: DataNode | int) -> DataNode:
    return types.Constant(table)[index]
