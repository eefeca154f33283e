"""Converts big_vision's .npz checkpoints to our models and back.

A parameter tree is a flat dict from big_vision's current names (Transformer/encoderblock_0/LayerNorm_0/scale) to
float32 arrays. `load_npz` brings every published layout to that form, `to_big_vision` makes it from a model, and
the round trip is bit-exact. Source: big_vision, models/vit.py (fix_old_checkpoints, scan_to_pyloop,
resample_posemb) and utils.py (load_params, recover_dtype).
"""

from __future__ import annotations

import logging
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_vit.config import ModelConfig, UserError
from dali_vit.files import replacing
from dali_vit.model import PlainViT, create_model
from dali_vit.variants import VARIANTS, Variant
from pipelines.words import one_line, some

Params = dict[str, np.ndarray]

log = logging.getLogger(__name__)
_warn = partial(log.warning, extra={"of_machine": True})  # each process reads the file, one of a machine speaks of it

_NOTE = "dali-vit resolution "
_NUMBERS = "biufV"  # kinds of numpy's types; as V it saves bfloat16, a type that it lacks


class Inferred(NamedTuple):
    """What a parameter tree says about its model; `resolution` is None where positions are sincos2d."""

    config: ModelConfig
    num_classes: int
    resolution: int | None


def open_npz(path: str | Path, resolution: int | None = None) -> tuple[PlainViT, ModelConfig, int]:
    """The model of a .npz file in eval mode, its config and its resolution; entries that are left out are logged.

    `resolution` defaults to that of the learned positions or, in a file that we wrote, to the one noted there; else a
    warning says that 224 is assumed (14 patches where 224 is not a multiple of the patch).
    Raises UserError (a ValueError) for a file that is not a complete checkpoint of a plain ViT.
    """
    params = load_npz(path)
    with _naming(path):
        config, classes, native = infer_config(params)
        patch = params["embedding/kernel"].shape[0]
        if (resolution := resolution or native or _noted_resolution(path)) is None:
            resolution = 14 * patch if 224 % patch else 224
            _warn("%s does not say for which images it is: --resolution %d is assumed", path, resolution)
        model = create_model(config, num_classes=classes, resolution=resolution)
        state, unmapped = from_big_vision(params, model)
    if odd := [name for name in params.keys() - set(unmapped) if not np.isfinite(params[name]).all()]:
        _warn("%s: not all of its weights are finite: %s", path, some(sorted(odd)))
    if unmapped:
        _warn("%s: left out, as the model has no place for them: %s", path, ", ".join(unmapped))
    model.load_state_dict(state)
    assert isinstance(model, PlainViT)
    return model.eval(), config, resolution


def load_npz(path: str | Path) -> Params:
    """The parameter tree of a .npz file of any age and float type, at the top level or under params/ or opt/target/."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            arrays = {name: _unpickled(npz, name) for name in npz.files}
    except MemoryError as error:  # or a header that is damaged asks for more than there is
        raise UserError(f"{path}: does not fit into memory, or is damaged ({error}); fetch or copy it again") from error
    except Exception as error:  # numpy, zipfile and what they decompress with each have errors of their own
        reason = one_line(error)
        if not isinstance(error, OSError) and not zipfile.is_zipfile(path):
            reason = "it is no ZIP archive"  # numpy would advise to load it as a pickle, unsafely
        raise UserError(f"{path}: not a whole .npz file ({reason}); fetch or copy it again") from error
    for prefix in ("params/", "opt/target/"):
        if f"{prefix}embedding/kernel" in arrays:
            arrays = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
            break
    others = [name for name, a in arrays.items() if not isinstance(a, np.ndarray) or a.dtype.kind not in _NUMBERS]
    if "embedding/kernel" not in arrays or "embedding/kernel" in others:
        raise UserError(f"{path}: holds no ViT (no embedding/kernel); give an image classifier of big_vision")
    if others:
        _warn("%s: left out, as they are no arrays of numbers: %s", path, ", ".join(others))
    with _naming(path):
        return modernise({name: _float32(array) for name, array in arrays.items() if name not in others})


def _unpickled(npz: Mapping[str, Any], name: str) -> Any:
    """An entry of a .npz file; None where it is an array of Python's objects, which only a pickle can hold."""
    try:
        return npz[name]
    except ValueError as error:
        if "Object arrays cannot be loaded" not in str(error):
            raise
        return None


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Names the file in UserErrors, and turns what arrays of odd shapes cause into one."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its arrays are not of a plain ViT's shapes ({error}); fetch it again") from error


def modernise(params: Mapping[str, np.ndarray]) -> Params:
    """Renames the parameters of old and scanned layouts to the current names.

    Scanned layers (encoderblock/..., depth first) are unrolled; pre-Linen submodule numbers (LayerNorm_2,
    MlpBlock_3) are renumbered; positions move out of Transformer/; a [cls] position merged into them is added
    to the [cls] token, as the current model gives that token no position.
    """
    modern: Params = {}
    for name, array in params.items():
        if match := re.fullmatch(r"Transformer/encoderblock/(.+)", name):
            modern |= {f"{_block(i)}/{match[1]}": layer for i, layer in enumerate(array)}
            continue
        name = re.sub(r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding", name)
        name = re.sub(r"/(MultiHeadDotProductAttention|MlpBlock)_\d+/", r"/\1_0/", name)
        modern[name.replace("/LayerNorm_2/", "/LayerNorm_1/")] = array
    positions = modern.get("pos_embedding")
    if positions is not None and math.isqrt(positions.shape[1] - 1) ** 2 == positions.shape[1] - 1 > 0:
        modern["pos_embedding"] = positions[:, 1:]
        if "cls" in modern:
            modern["cls"] = modern["cls"] + positions[:, :1]
    return modern


def infer_config(params: Mapping[str, np.ndarray]) -> Inferred:
    """The model that a parameter tree belongs to, from names and shapes; UserError where it is no plain ViT."""
    if any(name == "probe" or name.startswith("MAPHead_0/") for name in params):
        raise UserError("attention pooling (MAPHead_0) is not supported; give a model with pool_type gap or tok")
    kernel = _get(params, "embedding/kernel")  # [patch, patch, 3, width]
    if kernel.ndim != 4 or kernel.shape[0] != kernel.shape[1] or kernel.shape[2] != 3:
        raise UserError(f"embedding/kernel of shape {kernel.shape}: not that of square RGB patches")
    blocks = {int(m[1]) for m in map(re.compile(r"Transformer/encoderblock_(\d+)/").match, params) if m}
    hidden = _get(params, f"{_block(0)}/MlpBlock_0/Dense_0/bias")
    query = _get(params, f"{_block(0)}/MultiHeadDotProductAttention_0/query/bias")  # [heads, width of a head]
    patch, sizes = kernel.shape[0], Variant(kernel.shape[3], len(blocks), hidden.shape[0], query.shape[0])
    variant = next((name for name, known in VARIANTS.items() if known == sizes), None)
    positions = params.get("pos_embedding")
    config = ModelConfig(
        model=f"{variant or 'S'}/{patch}",
        pool="tok" if "cls" in params else "gap",
        posemb="sincos2d" if positions is None else "learn",
        head="mlp" if "pre_logits/kernel" in params else "linear",
        **({} if variant else sizes._asdict()),
    )
    resolution = None if positions is None else math.isqrt(positions.shape[1]) * patch
    classes = _get(params, "head/kernel").shape[1]
    if not classes:
        raise UserError("head/kernel has no classes; give an image classifier of big_vision")
    return Inferred(config, classes, resolution)


def from_big_vision(params: Mapping[str, np.ndarray], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict for `model` with the tree's values, and the names in the tree that the model has no place for.

    Learned positions are resampled to the model's resolution; sincos2d positions are the model's own. Raises
    UserError for a missing name and for an array of another shape than the model's.
    """
    vit = _plain(model)
    state = dict(vit.state_dict())
    shapes = {name: array.shape for name, array in to_big_vision(vit).items()}
    if missing := sorted(set(shapes) - set(params)):
        what = "1 parameter is" if len(missing) == 1 else f"{len(missing)} parameters are"
        raise UserError(f"{what} missing: {some(missing)}")
    arrays = {name: params[name] for name in shapes}
    if "pos_embedding" in arrays:
        positions = resample_posemb(torch.from_numpy(arrays["pos_embedding"]), shapes["pos_embedding"][1])
        arrays["pos_embedding"] = positions.numpy()
    for name, array in arrays.items():
        if array.shape != shapes[name]:
            raise UserError(f"{name} of shape {array.shape}: the model needs {shapes[name]}")
    for ours, theirs in _names(vit):
        state[ours] = torch.from_numpy(np.concatenate([_to_torch(name, arrays[name]) for name in theirs]))
    return state, sorted(set(params) - set(shapes))


def to_big_vision(model: nn.Module) -> Params:
    """A plain ViT's parameters under big_vision's names and in its shapes; fixed positions are left out."""
    vit = _plain(model)
    first_block: Any = vit.blocks[0]
    num_heads = first_block.attn.num_heads
    params: Params = {}
    for ours, theirs in _names(vit):
        parts = vit.get_parameter(ours).detach().cpu().chunk(len(theirs))  # the fused q, k and v, else one part
        for name, part in zip(theirs, parts, strict=True):
            params[name] = np.ascontiguousarray(_from_torch(name, part.numpy(), num_heads))
    return params


def save_npz(path: str | Path, params: Mapping[str, np.ndarray], resolution: int | None = None) -> None:
    """Writes a parameter tree as an .npz that big_vision loads (config.model_init), whole or not at all.

    resolution: side of the model's images, which cannot be told from fixed positions. It is noted in the archive's
    comment, because big_vision takes every entry for a parameter.
    """
    with replacing(Path(path)) as temporary:
        with temporary.open("wb") as file:
            np.savez(file, **params)  # type: ignore[arg-type]
        if resolution is not None:
            with zipfile.ZipFile(temporary, "a") as archive:
                archive.comment = f"{_NOTE}{resolution}".encode()


def _noted_resolution(path: str | Path) -> int | None:
    with zipfile.ZipFile(path) as archive:
        note = archive.comment.decode(errors="replace")
    digits = note.removeprefix(_NOTE)
    return int(digits) if note.startswith(_NOTE) and digits.isdecimal() else None


def num_classes(state: Mapping[str, Tensor]) -> int:
    """The number of classes of a plain ViT, from its state dict; UserError without a classifier."""
    if "head.bias" not in state:
        raise UserError("no classifier inside (no head.bias)")
    return state["head.bias"].shape[0]


def resample_positions(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A plain ViT's state dict with its positions fitted to `model`, the same ViT for another resolution.

    Learned positions are resampled; sincos2d positions are taken from `model`.
    """
    resampled = dict(state)
    if isinstance(model, PlainViT):
        target = model.state_dict()["pos_embed"]
        learned = isinstance(model.pos_embed, nn.Parameter)
        resampled["pos_embed"] = resample_posemb(state["pos_embed"], target.shape[1]) if learned else target
    return resampled


def resample_posemb(positions: Tensor, count: int) -> Tensor:
    """Resamples position embeddings [1, n, width] of a square grid bilinearly to a square grid of `count` positions.

    Corners map to corners, as in big_vision's scipy.ndimage.zoom(order=1). If n is `count`, they are returned as is.
    """
    if positions.shape[1] == count:
        return positions
    old, new = math.isqrt(positions.shape[1]), math.isqrt(count)
    if old**2 != positions.shape[1] or new**2 != count:
        raise UserError(f"positions of a grid that is not square ({positions.shape[1]} to {count}) do not resample")
    grid = positions.double().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, width, old, old]
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
    return grid.flatten(2).transpose(1, 2).contiguous().to(positions.dtype)


def _plain(model: nn.Module) -> PlainViT:
    if not isinstance(model, PlainViT):
        raise UserError(f"{type(model).__name__}: big_vision's layout holds plain ViTs only, not timm's models")
    return model


def _block(index: int) -> str:
    return f"Transformer/encoderblock_{index}"


def _names(model: PlainViT) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each parameter's name, and big_vision's name for it, or its three names for the fused q, k and v."""
    layers = {"patch_embed.proj": "embedding", "head": "head"}
    if model.pre_logits is not None:
        layers["pre_logits"] = "pre_logits"
    norms = {"norm": "Transformer/encoder_norm"}
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", _block(i)
        attention = f"{theirs}/MultiHeadDotProductAttention_0"
        for ends in (("weight", "kernel"), ("bias", "bias")):
            yield f"{ours}.attn.qkv.{ends[0]}", tuple(f"{attention}/{x}/{ends[1]}" for x in ("query", "key", "value"))
        layers[f"{ours}.attn.proj"] = f"{attention}/out"
        layers[f"{ours}.mlp.fc1"] = f"{theirs}/MlpBlock_0/Dense_0"
        layers[f"{ours}.mlp.fc2"] = f"{theirs}/MlpBlock_0/Dense_1"
        norms[f"{ours}.norm1"] = f"{theirs}/LayerNorm_0"
        norms[f"{ours}.norm2"] = f"{theirs}/LayerNorm_1"
    for weight, modules in (("kernel", layers), ("scale", norms)):
        for our_name, their_name in modules.items():
            yield f"{our_name}.weight", (f"{their_name}/{weight}",)
            yield f"{our_name}.bias", (f"{their_name}/bias",)
    if model.cls_token is not None:
        yield "cls_token", ("cls",)
    if isinstance(model.pos_embed, nn.Parameter):
        yield "pos_embed", ("pos_embedding",)


def _to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """An array in torch's layout: kernels with the output dimension first, attention heads merged."""
    if name == "embedding/kernel":
        return array.transpose(3, 2, 0, 1)
    if name.endswith("/out/kernel"):  # [heads, width of a head, width]
        return array.reshape(-1, array.shape[-1]).T
    if re.search(r"/(query|key|value)/kernel$", name):  # [width, heads, width of a head]
        return array.reshape(array.shape[0], -1).T
    if re.search(r"/(query|key|value)/bias$", name):
        return array.reshape(-1)
    return array.T if name.endswith("/kernel") else array


def _from_torch(name: str, array: np.ndarray, num_heads: int) -> np.ndarray:
    """The inverse of `_to_torch`."""
    if name == "embedding/kernel":
        return array.transpose(2, 3, 1, 0)
    if name.endswith("/out/kernel"):
        return array.T.reshape(num_heads, -1, array.shape[0])
    if re.search(r"/(query|key|value)/kernel$", name):
        return array.T.reshape(array.shape[1], num_heads, -1)
    if re.search(r"/(query|key|value)/bias$", name):
        return array.reshape(num_heads, -1)
    return array.T if name.endswith("/kernel") else array


def _get(params: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in params:
        raise UserError(f"1 parameter is missing: {name}")
    return params[name]


def _float32(array: np.ndarray) -> np.ndarray:
    """Any float type as float32; numpy saves bfloat16, a type it lacks, as two-byte void."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


__all__ = [
    "from_big_vision",
    "infer_config",
    "load_npz",
    "modernise",
    "num_classes",
    "open_npz",
    "resample_posemb",
    "resample_positions",
    "save_npz",
    "to_big_vision",
]
