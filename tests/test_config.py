import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from dali_vit import config as configs
from dali_vit.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, UserError
from dali_vit.validation import check_local, validate


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"),
    [
        (90, 1_268_355, 1024, 111_477),  # 90 x 1,268,355 / 1024 = 111,476.5..., rounded
        (300, 1_268_355, 1024, 371_588),
        (90, 1_268_355, 4096, 27_869),
        (0.5, 100, 10, 5),
        (1, 3, 10, 1),  # at least one step
    ],
)
def test_total_steps_counts_an_infinite_stream(epochs, images, batch, steps):
    assert configs.total_steps(OptimConfig(epochs=epochs, batch_size=batch), images) == steps


def test_steps_take_the_place_of_epochs():
    assert configs.total_steps(OptimConfig(epochs=None, steps=77), 1000) == 77


@pytest.mark.parametrize(
    ("group", "changes", "message"),
    [
        ("optim", {"epochs": None}, "exactly one of --epochs and --steps"),
        ("optim", {"steps": 20_000}, "exactly one of --epochs and --steps"),
        ("optim", {"epochs": -1.0}, "--epochs -1"),
        ("optim", {"batch_size": 0}, "--batch-size 0"),
        ("optim", {"lr": 0.0}, "--lr 0"),
        ("optim", {"lr": float("nan")}, "--lr nan"),
        ("optim", {"epochs": None, "steps": 100}, "--warmup-steps 10"),
        ("optim", {"mixup_alpha": -0.1}, "--mixup-alpha"),
        ("optim", {"label_smoothing": 1.0}, "--label-smoothing"),
        ("data", {"randaug_magnitude": 11.0}, "--randaug-magnitude 11"),
        ("data", {"randaug_layers": 10**9}, "--randaug-layers 1000000000: must be from 0 to 100"),
        ("data", {"minival": 1.0}, "--minival 1"),
        (
            "run",
            {"name": "a\nb"},
            r"--name 'a\\nb': has a line break or another control character in it; leave it out",
        ),
        ("data", {"resolution": 10**8}, "--resolution 100000000: must be from 1 to 8,192"),
        ("optim", {"epochs": float("inf")}, "--epochs inf: must be a finite number"),
        ("optim", {"weight_decay": float("inf")}, "--weight-decay inf: must be a finite number"),
        ("optim", {"grad_clip_norm": float("nan")}, "--grad-clip-norm nan: must be a finite number"),
        ("optim", {"grad_clip_norm": 0.0}, "--grad-clip-norm 0: must be above 0; None switches clipping off"),
        ("optim", {"batch_size": 10**11}, "--batch-size 100000000000: must be from 1 to 1,048,576"),
        ("optim", {"beta1": 2.0}, "--beta1 2: must be from 0 to below 1"),
        ("optim", {"beta2": 1.0}, "--beta2 1: must be from 0 to below 1"),
        ("optim", {"momentum": 5.0}, "--momentum 5: must be from 0 to below 1"),
        ("optim", {"momentum": 0.5}, "--momentum 0.5: has no effect on adamw; leave it out"),
        ("optim", {"optimizer": "sgd", "beta2": 0.95}, "--beta2 0.95: has no effect on sgd"),
        ("optim", {"optimizer": "sgd", "first_moment": "bfloat16"}, "--first-moment bfloat16: has no effect on sgd"),
        ("optim", {"eps": 0.0}, "--eps 0.0: must be from 1e-37 to"),
        ("optim", {"eps": 1e-300}, "--eps 1e-300: must be from 1e-37 to"),
        ("run", {"hang_timeout": float("nan")}, "--hang-timeout nan: must be a finite number"),
        ("run", {"threads": 0}, "--threads 0"),
        ("run", {"threads": 100_000}, "--threads 100000: must be from 1 to 1,024"),
        ("run", {"name": "a/b"}, "--name a/b"),
        ("run", {"name": ".."}, r"--name \.\.: a run's name is one folder"),
        ("run", {"name": 300 * "n"}, "--name n+...: longer than the 255 bytes"),
        ("run", {"name": os.fsdecode(b"\xff")}, "--name .: not UTF-8"),
        ("run", {"name": ""}, "--name: empty"),
        ("run", {"name": " "}, "--name: empty"),
        ("run", {"runs_dir": Path(os.fsdecode(b"runs\xe9"))}, "--runs-dir runs.,.*: not UTF-8"),
        ("run", {"runs_dir": Path("s3://bucket/runs")}, "--runs-dir s3://bucket/runs: must be on this machine's disks"),
        ("run", {"seed": -1}, "--seed -1"),
        ("run", {"seed": 10**23}, "--seed 10+: must be below 2"),
    ],
)
def test_impossible_values_name_their_flag(group, changes, message):
    config = Config()
    config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **changes)})
    with pytest.raises(UserError, match=message) as raised:
        validate(config)
    assert "\n" not in str(raised.value)


def test_yaml_round_trip_keeps_every_field():
    config = Config(
        DataConfig(data="x", resolution=64),
        ModelConfig(model="B/32", width=96),
        OptimConfig(epochs=None, steps=50, warmup_steps=5, grad_clip_norm=None),
        RunConfig(name="n", seed=3),
    )
    assert configs.from_dict(yaml.safe_load(configs.to_yaml(config))) == config


def test_unknown_field_of_another_version_is_refused():
    with pytest.raises(UserError, match="bogus"):
        configs.from_dict({"data": {"bogus": 1}})


def test_what_a_run_that_goes_on_may_change():
    """All else changes the weights, and is refused by its name where it differs."""
    fields = [field for group in configs.GROUPS.values() for field in dataclasses.fields(group)]
    assert sorted(field.name for field in fields if field.metadata.get("operational")) == [
        *("attention", "autotune", "checkpoint_every", "compile", "data", "eval_every", "gpus", "grad_accum_steps"),
        *("hang_timeout", "keep_checkpoints", "log_every", "max_bad_share", "max_hours", "max_restarts"),
        *("max_skipped_steps", "name", "profile", "recipe", "resume", "runs_dir", "spike_threshold", "threads"),
    ]


def test_differences_leave_out_what_does_not_change_the_weights():
    old = Config()
    new = dataclasses.replace(
        old,
        run=dataclasses.replace(old.run, threads=3, log_every=7, gpus=0, compile="off"),
        optim=dataclasses.replace(old.optim, lr=2e-3),
    )
    assert configs.differences(old, new) == ["--lr 0.001 -> 0.002"]


def test_a_tilde_is_the_home_folder(monkeypatch):
    """Which no shell puts in its place within `--runs-dir=~/runs`."""
    monkeypatch.setenv("HOME", "/home/me")
    assert Config(run=RunConfig(runs_dir=Path("~/runs"), name="a")).run_dir == Path("/home/me/runs/a")
    assert Config(run=RunConfig(runs_dir=Path("~nobody-knows/runs"), name="a")).run_dir == Path("~nobody-knows/runs/a")


@pytest.mark.parametrize("given", ["s3://bucket/a b", "gs://bucket", "hdfs+x://host:8020/a:b", "file:///tmp/x"])
@pytest.mark.parametrize("flag", ["--out", ""])
def test_a_url_is_no_local_path(given, flag):
    shown = f"{flag} {given}".strip().replace(":///", "://")
    with pytest.raises(UserError) as raised:
        check_local(Path(given), flag)
    assert str(raised.value) == (
        f"{shown}: must be on this machine's disks; name a local path, and copy from or to the store"
    )


@pytest.mark.parametrize("given", ["runs", "/data/s3:/x", "./a/s3://x", "12:30/x", "a:b", "a b:/c", "~/x", ".", ""])
def test_other_names_are_local_paths(given):
    check_local(Path(given), "--out")
