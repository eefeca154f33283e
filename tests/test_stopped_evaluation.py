"""A signal during an evaluation is obeyed at once, and the evaluation is made up for when the run goes on."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from dali_vit import checkpoint, milestones
from dali_vit.config import Config
from dali_vit.distributed import Group
from dali_vit.plan import plan
from dali_vit.stopping import Interrupted, Stop
from dali_vit.train import train
from tests.conftest import read_metrics
from tests.processes import assert_equal, command, dali_vit, running, wait_for, weights

pytestmark = pytest.mark.timeout(240)

# Evaluations that take half a minute before they begin; the file says that one has been entered.
SLOW = """
import pathlib, sys, time
import dali_vit.milestones
real = dali_vit.milestones.evaluate_splits

def slowly(*arguments):
    pathlib.Path(sys.argv[1]).touch()
    for _ in range(600):
        arguments[-1]()
        time.sleep(0.05)
    return real(*arguments)

dali_vit.milestones.evaluate_splits = slowly
from dali_vit.cli import main
main(sys.argv[2:])
"""
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def evaluated_steps(run_dir: Path) -> list[int]:
    return [int(line["step"]) for line in read_metrics(run_dir) if "val/top1" in line]


@pytest.mark.parametrize(("processes", "steps", "stopped_at"), [(1, 8, 8), (1, 16, 8), (2, 16, 8)])
def test_a_signal_ends_an_evaluation(
    processes: int, steps: int, stopped_at: int, image_folder: Path, tmp_path: Path
) -> None:
    """The last one of a run, and one in between: an epoch ends within the eighth step."""
    arguments = command(image_folder, tmp_path, "--eval-every", "1", steps=steps)
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    entered = tmp_path / "entered"
    launcher = LAUNCHER if processes == 2 else []
    with running(*launcher, str(script), str(entered), *arguments) as process:
        wait_for(entered.exists, "an evaluation")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=25)
    if processes == 1:
        assert process.returncode == 75, err
        assert f"stopped by SIGTERM after step {stopped_at}; start the same command again to go on" in err
    stopped = checkpoint.newest(tmp_path / "run")
    assert stopped.step == stopped_at
    assert stopped.loader["evaluation_due"]
    assert stopped.metrics == {}
    assert evaluated_steps(tmp_path / "run") == []

    assert dali_vit(*arguments).returncode == 0
    last = checkpoint.newest(tmp_path / "run")
    assert last.step == steps
    assert not last.loader["evaluation_due"]
    assert dali_vit(*command(image_folder, tmp_path / "alone", "--eval-every", "1", steps=steps)).returncode == 0
    alone = tmp_path / "alone/run"
    assert evaluated_steps(tmp_path / "run") == evaluated_steps(alone)
    assert stopped_at in evaluated_steps(alone)
    if processes == 1:
        assert_equal(weights(tmp_path / "run"), weights(alone))
        assert last.metrics == checkpoint.newest(alone).metrics


def test_a_second_signal_in_the_evaluation_that_is_made_up_for(image_folder: Path, tmp_path: Path) -> None:
    """The checkpoint stays as it is, and the evaluation due, until a start that nothing but the clock ends."""
    arguments = command(image_folder, tmp_path, "--eval-every", "1", steps=16)
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    for attempt in range(2):
        entered = tmp_path / f"entered{attempt}"
        with running(str(script), str(entered), *arguments) as process:
            wait_for(entered.exists, "an evaluation")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=25)
        assert process.returncode == 75, err
        assert "after step 8" in err
        assert checkpoint.newest(tmp_path / "run").loader["evaluation_due"]

    # The clock starts with the steps: an evaluation that takes longer than all --max-hours ends nevertheless.
    result = dali_vit(*arguments, "--max-hours", "1e-9")
    assert result.returncode == 75
    assert "--max-hours are over after step 9" in result.stderr
    assert evaluated_steps(tmp_path / "run") == [8]


@pytest.mark.timeout(60)
def test_a_run_that_is_to_stop_evaluates_no_more(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What time a scheduler gives it is for the checkpoint; on GPUs the ranks would ask only after ten batches."""
    monkeypatch.setattr(milestones, "evaluate_splits", lambda *_: pytest.fail("evaluated"))
    monkeypatch.setattr(Stop, "agreed", lambda stop, step: "stopped by SIGTERM" if step == 7 else None)
    config = replace(tiny_config, run=replace(tiny_config.run, eval_every=1))  # after step 7
    with pytest.raises(Interrupted, match=r"^stopped by SIGTERM after step 7;"):
        train(config, cpu, plan(config, 1))
    kept = checkpoint.newest(config.run_dir)
    assert (kept.step, kept.loader["evaluation_due"]) == (7, True)
