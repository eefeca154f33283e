"""What lies in a run's folder besides scalars and checkpoints: files set aside, logs, samples and traces."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dali_vit import runfolder
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group
from dali_vit.runfolder import open_folder, profiling, write_run_files

NAMES = ("config.yaml", "env.txt", "metrics.jsonl")


def test_of_a_start_that_logged_nothing_nothing_is_set_aside(tiny_config: Config) -> None:
    """As one that ended by a mistake, again and again."""
    for _ in range(2):
        open_folder(tiny_config, 0, False).close()
    assert {path.name for path in tiny_config.run_dir.iterdir() if not path.name.startswith("events.")} == {*NAMES}


def test_a_start_that_is_killed_as_it_sets_files_aside_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log goes last: by it the next start knows that there is something to set aside."""
    for name in NAMES:
        (tmp_path / name).write_text("first")
    rename, renamed = Path.rename, []

    def rename_one(path: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_one)
        with pytest.raises(KeyboardInterrupt):
            runfolder._set_aside(tmp_path)
    runfolder._set_aside(tmp_path)
    assert not any((tmp_path / name).exists() for name in NAMES)
    assert len(list(tmp_path.iterdir())) == len(NAMES)


def test_a_log_that_cannot_be_flushed_keeps_no_other_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    tried: list[Path] = []

    def refuse(path: Path) -> None:
        tried.append(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(runfolder, "flush", refuse)
    runfolder.flush_logs(tmp_path)
    assert tried == [tmp_path / "metrics.jsonl", tmp_path / "events.out.tfevents.1", tmp_path]


def test_the_name_of_a_new_run_is_on_the_disk(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(runfolder, "flush", flushed.append)
    write_run_files(tiny_config)
    assert flushed == [tiny_config.run.runs_dir]


def test_samples_that_cannot_be_written_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "samples").write_text("in the way")
    logged: list[tuple[str, int]] = []
    writer: Any = SimpleNamespace(image=lambda name, grid, step: logged.append((name, step)))
    runfolder.log_samples(writer, tmp_path, torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    assert logged == [("samples/train", 0)]
    assert caplog.messages == [f"{tmp_path / 'samples'} is not written (File exists); training goes on"]


@pytest.mark.timeout(60)
def test_each_process_writes_a_trace_of_its_own(tiny_config: Config, cpu: Group) -> None:
    config = replace(tiny_config, run=replace(tiny_config.run, profile=1))
    for rank in (0, 1):
        with profiling(config, replace(cpu, rank=rank, world_size=2), 1) as profiler:
            profiler.step()
    written = sorted(path.name.split(".")[0] for path in (config.run_dir / "profile").iterdir())
    assert written == ["rank0", "rank1"]


def test_a_run_without_a_step_left_has_no_trace(tiny_config: Config, cpu: Group) -> None:
    """As one that has but its last evaluation to make up for."""
    config = replace(tiny_config, run=replace(tiny_config.run, profile=2))
    with profiling(config, cpu, 0) as profiler:
        profiler.step()
    assert not (config.run_dir / "profile").exists()


def test_where_the_log_is_another_users_its_settings_are_not_replaced(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_folder(tiny_config, 0, evaluation_due=False).close()
    (tiny_config.run_dir / "config.yaml").write_text("theirs")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "metrics.jsonl")
    said = rf"^{tiny_config.run_dir}/metrics.jsonl: cannot be written \(Permission denied\); mend that and start again$"
    with pytest.raises(UserError, match=said):
        open_folder(tiny_config, 5, evaluation_due=False)
    assert (tiny_config.run_dir / "config.yaml").read_text() == "theirs"
