"""What a run's plan finds out before anything is written or trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dali_vit.config import Config, UserError
from dali_vit.plan import plan
from dali_vit.runfolder import open_folder
from tests.conftest import write_image_folder


def test_images_of_val_that_cannot_be_read_are_found_before_training(tmp_path: Path, tiny_config: Config) -> None:
    """Else at the first evaluation, hours later."""
    root = write_image_folder(tmp_path / "images")
    for image in (root / "val").rglob("*.jpg"):
        image.write_bytes(b"")
    config = replace(tiny_config, data=replace(tiny_config.data, data=str(root)))
    with pytest.raises(UserError, match=rf"^{root}/val/.*\.jpg is an empty file; .*more than --max-bad-share 0.01"):
        plan(config, 1)


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tiny_config: Config) -> None:
    """Unless it is told not to go on with anything."""
    writer = open_folder(tiny_config, 0, False)
    writer.scalars(1, {"train/loss": 1.0})
    writer.close()
    assert plan(tiny_config, 1).checkpoint is None
    with pytest.raises(UserError, match="holds metrics of a run without a checkpoint"):
        plan(replace(tiny_config, run=replace(tiny_config.run, resume=False)), 1)
