"""Which of a run's checkpoints is its best, how it is linked to, and how it is told of at the end."""

from __future__ import annotations

import dataclasses
import logging
import math
import os

import pytest

from dali_vit import checkpoint
from dali_vit.plan import plan
from dali_vit.step_folders import best_evaluation
from dali_vit.train import train
from tests.test_checkpoint import save


def test_the_last_k_and_the_best_are_kept(tmp_path):
    """The best is the one of highest minival top-1, and has a link of its own."""
    best = tmp_path / "checkpoints" / "best"
    for step, top1 in [(1, 10.0), (2, 90.0), (3, 20.0), (4, 30.0), (5, 40.0)]:
        save(tmp_path, step, {"minival/top1": top1, "val/top1": 100 - top1})
        assert os.readlink(best) == f"step_{min(step, 2):09d}"
    kept = sorted(f.name for f in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_000000002", "step_000000004", "step_000000005"]
    assert checkpoint.open_model(best).step == 2
    assert checkpoint.newest(tmp_path).step == 5


@pytest.mark.parametrize(
    ("losses", "best"), [((2.0, 2.0), 2), ((1.0, 2.0), 1), ((2.0, 1.0), 2), ((1.0, math.nan), 1), ((math.nan,) * 2, 2)]
)
def test_of_two_that_are_as_good_the_one_of_less_loss_is_the_best_else_the_later(tmp_path, losses, best):
    """As of few images many checkpoints have the same top-1."""
    for step, loss in enumerate(losses, 1):
        save(tmp_path, step, {"val/top1": 5.0, "val/loss": loss})
    assert os.readlink(tmp_path / "checkpoints" / "best") == f"step_{best:09d}"
    (step, metrics) = best_evaluation(tmp_path)
    assert (step, metrics["val/top1"]) == (best, 5.0)


def test_where_nothing_was_evaluated_no_best_is_told_of(tmp_path):
    assert best_evaluation(tmp_path) is None
    save(tmp_path, 1)
    assert best_evaluation(tmp_path) is None
    save(tmp_path, 2, {"val/top1": 5.0})
    (tmp_path / "checkpoints/best/checkpoint.json").write_text("{}")
    assert best_evaluation(tmp_path) is None
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere, 3, {"val/top1": 5.0})
    (tmp_path / "checkpoints/best").unlink()
    (elsewhere / "checkpoints/step_000000003").rename(tmp_path / "checkpoints/best")  # a copy, of another run maybe
    assert best_evaluation(tmp_path) is None


def test_what_is_called_best_and_is_no_link_of_ours_is_left_alone(tmp_path):
    best = tmp_path / "checkpoints" / "best"
    best.mkdir(parents=True)
    save(tmp_path, 1, {"val/top1": 1.0})
    assert not best.is_symlink()
    assert sorted(os.listdir(best.parent)) == ["best", "step_000000001"]


@pytest.mark.timeout(60)
def test_a_run_ends_with_its_best_evaluation_unless_that_was_the_last(tiny_config, cpu, monkeypatch, caplog):
    """Of steps 7 and 12."""
    caplog.set_level(logging.INFO, "dali_vit")
    for name, accuracies, best in (("rising", (20.0, 30.0), None), ("falling", (30.0, 20.0), 7)):
        given = iter(accuracies)

        def evaluate(*_, given=given):
            return {f"val/{key}": value for key, value in (("top1", next(given)), ("top5", 50.0), ("loss", 1.0))}

        monkeypatch.setattr("dali_vit.milestones.evaluate_splits", evaluate)
        config = dataclasses.replace(
            tiny_config, run=dataclasses.replace(tiny_config.run, name=name, eval_every=1, keep_checkpoints=1)
        )
        caplog.clear()
        train(config, cpu, plan(config, 1))
        told = [message for message in caplog.messages if message.startswith("best: ")]
        assert told == ([f"best: step  {best}/12 | val top1 30.00 % top5 50.00 % loss 1.0000"] if best else [])
        assert caplog.messages[-1].startswith("done in ")


@pytest.mark.timeout(60)
def test_the_one_that_was_the_best_goes_with_the_evaluation_of_a_better_one(tiny_config, cpu, monkeypatch):
    """That of the last step, too, after which nothing is saved."""
    given = iter((20.0, 30.0))
    monkeypatch.setattr(
        "dali_vit.milestones.evaluate_splits", lambda *_: {"val/top1": next(given), "val/top5": 50.0, "val/loss": 1.0}
    )
    config = dataclasses.replace(
        tiny_config, run=dataclasses.replace(tiny_config.run, eval_every=1, keep_checkpoints=1)
    )
    train(config, cpu, plan(config, 1))
    assert sorted(os.listdir(config.run_dir / "checkpoints")) == ["best", "step_000000012"]
