"""Details of runs: what is kept, logged, compiled, exported and said of them."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dali_vit.compiling
from dali_vit import autotune, checkpoint, environment, inference, metric_log, process, report
from dali_vit import export as exports
from dali_vit.arguments import EvalArguments
from dali_vit.config import Config, ModelConfig, OptimConfig, UserError
from dali_vit.data import load_dataset
from dali_vit.distributed import Group
from dali_vit.inference import convert
from dali_vit.loaders import Decoder, LoaderSettings
from dali_vit.metric_log import MetricLog
from dali_vit.model import create_model
from dali_vit.optim import create_optimizer, set_lr
from dali_vit.parsing import naming_file, parse, parse_train
from dali_vit.plan import plan
from dali_vit.step import build_update
from tests.conftest import CLASSES
from tests.test_checkpoint import save
from tests.test_process import end
from tests.test_report import dataset
from tests.test_report import plan as planned


def test_a_model_all_of_whose_parameters_decay_or_of_which_none_does_trains() -> None:
    for model in (torch.nn.Linear(3, 2, bias=False), torch.nn.LayerNorm(3)):
        optimizer = create_optimizer(model, OptimConfig())
        set_lr(optimizer, 0.5)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5]


def test_a_model_by_its_name_has_none_of_the_files_sizes(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {model: Ti/8, width: 96, depth: 3, num_heads: 3, mlp_dim: 384}\n")
    model = parse_train(["--config", str(file), "--model", "B/16"])[0].model
    assert (model.width, model.depth, model.num_heads, model.mlp_dim) == (None,) * 4


def test_a_flag_with_underscores_is_not_laid_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {batch_size: 8}\n")
    said = UserError("--batch-size -4: must be from 1 to 1,048,576")
    for flags, told in (([], f"--config {file}: {said}"), (["--batch_size", "-4"], str(said))):
        with pytest.raises(UserError) as caught, naming_file(["--config", str(file), *flags]):
            raise said
        assert str(caught.value) == told


def test_the_bar_of_a_run_that_goes_on_begins_where_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with report.progress_bar(12, 5, visible=True) as bar:
        assert (bar.n, bar.total) == (5, 12)
    assert "5/12" in terminal.getvalue()


def test_the_link_to_the_best_may_be_redirected_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run that is in progress, after its record was read: the weights are those of the record."""
    for step in (1, 2):
        save(tmp_path, step)
    best = tmp_path / "checkpoints/best"
    best.symlink_to("step_000000001")
    hash_of = checkpoint.file_sha256

    def redirected(path: Path) -> str:
        best.unlink()
        best.symlink_to("step_000000002")
        return hash_of(path)

    monkeypatch.setattr(checkpoint, "file_sha256", redirected)
    assert checkpoint.open_model(best).step == 1


def test_a_run_may_be_called_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 3)
    assert checkpoint.open_model(tmp_path / "checkpoints").step == 3
    assert checkpoint.open_model(tmp_path / "checkpoints/checkpoints").step == 3


def test_what_is_unfinished_and_cannot_be_removed_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another user's start, or a file that NFS keeps as long as it is open."""
    stale = tmp_path / "checkpoints/.tmp-step_000000001-99"
    stale.mkdir(parents=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refuse)
    assert save(tmp_path, 3).is_dir()
    assert stale.is_dir()


def test_each_time_that_the_log_cannot_be_written_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for the lines of one time, and again after lines that were written in between."""
    full, append = {2, 3, 5}, metric_log._append

    def write(file: Any, line: bytes) -> None:
        if json.loads(line)["step"] in full:
            raise OSError(28, "No space left on device")
        append(file, line)

    monkeypatch.setattr(metric_log, "_append", write)
    with MetricLog(tmp_path, 0) as log:
        for step in range(1, 6):
            log.scalars(step, {"a": 1.0})
    told = f"{tmp_path}/metrics.jsonl cannot be written to (No space left on device); training goes on without these"
    assert caplog.messages == [f"{told} lines"] * 2


@pytest.mark.parametrize(("flags", "threads"), [([], 5), (["--threads", "3"], 3)])
def test_eval_loads_with_the_threads_that_were_asked_for(
    flags: list[str], threads: int, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(model="Ti/8", width=32, depth=1, num_heads=2, mlp_dim=64)
    model = create_model(config, num_classes=4, resolution=32)
    checkpoint.save_model(tmp_path / "m.safetensors", model.state_dict(), config, 32, CLASSES, None)
    given: list[int] = []
    make = inference.eval_loader
    monkeypatch.setattr(
        inference, "eval_loader", lambda files, **options: (given.append(options["threads"]), make(files, **options))[1]
    )
    flags = ["--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(image_folder), *flags]
    asked = parse(EvalArguments, flags, "eval")
    inference.evaluate_checkpoint(asked, Group(0, 1, 0, 1, torch.device("cpu"), cores=5))
    assert given == [threads]


def test_convert_keeps_classes_and_step(tmp_path: Path) -> None:
    save(tmp_path / "run", 7)
    convert(tmp_path / "run", tmp_path / "a.safetensors")
    opened = checkpoint.open_model(tmp_path / "a.safetensors")
    assert (opened.classes, opened.resolution, opened.step) == (("ant", "bee", "cat"), 32, 7)


def test_two_parts_that_leave_single_images_are_named(tiny_config: Config) -> None:
    config = replace(
        tiny_config,
        model=ModelConfig("timm:resnet18"),
        optim=replace(tiny_config.optim, batch_size=2),
        run=replace(tiny_config.run, grad_accum_steps=2),
    )
    with pytest.raises(UserError, match=r"^--grad-accum-steps 2: leaves a process one image at a time"):
        plan(config, 1)


def test_no_smaller_batch_than_an_image_a_process_is_advised(tiny_config: Config) -> None:
    optim = replace(tiny_config.optim, steps=None, epochs=1.0, batch_size=4, warmup_steps=50)
    config = replace(tiny_config, optim=optim)
    with pytest.raises(UserError, match=r"; a smaller --batch-size than 4, or more --epochs, make more steps of 54"):
        plan(config, 2)
    with pytest.raises(UserError, match=r"; more --epochs, make more steps of 54 images$"):
        plan(config, 4)


def test_each_value_of_the_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As env.txt has them, of which a line is a value; a name on the command line may have a line break."""
    monkeypatch.setattr("sys.argv", ["dali-vit", "a\nb\rc"])
    found = environment.describe_environment()
    assert found["command"] == r"dali-vit 'a\nb\rc'"
    assert not any("\n" in value for value in found.values())


def test_an_installed_copy_has_no_commit_of_the_checkout_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a virtual environment within another project."""

    def git(command: list[str], **_: Any) -> Any:
        if command[5] == "ls-files":
            raise subprocess.CalledProcessError(1, command)
        return SimpleNamespace(stdout="abc\n")

    monkeypatch.setattr(subprocess, "run", git)
    assert environment.git_commit() is None


@pytest.mark.parametrize("code", [1, 75, 130])
def test_a_full_disk_under_stdout_hides_no_other_code(code: int) -> None:
    """A launcher starts a run that ended with 75 again."""
    with open("/dev/full", "w") as full:
        assert end(f"cli.main = lambda: (print('text'), sys.exit({code}))", stdout=full.fileno()).returncode == code


@pytest.mark.parametrize(("before", "said"), [(1, "2 processes instead of 1"), (4, "2 processes instead of 4")])
def test_another_number_of_processes_is_told_with_what_it_changes(before: int, said: str) -> None:
    found = SimpleNamespace(step=1200, loader={"world_size": before})
    group = Group(0, 2, 0, 2, torch.device("cpu"))
    given: dict[str, Any] = {"model": "M", "how": {}, "threads": 1, "bad_samples": 1}
    text = report.summary(Config(), planned(dataset(minival=100, val=2), checkpoint=found), group, **given)
    assert text.splitlines()[-1] == (
        f"resuming  after step 1,200, 1 image left out, with {said}: batch size and data order stay, 512 images a"
        f" process instead of {1024 // before}"
    )


def test_an_export_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", 1)
    events: list[str] = []
    rename, flush = Path.rename, exports.flush

    def renamed(path: Path, target: Path) -> Path:
        events.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(exports, "flush", lambda path: (events.append(path.name), flush(path))[1])
    exports.export(tmp_path / "run", tmp_path / "out")
    assert events[-1] == "renamed"
    files = {"config.json", "model.safetensors", "head", "classifier.safetensors", f".out.{os.getpid()}.tmp"}
    assert set(events[:-1]) == files


def test_a_file_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with report.progress_bar(12, 0, visible=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("mode", "marks"), [("reduce-overhead", 2), ("max-autotune", 2), ("default", 0)])
def test_each_step_begins_a_new_replay_of_cuda_graphs(
    mode: Any, marks: int, tiny_config: Config, cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else torch guesses where one step ends, and may keep what the steps before have left."""
    begun: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(dali_vit.compiling, "compile_fault", lambda device: None)
    config = replace(tiny_config, run=replace(tiny_config.run, compile=mode))
    model = create_model(config.model, num_classes=3, resolution=32)
    update, _ = build_update(config, model, create_optimizer(model, config.optim), cpu)
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    for _ in range(2):
        update(images, torch.arange(8) % 3, 0.7, 1e-2)
    assert len(begun) == marks


def test_threads_that_are_asked_for_are_not_those_that_a_search_may_vary(tiny_config: Config, cpu: Any) -> None:
    """Even if they are as many as the default: what a search found without the flag would be more or fewer."""
    dataset = load_dataset(tiny_config.data.data or "", minival=0.1)
    paths = []
    for threads in (None, cpu.cores):
        config = replace(tiny_config, run=replace(tiny_config.run, threads=threads))
        defaults = autotune.common_defaults(config, cpu)
        assert defaults.threads == cpu.cores
        paths.append(autotune.cache_path(autotune._conditions(dataset, config, cpu, defaults)))
    assert paths[0] != paths[1]


def test_of_the_only_checkpoint_it_is_not_said_that_another_is_tried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (save(tmp_path, 1) / "trainer.pt").write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.newest(tmp_path)
    folder = tmp_path / "checkpoints/step_000000001"
    assert caplog.messages == [f"{folder}/trainer.pt: damaged (its checksum differs)"]


def test_a_first_search_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert autotune._read(tmp_path / "autotune-0.json", {}) is None
    assert not caplog.messages


@pytest.mark.parametrize("rank", [0, 1])
def test_that_a_rank_has_to_decode_whole_images_is_said_once(
    rank: int, cpu: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    of_ranks = [(LoaderSettings(2), None), (LoaderSettings(2, decoder=Decoder(region="full")), "SIGSEGV")]
    monkeypatch.setattr(autotune, "gather_objects", lambda own: of_ranks)
    found = autotune.common_defaults(Config(), replace(cpu, rank=rank, world_size=2))
    assert found.decoder.region == "full"
    told = "whole JPEGs are decoded, as decoding windows alone fails on rank 1 (SIGSEGV)"
    assert caplog.messages == ([told] if rank == 0 else [])


def test_no_folder_for_temporary_files_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose disk is read-only; torch and timm would end in a traceback when they are imported."""

    def nowhere() -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/']")

    monkeypatch.setattr(process.tempfile, "gettempdir", nowhere)
    said = r"^No usable temporary directory found in \['/tmp', '/'\]: set TMPDIR to a folder that can be written to$"
    with pytest.raises(UserError, match=said):
        process.check_surroundings()
