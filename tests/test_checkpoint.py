"""Checkpoints are whole or absent, are recognised when damaged, and run no code when they are loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dali_vit.milestones
from dali_vit import checkpoint, inference
from dali_vit.config import Config, ModelConfig, RunConfig, UserError
from dali_vit.model import create_model
from dali_vit.plan import plan, up_to_date
from dali_vit.train import train
from pipelines.bad_samples import DecodeError
from tests.conftest import read_metrics

CLASSES = ("ant", "bee", "cat")
EVALUATED = [f"{split}/{name}" for split in ("minival", "val") for name in ("top1", "top5", "loss")]
CONFIG = Config(
    model=ModelConfig(model="Ti/8", width=32, depth=1, num_heads=2, mlp_dim=64),
    run=RunConfig(name="run", keep_checkpoints=2),
)
CONFIG = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, resolution=32))


def save(run_dir: Path, step: int, metrics: dict[str, float] | None = None, config: Config = CONFIG) -> Path:
    model = create_model(CONFIG.model, num_classes=len(CLASSES), resolution=32, seed=step)
    folder = checkpoint.save(
        run_dir,
        step=step,
        config=config,
        classes=CLASSES,
        model_state=model.state_dict(),
        trainer_state={"optimizer": {"state": {0: {"exp_avg": torch.full((2,), float(step))}}}, "rng": []},
        loader_state={"step": step},
    )
    if metrics:
        checkpoint.add_metrics(run_dir, step=step, metrics=metrics, keep=config.run.keep_checkpoints)
    return folder


def test_round_trip(tmp_path):
    save(tmp_path, 7, {"val/top1": 50.0})
    found = checkpoint.newest(tmp_path)
    assert (found.step, found.classes, found.metrics) == (7, CLASSES, {"val/top1": 50.0})
    assert found.loader == {"step": 7, "evaluation_due": False}
    assert found.config == CONFIG
    assert torch.equal(found.trainer_state()["optimizer"]["state"][0]["exp_avg"], torch.tensor([7.0, 7.0]))
    expected = create_model(CONFIG.model, num_classes=3, resolution=32, seed=7)
    opened = checkpoint.open_model(tmp_path)
    assert (opened.classes, opened.resolution, opened.step) == (CLASSES, 32, 7)
    assert not opened.model.training
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(opened.model(images), expected.eval()(images))


def test_every_way_to_name_a_checkpoint_opens_the_same_model(tmp_path):
    folder = save(tmp_path, 3)
    expected = checkpoint.load_model(tmp_path).state_dict()
    for path in (folder, folder.parent, folder / "model.safetensors"):
        torch.testing.assert_close(checkpoint.load_model(path).state_dict(), expected, rtol=0, atol=0)


def test_one_that_is_written_again_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = os.replace

    def crash(source, target):
        if target == folder:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    (aside,) = folder.parent.glob(".tmp-old-*")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before


@pytest.mark.timeout(60)
def test_an_evaluation_that_fails_loses_nothing(tiny_config, cpu, monkeypatch):
    config = dataclasses.replace(tiny_config, run=dataclasses.replace(tiny_config.run, eval_every=1))

    def fail(*_: Any) -> dict[str, float]:
        raise DecodeError("2 of 28 samples cannot be read or decoded", [])

    with monkeypatch.context() as patch:
        patch.setattr(dali_vit.milestones, "evaluate_splits", fail)
        with pytest.raises(DecodeError):
            train(config, cpu, plan(config, 1))
    found = checkpoint.newest(config.run_dir)
    assert (found.step, found.metrics, found.loader["evaluation_due"]) == (7, {}, True)
    train(config, cpu, plan(config, 1))
    logged = [line["step"] for line in read_metrics(config.run_dir) if "val/top1" in line]
    assert logged == [7, 12]
    assert set(checkpoint.read(found.path).metrics) == set(EVALUATED)


@pytest.mark.timeout(60)
def test_metrics_are_those_of_the_very_weights(tiny_config, cpu):
    """Else a checkpoint between evaluations would pass for the best. An epoch is 54 images, 6.75 steps."""
    config = dataclasses.replace(
        tiny_config, run=dataclasses.replace(tiny_config.run, eval_every=1, keep_checkpoints=100)
    )
    train(config, cpu, plan(config, 1))
    found = [checkpoint.read(folder) for folder in sorted((config.run_dir / "checkpoints").glob("step_*"))]
    logged = {line["step"]: line for line in read_metrics(config.run_dir) if "val/top1" in line}
    assert sorted(logged) == [7, 12]
    assert [c.step for c in found] == [5, 7, 10, 12]
    for c in found:
        expected = {} if c.step not in logged else {name: logged[c.step][name] for name in EVALUATED}
        assert c.metrics == expected


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "retype"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path, file, damage, caplog):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = path.read_bytes()
    damaged = {
        "truncate": content[: len(content) // 2],
        "flip": content[:100] + bytes([content[100] ^ 0xFF]) + content[101:],
        "retype": content.replace(b'"data": {', b'"data": "x", "was": {') + b" ",
    }
    path.unlink()
    if damage != "remove":
        path.write_bytes(damaged[damage])
    with caplog.at_level("WARNING", logger="dali_vit"):
        assert [checkpoint.newest(tmp_path).step for _ in range(2)] == [1, 1]
    assert ["step_000000002" in line for line in caplog.messages] == [True]  # once
    assert caplog.messages[0].endswith("; trying the one before")
    assert "use an older checkpoint" not in caplog.text


def test_damaged_checkpoints_of_later_steps_displace_no_good_one(tmp_path):
    """A run that went on from step 1, because that of step 9 is damaged, keeps what it writes from there on."""
    for step in (1, 9):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step_000000009/trainer.pt").write_bytes(b"")
    keep_one = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, keep_checkpoints=1))
    for step in (4, 6):
        save(tmp_path, step, config=keep_one)
        assert checkpoint.newest(tmp_path).step == step
    assert sorted(f.name for f in (tmp_path / "checkpoints").glob("step_*")) == ["step_000000006", "step_000000009"]
    save(tmp_path, 9, config=keep_one)
    assert checkpoint.newest(tmp_path).step == 9
    assert [f.name for f in (tmp_path / "checkpoints").glob("step_*")] == ["step_000000009"]


def test_only_damaged_checkpoints_are_an_error_and_stay(tmp_path):
    path = save(tmp_path, 1) / "trainer.pt"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint is damaged; where this folder is moved away, "):
        checkpoint.newest(tmp_path)
    assert path.parent.is_dir()


def test_a_model_is_opened_without_what_only_training_needs(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (folder / "trainer.pt").unlink()
    for path in (tmp_path, folder):
        assert checkpoint.open_model(path).step == 2
    assert inference._newest(tmp_path) == "checkpoints/step_000000002"  # by which several processes go
    assert checkpoint.newest(tmp_path).step == 1
    (folder / "model.safetensors").write_bytes(b"")
    assert checkpoint.open_model(tmp_path).step == 1
    with pytest.raises(
        UserError, match=r"model.safetensors: damaged \(its checksum differs\); use an older checkpoint$"
    ):
        checkpoint.open_model(folder)


def test_a_model_is_loaded_for_images_of_another_size(tmp_path):
    save(tmp_path, 1)
    with torch.no_grad():
        assert checkpoint.load_model(tmp_path, 64)(torch.zeros(2, 3, 64, 64)).shape == (2, len(CLASSES))


def test_steps_are_compared_as_numbers(tmp_path):
    """From step 1,000,000,000 on the names of folders are longer."""
    keep_two = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, keep_checkpoints=2))
    for step in (999_999_998, 999_999_999, 10**9):
        save(tmp_path, step, config=keep_two)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_1000000000", "step_999999999"]
    assert checkpoint.newest(tmp_path).step == 10**9


def test_one_that_its_run_removes_while_it_is_read_is_not_taken_for_damaged(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)
    read = checkpoint.read

    def read_too_late(folder: Path, files: Any) -> checkpoint.Checkpoint:
        if folder.name == "step_000000001":
            keep_one = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, keep_checkpoints=1))
            save(tmp_path, 2, config=keep_one)
        return read(folder, files)

    monkeypatch.setattr(checkpoint, "read", read_too_late)
    assert checkpoint.newest(tmp_path).step == 2
    assert caplog.text == ""
    assert os.listdir(tmp_path / "checkpoints") == ["step_000000002"]


def test_one_that_its_run_removes_before_its_weights_are_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1)
    read = checkpoint.weights.read

    def read_too_late(file: Path) -> Any:
        if file.parent.name == "step_000000001":
            keep_one = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, keep_checkpoints=1))
            save(tmp_path, 2, config=keep_one)
        return read(file)

    monkeypatch.setattr(checkpoint.weights, "read", read_too_late)
    assert checkpoint.open_model(tmp_path).step == 2


def test_a_link_among_the_checkpoints_is_never_removed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere, 1)
    link = tmp_path / "run/checkpoints/step_000000001"
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere / "checkpoints" / link.name)
    for step in (2, 3, 4):
        save(tmp_path / "run", step)
    assert sorted(os.listdir(link.parent)) == ["step_000000001", "step_000000003", "step_000000004"]
    assert checkpoint.read(link).step == 1


@pytest.mark.parametrize("file", ["model.safetensors", "trainer.pt"])
def test_one_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, file, monkeypatch):
    """Going on from the one before would be to lose it. Root may read everything, so it is refused in place."""
    save(tmp_path, 1)
    refused = save(tmp_path, 2) / file
    read_file = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return read_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        checkpoint.newest(tmp_path)
    if file == "model.safetensors":
        with pytest.raises(PermissionError):
            checkpoint.open_model(refused)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()} == {
        "checkpoint.json": mode,
        "model.safetensors": mode,
        "trainer.pt": mode,
    }


def test_what_a_crash_left_behind_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "checkpoints/step_000000001", tmp_path / "checkpoints/.tmp-step_000000002-99")
    assert checkpoint.newest(tmp_path).step == 1
    save(tmp_path, 3)
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "checkpoint format 99, this version reads 1"),
        (
            {"config": {"optim": {"lr": 1e-3, "warp": 9}}},
            r"config has unknown fields \(warp\): another version wrote it",
        ),
    ],
)
def test_one_of_another_version_is_named_and_not_taken_for_damaged(tmp_path, change, message):
    """Going on from the one before would be to lose it."""
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    record = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**record, **change}))
    for found, path in [(checkpoint.read, folder), (checkpoint.newest, tmp_path), (checkpoint.open_model, tmp_path)]:
        with pytest.raises(checkpoint.OtherVersion, match=f"step_000000002: {message}"):
            found(path)


@pytest.mark.timeout(60)
def test_what_another_process_wrote_since_the_plan_was_made_is_gone_on_from(tiny_config, cpu):
    planned = plan(tiny_config, 1)
    assert up_to_date(planned, tiny_config) is planned
    train(tiny_config, cpu, planned)
    renewed = up_to_date(planned, tiny_config)
    assert renewed.checkpoint.step == 12
    assert up_to_date(renewed, tiny_config) is renewed
    other = dataclasses.replace(tiny_config, optim=dataclasses.replace(tiny_config.optim, lr=0.5))
    with pytest.raises(UserError, match=r"was begun with other settings \(--lr 0.001 -> 0.5\)"):
        up_to_date(planned, other)
