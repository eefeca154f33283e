"""Top-1, top-5 and loss of a model on a labelled set, every image counted exactly once over all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from dali_vit.distributed import sum_over_ranks
from dali_vit.step import normalize


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    acceptable: torch.Tensor | None = None,
) -> dict[str, float]:
    """Accuracies in percent, mean cross-entropy and the number of images.

    `batches` yields images uint8 [N, S, S, 3] and labels int64 [N]; a label of -1 marks padding. With
    `acceptable` (ReaL: int64 [images, K], the right classes of each image, filled up with -1) a label is
    instead the image's row, rows without any class are left out, and top5 and loss are not reported.
    Counts are integers, summed over ranks, so that the result does not depend on the number of ranks.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # images, top-1, top-5
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    if acceptable is not None:
        acceptable = acceptable.to(device)
    for images, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(normalize(images))  # [N, classes]
        logits = logits.float()
        valid = labels >= 0
        if acceptable is not None:
            rows = acceptable[labels.clamp(min=0)]  # [N, K]
            valid &= (rows >= 0).any(dim=1)
            right = (rows == logits.argmax(dim=1, keepdim=True)).any(dim=1)
            counts += torch.stack([valid.sum(), (right & valid).sum(), torch.zeros_like(counts[0])])
            continue
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [N, 5]
        counts += torch.stack([valid.sum(), top[:, 0].sum(), top.sum()])
        loss_sum += F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum").double()
    model.train(was_training)

    sum_over_ranks(counts)
    sum_over_ranks(loss_sum)
    images_seen, top1, top5 = counts.tolist()
    share = 100.0 / max(images_seen, 1)
    if acceptable is not None:
        return {"top1": top1 * share, "count": images_seen}
    return {
        "top1": top1 * share,
        "top5": top5 * share,
        "loss": loss_sum.item() / max(images_seen, 1),
        "count": images_seen,
    }
