"""big_vision's model names, the sizes they stand for, and which sizes go together. Needs no torch."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from dali_vit.config import Config, ModelConfig, UserError
from dali_vit.validation import MAX_RESOLUTION, validate


class Variant(NamedTuple):
    """The four sizes that make a plain ViT."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int


# big_vision, models/vit.py, decode_variant; the larger ones are from "Scaling Vision Transformers" (2106.04560).
VARIANTS = {
    "mu": Variant(32, 1, 128, 2),
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    "M": Variant(512, 12, 2048, 8),
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "So400m": Variant(1152, 27, 4304, 16),
    "H": Variant(1280, 32, 5120, 16),
    "g": Variant(1408, 40, 6144, 16),
    "G": Variant(1664, 48, 8192, 16),
}
# Larger than any existing ViT, so that typing errors are refused here before they take all memory.
_MAX_SIZE = {"width": 2**16, "depth": 1024, "mlp_dim": 2**18, "num_heads": 2**12}
TIMM_PREFIX = "timm:"


def resolve_variant(config: ModelConfig) -> tuple[Variant, int]:
    """Sizes and patch side of a VARIANT/PATCH model, the config's overrides applied; UserError for other names."""
    match = re.fullmatch(r"(\w+)/([1-9]\d*)", config.model)
    if match is None or match[1] not in VARIANTS:
        timms = config.model if re.fullmatch(r"[a-z]\w*_\w+", config.model) else "NAME"
        raise UserError(
            f"--model {config.model}: no such model; give VARIANT/PATCH with a variant of {', '.join(VARIANTS)}"
            f" (such as S/16), or {TIMM_PREFIX}{timms}"
        )
    patch = int(match[2])
    if patch > MAX_RESOLUTION:
        raise UserError(f"--model {config.model}: its patch must be at most {MAX_RESOLUTION:,} pixels")
    overrides = {name: getattr(config, name) for name in Variant._fields if getattr(config, name) is not None}
    for name, value in overrides.items():
        if not 1 <= value <= _MAX_SIZE[name]:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from 1 to {_MAX_SIZE[name]:,}")
    return VARIANTS[match[1]]._replace(**overrides), patch


def check_config(config: Config) -> None:
    """UserError for settings that no run can use, whatever the data and the machine; asks timm for a model of timm."""
    validate(config)
    check_model(config.model, config.data.resolution)
    if config.model.model.startswith(TIMM_PREFIX):
        from dali_vit.model import timm_name  # imported here, as timm takes seconds

        timm_name(config.model)


def check_model(config: ModelConfig, resolution: int) -> None:
    """UserError for an unknown name, sizes that do not fit together, and settings that a timm model ignores.

    Whether timm has a model of the name is not checked here but by `model.timm_name`.
    """
    if config.model.startswith(TIMM_PREFIX):
        _check_no_effect(config)
        return
    (width, _, _, num_heads), patch = resolve_variant(config)
    if resolution % patch:
        raise UserError(indivisible(config, resolution, patch))
    if width % num_heads:
        raise UserError(f"--width {width}: not divisible by {num_heads} heads; change --width or --num-heads")
    if config.posemb == "sincos2d" and (width % 4 or width < 8):
        raise UserError(f"--width {width}: sincos2d positions need a multiple of 4 from 8 on; use --posemb learn")


def indivisible(config: ModelConfig, resolution: int, patch: int) -> str:
    """The error message for a resolution that is no multiple of the patch's side."""
    near = max(patch, round(resolution / patch) * patch)
    return f"--resolution {resolution}: not divisible by the patch of {config.model}; use {near}"


def _check_no_effect(config: ModelConfig) -> None:
    defaults = ModelConfig(model=config.model)
    for field in dataclasses.fields(ModelConfig):
        value = getattr(config, field.name)
        if value != getattr(defaults, field.name):
            flag = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{flag} {value}: has no effect on {config.model}; leave it out")
