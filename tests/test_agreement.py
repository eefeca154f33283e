"""Processes whose settings, data or weights differ from the first process's do not train or evaluate beside it."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import platform
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dali_vit import agreement, checkpoint, distributed
from dali_vit.agreement import check_same_evaluation, check_same_run, check_same_settings
from dali_vit.config import GROUPS, Config, DataConfig, UserError
from dali_vit.data import Dataset, ImageList, load_dataset, with_labels
from dali_vit.names import fingerprint
from dali_vit.plan import Plan
from tests.conftest import write_image_folder
from tests.processes import run_ranks
from tests.test_inference import CONFIG, GREEN, RED, colour_model, paint


class Ranks:
    """The ranks one after the other in this process: each finds what those before it gave, and its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._given: list[list[Any]] = []
        self._call = 0
        monkeypatch.setattr(agreement, "gather_objects", self._gather)
        monkeypatch.setattr(platform, "node", lambda: f"node{len(self._given) - 1}")

    def begin(self) -> None:
        self._given.append([])
        self._call = 0

    def forgive(self) -> None:
        """Lets the rank that was the last have given what rank 0 did."""
        self._given[-1] = self._given[0]

    def _gather(self, value: Any) -> list[Any]:
        self._given[-1].append(value)
        self._call += 1
        return [given[self._call - 1] for given in self._given]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def train(ranks: Ranks, config: Config, dataset: Dataset, start: int = 0) -> None:
    ranks.begin()
    assert dataset.val is not None
    of_train = fingerprint(dataset.split("train"), dataset.root / "train")
    of_val = fingerprint(dataset.val, dataset.root / "val")
    checkpoint: Any = SimpleNamespace(step=start)
    check_same_run(config, Plan(dataset, torch.nn.Identity(), 12, checkpoint, of_train, of_val))


def test_the_same_set_may_lie_elsewhere(ranks: Ranks, tiny_config: Config, tmp_path: Path) -> None:
    for rank in range(3):
        root = write_image_folder(tmp_path / str(rank))
        data = replace(tiny_config.data, data=str(root))
        run = replace(tiny_config.run, threads=rank + 1, runs_dir=root)
        train(ranks, replace(tiny_config, data=data, run=run), load_dataset(root))


def test_each_machine_may_have_gpus_of_its_own_number(ranks: Ranks, tiny_config: Config, image_folder: Path) -> None:
    dataset = load_dataset(image_folder)
    for gpus in (0, 4, 8):
        train(ranks, replace(tiny_config, run=replace(tiny_config.run, gpus=gpus)), dataset)


def rename_an_image(root: Path) -> str:
    image = min((root / "train").rglob("*.jpg"))
    image.rename(image.with_name("other.jpg"))
    return "training images"


def remove_an_image(root: Path) -> str:
    min((root / "val").rglob("*.jpg")).unlink()
    return "val images"


def swap_classes(root: Path) -> str:
    for split in ("train", "val"):
        first, second = sorted((root / split).iterdir())[:2]
        first.rename(root / "aside")
        second.rename(first)
        (root / "aside").rename(second.with_name("zebra"))
    return "classes"


@pytest.mark.parametrize("change", [rename_an_image, remove_an_image, swap_classes])
def test_another_set_is_named(change: Callable[[Path], str], ranks: Ranks, tiny_config: Config, tmp_path: Path) -> None:
    roots = [write_image_folder(tmp_path / str(rank)) for rank in range(3)]
    differing = change(roots[2])
    for root in roots[:2]:
        train(ranks, tiny_config, load_dataset(root))
    with pytest.raises(UserError) as error:
        train(ranks, tiny_config, load_dataset(roots[2]))
    assert str(error.value) == (
        f"--data {tiny_config.data.data}: rank 2 (on node2) has other {differing} there than rank 0 (on node0);"
        " give all nodes the same set"
    )


@pytest.mark.parametrize(
    ("classes", "others"), [(("ab", "c"), ("a", "bc")), (("ant", os.fsdecode(b"\xff")), ("ant", os.fsdecode(b"\xfe")))]
)
def test_other_classes_are_named_whatever_their_bytes(
    classes: tuple[str, ...], others: tuple[str, ...], ranks: Ranks, tiny_config: Config, image_folder: Path
) -> None:
    dataset = load_dataset(image_folder)
    for _ in range(2):
        train(ranks, tiny_config, replace(dataset, classes=classes))
    with pytest.raises(UserError, match=r"rank 2 \(on node2\) has other classes there than rank 0 \(on node0\)"):
        train(ranks, tiny_config, replace(dataset, classes=others))


def test_a_copy_of_other_sizes_is_named(ranks: Ranks, tiny_config: Config, tmp_path: Path) -> None:
    """Of the same names and classes, but made smaller on one node."""
    root = write_image_folder(tmp_path / "set")
    train(ranks, tiny_config, load_dataset(root))
    with pytest.raises(
        UserError, match=r"rank 1 \(on node1\) has other sizes of images there than rank 0 \(on node0\)"
    ):
        train(ranks, tiny_config, replace(load_dataset(root), resized={"shorter_side": 16, "quality": 92}))


def test_another_setting_is_named(ranks: Ranks, tiny_config: Config, image_folder: Path) -> None:
    """One that decides on the weights, and one that only decides on when the ranks meet."""
    dataset = load_dataset(image_folder)
    train(ranks, tiny_config, dataset)
    for flag, changed in (
        ("--lr: rank 0 was given 0.001, rank 1 0.5", replace(tiny_config, optim=replace(tiny_config.optim, lr=0.5))),
        ("--log-every: rank 0 was given 1, rank 2 7", replace(tiny_config, run=replace(tiny_config.run, log_every=7))),
    ):
        with pytest.raises(UserError, match=f"{flag}; give all processes the same"):
            train(ranks, changed, dataset)
        ranks.forgive()


def test_what_is_no_number_is_the_same_on_all_ranks() -> None:
    check_same_settings({"minival": math.nan})  # though it is not equal to itself


def test_every_setting_but_those_of_a_machine_is_compared(
    ranks: Ranks, tiny_config: Config, image_folder: Path
) -> None:
    dataset = load_dataset(image_folder)
    train(ranks, tiny_config, dataset)
    names = {(group, field.name) for group, kind in GROUPS.items() for field in dataclasses.fields(kind)}
    for group, name in names - {("data", "data"), ("run", "runs_dir"), ("run", "gpus"), ("run", "threads")}:
        changed = replace(getattr(tiny_config, group), **{name: "another"})
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: rank 0 was given .* rank .* another"):
            train(ranks, replace(tiny_config, **{group: changed}), dataset)
        ranks.forgive()


def test_another_step_is_named(ranks: Ranks, tiny_config: Config, image_folder: Path) -> None:
    dataset = load_dataset(image_folder)
    train(ranks, tiny_config, dataset, start=5)
    with pytest.raises(UserError, match=r"would go on from different steps \(5, 10\); the folder must be on a file"):
        train(ranks, tiny_config, dataset, start=10)


def test_another_set_to_evaluate_is_named(ranks: Ranks, image_folder: Path) -> None:
    val = load_dataset(image_folder).split("val")
    folder = image_folder / "val"

    def evaluate(files: ImageList, weights: int | str = 4, real: np.ndarray | None = None) -> None:
        ranks.begin()
        check_same_evaluation("DATA", files, folder, weights=weights, real_labels=real)

    real = np.array([[0, 1], [2, -1]])
    evaluate(val, real=real)
    for files, labels, message in (
        (val.subset(np.arange(1, len(val))), real, "rank 1 .on node1. has other images there than rank 0 "),
        (with_labels(val, val.labels[::-1].copy()), real, "rank 2 .on node2. has other labels there than rank 0 "),
        (val, real[::-1].copy(), "rank 3 .on node3. has other labels of --real there than rank 0"),
    ):
        with pytest.raises(UserError, match=f"--data DATA: {message}"):
            evaluate(files, real=labels)
        ranks.forgive()
    with pytest.raises(UserError, match=r"--checkpoint: the processes found different weights \(4, 4, 4, 4, 6\); they"):
        evaluate(val, weights=6, real=real)


# Run by each of two ranks: what eval says of the data and checkpoint of its own, one after the other.
SCRIPT = """
import json, sys
from pathlib import Path

from dali_vit import distributed, inference
from dali_vit.arguments import EvalArguments
from dali_vit.config import UserError

results = []
with distributed.connect(0) as group:
    for checkpoint, data, resolution in json.loads(sys.argv[1])[group.rank]:
        arguments = EvalArguments(Path(checkpoint), data, batch_size=2, threads=1, resolution=resolution)
        try:
            found = inference.evaluate_checkpoint(arguments, group)
        except UserError as error:
            found = str(error)
        results.append(found)
print(json.dumps(results))
"""


@pytest.mark.timeout(150)
def test_two_ranks_evaluate_the_same_or_say_why_not(tmp_path: Path) -> None:
    """Of a run that goes on meanwhile both take the checkpoint that was the newest when rank 0 looked."""
    classes = ("a", "b", "c")
    for rank in ("0", "1"):
        paint(tmp_path / rank / "val/a", RED, RED, GREEN)
        paint(tmp_path / rank / "val/b", GREEN)
        paint(tmp_path / rank / "val/c", RED)
    (tmp_path / "1/val/a/ILSVRC2012_val_00000000.png").rename(tmp_path / "1/val/a/x.png")
    for run, steps in (("run0", (2,)), ("run1", (2, 4))):
        for step in steps:
            model = colour_model(3)
            with torch.no_grad():
                model.head.weight.mul_(1 if step == 2 else -1)
            checkpoint.save(
                tmp_path / run,
                step=step,
                config=Config(model=CONFIG, data=DataConfig(resolution=32)),
                classes=classes,
                model_state=model.state_dict(),
                trainer_state={},
                loader_state={},
            )
    data = [str(tmp_path / name) for name in ("0", "1", "2")]
    run, other = (str(tmp_path / name) for name in ("run0", "run1"))
    of_ranks = [
        [[run, data[0], None], [f"{run}/best", data[0], None], *[[run, data[0], 32]] * 3],
        [
            [other, data[0], None],
            [f"{other}/best", data[0], None],
            *[[run, *own] for own in zip(data, (48, 32, 32), strict=True)],
        ],
    ]
    for folder, step in ((run, 2), (other, 4)):
        os.symlink(f"checkpoints/step_{step:09d}", f"{folder}/best")
    of_both = [json.loads(out) for out, _ in run_ranks(2, "-c", SCRIPT, json.dumps(of_ranks), timeout=140)]
    for newest, best, resolution, other_images, absent in of_both:
        for metrics in (newest, best):
            assert (metrics["val/count"], metrics["val/top1"]) == (5, pytest.approx(60))
        assert resolution == "--resolution: rank 0 was given 32, rank 1 48; give all processes the same"
        assert re.search(r"rank 1 \(on .*\) has other images there than rank 0 \(on ", other_images)
        assert absent.startswith(f"rank 1: {tmp_path}/2: no such folder;")


def test_a_refusal_that_no_user_can_mend_keeps_its_traceback() -> None:
    """As one without a file, which may be a defect."""

    def refused() -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with pytest.raises(OSError, match="Invalid argument"):
        distributed.together(refused)
