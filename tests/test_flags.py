"""The flags of train: which there are, and what they make of a recipe."""

from __future__ import annotations

import re

import pytest
import yaml

from dali_vit.config import ModelConfig, from_dict
from tests.conftest import run

FLAGS = [
    *("--antialias", "--autotune", "--batch-size", "--beta1", "--beta2", "--checkpoint-every", "--compile"),
    "--config",
    *("--crop", "--data", "--depth", "--epochs", "--eps", "--eval-every"),
    *("--first-moment", "--gpus", "--grad-clip-norm", "--head", "--keep-checkpoints", "--label-smoothing"),
    *("--log-every", "--lr", "--minival", "--mixup-alpha", "--mlp-dim", "--model"),
    *("--momentum", "--name", "--no-antialias", "--no-resume", "--num-heads", "--optimizer"),
    *("--pool", "--posemb", "--print-config", "--randaug-contrast", "--randaug-layers", "--randaug-magnitude"),
    *("--recipe", "--resolution", "--resume", "--runs-dir", "--seed", "--steps"),
    *("--threads", "--warmup-steps", "--weight-decay", "--width"),
    *("--hang-timeout", "--max-bad-share", "--max-hours", "--max-restarts", "--max-skipped-steps", "--profile"),
    *("--attention", "--grad-accum-steps", "--residual", "--spike-threshold"),
]


def test_the_flags_of_train_are_frozen(capsys):
    code, out, _ = run("train", "--help", capsys=capsys)
    assert code == 0
    words = {word.strip(",.│ ") for word in out.split()}
    assert {w for w in words if w.startswith("--") and w.strip("-")} - {"--help"} == set(FLAGS)


def test_preview_groups_its_settings_as_train_does(capsys):
    groups = [
        re.findall(r"^\W*(\w* ?options)\W*$", run(command, "--help", capsys=capsys)[1], re.MULTILINE)
        for command in ("train", "preview")
    ]
    assert groups == 2 * [["options", "data options", "model options", "optim options", "run options"]]


def test_help_lists_every_recipe_with_its_line(capsys):
    from dali_vit import recipes

    _, out, _ = run("train", "--help", capsys=capsys)
    for line in recipes.describe().splitlines():
        assert line.strip() in out


def test_print_config_resolves_recipe_and_flags_without_training(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("train", "--recipe", "b32-90ep", "--lr", "0.002", "--print-config", capsys=capsys)
    config = yaml.safe_load(out)
    assert code == 0
    assert (config["model"]["model"], config["optim"]["lr"], config["optim"]["epochs"]) == ("B/32", 0.002, 90.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--model", "XL/16"], ["--resolution", "33"], ["--num-heads", "5"], ["--lr", "0"]])
def test_print_config_refuses_what_no_run_could_use(flags, capsys):
    code, out, err = run("train", *flags, "--print-config", capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert flags[1] in err


@pytest.mark.parametrize("form", [["--recipe=s16-300ep"], ["--recipe", "s16-300ep"]])
def test_both_spellings_of_recipe(form, capsys):
    _, out, _ = run("train", *form, "--print-config", capsys=capsys)
    assert yaml.safe_load(out)["optim"]["epochs"] == 300.0


@pytest.mark.parametrize("flag", [["--model", "S/16"], ["--model=S/16"]])
def test_a_model_by_its_name_has_its_own_size(flag, capsys):
    code, out, _ = run("train", "--recipe", "demo", *flag, "--depth", "6", "--print-config", capsys=capsys)
    model = yaml.safe_load(out)["model"]
    assert code == 0
    assert [model[key] for key in ("model", "width", "depth", "num_heads", "mlp_dim")] == ["S/16", None, 6, None, None]


@pytest.mark.parametrize("recipe", ["demo", "s16-90ep-linear-head"])
def test_a_model_of_timm_takes_nothing_of_the_recipes_model(recipe, capsys):
    code, out, err = run("train", "--recipe", recipe, "--model", "timm:resnet18", "--print-config", capsys=capsys)
    assert code == 0, err
    assert from_dict({"model": yaml.safe_load(out)["model"]}).model == ModelConfig("timm:resnet18")


@pytest.mark.parametrize("flags", [["--steps", "20000"], ["--epochs", "None", "--steps=20000"]])
def test_steps_replace_the_recipes_epochs(flags, capsys):
    _, out, _ = run("train", *flags, "--print-config", capsys=capsys)
    optim = yaml.safe_load(out)["optim"]
    assert (optim["steps"], optim["epochs"]) == (20_000, None)


def test_a_model_that_timm_lacks_is_not_printed(capsys):
    code, out, err = run("train", "--model", "timm:nope", "--print-config", capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("dali-vit: --model timm:nope: no such model in timm ")


def test_epochs_and_steps_are_not_both_taken(capsys):
    code, _, err = run("train", "--epochs", "3", "--steps=20", "--print-config", capsys=capsys)
    assert (code, err) == (2, "dali-vit: --epochs and --steps: give one of them, not both\n")


def test_a_negative_number_of_gpus_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("train", "--data", "demo", "--gpus", "-1", capsys=capsys)
    assert (code, out) == (2, "")
    assert err == "dali-vit: --gpus -1: must not be negative; 0 means the CPU\n"
