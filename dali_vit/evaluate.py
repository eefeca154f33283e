"""Top-1, top-5 and loss of a model on a labelled set, every image counted exactly once over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from dali_vit import data as datasets
from dali_vit import left_out
from dali_vit.config import Config
from dali_vit.distributed import Group, share_buffers, sum_over_ranks
from dali_vit.loaders import EvalLoader, eval_loader, num_threads
from dali_vit.mixup import normalize


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
    Counts are integers, summed over ranks, so that the accuracies do not depend on the number of ranks. Collective:
    every rank evaluates with the buffers of rank 0, as batch norm's statistics differ between ranks. On a GPU matrix
    products are in bfloat16.
    """
    share_buffers(model)
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # images, top-1, top-5
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    if acceptable is not None:
        acceptable = acceptable.to(device)
    try:
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
    finally:
        model.train(was_training)

    sum_over_ranks(counts)
    sum_over_ranks(loss_sum)
    images_seen, top1, top5 = counts.tolist()
    # In this order: 100 / count need not be exact, and 494 of 500 would be 98.80000000000001 %.
    top1, top5 = (100 * right / max(images_seen, 1) for right in (top1, top5))
    if acceptable is not None:
        return {"top1": top1, "count": images_seen}
    return {
        "top1": top1,
        "top5": top5,
        "loss": loss_sum.item() / max(images_seen, 1),
        "count": images_seen,
    }


def evaluate_splits(
    model: torch.nn.Module,
    dataset: datasets.Dataset,
    config: Config,
    group: Group,
    loaders: dict[str, EvalLoader],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """`<split>/top1`, `/top5` and `/loss` on minival and val, and `/bad_samples` where images were left out.

    loaders: empty at first, kept from one call to the next: they take time to make, most of all on a GPU, and remember
    which images cannot be decoded. `progress` is called before each batch is fetched and after the last, equally often
    on every rank, and may end the evaluation by an exception. UserError where --max-bad-share is exceeded.
    """

    def announced(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        progress()
        for batch in batches:
            yield batch
            progress()

    metrics: dict[str, float] = {}
    for name, files in (("minival", dataset.minival), ("val", dataset.val)):
        if files is None:
            continue
        if name not in loaders:
            if group.device.type == "cuda":
                torch.cuda.empty_cache()  # of what the training steps left: DALI's buffers are not torch's
            loaders[name] = eval_loader(
                files,
                # A batch that fits in training fits in an evaluation.
                batch_size=config.optim.batch_size // group.world_size // config.run.grad_accum_steps,
                resolution=config.data.resolution,
                group=group,
                threads=num_threads(config, group),
                max_bad_share=config.data.max_bad_share,
            )
        result = evaluate(model, announced(loaders[name]), group.device)
        bad = len(files) - int(result.pop("count"))
        # Each rank has counted its own alone.
        left_out.check_share(bad, len(files), name, max_bad_share=config.data.max_bad_share, data=config.data.data)
        if bad:
            result["bad_samples"] = bad
        metrics |= {f"{name}/{key}": value for key, value in result.items()}
    return metrics
