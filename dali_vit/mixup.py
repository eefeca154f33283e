"""Mixup as big_vision does it: one lambda per step for the whole batch, the partner of image i is image i-1.

Source: big_vision, utils.get_mixup. The tensor functions hold no state and read no value back
from the device, and a new lambda (a 0-d tensor) does not make torch.compile compile again.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

_PHILOX_KEY = 0x6D69787570  # "mixup": keeps lambda's random numbers apart from the other streams of the same seed


def sample_lambda(alpha: float, seed: int, step: int) -> float:
    """The weight of a step's own images, in [0.5, 1]: max(b, 1 - b) of a draw b ~ Beta(alpha, alpha).

    A pure function of (seed, step), so every rank draws the same and a resumed run repeats it. alpha 0 gives 1.
    """
    if alpha == 0:
        return 1.0
    # The step is the counter's highest word: each step has 2^192 counts of its own, more than any draw takes.
    generator = np.random.Generator(np.random.Philox(key=[seed, _PHILOX_KEY], counter=[0, 0, 0, step]))
    draw = float(generator.beta(alpha, alpha))
    return max(draw, 1.0 - draw)


def normalize(images: Tensor) -> Tensor:
    """Pixels [N, H, W, 3] uint8 to images [N, 3, H, W] float32 in [-1, 1], channels-last in memory."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def normalize_and_mix(images: Tensor, lam: Tensor, partners: Tensor | None = None) -> Tensor:
    """`normalize`, then each image's blend with its partner: lam * image + (1 - lam) * the batch rolled by one.

    images: [N, H, W, 3] uint8; lam: 0-d float32 on the same device; returns [N, 3, H, W] float32 in [-1, 1]. For a part
    of a batch, pass the partners: that of the part's first image lies in another part.
    """
    normalized = normalize(images)
    mixed_in = normalized.roll(1, 0) if partners is None else normalize(partners)
    return lam * normalized + (1.0 - lam) * mixed_in


def mixup_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    lam: Tensor,
    label_smoothing: float = 0.0,
    partner_labels: Tensor | None = None,
) -> Tensor:
    """Mean softmax cross-entropy (0-d float32) against labels mixed as `normalize_and_mix` mixes the images.

    logits: [N, classes] of any float type; labels: [N] int64; lam: 0-d float32. `label_smoothing` spreads that
    share of every label evenly over all classes. Label -1 means no label: its term, as an image's own label or as its
    partner's, is left out of the sum without replacement, while the mean is still over all N.
    """
    if partner_labels is None:
        partner_labels = labels.roll(1, 0)
    log_p = logits.float().log_softmax(dim=1)  # [N, classes]

    def weighted(labels: Tensor) -> tuple[Tensor, Tensor]:
        labelled = (labels >= 0)[:, None]  # [N, 1]
        return log_p.gather(1, labels.clamp(min=0)[:, None]) * labelled, labelled

    (own, is_own), (partner, is_partner) = weighted(labels), weighted(partner_labels)
    loss = -(lam * own + (1.0 - lam) * partner).mean()
    if label_smoothing:
        weight = lam * is_own + (1.0 - lam) * is_partner  # [N, 1], 1 where both labels are there
        loss = (1.0 - label_smoothing) * loss - label_smoothing * (weight * log_p).mean()
    return loss


__all__ = ["mixup_cross_entropy", "normalize", "normalize_and_mix", "sample_lambda"]
