"""What a run says about itself before it begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dali_vit import metrics
from dali_vit.config import Config, ModelConfig, OptimConfig
from dali_vit.data import Dataset, FileList
from dali_vit.distributed import Group
from dali_vit.manifest import MANIFEST
from dali_vit.plan import Plan
from dali_vit.report import evaluation_line, model_line, progress_line, remarks, summary, with_sizes


def dataset(*, minival: int, val: int, train: int = 2000) -> Dataset:
    def files(count: int) -> FileList | None:
        return FileList.from_paths([f"{i}.jpg" for i in range(count)], np.arange(count) % 2) if count else None

    return Dataset("set", Path("/set"), ("a", "b"), files(train), files(minival), files(val))


def plan(dataset: Dataset, total_steps: int = 112_603, checkpoint: Any = None) -> Plan:
    return Plan(dataset, torch.nn.Identity(), total_steps, checkpoint, "of train", "of val")


def test_a_single_class_is_remarked_on() -> None:
    single = replace(dataset(minival=100, val=1), classes=("images",))
    (said,) = remarks(Config(), plan(single))
    assert said == "/set has but one class, images: there is nothing to tell it from"


@pytest.mark.parametrize(
    ("minival", "val", "said"),
    [
        (0, 100, ["--minival 0.01 of 2,000 training images is none: the best checkpoint is chosen by val"]),
        (
            0,
            99,
            [
                "--minival 0.01 of 2,000 training images is none: the best checkpoint is chosen by val",
                "{few} 99 images of val, {chance}; give --minival 0.05",
            ],
        ),
        (100, 3, []),
        (99, 3, ["{few} 99 images of minival, {chance}; give --minival 0.05"]),
        (99, 100, ["{few} 99 images of minival, {chance}; give --minival 0.05, or --minival 0, by which val chooses"]),
        (1, 3, ["{few} 1 image of minival, {chance}; give --minival 0.05"]),
        (
            2,
            0,
            [
                "/set has no val/: minival alone is evaluated",
                "{few} 2 images of minival, {chance}; give --minival 0.05",
            ],
        ),
        (0, 0, ["/set has no val/, and --minival leaves none: nothing is evaluated"]),
    ],
)
def test_what_is_evaluated_is_said_where_it_is_less_than_usual(minival: int, val: int, said: list[str]) -> None:
    few = "the best checkpoint is chosen by the"
    said = [text.format(few=few, chance="much by chance") for text in said]
    assert remarks(Config(), plan(dataset(minival=minival, val=val))) == said
    at_the_end = replace(Config(), run=replace(Config().run, eval_every=0.0))  # there is nothing to choose from
    assert remarks(at_the_end, plan(dataset(minival=minival, val=val))) == [s for s in said if "chance" not in s]
    without = replace(Config(), data=replace(Config().data, minival=0.0))
    assert remarks(without, plan(dataset(minival=0, val=100))) == []  # as asked for
    demo = replace(Config(), data=replace(Config().data, data="demo"))
    assert remarks(demo, plan(dataset(minival=20, val=500))) == []  # which is no one's own


def test_a_share_that_is_too_large_to_hold_out_is_not_asked_for() -> None:
    config = replace(Config(), optim=replace(Config().optim, batch_size=8))
    assert [remarks(config, plan(dataset(minival=2, val=3, train=train))) for train in (197, 198)] == [
        ["the best checkpoint is chosen by the 2 images of minival, much by chance"],
        ["the best checkpoint is chosen by the 2 images of minival, much by chance; give --minival 0.5"],
    ]


def test_a_decay_that_is_torchs_is_remarked_on() -> None:
    """timm's usual 0.1, by which nothing is learned here; ours is multiplied by the schedule alone."""
    config = replace(Config(), optim=replace(Config().optim, weight_decay=0.1))
    assert remarks(config, plan(dataset(minival=100, val=2))) == [
        "--weight-decay 0.1 is not multiplied by --lr: torch and timm call it 100; what they call 0.1 is 0.0001 here"
    ]
    sgd = replace(config, optim=replace(config.optim, optimizer="sgd"))
    assert remarks(sgd, plan(dataset(minival=100, val=2))) == []


@pytest.mark.parametrize("holds", ["train", MANIFEST])
def test_a_folder_of_the_name_demo_is_remarked_on(holds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    demo = replace(Config(), data=replace(Config().data, data="demo"))
    assert remarks(demo, plan(dataset(minival=100, val=2))) == []  # it may be anything
    (tmp_path / "demo" / holds).touch() if holds == MANIFEST else (tmp_path / "demo" / holds).mkdir()
    for data, said in (
        ("./demo", []),
        (
            "demo",
            ["--data demo is the dataset drawn on first use; for the folder demo/ that is here give ./demo"],
        ),
    ):
        config = replace(Config(), data=replace(Config().data, data=data))
        assert remarks(config, plan(dataset(minival=100, val=2))) == said


def test_another_name_for_val_is_remarked_on(tmp_path: Path) -> None:
    (tmp_path / "validation" / "a").mkdir(parents=True)
    (tmp_path / "validation" / "a" / "1.jpg").touch()
    named = replace(dataset(minival=100, val=0), root=tmp_path)
    assert remarks(Config(), plan(named)) == [
        f"{tmp_path} has no val/: minival alone is evaluated; if validation/ is meant, rename it to val/"
    ]


def test_classes_that_val_has_no_images_of_are_remarked_on() -> None:
    one = replace(dataset(minival=100, val=2), val=FileList.from_paths(["0.jpg"], [1]))
    assert remarks(Config(), plan(one)) == ["/set: val has no images of 1 of 2 classes (a)"]


@pytest.mark.parametrize(("train", "images"), [(1, "image"), (1023, "images"), (1024, None)])
def test_a_batch_larger_than_the_data_is_remarked_on(train: int, images: str | None) -> None:
    """As by the recipes' batches, which are ImageNet's."""
    count = f"{train:,} {images}"
    said = f"--batch-size 1024: the training set has but {count}, which each step repeats; give a smaller one"
    assert remarks(Config(), plan(dataset(minival=100, val=2, train=train))) == ([said] if images else [])


def test_files_that_are_not_trained_on_are_remarked_on(tmp_path: Path) -> None:
    """Other loaders take the images of subfolders, too."""
    for name in ("train/a/1.jpg", "train/a/deep/2.jpg", "train/b/x/3.png", "train/b/4.avif", "val/b/y/5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    here = replace(dataset(minival=100, val=2), root=tmp_path)
    assert remarks(Config(), plan(here)) == [
        f"{tmp_path}: files in a subfolder are left out (3, such as {tmp_path}/train/a/deep/2.jpg): move images into"
        " the class folder itself",
        f"{tmp_path}: files of another suffix are left out (1, such as {tmp_path}/train/b/4.avif): save images as JPEG"
        " or PNG",
    ]
    assert remarks(Config(), plan(replace(dataset(minival=100, val=2, train=10_000), root=tmp_path))) == []


def test_other_images_in_val_are_remarked_on() -> None:
    before = SimpleNamespace(loader={"val_names": "of another val"})
    assert remarks(Config(), plan(dataset(minival=100, val=2), checkpoint=before)) == [
        "/set: val has other images than before; what is measured on it is not to be compared"
    ]
    before.loader["val_names"] = "of val"
    assert remarks(Config(), plan(dataset(minival=100, val=2), checkpoint=before)) == []


def test_a_warm_up_of_most_of_the_run_is_remarked_on() -> None:
    """ImageNet-100 under the default recipe: 126,689 images, 99 % of them 90 times in batches of 1,024."""
    total = round(90 * 0.99 * 126_689 / 1024)
    (said,) = remarks(Config(), plan(dataset(minival=100, val=2), total))
    assert said == (
        "--warmup-steps 10000: 91 % of the run's 11023 steps are at a rate below --lr; ImageNet's 90 epochs have 9 %,"
        " here 1002"
    )
    half = replace(Config(), optim=OptimConfig(warmup_steps=5511))
    assert remarks(half, plan(dataset(minival=100, val=2), total)) == []


def test_sizes_that_are_not_the_names_are_told() -> None:
    assert with_sizes(ModelConfig("S/16")) == "S/16"
    own = ModelConfig("Ti/8", width=96, depth=3)
    assert model_line(own, 84_000, 640_000.0, 32) == (
        "ViT-Ti/8 (width 96, depth 3) gap, sincos2d, mlp head, 0.084 M parameters, 0.00064 GFLOP at 32 px"
    )
    assert model_line(ModelConfig("timm:resnet50"), 25_557_032, 8.2e9, 224) == (
        "timm:resnet50, 25.56 M parameters, 8.20 GFLOP at 224 px"
    )


@pytest.mark.parametrize(
    ("steps", "length"), [(1, "1 step of 1 image (0.11 epochs)"), (1000, "1,000 steps of 1 image (111.1 epochs)")]
)
def test_the_length_of_a_run(steps: int, length: str) -> None:
    group = Group(0, 1, 0, 1, torch.device("cpu"))
    config = replace(Config(), optim=OptimConfig(batch_size=1))
    text = summary(
        config,
        plan(dataset(minival=1, val=2, train=9), steps),
        group,
        model="M",
        how={},
        bad_samples=0,
        threads=1,
    )
    assert f"length    {length}" in text.splitlines()


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        (None, "float32; no GPU is used: no NVIDIA driver"),
        (0, "float32"),
        (2, "float32; no GPU is used: no NVIDIA driver"),
    ],
)
def test_why_no_gpu_is_used_is_said_unless_none_was_asked_for(
    gpus: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dali_vit.report.why_no_gpu", lambda: "no NVIDIA driver")
    config = replace(Config(), run=replace(Config().run, gpus=gpus))
    given: dict[str, Any] = {"model": "M", "how": {}, "bad_samples": 0}
    group = Group(0, 2, 0, 2, torch.device("cpu"))
    text = summary(config, plan(dataset(minival=100, val=2), 9), group, **given, threads=1)
    assert f"devices   2 x CPU, {said}" in text.splitlines()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    on_gpu = replace(group, device=torch.device("cuda", 0))
    text = summary(config, plan(dataset(minival=100, val=2), 9), on_gpu, **given, threads=1)
    assert "devices   2 x H200, bf16 autocast, float32 residual stream" in text.splitlines()


def test_how_a_run_optimises_is_told() -> None:
    group = Group(0, 1, 0, 1, torch.device("cpu"))
    told = []
    for optim in (OptimConfig(), OptimConfig(optimizer="sgd", lr=0.4, warmup_steps=1, label_smoothing=0.1)):
        config = replace(Config(), optim=optim)
        text = summary(config, plan(dataset(minival=1, val=2)), group, model="M", how={}, bad_samples=0, threads=1)
        told += [line for line in text.splitlines() if line.startswith("optimiser ")]
    assert told == [
        "optimiser AdamW, lr 0.001 after 10,000 steps of warm-up, weight decay 0.0001",
        "optimiser SGD, lr 0.4 after 1 step of warm-up, weight decay 0.0001, label smoothing 0.1",
    ]


def test_rates_are_of_all_gpus_and_mfu_of_the_peak_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda _: 1000.0)
    group = Group(0, 2, 0, 2, torch.device("cpu"))
    scalars = metrics.speed(3, 2.0, 0.0, batch_size=8, train_flops=50.0, group=group)
    assert (scalars["perf/images_per_sec"], scalars["perf/images_per_sec_per_gpu"]) == (12, 6)
    assert scalars["perf/step_ms"] == pytest.approx(1e3 * 2 / 3)
    assert scalars["perf/mfu_pct"] == pytest.approx(100 * 12 * 50 / 2000)


@pytest.mark.parametrize(
    ("loss", "said"), [(0.69312, "0.6931"), (99_999.0, "99999.0000"), (3.4e38, "3.4e+38"), (float("nan"), "nan")]
)
def test_a_loss_is_short_however_large(loss: float, said: str) -> None:
    """Of the largest float32 it would be 38 digits."""
    scalars = {"train/loss": loss, "train/lr": 1e-3, "perf/images_per_sec": 1000.0, "perf/data_wait_pct": 0.0}
    line = progress_line(5, 10, 0.5, scalars, 60.0)
    assert line.split(" | ")[:3] == ["step  5/10", "epoch 0.50", f"loss {said}"]
    metrics = {"val/top1": 50.0, "val/top5": 60.0, "val/loss": loss}
    assert evaluation_line(5, 10, metrics) == f"step  5/10 | val top1 50.00 % top5 60.00 % loss {said}"


@pytest.mark.parametrize(("bad", "said"), [(1.0, " (1 image left out)"), (1234, " (1,234 images left out)")])
def test_an_evaluation_tells_how_many_images_it_left_out(bad: float, said: str) -> None:
    values = {"val/top1": 50.0, "val/top5": 60.0, "val/loss": 1.5, "val/bad_samples": bad}
    assert evaluation_line(5, 10, values) == f"step  5/10 | val top1 50.00 % top5 60.00 % loss 1.5000{said}"
