"""Runs whose folder is moved or removed while they run, copies of runs, and where a run may lie."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dali_vit.step
import dali_vit.train
from dali_vit import checkpoint, runlock
from dali_vit.config import Config, UserError
from dali_vit.data import load_dataset
from dali_vit.distributed import Group
from dali_vit.plan import plan
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.saving import Saver
from dali_vit.step_folders import prune
from dali_vit.stopping import Interrupted
from dali_vit.train import train
from tests.conftest import read_metrics
from tests.processes import wait_for


def before_step_7(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a training run call `act` when the checkpoint of step 5 is begun, and steps 1 to 6 are taken."""
    steps: list[int] = []

    def build(*arguments: Any) -> Any:
        update, how = dali_vit.step.build_update(*arguments)

        def acting(*batch: Any) -> Any:
            steps.append(1)
            if len(steps) == 7:
                act()
            return update(*batch)

        return acting, how

    monkeypatch.setattr(dali_vit.train, "build_update", build)


@pytest.mark.timeout(60)
def test_a_run_keeps_its_checkpoints_in_the_folder_that_was_renamed(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, now = tiny_config.run_dir, tiny_config.run_dir.parent / "renamed"
    before_step_7(lambda: before.rename(now), monkeypatch)
    with caplog.at_level(logging.INFO, "dali_vit"), runlock.locked(tiny_config, cpu):
        metrics = train(tiny_config, cpu, plan(tiny_config, 1))
    assert not before.exists()
    assert sorted(path.name for path in (now / "checkpoints").glob("step_*")) == [
        f"step_{step:09d}" for step in (5, 10, 12)
    ]
    assert [line["step"] for line in read_metrics(now) if "train/loss" in line] == list(range(1, 13))
    events = EventAccumulator(str(now))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")][-6:] == list(range(7, 13))
    assert "val/top1" in events.Tags()["scalars"]
    assert sum("was moved to" in message for message in caplog.messages) == 1
    assert caplog.messages[-1].endswith(f": {now}")
    renamed = replace(tiny_config, run=replace(tiny_config.run, name="renamed"))
    assert train(renamed, cpu, plan(renamed, 1)) == metrics


@pytest.mark.timeout(60)
def test_a_renamed_run_that_is_stopped_says_under_which_name_it_goes_on(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command would begin another run."""
    before, now = tiny_config.run_dir, tiny_config.run_dir.parent / "a new name"

    def rename_and_stop() -> None:
        before.rename(now)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.5)  # for the thread that takes the signal; the whole run is shorter

    before_step_7(rename_and_stop, monkeypatch)
    with pytest.raises(Interrupted) as stopped, runlock.locked(tiny_config, cpu):
        train(tiny_config, cpu, plan(tiny_config, 1))
    flags = f"--runs-dir {now.parent} --name 'a new name'"
    step, told = re.fullmatch(r"stopped by SIGTERM after step (\d+); (.*)", str(stopped.value)).groups()
    assert told == f"it is {now} now: start the same command with {flags} to go on"
    renamed = replace(tiny_config, run=replace(tiny_config.run, name="a new name"))
    assert plan(renamed, 1).checkpoint.step == int(step) >= 7


@pytest.mark.timeout(60)
@pytest.mark.parametrize("removed", ["the folder", "metrics.jsonl"])
def test_a_run_goes_on_where_its_folder_or_log_is_removed(
    removed: str, tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In new ones, from which it can be continued; each loss is warned of once."""
    config = replace(tiny_config, run=replace(tiny_config.run, log_every=1))
    folder = config.run_dir

    def remove() -> None:
        wait_for(lambda: checkpoint.newest(folder) is not None, "the checkpoint of step 5")
        shutil.rmtree(folder) if removed == "the folder" else (folder / "metrics.jsonl").unlink()

    before_step_7(remove, monkeypatch)
    with runlock.locked(config, cpu):
        metrics = train(config, cpu, plan(config, 1))
    told = [f"{folder}/metrics.jsonl was removed: a new one begins with step 7"]
    if removed == "the folder":
        told.insert(0, f"{folder} was removed while it runs: it goes on in a new one")
    assert [message for message in caplog.messages if "removed" in message] == told
    assert [line["step"] for line in read_metrics(folder) if "train/loss" in line] == list(range(7, 13))
    events = EventAccumulator(str(folder))
    events.Reload()
    first = 7 if removed == "the folder" else 1
    assert [event.step for event in events.Scalars("train/loss")] == list(range(first, 13))
    assert checkpoint.newest(folder).step == 12
    monkeypatch.undo()
    assert train(config, cpu, plan(config, 1)) == metrics


@pytest.mark.timeout(60)
@pytest.mark.parametrize("written", ["model.safetensors", "trainer.pt"])
def test_a_checkpoint_is_written_again_where_the_folder_is_renamed_meanwhile(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    before, now = tiny_config.run_dir, tiny_config.run_dir.parent / "renamed"
    hash_of = checkpoint.file_sha256

    def renaming(path: Path) -> str:
        if path.name == written and "step_000000005" in path.parent.name and before.exists():
            before.rename(now)
        return hash_of(path)

    monkeypatch.setattr(checkpoint, "file_sha256", renaming)
    with runlock.locked(tiny_config, cpu):
        train(tiny_config, cpu, plan(tiny_config, 1))
    assert not before.exists()
    assert sorted(path.name for path in (now / "checkpoints").glob("step_*")) == [
        f"step_{step:09d}" for step in (5, 10, 12)
    ]
    assert checkpoint.read(now / "checkpoints" / "step_000000005").step == 5


@pytest.mark.parametrize("had", ["step_000000001", "nothing", "other bytes", "more", "no links"])
def test_a_copy_that_follows_links_has_a_best_checkpoint_that_is_a_link(
    had: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, step: int, top1: float) -> Path:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        text = json.dumps({"step": step, "metrics": {"val/top1": top1}})
        (folder / "checkpoint.json").write_text(text)
        (folder / "model.safetensors").write_bytes(b"weights")
        return folder

    copy = make("best", 1, 50.0)
    if had != "nothing":
        make("step_000000001", 1, 50.0)
    if had == "other bytes":
        (copy / "model.safetensors").write_bytes(b"Weights")
    if had == "more":
        (copy / "notes").touch()
    for path in tmp_path.rglob("*"):  # the contents tell, not the times
        os.utime(path, (0, 0))
    if had == "no links":
        monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    stays = had != "step_000000001"
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for step, top1 in ((2, 40.0), (3, 60.0), (4, 45.0)):
        prune(tmp_path / "checkpoints", 1, make(f"step_{step:09d}", step, top1))
        if stays:
            assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
        else:
            assert os.readlink(copy) == f"step_{1 if step == 2 else 3:09d}"
            assert (copy / "model.safetensors").read_bytes() == b"weights"
    assert sorted(os.listdir(copy.parent)) == ["best", "step_000000003", "step_000000004"]
    assert caplog.messages == (
        [f"{copy}: is a folder, not a link to the best checkpoint, and will not be brought up to date: remove it"]
        if stays
        else []
    )


@pytest.mark.parametrize("refused", [errno.EROFS, errno.EACCES])
def test_nobody_is_told_to_remove_what_cannot_be_changed(
    refused: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run on a disk that is mounted to be read, or of another user."""
    for name in ("best", "step_000000001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "checkpoint.json").write_text('{"step": 1, "metrics": {}}')
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError(refused, "refused")))
    prune(tmp_path / "checkpoints", 1, tmp_path / "checkpoints/step_000000001")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("place", "refused"),
    [("train", True), ("val/new/runs", True), ("link", True), ("", False), ("runs", False), ("train/.runs", False)],
)
def test_a_run_may_lie_beside_the_images_but_not_among_the_classes(
    place: str, refused: bool, tiny_config: Config, tmp_path: Path
) -> None:
    """Where the next start would take it for a class without images."""
    data = Path(shutil.copytree(tiny_config.data.data, tmp_path / "data"))
    (data / "link").symlink_to("train")
    config = replace(
        tiny_config,
        data=replace(tiny_config.data, data=str(data)),
        run=replace(tiny_config.run, runs_dir=data / place),
    )
    if not refused:
        assert plan(config, 1).checkpoint is None
        return
    with pytest.raises(UserError) as raised:
        plan(config, 1)
    there = config.run_dir.resolve()
    told = f"{there} lies in {data / there.relative_to(data).parts[0]}, whose folders are classes; choose another"
    assert str(raised.value) == f"--runs-dir {config.run.runs_dir}: {told}"


def test_a_run_may_lie_within_a_class_and_among_shards(tiny_config: Config, tmp_path: Path) -> None:
    name = load_dataset(tiny_config.data.data, minival=0).classes[0]
    within = replace(tiny_config.run, runs_dir=Path(tiny_config.data.data) / "train" / name)
    assert plan(replace(tiny_config, run=within), 1).checkpoint is None
    shards = prepare(PrepareArguments(Path(tiny_config.data.data), tmp_path / "shards"))
    among = replace(tiny_config, data=replace(tiny_config.data, data=str(shards)))
    assert plan(replace(among, run=replace(tiny_config.run, runs_dir=shards / "train")), 1).checkpoint is None


@pytest.mark.timeout(60)
def test_the_last_good_checkpoint_is_looked_for_where_the_run_is_now(tiny_config: Config, cpu: Group) -> None:
    before, now = tiny_config.run_dir, tiny_config.run_dir.parent / "renamed"
    planned = plan(tiny_config, 1)
    unused: Any = None
    with runlock.locked(tiny_config, cpu):
        train(tiny_config, cpu, planned)
        before.rename(now)
        with Saver(tiny_config, cpu, planned, unused, unused, None) as saver:
            newest = saver.newest()
    assert newest is not None
    assert newest.path == now / "checkpoints" / "step_000000012"


@pytest.mark.timeout(60)
def test_a_trace_goes_into_the_folder_that_was_renamed(
    tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the old name may be another run by then."""
    config = replace(tiny_config, run=replace(tiny_config.run, profile=2))
    before, now = config.run_dir, config.run_dir.parent / "renamed"
    before_step_7(lambda: before.rename(now), monkeypatch)
    with runlock.locked(config, cpu):
        train(config, cpu, plan(config, 1))
    assert not before.exists()
    assert [path.name.split(".")[0] for path in (now / "profile").iterdir()] == ["rank0"]
