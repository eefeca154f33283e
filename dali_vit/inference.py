"""Uses of a finished model: accuracy on a labelled set, predictions for files, conversion."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from dali_vit import big_vision, checkpoint, left_out
from dali_vit import data as datasets
from dali_vit.agreement import check_same_evaluation, check_same_settings
from dali_vit.arguments import EvalArguments
from dali_vit.config import UserError
from dali_vit.distributed import Group, gather_objects, together
from dali_vit.evaluate import evaluate
from dali_vit.files import at_home, file_sha256, make_parent, replacing
from dali_vit.image_files import list_images, other_images
from dali_vit.inspection import no_messages_beside_ours
from dali_vit.listing import scan, utf8_name
from dali_vit.loaders import eval_loader
from dali_vit.mixup import normalize
from dali_vit.model import num_parameters
from dali_vit.report import with_sizes
from dali_vit.structure import remarks_on_files, val_without_images
from dali_vit.undecodable import faults_of, saying_why
from dali_vit.validation import MAX_BATCH_SIZE, MAX_THREADS, check_local, check_range
from dali_vit.wordnet import descriptions
from pipelines.bad_samples import DecodeError
from pipelines.words import some

log = logging.getLogger(__name__)

_LEAVING_OUT = ", or leave images out by --max-bad-share"


def evaluate_checkpoint(asked: EvalArguments, group: Group) -> dict[str, float]:
    """`<split>/top1`, `/top5` (percent), `/loss` and `/count` of a checkpoint; with `real` also `real/top1`, `/count`.

    Collective over the group; every image counts once. Up to max_bad_share of the images, unless it is 0 one in any
    case, may be undecodable: they are left out, named in a warning and counted in `<split>/bad_samples`. A run's folder
    means its newest checkpoint as rank 0 finds it. The main process shows a progress bar where stderr is a terminal.
    minival: share of the training images held out as minival; None: that of the checkpoint's run, or 0.01 for a file of
    weights, which does not record it. With `v2` the class folders lie in DATA itself and the scalars are `v2/*`. Raises
    UserError or DecodeError, which name what does not fit.
    """
    path, data, split, minival, real = asked.checkpoint, asked.data, asked.split, asked.minival, asked.real
    max_bad_share, batch_size = asked.max_bad_share, asked.batch_size
    same = ("split", "minival", "v2", "batch_size", "resolution", "max_bad_share")
    check_same_settings({**{name: getattr(asked, name) for name in same}, "real": real is not None})
    check_range("--batch-size", batch_size, 1, MAX_BATCH_SIZE)
    check_range("--max-bad-share", max_bad_share, 0, 1)
    if asked.v2 and (split != "val" or minival is not None):
        flag = f"--minival {minival:g}" if split == "val" else f"--split {split}"
        raise UserError(f"{flag}: with --v2 all of DATA is evaluated; leave one of them out")
    if real is not None and split != "val":
        raise UserError(f"--real {real}: its labels are those of val; leave --split {split} out")
    named = "v2" if asked.v2 else split
    newest = together(lambda: _newest(at_home(path)) if group.is_main and group.world_size > 1 else None)
    chosen = gather_objects(newest)[0]  # a run in progress may write a newer one meanwhile

    def load() -> tuple[checkpoint.OpenedModel, datasets.ImageList, Path, np.ndarray | None]:
        if asked.threads is not None:
            check_range("--threads", asked.threads, 1, MAX_THREADS)
        opened = checkpoint.open_model(path / chosen if chosen else path, asked.resolution)
        files, folder = _images(data, opened, group, split=split, minival=minival, v2=asked.v2)
        datasets.check_images(files, max_bad_share or None)
        if real is None:
            return opened, files, folder, None
        outputs = _num_outputs(opened)
        accepted = datasets.load_real_labels(at_home(real), files, num_classes=outputs, split=named)
        return opened, files, folder, accepted

    opened, files, folder, real_labels = together(load)
    if group.is_main and split != "minival":  # a small part of what may be a large set
        for remark in remarks_on_files(folder, files, _class_folders(folder)):
            log.warning("%s", remark)
    if group.world_size > 1:
        weights = file_sha256(at_home(path)) if at_home(path).is_file() else opened.step
        check_same_evaluation(data, files, folder, weights=weights, real_labels=real_labels)
    model = opened.model.to(group.device)
    instead = f", or give a higher --max-bad-share than {max_bad_share:g}" if max_bad_share else _LEAVING_OUT

    def run(
        name: str, files: datasets.ImageList, acceptable: torch.Tensor | None = None
    ) -> tuple[dict[str, float], tuple[int, ...]]:
        batches = eval_loader(
            files,
            batch_size=min(batch_size, len(files)),
            resolution=opened.resolution,
            group=group,
            threads=asked.threads or group.cores,
            max_bad_share=max_bad_share,
        )
        try:
            with _progress_bar(name, len(files), visible=group.is_main) as bar, saying_why(files, instead):
                counted = _counted(batches, len(files), bar, group.world_size)
                return evaluate(model, counted, group.device, acceptable), batches.bad_samples
        finally:
            batches.close()

    result, bad = run(named, files)
    metrics = {f"{named}/{name}": value for name, value in result.items()}
    if bad_of_all := sorted(itertools.chain.from_iterable(gather_objects(bad))):
        metrics[f"{named}/bad_samples"] = len(bad_of_all)
        if group.is_main:
            some_bad = files.subset(np.array(bad_of_all))
            faults = faults_of(some_bad, [some_bad.path(i) for i in range(len(some_bad))])
            log.warning("%d of %d images of %s left out: %s", len(bad_of_all), len(files), named, faults)
        left_out.check_share(len(bad_of_all), len(files), named, max_bad_share=max_bad_share, data=None)
    if real_labels is not None:
        rows = datasets.with_labels(files, np.arange(len(files)))
        result, _ = run("real", rows, torch.from_numpy(real_labels))
        metrics |= {f"real/{name}": value for name, value in result.items()}
    return metrics


def _newest(path: Path) -> str | None:
    """The checkpoint that a run's folder or a link to its best one stands for now, relative to `path`; else None."""
    if path.is_symlink() and (path / "checkpoint.json").exists():
        return os.path.join(os.pardir, path.resolve().name)
    newest = checkpoint.newest(path, checkpoint.FILES[:1])
    return None if newest is None else os.path.join("checkpoints", newest.path.name)


def _images(
    data: str, opened: checkpoint.OpenedModel, group: Group, *, split: str, minival: float | None, v2: bool
) -> tuple[datasets.ImageList, Path]:
    """The images that a model is to be evaluated on, and the folder that holds the files of a FileList."""
    if v2:
        classes = opened.classes or tuple(map(str, range(_num_outputs(opened))))
        files = datasets.load_eval_folder(data, classes)
        if group.is_main and (there := len(np.unique(files.labels))) < len(classes):
            log.warning("%s has images of %d of the model's %d classes alone", data, there, len(classes))
        return files, at_home(data).absolute()
    if minival is None:
        minival = 0.01 if opened.minival is None else opened.minival
    dataset = datasets.load_dataset(data, minival=minival, split=split)
    _check_classes(data, dataset.classes, opened)
    if group.is_main and split == "val" and (absent := val_without_images(dataset)):
        log.warning("%s", absent)
    return dataset.split(split), dataset.root / ("val" if split == "val" else "train")


def _class_folders(folder: Path) -> Iterator[Path]:
    """The class folders in a folder, as `left_out` takes them."""
    for name in scan(folder, folders=True, dead_links=True):
        yield folder / utf8_name(name)


@contextmanager
def _progress_bar(name: str, total: int, *, visible: bool) -> Iterator[tqdm]:
    """A progress bar of images where stderr is a terminal; other messages are kept from the terminal meanwhile."""
    with (
        _stderr_itself() as terminal,
        no_messages_beside_ours(),
        tqdm(total=total, desc=name, unit=" images", file=terminal, disable=None if visible else True) as bar,
    ):
        yield bar


@contextmanager
def _stderr_itself() -> Iterator[TextIO]:
    """A duplicate of stderr that still leads to the terminal while other messages are kept from it."""
    stderr = os.fdopen(os.dup(2), "w")
    try:
        yield stderr
    finally:
        with suppress(OSError):  # the terminal may be gone, of which tqdm takes no notice
            stderr.close()


def _counted(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]], total: int, bar: tqdm, world_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches, counted as if all ranks were as far as this one: asking which rows are padding waits for the GPU."""
    for images, labels in batches:
        yield images, labels
        bar.update(min(len(images) * world_size, total - bar.n))


def predict(
    path: Path, images: Sequence[Path], device: torch.device, *, top: int = 5, resolution: int | None = None
) -> Generator[tuple[Path, list[dict[str, Any]]]]:
    """Yields each image file, or image in a folder, with its `top` likeliest classes, as soon as they are found.

    A class has `class`, `index` and `probability` in [0, 1], and `description` where class names are WordNet ids. An
    image that cannot be used has no classes, and after the last image a DecodeError names all such images. UserError
    for anything else that does not fit. Messages on stderr are held back until the generator ends or is closed.
    """
    files = list_images(images)
    opened = checkpoint.open_model(path, resolution)
    folders = filter(Path.is_dir, map(at_home, images))
    if others := list(dict.fromkeys(path for folder in folders for path in other_images(folder))):
        remedy = "save them as JPEG or PNG, or rename .jfif and .jpe to .jpg"
        log.warning("left out for their suffixes: %s; %s", some(others), remedy)
    datasets.check_images(files, max_bad_share=1.0)
    group = Group(0, 1, 0, 1, device)
    batch_size = min(len(files), 64)
    batches = eval_loader(
        files,
        batch_size=batch_size,
        resolution=opened.resolution,
        group=group,
        threads=group.cores,
        max_bad_share=1.0,
    )
    model = opened.model.to(device)
    words = descriptions(opened.classes) if opened.classes else None
    try:
        with no_messages_beside_ours(), saying_why(files):
            for start, (pixels, labels) in zip(range(0, len(files), batch_size), batches, strict=True):
                values, indices = _likeliest(model, pixels, top)
                # The last batch is padded beyond the last file.
                for row, label, value, index in zip(
                    range(start, len(files)), labels.tolist(), values.tolist(), indices.tolist(), strict=False
                ):
                    ranked = zip(index, value, strict=True) if label >= 0 else ()
                    yield Path(files.path(row)), [_prediction(opened, words, i, p) for i, p in ranked]
            if unusable := [files.path(i) for i in batches.bad_samples]:
                raise DecodeError("cannot be read or decoded", unusable)
    finally:
        batches.close()


@torch.inference_mode()
def _likeliest(model: torch.nn.Module, pixels: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and indices of the likeliest classes, [N, top] each, of images uint8 [N, S, S, 3]."""
    probabilities = model(normalize(pixels)).float().softmax(dim=1)  # [N, classes]
    values, indices = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
    return values, indices


def convert(source: Path, target: Path, resolution: int | None = None) -> str:
    """Converts big_vision's .npz to .safetensors or back; returns one line that says what was written."""
    check_local(target)
    target = at_home(target)
    if target.exists():
        raise UserError(f"{target}: exists; choose another name or remove it")
    if target.suffix not in (".safetensors", ".npz"):
        raise UserError(f"{target}: the name must end in .safetensors or .npz")
    try:
        opened = checkpoint.open_model(source, resolution)
    except UserError as error:
        raise UserError(str(error).removeprefix("--checkpoint ")) from error
    try:
        make_parent(target)
        if target.suffix == ".npz":
            big_vision.save_npz(target, big_vision.to_big_vision(opened.model), opened.resolution)
        else:
            about = opened.config, opened.resolution, opened.classes, opened.step
            with replacing(target) as temporary:
                checkpoint.save_model(temporary, opened.model.state_dict(), *about)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    parameters = num_parameters(opened.model)
    without = "; class names have no place in it" if opened.classes and target.suffix == ".npz" else ""
    return f"{target}: {with_sizes(opened.config)} at {opened.resolution} px, {parameters:,} parameters{without}"


def _num_outputs(opened: checkpoint.OpenedModel) -> int:
    return int(getattr(opened.model, "num_classes", 0))


def _check_classes(data: str, classes: tuple[str, ...], opened: checkpoint.OpenedModel) -> None:
    if opened.classes is not None and opened.classes != classes:
        differing = sorted(set(classes) ^ set(opened.classes)) or ["their order"]
        raise UserError(
            f"--data {data}: its {len(classes)} classes are not the {len(opened.classes)} that the checkpoint was"
            f" trained on (they differ in {some(differing)}); give a set of the same"
        )
    if len(classes) != _num_outputs(opened):
        raise UserError(f"--data {data}: has {len(classes)} classes, the checkpoint {_num_outputs(opened)}")


def _prediction(
    opened: checkpoint.OpenedModel, words: Sequence[str] | None, index: int, probability: float
) -> dict[str, Any]:
    name = opened.classes[index] if opened.classes else str(index)
    found = {"class": name, "index": index, "probability": probability}
    return found if words is None else found | {"description": words[index]}
