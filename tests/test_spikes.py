"""Steps with loss spikes are counted and leave the weights untouched, also on resume; healthy runs have none."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dali_vit.step
import dali_vit.train
from dali_vit import checkpoint, cli
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group
from dali_vit.files import file_sha256
from dali_vit.mixup import mixup_cross_entropy, sample_lambda
from dali_vit.plan import plan
from dali_vit.spikes import MEMORY, WARM_UP, is_spike
from dali_vit.stopping import Interrupted, Stop
from dali_vit.train import train
from tests.conftest import TINY, last_scalars, read_metrics

SPIKE, STEPS = 120, 135  # the step (from 0) whose loss leaps, and those of the run


def spikes_in(losses: list[float], threshold: float = 10.0) -> list[int]:
    seen = torch.zeros(3)
    return [i for i, loss in enumerate(losses) if is_spike(seen, torch.tensor(loss), threshold)]


def deviations(losses: list[float]) -> np.ndarray:
    """What `is_spike` compares with the threshold after its warm-up, in float64 and written out anew."""
    mean = variance = 0.0
    found = []
    for i, loss in enumerate(losses):
        if i >= WARM_UP:
            found.append((loss - mean) / max(math.sqrt(variance), 0.1 * mean, 0.1))
        weight = 1 / min(i + 1, MEMORY)
        before, mean = mean, mean + weight * (loss - mean)
        variance = (1 - weight) * (variance + weight * (loss - before) ** 2)
    return np.array(found)


def test_statistics_are_the_mean_and_variance_of_the_losses():
    losses = np.random.default_rng(0).normal(5.0, 0.5, MEMORY)
    seen = torch.zeros(3)
    for loss in losses:
        is_spike(seen, torch.tensor(loss, dtype=torch.float32), 10.0)
    assert seen[1].item() == pytest.approx(losses.mean(), rel=1e-5)
    assert seen[2].item() == pytest.approx(losses.var(), rel=1e-4)
    # From there on the oldest fade: after three times as many steps at another level that one is what is left.
    for _ in range(3 * MEMORY):
        is_spike(seen, torch.tensor(4.0), 10.0)
    assert seen[1].item() == pytest.approx(4.0, abs=(losses.mean() - 4) * math.exp(-3) * 1.01)
    before = seen[1].item()
    is_spike(seen, torch.tensor(5.0), 10.0)
    assert seen[1].item() == pytest.approx(before + (5.0 - before) / MEMORY, abs=2e-7)


@pytest.mark.parametrize(
    ("level", "noise", "bound"),
    [(5.0, 0.8, 13.0), (5.0, 0.1, 10.0), (0.02, 0.001, 1.02)],  # by deviations, by the mean, by 1 nat
)
def test_where_a_loss_becomes_a_spike(level, noise, bound):
    steady = [level - noise, level + noise] * 250
    assert spikes_in([*steady, bound * 1.01]) == [500]
    assert spikes_in([*steady, bound * 0.99]) == []
    assert spikes_in([*steady, 0.0, -1e9]) == []


def test_nothing_is_a_spike_during_warm_up():
    assert (WARM_UP, MEMORY) == (100, 1000)
    assert spikes_in([1.0] * (WARM_UP - 1) + [1e6]) == []
    assert spikes_in([1.0] * WARM_UP + [1e6]) == [WARM_UP]


def test_a_spike_does_not_hide_the_next_and_what_is_not_finite_leaves_no_trace():
    assert spikes_in([1.0] * 200 + [50.0] * 30) == list(range(200, 230))
    seen = torch.zeros(3)
    for loss in [1.0] * 5 + [math.nan, math.inf, -math.inf]:
        is_spike(seen, torch.tensor(loss), 10.0)
    assert seen.tolist() == [5, 1, 0]


def test_losses_of_a_healthy_run_stay_far_below_the_threshold():
    """Twenty thousand steps as ImageNet's are: ln 1000 falling to 2, Mixup's share of it, batches of 1024.

    The largest lies 2.2 deviations above the running mean, where 10 are a spike.
    """
    rng = np.random.default_rng(0)
    steps = np.arange(20_000)
    level = 2.0 + 4.9 * np.exp(-steps / 3000)
    lams = np.array([sample_lambda(0.2, 0, step) for step in steps.tolist()])
    mixing = -(lams * np.log(lams) + (1 - lams) * np.log(np.maximum(1 - lams, 1e-12)))
    losses = (level + 2 * mixing * (level < 6) + rng.normal(0, 1.5 / 32, len(steps))).tolist()
    found = deviations(losses)
    assert 2 < found.max() < 2.5
    assert spikes_in(losses) == []


@pytest.fixture
def leaping(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Multiplies the loss of the steps it is called with by 50; nothing until it is."""
    state = {"step": 0, "leaps": range(0)}

    def seen_lambda(alpha: float, seed: int, step: int) -> float:
        state["step"] = step
        return sample_lambda(alpha, seed, step)

    def leaping_loss(*arguments: Tensor) -> Tensor:
        return mixup_cross_entropy(*arguments) * (50.0 if state["step"] in state["leaps"] else 1.0)

    monkeypatch.setattr(dali_vit.train, "sample_lambda", seen_lambda)
    monkeypatch.setattr(dali_vit.step, "mixup_cross_entropy", leaping_loss)
    return lambda steps: state.update(leaps=steps)


def config_of(tiny: Config, name: str, **optim: float) -> Config:
    return replace(
        tiny,
        optim=replace(tiny.optim, steps=STEPS, **optim),
        run=replace(tiny.run, name=name, keep_checkpoints=100),
    )


def run(config: Config, group: Group) -> None:
    train(config, group, plan(config, 1))


def assert_same_end(first: Path, second: Path) -> None:
    ends = [checkpoint.newest(path) for path in (first, second)]
    assert [end.step for end in ends] == [STEPS, STEPS]
    for state in (lambda end: end.model_state(), lambda end: flat(end.trainer_state()["optimizer"])):
        expected, actual = map(state, ends)
        assert expected.keys() == actual.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, actual[name]), name


def flat(optimizer: dict) -> dict[str, Tensor]:
    states = {f"{i}.{key}": value for i, state in optimizer["state"].items() for key, value in state.items()}
    return {**states, "losses_seen": optimizer["param_groups"][0]["losses_seen"]}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "optim", [{}, {"first_moment": "bfloat16"}, {"optimizer": "sgd"}], ids=["adamw", "bfloat16", "sgd"]
)
def test_a_spike_is_left_out_and_counted(tiny_config, cpu, leaping, monkeypatch, optim):
    states: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def build(config, model, optimizer, group):
        update, how = dali_vit.step.build_update(config, model, optimizer, group)

        def observed(*arguments):
            before = {n: p.clone() for n, p in model.state_dict().items()} | clones(optimizer)
            result = update(*arguments)
            states.append((before, {n: p.clone() for n, p in model.state_dict().items()} | clones(optimizer)))
            return result

        return observed, how

    def clones(optimizer):
        return {f"{i}.{k}": v.clone() for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}

    monkeypatch.setattr(dali_vit.train, "build_update", build)
    spike = 119  # a checkpoint is due after it
    leaping(range(spike, spike + 1))
    config = config_of(tiny_config, "spike", **optim)
    run(config, cpu)
    changed = [any(not torch.equal(before[n], after[n]) for n in before) for before, after in states]
    # Of the first, whose learning rate is 0, only what the optimiser keeps may change.
    assert [i for i, c in enumerate(changed) if not c and i > 0] == [spike]
    logged = [m for m in read_metrics(config.run_dir) if "train/loss" in m]
    assert [m["train/skipped_steps"] for m in logged] == [0] * spike + [1] * (STEPS - spike)
    assert logged[spike]["train/loss"] is None  # the mean of no step
    steps = [int(f.name[5:]) for f in sorted((config.run_dir / "checkpoints").glob("step_*"))]
    assert steps == [step for step in range(5, STEPS + 1, 5) if step != spike + 1]


@pytest.mark.timeout(120)
def test_a_run_that_goes_on_leaves_the_same_steps_out(tiny_config, cpu, leaping, monkeypatch):
    """The run is stopped 8 steps before the spike, far too few for statistics that would begin anew."""
    leaping(range(SPIKE, SPIKE + 1))
    whole, stopped = config_of(tiny_config, "whole"), config_of(tiny_config, "stopped")
    run(whole, cpu)
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self, step: "stopped" if step == SPIKE - 8 else None)
        with pytest.raises(Interrupted):
            run(stopped, cpu)
    assert checkpoint.newest(stopped.run_dir).step == SPIKE - 8
    run(stopped, cpu)
    assert last_scalars(stopped.run_dir)["train/skipped_steps"] == 1
    assert_same_end(whole.run_dir, stopped.run_dir)


@pytest.mark.timeout(120)
def test_a_run_may_be_stopped_on_a_spike(tiny_config, cpu, leaping, monkeypatch):
    """Its checkpoint is as good as that of the step before, and what was trained since the last is not lost."""
    leaping(range(SPIKE, SPIKE + 1))
    whole, stopped = (config_of(tiny_config, name) for name in ("whole", "stopped"))
    run(whole, cpu)
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self, step: "stopped" if step == SPIKE + 1 else None)
        with pytest.raises(Interrupted, match=f"stopped after step {SPIKE + 1};"):
            run(stopped, cpu)
    assert checkpoint.newest(stopped.run_dir).step == SPIKE + 1
    run(stopped, cpu)
    assert_same_end(whole.run_dir, stopped.run_dir)


@pytest.mark.timeout(120)
def test_a_checkpoint_from_before_there_were_statistics_is_gone_on_from(tiny_config, cpu, leaping, monkeypatch):
    config = config_of(tiny_config, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self, step: "stopped" if step == 10 else None)
        with pytest.raises(Interrupted):
            run(config, cpu)
    folder = checkpoint.newest(config.run_dir).path
    state = torch.load(folder / "trainer.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0].pop("losses_seen")[0] == 10
    torch.save(state, folder / "trainer.pt")
    record = json.loads((folder / "checkpoint.json").read_text())
    record["sha256"]["trainer.pt"] = file_sha256(folder / "trainer.pt")
    record["config"]["optim"].pop("spike_threshold")
    (folder / "checkpoint.json").write_text(json.dumps(record))

    leaping(range(SPIKE, SPIKE + 1))
    run(config, cpu)
    end = checkpoint.newest(config.run_dir)
    assert end.step == STEPS
    assert flat(end.trainer_state()["optimizer"])["losses_seen"][0] == STEPS - 10 - 1  # counted anew, less the spike
    assert last_scalars(config.run_dir)["train/skipped_steps"] == 1


@pytest.mark.timeout(120)
def test_spikes_that_do_not_end_stop_the_run(image_folder, tmp_path, leaping, capsys):
    leaping(range(SPIKE, STEPS))
    arguments = ["train", "--data", str(image_folder), "--runs-dir", str(tmp_path), "--name", "up", "--gpus", "0"]
    arguments += [*TINY, "--steps", str(STEPS), "--threads", "1", "--log-every", "1", "--eval-every", "0"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--checkpoint-every", "25"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"11 steps were left out, the last of them between steps {SPIKE + 11} and {SPIKE + 11}:" in err
    assert "--max-skipped-steps 10, --spike-threshold 10" in err
    assert f"last good checkpoint: {tmp_path / 'up' / 'checkpoints' / 'step_000000100'}\n" in err
    assert err.count("\n") == 1
    # As the message says, the threshold may be changed for the rest of the run.
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--spike-threshold", "0"])
    assert not ended.value.code
    assert checkpoint.newest(tmp_path / "up").step == STEPS


@pytest.mark.timeout(120)
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_run_may_end_on_a_spike(tiny_config, cpu, leaping, goes_on):
    """Else it would be gone on with for ever: the step would be as bad the next time."""
    leaping(range(STEPS - 1, STEPS))
    config = config_of(tiny_config, "end")
    config = replace(config, run=replace(config.run, checkpoint_every=STEPS - 1))
    run(config, cpu)
    if goes_on:
        shutil.rmtree(checkpoint.newest(config.run_dir).path)
        run(config, cpu)
    before, end = (checkpoint.read(folder) for folder in sorted((config.run_dir / "checkpoints").glob("step_*")))
    assert (before.step, end.step) == (STEPS - 1, STEPS)
    for name, tensor in before.model_state().items():
        assert torch.equal(tensor, end.model_state()[name]), name
    logged = read_metrics(config.run_dir)
    assert [m["train/skipped_steps"] for m in logged if "train/loss" in m][-2:] == [0, 1]
    assert end.metrics["val/top1"] == logged[-1]["val/top1"]


@pytest.mark.timeout(60)
def test_a_run_without_a_good_step_is_an_error(tiny_config, cpu, monkeypatch):
    monkeypatch.setattr(dali_vit.step, "mixup_cross_entropy", lambda *a: mixup_cross_entropy(*a) * math.nan)
    config = replace(tiny_config, optim=replace(tiny_config.optim, steps=4))
    said = r"^4 steps were left out.* so that --lr is not to blame; try .*; last good checkpoint: none yet"
    with pytest.raises(UserError, match=said):
        run(config, cpu)


@pytest.mark.timeout(120)
def test_a_healthy_run_keeps_its_bits(tiny_config, cpu):
    """400 steps of batch 8 with Mixup, whose losses spread far more than those of 1024: at most 1.9 deviations."""
    configs = [config_of(tiny_config, f"{t:g}", spike_threshold=t) for t in (10.0, 0.0)]
    configs = [replace(c, optim=replace(c.optim, steps=400)) for c in configs]
    for config in configs:
        run(config, cpu)
    states = [checkpoint.newest(config.run_dir).model_state() for config in configs]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    logged = [m for m in read_metrics(configs[0].run_dir) if "train/loss" in m]
    assert {m["train/skipped_steps"] for m in logged} == {0}
    found = deviations([m["train/loss"] for m in logged])
    assert len(found) == 400 - WARM_UP
    assert found.max() < 3
