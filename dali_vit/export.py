"""Checkpoints as folders that timm loads by itself: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

```
config.json                   architecture, arguments, input statistics and class names, as timm has them
model.safetensors             the weights
head/classifier.safetensors   only for models with an MLP head: the head, as timm's ViT has no place for its tanh; the
                              metadata's `classes` are the class names as JSON
```
The head has a folder of its own because timm before 1.0.29 fails where it finds two files of weights.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from dali_vit import checkpoint, weights
from dali_vit.config import UserError
from dali_vit.files import at_home, flush, make_parent
from dali_vit.model import PlainViT, no_such_images, vit_arguments
from dali_vit.validation import check_local
from dali_vit.variants import TIMM_PREFIX, resolve_variant

__all__ = ["export"]

# timm's registered models nearest to our sizes; every argument in which one might differ is given as well.
_SIZES = {"Ti": "tiny", "S": "small", "B": "base", "L": "large", "H": "huge", "g": "giant", "G": "gigantic"}
_ANY_VIT = "vit_base_patch16_224"
_CLASSIFIER = "head/classifier.safetensors"


def export(source: Path, target: Path, resolution: int | None = None) -> str:
    """Writes a checkpoint as a folder for timm; returns one or two lines to print about it.

    `resolution` resamples the position embeddings. A model with an MLP head becomes one without a classifier, and
    the head lies beside it: logits = head(tanh(pre_logits(features))). Raises UserError for a target that exists,
    unless it is an empty folder.
    """
    check_local(target, "--out")
    target = at_home(target)
    taken = UserError(f"--out {target}: exists; choose another folder or remove it")
    _remove_leftovers(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise taken
    opened = checkpoint.open_model(source, resolution)
    state = dict(opened.model.state_dict())
    classifier: dict[str, Tensor] = {}
    if isinstance(opened.model, PlainViT):
        architecture, arguments = _plain_vit(opened)
        if opened.model.pre_logits is not None:
            classifier = {name: state.pop(name) for name in list(state) if name.startswith(("pre_logits.", "head."))}
    else:
        architecture = opened.config.model.removeprefix(TIMM_PREFIX)
        fixed = opened.model.pretrained_cfg.get("fixed_input_size", False)  # type: ignore[union-attr, operator]
        arguments = {"img_size": opened.resolution} if fixed else {}
    num_classes = 0 if classifier else int(opened.model.num_classes)  # type: ignore[arg-type]
    stock = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **arguments)
    try:
        stock.load_state_dict(state)  # weights that timm's own model refuses are not written
    except RuntimeError as error:
        raise no_such_images(opened.config, opened.resolution, error) from error

    config = _config(stock, architecture, arguments, num_classes, opened)
    files = {"model.safetensors": state} | ({_CLASSIFIER: classifier} if classifier else {})
    try:
        _write(target, config, files, opened.classes)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOTEMPTY:  # created meanwhile by another process
            raise taken from error
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--out {target}: cannot write there ({reason})") from error
    what = f"[N, {stock.num_features}] features" if classifier else f"[N, {num_classes}] logits"
    lines = [f'{target}: timm.create_model("local-dir:{target}", pretrained=True) gives {what}']
    if classifier:
        lines.append(
            f"timm's ViT has no MLP head: logits = head(tanh(pre_logits(features))) with {target / _CLASSIFIER}"
        )
    mean, std = (config["pretrained_cfg"][key] for key in ("mean", "std"))
    if mean != [0.5] * 3 or std != [0.5] * 3:
        lines.append(f"it takes (value / 255 - mean) / std with mean {mean} and std {std}, not [-1, 1]")
    return "\n".join(lines)


def _plain_vit(opened: checkpoint.OpenedModel) -> tuple[str, dict[str, Any]]:
    """The registered name and the arguments with which timm's VisionTransformer equals ours, except for an MLP head.

    Fixed positions are saved like learned ones.
    """
    _, patch = resolve_variant(opened.config)
    name = f"vit_{_SIZES.get(opened.config.model.split('/')[0], '')}_patch{patch}_224"
    return name if timm.is_model(name) else _ANY_VIT, {
        **vit_arguments(opened.config, opened.resolution),
        "norm_layer": "layernorm",  # timm's has big_vision's epsilon, 1e-6
        "act_layer": "gelu_tanh",
    }


def crop_pct(resolution: int) -> float:
    """224 / 256, or a value near it with which timm, which rounds down, resizes to the same side as our evaluation.

    The crop's offset may still differ by a pixel: timm rounds it, while our evaluation, like its reference, truncates.
    """
    side = round(resolution * 256 / 224)
    return 0.875 if math.floor(resolution / 0.875) == side else resolution / (side + 0.5)


def _config(
    stock: torch.nn.Module,
    architecture: str,
    arguments: dict[str, Any],
    num_classes: int,
    opened: checkpoint.OpenedModel,
) -> dict[str, Any]:
    """What timm reads from config.json; the preprocessing is that of our evaluation."""
    known: Any = stock.pretrained_cfg
    plain = isinstance(opened.model, PlainViT)
    statistics = {key: [0.5] * 3 if plain else list(known[key]) for key in ("mean", "std")}
    classes = {"label_names": list(opened.classes)} if opened.classes and num_classes else {}
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": stock.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, opened.resolution, opened.resolution],
            "fixed_input_size": plain or bool(known.get("fixed_input_size", False)),
            "interpolation": "bilinear",
            "crop_pct": crop_pct(opened.resolution),
            "crop_mode": "center",
            **statistics,
            "num_classes": num_classes,
            "first_conv": known["first_conv"],
            "classifier": known["classifier"],
            **classes,
        },
    }


def _remove_leftovers(target: Path) -> None:
    """Removes the unfinished folders, in and beside the target, of exports to it that were killed."""
    for folder in (target, target.parent):
        for path in folder.glob(".*.tmp"):
            if re.fullmatch(rf"\.{re.escape(target.name)}\.\d+\.tmp", path.name):
                with suppress(OSError), _locked(path):  # else another export is writing there
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder; OSError where another process has. The lock ends with its process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _write(
    target: Path, config: dict[str, Any], files: dict[str, dict[str, Tensor]], classes: tuple[str, ...] | None
) -> None:
    """Writes the folder under another name and renames it, so that it exists as a whole or not at all.

    An empty folder that exists already, perhaps the user's working directory, is filled instead, config.json last.
    """
    make_parent(target)
    is_there = target.is_dir()  # a folder that another process makes after this is not filled
    name = f".{target.name}.{os.getpid()}.tmp"
    temporary = target / name if is_there else target.with_name(name)
    try:
        temporary.mkdir()
        with ExitStack() as lock:
            with suppress(OSError):  # a file system without locks
                lock.enter_context(_locked(temporary))
            (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            for name, tensors in files.items():
                named = {"classes": json.dumps(classes)} if name == _CLASSIFIER and classes else {}
                (temporary / name).parent.mkdir(exist_ok=True)
                weights.write(temporary / name, tensors, {"format": "pt", **named})
            for written in (*temporary.rglob("*"), temporary):
                flush(written)
            if is_there:
                for file in sorted(temporary.iterdir(), key=lambda file: file.name == "config.json"):
                    file.rename(target / file.name)
            else:
                temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
