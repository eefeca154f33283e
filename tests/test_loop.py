"""What the training loop makes of its settings: number of steps, learning rates, the loader's augmentation."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import dropout

import dali_vit.train as loop
from dali_vit import checkpoint, loaders, milestones
from dali_vit import data as datasets
from dali_vit import plan as planning
from dali_vit.config import Config, ModelConfig, UserError
from dali_vit.distributed import Group
from dali_vit.mixup import sample_lambda
from dali_vit.model import create_model
from dali_vit.plan import plan
from dali_vit.stopping import Interrupted
from dali_vit.train import train
from dali_vit.variants import VARIANTS
from pipelines.train import Augment
from tests.conftest import read_metrics, write_image_folder


@pytest.mark.timeout(60)
def test_the_learning_rate_of_every_step_and_their_number(tiny_config: Config, cpu: Group) -> None:
    """54 images a batch of 8: 1.3 epochs are 8.775 batches, of which none is cut off at an epoch's end."""
    config = replace(tiny_config, optim=replace(tiny_config.optim, steps=None, epochs=1.3, lr=0.004))
    train(config, cpu, plan(config, 1))
    assert checkpoint.newest(config.run_dir).step == 9
    rates = [line["train/lr"] for line in read_metrics(config.run_dir) if "train/lr" in line]
    warm_up = [0.0, 0.002]
    assert rates == pytest.approx(warm_up + [0.002 * (1 + math.cos(math.pi * i / 7)) for i in range(7)], abs=1e-9)


def test_a_run_of_one_step_has_no_warm_up(tiny_config: Config) -> None:
    config = replace(tiny_config, optim=replace(tiny_config.optim, steps=None, epochs=0.01))
    with pytest.raises(UserError, match="--warmup-steps 2: the run has but one step"):
        plan(config, 1)


def test_a_warm_up_longer_than_the_run_is_refused_with_what_makes_more_steps(tiny_config: Config) -> None:
    """As by the recipes on a user's own images, where a shorter warm-up alone gives a handful of steps."""
    optim = replace(tiny_config.optim, steps=None, epochs=1.0, warmup_steps=7)
    with pytest.raises(UserError) as refused:
        plan(replace(tiny_config, optim=optim), 1)
    assert str(refused.value) == (
        "--warmup-steps 7: must be below the run's 7 steps; give 0; a smaller --batch-size than 8, or more --epochs,"
        " make more steps of 54 images"
    )


@pytest.mark.parametrize(
    ("model", "resolution", "fault"),
    [("S16", 32, "--model S16: no such model"), ("Ti/8", 33, "--resolution 33"), ("timm:nope", 32, "timm:nope")],
)
def test_a_model_is_checked_before_data_are_fetched(
    model: str, resolution: int, fault: str, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("fetched"))
    data = replace(tiny_config.data, resolution=resolution)
    with pytest.raises(UserError, match=fault):
        plan(replace(tiny_config, data=data, model=ModelConfig(model)), 1)


def test_the_settings_reach_the_loader(tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(loaders, "TrainLoader", lambda samples, **options: given.update(options))
    data = replace(
        tiny_config.data,
        crop="torchvision",
        antialias=False,
        randaug_layers=3,
        randaug_magnitude=7.0,
        randaug_contrast="mean",
        max_bad_share=0.5,
    )
    config = replace(tiny_config, data=data, run=replace(tiny_config.run, seed=9))
    loaders.train_loader(plan(config, 1).dataset, config, replace(cpu, rank=1, world_size=2), start_step=4)
    assert given["augment"] == Augment(
        crop="torchvision", antialias=False, randaug_layers=3, randaug_magnitude=7.0, randaug_contrast="mean"
    )
    found = {name: given[name] for name in ("batch_size", "image_size", "seed", "rank", "world_size", "start_step")}
    assert found == {"batch_size": 8, "image_size": 32, "seed": 9, "rank": 1, "world_size": 2, "start_step": 4}
    assert (given["max_bad_share"], given["num_threads"]) == (0.5, 1)


@pytest.mark.timeout(60)
def test_seed_and_alpha_reach_the_weights_and_mixup(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = replace(tiny_config.optim, steps=4, mixup_alpha=0.7)
    config = replace(tiny_config, optim=optim, run=replace(tiny_config.run, seed=9))
    lambdas: list[float] = []
    build = loop.build_update

    def build_recording(*arguments: Any) -> tuple[Any, dict[str, str]]:
        update, how = build(*arguments)

        def record(images: Any, labels: Any, lam: float, lr: float) -> Any:
            lambdas.append(lam)
            return update(images, labels, lam, lr)

        return record, how

    monkeypatch.setattr(loop, "build_update", build_recording)
    planned = plan(config, 1)
    expected = create_model(config.model, num_classes=4, resolution=32, seed=9).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in planned.model.state_dict().items())
    train(config, cpu, planned)
    assert lambdas == [sample_lambda(0.7, 9, step) for step in range(4)]


@pytest.mark.timeout(60)
def test_dropout_is_drawn_from_the_seed_and_goes_on_where_it_was(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models of timm's may have it; torch's own state must not matter, nor that a run was stopped."""

    def with_dropout(*arguments: Any, **options: Any) -> torch.nn.Module:
        model = create_model(*arguments, **options)
        model.head.register_forward_pre_hook(lambda layer, given: dropout(given[0], 0.5, layer.training))
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        return model

    def trained(name: str, state: int, stops: int | None = None) -> dict[str, torch.Tensor]:
        optim = replace(tiny_config.optim, steps=8)
        config = replace(tiny_config, optim=optim, run=replace(tiny_config.run, name=name))
        monkeypatch.setattr(loop.Stop, "agreed", lambda self, step: "stopped" if step == stops else None)
        torch.manual_seed(state)
        if stops is None:
            train(config, cpu, plan(config, 1))
        else:
            with pytest.raises(Interrupted):
                train(config, cpu, plan(config, 1))
        return checkpoint.newest(config.run_dir).model_state()

    monkeypatch.setattr(planning, "create_model", with_dropout)
    whole = trained("whole", 1)
    trained("parted", 2, stops=3)
    parted = trained("parted", 3)
    assert all(torch.equal(parted[name], tensor) for name, tensor in whole.items())


def test_a_timm_model_that_takes_no_images_of_the_size_is_named(tiny_config: Config) -> None:
    config = replace(tiny_config, model=ModelConfig(model="timm:inception_v3"))
    with pytest.raises(UserError, match=r"^--resolution 32: timm:inception_v3 takes no images of that size \("):
        plan(config, 1)


@pytest.mark.timeout(60)
def test_that_nothing_is_evaluated_is_said(
    tiny_config: Config, cpu: Group, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_image_folder(tmp_path / "data", val=1)
    shutil.rmtree(folder / "val")
    data = replace(tiny_config.data, data=str(folder), minival=0.0)
    config = replace(tiny_config, data=data, optim=replace(tiny_config.optim, steps=3))
    with caplog.at_level(logging.INFO, "dali_vit"):
        train(config, cpu, plan(config, 1))
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told[0] == f"{folder} has no val/, and --minival leaves none: nothing is evaluated"
    # Nor is there an evaluation without a number in the logs.
    assert [message for message in caplog.messages if message.startswith("step 3/3")][-1].startswith(
        "step 3/3 | epoch "
    )
    assert not any("perf/evaluation_s" in line for line in read_metrics(config.run_dir))


def leave_out_step_2(monkeypatch: pytest.MonkeyPatch) -> None:
    build = loop.build_update

    def build_failing(*arguments: Any) -> Any:
        update, how = build(*arguments)
        steps = itertools.count(1)

        def fail_at_2(*batch: Any) -> Any:
            loss, norm = update(*batch)
            return loss, torch.full_like(norm, math.nan) if next(steps) == 2 else norm

        return fail_at_2, how

    monkeypatch.setattr(loop, "build_update", build_failing)


@pytest.mark.timeout(60)
def test_an_evaluation_of_weights_that_were_not_saved_is_added_to_no_checkpoint(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is left out: it is evaluated, but there is no checkpoint of it."""
    added, saved = [], []
    add, save = loop.Saver.add_metrics, loop.Saver.save
    monkeypatch.setattr(loop.Saver, "add_metrics", lambda *given: (added.append(given[1]), add(*given)))
    monkeypatch.setattr(loop.Saver, "save", lambda *given, **named: (saved.append(given[1]), save(*given, **named)))
    leave_out_step_2(monkeypatch)
    config = replace(
        tiny_config,
        optim=replace(tiny_config.optim, steps=6, batch_size=8),
        run=replace(tiny_config.run, eval_every=2 * 8 / 54, checkpoint_every=100),
    )
    train(config, cpu, plan(config, 1))
    assert (saved, added) == ([4, 6], [4, 6])
    assert [line["step"] for line in read_metrics(config.run_dir) if "val/top1" in line] == [2, 4, 6]


@pytest.mark.timeout(60)
def test_a_run_stopped_in_the_evaluation_after_a_step_that_was_left_out_has_a_checkpoint(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is stopped at that step has; the evaluation is made up for when it goes on."""

    def stop(*_: Any) -> None:
        raise Interrupted("stopped by SIGTERM")

    config = replace(
        tiny_config,
        optim=replace(tiny_config.optim, steps=6, batch_size=8),
        run=replace(tiny_config.run, eval_every=2 * 8 / 54, checkpoint_every=100),
    )
    leave_out_step_2(monkeypatch)
    monkeypatch.setattr(milestones, "evaluate_splits", stop)
    monkeypatch.setattr(loop.Stop, "agreed", lambda self, step: None)
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM after step 2;"):
        train(config, cpu, plan(config, 1))
    kept = checkpoint.newest(config.run_dir)
    assert kept is not None
    assert (kept.step, kept.loader["evaluation_due"]) == (2, True)


@pytest.mark.timeout(60)
def test_the_watchdog_is_told_what_runs(tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of which step, in a run that goes on, too. The first three steps of each start may compile."""
    config = replace(
        tiny_config,
        optim=replace(tiny_config.optim, steps=8),
        run=replace(tiny_config.run, eval_every=2 * 8 / 54, checkpoint_every=100),
    )
    told: list[tuple[str, int]] = []

    def tell(watchdog: Any, stage: str, step: int) -> None:
        if told[-1:] != [(stage, step)]:
            told.append((stage, step))

    def stop_at_3(stop: Any, step: int) -> str | None:
        return "stopped" if step == 3 and told[-1][0] == "compilation" else None

    def expected(start: int, stages: list[str]) -> list[tuple[str, int]]:
        return [
            ("preparation", start),
            *((stage, step) for step, names in enumerate(stages, start) for stage in ("loader", *names.split())),
        ]

    evaluate, evaluated_in = milestones.evaluate_splits, []

    def evaluate_splits(*given: Any) -> dict[str, float]:
        evaluated_in.append(told[-1])  # where its loader may hang, too
        return evaluate(*given)

    monkeypatch.setattr(milestones, "evaluate_splits", evaluate_splits)
    monkeypatch.setattr(loop.Watchdog, "enter", tell)
    monkeypatch.setattr(loop.Watchdog, "_watch", lambda self: None)
    monkeypatch.setattr(loop.Stop, "agreed", stop_at_3)
    with pytest.raises(Interrupted):
        train(config, cpu, plan(config, 1))
    evaluated = "checkpoint evaluation"
    assert told == expected(0, ["compilation", f"compilation {evaluated}", "compilation checkpoint"])
    told.clear()
    train(config, cpu, plan(config, 1))
    stages = [f"compilation {evaluated}", "compilation", f"compilation {evaluated}", "step", f"step {evaluated}"]
    assert told == [*expected(3, stages), ("checkpoint", 7)]
    assert evaluated_in == [("evaluation", step) for step in (1, 3, 5, 7)]


def test_the_variants_are_big_visions() -> None:
    """Width, blocks, width of the MLP, heads: of these no count of parameters tells the last."""
    assert {name: tuple(sizes) for name, sizes in VARIANTS.items()} == {
        "mu": (32, 1, 128, 2),
        "Ti": (192, 12, 768, 3),
        "S": (384, 12, 1536, 6),
        "M": (512, 12, 2048, 8),
        "B": (768, 12, 3072, 12),
        "L": (1024, 24, 4096, 16),
        "So400m": (1152, 27, 4304, 16),
        "H": (1280, 32, 5120, 16),
        "g": (1408, 40, 6144, 16),
        "G": (1664, 48, 8192, 16),
    }


@pytest.mark.timeout(60)
def test_each_batch_of_an_evaluation_is_given_the_watchdogs_patience_anew(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a large set takes longer than --hang-timeout, and does not hang."""
    told: list[tuple[str, int]] = []
    of_batches: list[list[tuple[str, int]]] = []

    def evaluate_splits(*given: Any) -> dict[str, float]:
        for _ in range(3):
            told.clear()
            given[-1]()
            of_batches.append(told.copy())
        return {}

    monkeypatch.setattr(milestones, "evaluate_splits", evaluate_splits)
    monkeypatch.setattr(loop.Watchdog, "enter", lambda watchdog, stage, step: told.append((stage, step)))
    monkeypatch.setattr(loop.Watchdog, "_watch", lambda watchdog: None)
    config = replace(tiny_config, optim=replace(tiny_config.optim, steps=4))
    train(config, cpu, plan(config, 1))
    assert of_batches == [[("evaluation", 3)]] * 3
