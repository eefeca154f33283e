"""Runs whose learning rate is far too high do not end as if all were well."""

import re

import pytest

from dali_vit import checkpoint
from tests.conftest import run
from tests.test_cli import good


@pytest.mark.timeout(120)
def test_gradients_that_stay_not_finite_stop_the_run(image_folder, tmp_path, capsys):
    command = [*good(image_folder, tmp_path), "--name", "nan", "--steps", "60", "--log-every", "5"]
    code, _, err = run(*command, "--lr", "1e30", "--grad-clip-norm", "None", "--checkpoint-every", "2", capsys=capsys)
    assert code == 2
    assert re.search(r"1[12] steps were left out, the last of them between steps \d+ and \d+: the gradient was", err)
    assert "); lower --lr; last good checkpoint" in err
    assert err.count("\n") == 1
    kept = checkpoint.newest(tmp_path / "runs" / "nan")
    assert kept is None or all(t.isfinite().all() for t in kept.model_state().values())


@pytest.mark.timeout(60)
def test_a_run_that_ends_with_weights_of_no_use_does_not_end_well(image_folder, tmp_path, capsys):
    """The steps after the ruinous one are left out, too few to stop the run."""
    command = [*good(image_folder, tmp_path), "--name", "ruin", "--steps", "6", "--warmup-steps", "1", "--lr", "1e38"]
    for _ in range(2):  # nor when it is started again
        code, _, err = run(*command, "--grad-clip-norm", "None", capsys=capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert "ruin: its weights have become infinite or NaN; lower --lr" in err
