"""What a loss of power, or a kill in the last moment, must not take: logs, receipts, names, the best checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dali_vit import checkpoint, files, remote, runfolder, step_folders
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group
from dali_vit.files import replacing
from dali_vit.manifest import MANIFEST, Manifest, write_manifest
from dali_vit.metric_log import MetricLog
from dali_vit.plan import plan
from dali_vit.prepare import prepare
from dali_vit.prepare.receipts import read_receipt, write_receipt
from dali_vit.train import train
from tests.conftest import read_metrics
from tests.datasets import tree, write_source
from tests.test_checkpoint import save


@pytest.fixture
def evaluated(tiny_config: Config) -> Config:
    """12 steps, evaluated after 7 and 12, with a line for each step and a checkpoint after 5 and 10, too."""
    return dataclasses.replace(tiny_config, run=dataclasses.replace(tiny_config.run, eval_every=1, log_every=1))


def events(folder: Path, name: str) -> list[int]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [e.step for e in accumulator.Scalars(name)] if name in accumulator.Tags()["scalars"] else []


@pytest.mark.timeout(120)
def test_logs_reach_the_disk_before_the_checkpoint_that_stands_on_them(
    evaluated: Config, cpu: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`disk` has what each file held when it was flushed last."""
    disk = tmp_path / "disk"
    disk.mkdir()
    seen: list[tuple[str, int, list[int], list[int]]] = []
    flush, save, add_metrics = files.flush, checkpoint.save, checkpoint.add_metrics

    def noting_flush(path: Path) -> None:
        flush(path)
        if path.is_file():
            (disk / path.name).write_bytes(path.read_bytes())

    def note(write: str, step: int, scalar: str) -> None:
        lines = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
        logged = [line["step"] for line in lines if scalar in line]
        # Later ones may be there, too: training goes on meanwhile.
        seen.append((write, step, *([s for s in steps if s <= step] for steps in (logged, events(disk, scalar)))))

    def noting_save(run_dir: Path, **arguments: Any) -> Path:
        note("save", arguments["step"], "train/loss")
        return save(run_dir, **arguments)

    def noting_add_metrics(run_dir: Path, **arguments: Any) -> None:
        note("add_metrics", arguments["step"], "val/top1")
        add_metrics(run_dir, **arguments)

    monkeypatch.setattr(runfolder, "flush", noting_flush)
    monkeypatch.setattr(checkpoint, "save", noting_save)
    monkeypatch.setattr(checkpoint, "add_metrics", noting_add_metrics)
    train(evaluated, cpu, plan(evaluated, 1))
    upto = {step: list(range(1, step + 1)) for step in (5, 7, 10, 12)}
    assert seen == [
        *[("save", step, upto[step], upto[step]) for step in (5, 7)],
        ("add_metrics", 7, [7], [7]),
        *[("save", step, upto[step], upto[step]) for step in (10, 12)],
        ("add_metrics", 12, [7, 12], [7, 12]),
    ]


def test_the_first_checkpoint_is_on_the_disk_with_the_folder_that_it_makes(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_config.run_dir / "checkpoints"
    flushed: list[tuple[Path, bool]] = []
    monkeypatch.setattr(checkpoint, "flush", lambda path: flushed.append((path, (folder / "step_000000001").exists())))
    state: dict[str, Any] = {"model_state": {}, "trainer_state": {}, "loader_state": {}}
    checkpoint.save(tiny_config.run_dir, step=1, config=tiny_config, classes=("a",), **state)
    assert flushed[0] == (tiny_config.run_dir, False)
    assert [named for _, named in flushed[1:-1]] == [False] * 4  # three files and the folder that holds them
    assert flushed[-1] == (folder, True)
    checkpoint.save(tiny_config.run_dir, step=2, config=tiny_config, classes=("a",), **state)
    assert [path for path, _ in flushed].count(tiny_config.run_dir) == 1


def test_an_evaluation_is_on_the_disk_with_the_checkpoint_of_its_weights(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, Any] = {"model_state": {}, "trainer_state": {}, "loader_state": {}}
    folder = checkpoint.save(tiny_config.run_dir, step=1, config=tiny_config, classes=("a",), **state)
    flushed: list[tuple[Path, Any]] = []

    def metrics() -> Any:
        return json.loads((folder / "checkpoint.json").read_text())["metrics"]

    monkeypatch.setattr(checkpoint, "flush", lambda path: flushed.append((path, metrics())))
    checkpoint.add_metrics(tiny_config.run_dir, step=1, metrics={"val/top1": 1.0}, keep=1)
    assert flushed == [(folder, {"val/top1": 1.0})]  # the file itself is `replacing`'s care


def test_a_manifest_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, list[str]]] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, os.listdir(tmp_path))))
    write_manifest(tmp_path, Manifest("shards", ("a",), {}, "plan"))
    assert synced == [((tmp_path / MANIFEST).stat().st_size, [f".{MANIFEST}.tmp"])]


@pytest.mark.timeout(120)
def test_a_set_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "set"
    seen: list[tuple[bool, bool]] = []
    made = tmp_path / "set.partial/.set" / MANIFEST
    monkeypatch.setattr(os, "sync", lambda: seen.append((made.exists(), target.exists())))
    prepare(dataclasses.replace(write_source("folder", tmp_path / "source"), target=target))
    assert seen[-1] == (True, False)


@pytest.mark.timeout(120)
def test_an_evaluation_that_is_made_up_for_stands_in_the_log_once(evaluated: Config, cpu: Group) -> None:
    """As after a kill between its line in the log and the note of it in the checkpoint."""
    train(evaluated, cpu, plan(evaluated, 1))
    record = evaluated.run_dir / "checkpoints/step_000000012/checkpoint.json"
    text = json.loads(record.read_text())
    text["loader"]["evaluation_due"], text["metrics"] = True, {}
    record.write_text(json.dumps(text))
    before = read_metrics(evaluated.run_dir)
    assert train(evaluated, cpu, plan(evaluated, 1)) == checkpoint.newest(evaluated.run_dir).metrics
    after = read_metrics(evaluated.run_dir)
    of_evaluation = ("minival/", "val/", "perf/evaluation_s")
    for name in ("val/top1", "minival/loss"):
        assert [(m["step"], m[name]) for m in after if name in m] == [(m["step"], m[name]) for m in before if name in m]
    rest = [
        [{n: v for n, v in m.items() if not n.startswith(of_evaluation)} for m in lines] for lines in (before, after)
    ]
    assert [m for m in rest[1] if len(m) > 1] == [m for m in rest[0] if len(m) > 1]
    assert len([m for m in after if m["step"] == 12 and "perf/evaluation_s" in m]) == 1


def test_a_step_that_is_written_again_is_removed_once_the_new_ones_name_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 1).parent
    seen: list[tuple[str, bool]] = []

    def flush(path: Path) -> None:
        files.flush(path)
        seen.append((path.name, (folder / ".tmp-old-step_000000001").exists()))

    monkeypatch.setattr(checkpoint, "flush", flush)
    save(tmp_path, 1)
    assert seen[-1] == ("checkpoints", True)
    assert os.listdir(folder) == ["step_000000001"]


def test_a_line_that_loses_all_goes_and_a_log_that_loses_nothing_is_not_written(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "val/top1": 1.0}\n{"step": 2, "train/loss": 2.0}\n{"step": 2, "val/top1": 3.0}\n')
    inode = log.stat().st_ino
    MetricLog(tmp_path, 2).close()
    assert log.stat().st_ino == inode
    MetricLog(tmp_path, 2, evaluation_due=True).close()
    assert log.read_text() == '{"step": 1, "val/top1": 1.0}\n{"step": 2, "train/loss": 2.0}\n'


def test_a_log_that_cannot_be_rewritten_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')

    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", refuse)
    hook = threading.excepthook
    with pytest.raises(
        UserError, match=r"^.*/metrics.jsonl: cannot be written \(No space left on device\); mend that "
    ):
        MetricLog(tmp_path, 3)
    assert threading.excepthook is hook
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 9}\n'


@pytest.mark.parametrize("refused", ["SummaryWriter.__init__", "_put_events_before_now"])
def test_events_that_cannot_be_begun_are_given_up_with_a_warning(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"dali_vit.metric_log.{refused}", refuse)
    with caplog.at_level(logging.WARNING), MetricLog(tmp_path, 0) as log:
        log.scalars(1, {"train/loss": 1.0})
        log.flush()
    assert caplog.messages == ["no more TensorBoard events are written (No space left on device); training goes on"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 1.0}\n'


@pytest.mark.timeout(120)
def test_a_finished_run_is_tidied_up_when_it_is_started_again(evaluated: Config, cpu: Group) -> None:
    """As after a kill behind the last checkpoint's metrics, before `best` was pointed to it."""
    train(evaluated, cpu, plan(evaluated, 1))
    folder = evaluated.run_dir / "checkpoints"
    (folder / "best").unlink()
    (folder / "best").symlink_to("step_000000007")
    record = folder / "step_000000012/checkpoint.json"
    text = json.loads(record.read_text())
    text["metrics"]["minival/top1"] = text["metrics"]["val/top1"] = 101.0
    record.write_text(json.dumps(text))
    (folder / ".tmp-old-step_000000003").mkdir()
    (folder / ".tmp-best").symlink_to("nowhere")
    unfinished = folder / f"step_000000012/.dali-vit-{'0' * 32}.tmp"
    unfinished.touch()
    kept = step_folders.step_folders(folder)
    keeping_less = dataclasses.replace(evaluated, run=dataclasses.replace(evaluated.run, keep_checkpoints=1))
    train(keeping_less, cpu, plan(keeping_less, 1))
    assert os.readlink(folder / "best") == "step_000000012"
    assert step_folders.step_folders(folder) == kept  # what it kept when it was done
    assert len(kept) == 3
    assert not list(folder.glob(".tmp*"))
    assert not unfinished.exists()


@pytest.mark.parametrize("text", ["", "\0" * 9, "[]", "{}", '{"metrics": null}'])
def test_a_record_that_is_lost_is_never_the_best_checkpoints(text: str, tmp_path: Path) -> None:
    records = [text, '{"metrics": {"val/top1": 1.0}}', '{"metrics": {}}']
    for step, record in enumerate(records, start=1):
        folder = step_folders.step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "checkpoint.json").write_text(record)
    step_folders.prune(folder.parent, 1, folder)
    assert sorted(os.listdir(folder.parent)) == ["best", "step_000000002", "step_000000003"]
    assert os.readlink(folder.parent / "best") == "step_000000002"


def test_what_replaces_a_file_is_on_the_disk_before_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    flushed: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "flush", lambda written: flushed.append((written.read_text(), path.read_text())))
    with replacing(path) as temporary:
        temporary.write_text("after")
    assert flushed == [("after", "before")]
    assert path.read_text() == "after"


def test_what_a_killed_process_left_beside_a_file_goes_after_an_hour(tmp_path: Path) -> None:
    names = [f".dali-vit-{digit * 32}.tmp" for digit in "ab"]
    others = [f".dali-vit-{'g' * 32}.tmp", f"dali-vit-{'a' * 32}.tmp", f".{'a' * 32}.tmp", "a.tmp"]
    for name in [*names, *others]:
        (tmp_path / name).touch()
        old = time.time() - (3500 if name == names[1] else 3700)
        os.utime(tmp_path / name, (old, old))
    with replacing(tmp_path / "file") as temporary:
        temporary.touch()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, names[1], "file"])


def test_a_receipt_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(
        "dali_vit.prepare.receipts.flush", lambda path: flushed.append((path.name, os.listdir(tmp_path)))
    )
    write_receipt(tmp_path / "a.json", {"bytes": 1})
    assert flushed == [("a.tmp", ["a.tmp"]), (tmp_path.name, ["a.json"])]
    assert read_receipt(tmp_path / "a.json") == {"bytes": 1}
    for lost in ("", '{"bytes"'):
        (tmp_path / "a.json").write_text(lost)
        assert read_receipt(tmp_path / "a.json") is None
    assert read_receipt(tmp_path / "b.json") is None


@pytest.mark.timeout(120)
@pytest.mark.parametrize("lost", ["train-000001.json", "plan.json"])
def test_prepare_goes_on_without_a_receipt_that_was_lost(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = dataclasses.replace(write_source("folder", tmp_path / "source"), shard_mb=1)
    monkeypatch.setattr("dali_vit.prepare.targets._TAR_OVERHEAD", 200_000)
    whole = prepare(dataclasses.replace(arguments, target=tmp_path / "whole"))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dali_vit.prepare.write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(dataclasses.replace(arguments, target=tmp_path / "set"))
    state = tmp_path / "set.partial/.state"
    assert (state / "train-000001.json").stat().st_size
    (state / lost).write_bytes(b"")
    if lost == "plan.json":
        (tmp_path / "set.partial/.set/train/shard-000009.tar").touch()  # as another plan may have had it
    prepare(dataclasses.replace(arguments, target=tmp_path / "set"))
    assert tree(tmp_path / "set") == tree(whole)


def test_an_older_attempt_set_aside_is_not_written_over(tmp_path: Path) -> None:
    names = ("config.yaml", "env.txt", "metrics.jsonl")
    for name in names:
        (tmp_path / name).write_text("second")
    (tmp_path / "config.yaml.1").write_text("first")
    runfolder._set_aside(tmp_path)
    assert (tmp_path / "config.yaml.1").read_text() == "first"
    assert [(tmp_path / f"{name}.2").read_text() for name in names] == ["second"] * 3


def test_the_events_of_this_start_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("events.out.tfevents.1", "events.out.tfevents.2", "metrics.jsonl"):
        (tmp_path / name).touch()
    flushed: list[Path] = []
    monkeypatch.setattr(runfolder, "flush", flushed.append)
    runfolder.flush_logs(tmp_path)
    assert flushed == [tmp_path / "metrics.jsonl", tmp_path / "events.out.tfevents.2", tmp_path]


def test_a_copy_from_a_store_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As later starts know a shard by its size."""
    flushed = []
    monkeypatch.setattr("dali_vit.remote.flush", lambda path: flushed.append((path.name, os.listdir(tmp_path))))
    remote._place(tmp_path / "a.tar", lambda path: path.write_bytes(b"tar"))
    assert flushed == [(".a.tar.part", [".a.tar.part"])]
    assert os.listdir(tmp_path) == ["a.tar"]
