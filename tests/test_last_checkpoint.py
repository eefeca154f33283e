"""A checkpoint that is being written when a run ends, normally or because a process fails, is written to its end."""

from __future__ import annotations

import pytest

from dali_vit import checkpoint
from tests.conftest import read_metrics
from tests.processes import command, run_ranks, running

SLOW_DISK = """
import time
from dali_vit import checkpoint, cli

save = checkpoint.save
checkpoint.save = lambda *arguments, **options: (time.sleep(3), save(*arguments, **options))[1]
cli.run()
"""


@pytest.mark.timeout(120)
def test_no_process_ends_before_the_last_checkpoint_is_written(image_folder, tmp_path):
    """The launcher would end the one that writes it with the first that has stopped."""
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK)
    arguments = command(
        image_folder, tmp_path, "--max-hours", str(1 / 3600), "--checkpoint-every", "100000", steps=4000
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "slow_disk.py")]
    with running(*launcher, *arguments) as process:
        _, err = process.communicate(timeout=90)
    assert "--max-hours are over after step" in err
    assert checkpoint.newest(tmp_path / "run").step == read_metrics(tmp_path / "run")[-1]["step"]


FAILING_RANK = """
import os
import time
from dali_vit import checkpoint, cli
from pipelines.loader import TrainLoader

save, load = checkpoint.save, TrainLoader.__next__
checkpoint.save = lambda *arguments, **options: (time.sleep(3), save(*arguments, **options))[1]

def fail_at_11(self, made=[]):
    made.append(load(self))
    if len(made) > 10 and os.environ["RANK"] == "1":
        raise RuntimeError("as it happens")
    return made[-1]

TrainLoader.__next__ = fail_at_11
cli.run()
"""


@pytest.mark.timeout(120)
def test_a_checkpoint_that_is_being_written_is_kept_where_another_process_fails(image_folder, tmp_path):
    """The launcher ends the one that writes it, by a signal."""
    (tmp_path / "failing.py").write_text(FAILING_RANK)
    arguments = command(image_folder, tmp_path, "--checkpoint-every", "10", steps=4000)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "failing.py")]
    with running(*launcher, *arguments) as process:
        _, err = process.communicate(timeout=90)
    assert "as it happens" in err
    assert checkpoint.newest(tmp_path / "run").step == 10


REFUSED = """
from dali_vit import checkpoint, cli

save = checkpoint.save

def refuse_the_last(run_dir, *, step, **options):
    if step == 20:
        raise OSError("no space left on the disk")
    return save(run_dir, step=step, **options)

checkpoint.save = refuse_the_last
cli.run()
"""


@pytest.mark.timeout(120)
def test_where_the_last_checkpoint_is_refused_no_process_ends_well(image_folder, tmp_path):
    """Only the first has written it; a script may go by the exit code of another."""
    arguments = command(image_folder, tmp_path, steps=20)
    first, second = run_ranks(2, "-c", REFUSED, *arguments, code=2)
    assert first[1].endswith("(no space left on the disk); make room and start again\n")
    assert "no space left" not in second[1]
    assert checkpoint.newest(tmp_path / "run").step == 10
