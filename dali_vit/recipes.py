"""Named recipes: functions that return a Config, each stating only what it changes.

Each recipe runs as `dali-vit train --recipe NAME --data PATH`; `demo` needs no --data.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

from dali_vit.config import Config, UserError

IMAGENET_TRAIN_99 = 1_281_167 - round(0.01 * 1_281_167)  # images of ImageNet-1k train less the 1 % minival


def _set(config: Config, group: str, **changes: Any) -> Config:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **changes)})


def paper(config: Config) -> Config:
    """The paper's ViT-S/16."""
    return config


def no_aug(config: Config) -> Config:
    """Without RandAugment and Mixup."""
    return _set(_set(config, "data", randaug_layers=0), "optim", mixup_alpha=0.0)


def learned_posemb(config: Config) -> Config:
    """Learned position embeddings."""
    return _set(config, "model", posemb="learn")


def batch4096(config: Config) -> Config:
    """Batch size 4096."""
    return _set(config, "optim", batch_size=4096)


def cls_token(config: Config) -> Config:
    """[cls] token instead of global average pooling."""
    return _set(config, "model", pool="tok")


def linear_head(config: Config) -> Config:
    """Linear head instead of the MLP head."""
    return _set(config, "model", head="linear")


def original_aug(config: Config) -> Config:
    """The original ViT (learned positions, batch 4096, [cls]), augmented."""
    return learned_posemb(batch4096(cls_token(config)))


def original(config: Config) -> Config:
    """The original ViT (learned positions, batch 4096, [cls]), not augmented."""
    return no_aug(original_aug(config))


def b16(config: Config) -> Config:
    """ViT-B/16 under the paper's S/16 recipe."""
    return _set(config, "model", model="B/16")


def b32(config: Config) -> Config:
    """ViT-B/32 under the paper's S/16 recipe."""
    return _set(config, "model", model="B/32")


def resnet50(config: Config) -> Config:
    """timm's ResNet-50, crop and flip, SGD as in arXiv 1706.02677 for batch 1,024, cosine, label smoothing."""
    batch_size = config.optim.batch_size
    config = _set(config, "model", model="timm:resnet50")
    config = _set(config, "data", crop="torchvision", randaug_layers=0)
    return _set(
        config,
        "optim",
        optimizer="sgd",
        lr=0.1 * batch_size / 256,
        momentum=0.9,
        weight_decay=1e-4,
        label_smoothing=0.1,
        warmup_steps=round(5 * IMAGENET_TRAIN_99 / batch_size),  # 5 epochs
        grad_clip_norm=None,
        mixup_alpha=0.0,
    )


def demo(config: Config) -> Config:
    """A small ViT on a dataset drawn on first use: minutes on two CPU cores."""
    config = _set(config, "data", data="demo", resolution=64, randaug_layers=1, randaug_magnitude=2.0)
    config = _set(config, "model", model="Ti/8", width=96, depth=3, num_heads=3, mlp_dim=384)
    config = _set(config, "optim", batch_size=64, lr=2e-3, warmup_steps=60, mixup_alpha=0.0)
    return _set(config, "run", log_every=20, checkpoint_every=200, eval_every=5.0)


# For each row of *Better plain ViT baselines for ImageNet-1k* (arXiv 2205.01580): ImageNet-1k val top-1 in percent at
# 224 px after these numbers of epochs.
_EPOCHS = (90, 150, 300)
_ROWS: dict[str, tuple[Callable[[Config], Config], tuple[float, float, float]]] = {
    "": (paper, (76.5, 78.5, 80.0)),
    "-no-aug": (no_aug, (73.6, 73.7, 73.7)),
    "-learned-posemb": (learned_posemb, (75.0, 78.0, 79.6)),
    "-batch4096": (batch4096, (74.7, 77.3, 78.6)),
    "-cls-token": (cls_token, (75.0, 76.9, 78.2)),
    "-linear-head": (linear_head, (76.7, 78.6, 79.8)),
    "-original-aug": (original_aug, (71.6, 74.8, 76.1)),
    "-original": (original, (66.8, 67.2, 67.1)),
}
_OTHERS = {"b16-90ep": (b16, 90), "b32-90ep": (b32, 90), "resnet50-90ep": (resnet50, 90)}


def _build(variant: Callable[[Config], Config], epochs: int) -> Config:
    return variant(_set(Config(), "optim", epochs=float(epochs)))


def _words(variant: Callable[[Config], Config]) -> str:
    return str(variant.__doc__).rstrip(".")


RECIPES: dict[str, tuple[Callable[[], Config], str]] = {
    "demo": (partial(_build, demo, 20), _words(demo)),
    **{
        f"s16-{epochs}ep{suffix}": (partial(_build, row, epochs), f"{_words(row)}: {top1[i]} %")
        for i, epochs in enumerate(_EPOCHS)
        for suffix, (row, top1) in _ROWS.items()
    },
    **{name: (partial(_build, variant, epochs), _words(variant)) for name, (variant, epochs) in _OTHERS.items()},
}


def get(name: str) -> Config:
    """The Config of a recipe; raises UserError for an unknown name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "`dali-vit train --help` lists them"
        raise UserError(f"--recipe {name}: no such recipe; {hint}")
    return _set(RECIPES[name][0](), "run", recipe=name)


def describe() -> str:
    """One line per recipe, with the top-1 that the paper reports."""
    width = max(map(len, RECIPES))
    return "\n".join(f"  {name:<{width}}  {words}" for name, (_, words) in RECIPES.items())
