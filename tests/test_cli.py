"""The command line from outside: what it prints, with what code it exits, what it leaves on the disk."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import yaml
from PIL import Image

from dali_vit.config import mendable
from tests.conftest import CLASSES, TINY, VAL_PER_CLASS, read_metrics, run, write_image_folder
from tests.processes import dali_vit


def good(image_folder, tmp_path) -> list[str]:
    return ["train", "--data", str(image_folder), "--runs-dir", str(tmp_path / "runs"), "--gpus", "0", *TINY]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--recipe", "nonsense"], ["--recipe nonsense"]),
        (["--recipe"], ["--recipe"]),
        (["--runs-dir", ""], ["--runs-dir: empty; give it a value, or leave it out"]),
        (["--runs-dir="], ["--runs-dir: empty; give it a value, or leave it out"]),
        (["--lr", "1", ""], ["an argument: empty; give it a value, or leave it out"]),
        (
            ["--recipe", "demo", "--model", "timm:resnet18"],
            ["--width 32: has no effect on timm:resnet18; leave it out"],
        ),
        (["--epocs", "3"], ["--epocs", "; did you mean --epochs? (`dali-vit train --help`"]),
        (["--qwertyuiop"], ["Unrecognized options: --qwertyuiop (`dali-vit train --help`"]),
        (["--data-dir", "x"], ["Unrecognized options: --data-dir, x; did you mean --data? (`dali-vit train --help`"]),
        (["--wd=0.1"], ["; did you mean --weight-decay, which is not multiplied by --lr? ("]),
        (["--pretrained"], ["Unrecognized options: --pretrained; every run starts from scratch ("]),
        (["--lrr", "1", "--batch", "8", "--data_dir=x"], ["=x; --batch: did you mean --batch-size?; --data_dir: did"]),
        (["/"], ["Unrecognized options: / (`"]),
        (["--resume=/"], ["; --resume takes nothing: --runs-dir and --name say which run ("]),
        (["--resume", "/"], ["; --resume takes nothing: --runs-dir and --name say which run ("]),
        (["--model", "vit_small_patch16_224"], ["(such as S/16), or timm:vit_small_patch16_224\n"]),
        (["--epochs", "many"], ["--epochs"]),
        (["--epochs", "1", "--steps", "5"], ["--epochs", "--steps"]),
        (["--model", "XL/16"], ["--model XL/16", "S/16"]),
        (["--model", "timm:resnet5000"], ["timm:resnet5000"]),
        (["--resolution", "33"], ["--resolution 33", "32"]),
        (["--gpus", "64"], ["--gpus 64", "--gpus"]),
        (["--data", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--steps", "1"], ["--warmup-steps"]),
        (["--crop", "center"], ["--crop"]),
        (["--epochs", "1e308"], ["--epochs 1e+308: must be from 0 to 1,000,000"]),
        (["--steps", "1" + "0" * 30], ["--steps 1", "must be from 0 to 10,000,000,000"]),
        (["--hang-timeout", "1e30"], ["--hang-timeout 1e+30: must be from 0 to 10,000,000"]),
        (["--lr", "1e308"], ["--lr 1e+308: must be from 0 to 1e+38"]),
        *[(["--lr", rate], [f"--lr {rate}: must be above 0, such as 0.001"]) for rate in ("0", "-1")],
        (["--weight-decay", "1.5"], ["--weight-decay 1.5: must be from 0 to 1"]),
        (["--hang-timeout", "-1"], ["--hang-timeout -1.0: must be from 0"]),
    ],
)
def test_a_mistake_is_one_line_code_2_and_nothing_written(flags, words, image_folder, tmp_path, capsys):
    code, out, err = run(*good(image_folder, tmp_path), *flags, capsys=capsys)
    assert code == 2
    assert out == ""
    assert err.startswith("dali-vit: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("images", "; did you mean --data images?"),
        ("demo", "; did you mean --data ./demo?"),  # demo is a set of ours
        ("my, images", "; did you mean --data 'my, images'?"),
        ("n" * 60 + "-" + "m" * 60, "; did you mean --data nnn"),
        ("absent", " (`dali-vit train --help`"),
    ],
)
def test_a_folder_without_a_flag_is_taken_for_data(name, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name != "absent":
        (tmp_path / name).mkdir()
    for others in ([], ["-b", "256", "--amp"]):  # as timm's scripts are called
        code, _, err = run("train", name, "--epochs", "3", *others, capsys=capsys)
        assert (code, err.count("\n"), err.split(": ")[:2]) == (2, 1, ["dali-vit", "Unrecognized options"])
        assert hint in err


@pytest.mark.parametrize("name", ["mine", "mine/checkpoints"])
def test_a_file_in_place_of_a_runs_folder_is_named(name, image_folder, tmp_path, capsys):
    (tmp_path / "runs" / name).parent.mkdir(parents=True)
    (tmp_path / "runs" / name).touch()
    code, _, err = run(*good(image_folder, tmp_path), "--name", "mine", "--steps", "4", capsys=capsys)
    assert (code, err) == (2, f"dali-vit: --runs-dir {tmp_path}/runs: {name} is a file there; choose another --name\n")


@pytest.mark.parametrize("name", ["runs/s16-90ep/checkpoints", "."])
def test_a_folder_that_takes_no_run_is_told_of_before_the_data_are_read(name, tmp_path, monkeypatch, capsys):
    refused = tmp_path / name
    refused.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != refused)  # root may write anywhere
    code, out, err = run(*good("s3://bucket/set", tmp_path), capsys=capsys)
    assert (code, out) == (2, "")
    assert err == f"dali-vit: --runs-dir {tmp_path / 'runs'}: cannot write {refused} (Permission denied)\n"


LONG = f"/tmp/{300 * 'x'}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "IMAGES", "--runs-dir", LONG],
        ["train", "--data", LONG],
        ["eval", "--checkpoint", LONG, "--data", "IMAGES"],
        ["predict", "--checkpoint", "run", f"{LONG}.jpg"],
        ["convert", f"{LONG}.npz", "out.safetensors"],
        ["export", "--checkpoint", "run", "--out", LONG],
        ["preview", "--data", "IMAGES", "--out", f"{LONG}.png"],
        ["prepare", LONG, "out"],
        ["prepare", "IMAGES", LONG],
        ["verify", LONG],
    ],
)
def test_what_the_operating_system_refuses_is_one_line(arguments, image_folder, tmp_path, monkeypatch, capsys):
    """Here a name that is too long; a folder that may not be entered is refused in the same places, but not to root."""
    monkeypatch.chdir(tmp_path)
    arguments = [str(image_folder) if word == "IMAGES" else word for word in arguments]
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert out == ""
    assert err.startswith("dali-vit: ")
    assert err.count("\n") == 1
    assert f"{300 * 'x'}" in err
    assert "File name too long" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", b"runs"), "runs: Permission denied; check its permissions"),
        (OSError(28, "No space left on device", "runs"), "runs: No space left on device; make room"),
        (OSError(28, "No space left on device"), None),
        (FileNotFoundError(2, "No such file or directory", "runs"), None),
    ],
)
def test_which_refusals_are_the_users_to_mend(error, message):
    told = mendable(error)
    assert message == (None if told is None else str(told))


def test_data_is_asked_for(capsys):
    code, _, err = run("train", capsys=capsys)
    assert code == 2
    assert "--data" in err


def test_unknown_command(capsys):
    code, _, err = run("trian", capsys=capsys)
    assert (code, "trian" in err, "train" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: shutil.rmtree(root / "train"), ["train"]),
        (lambda root: [f.unlink() for f in (root / "train" / "bee").iterdir()], ["bee"]),
        (lambda root: shutil.rmtree(root / "val" / "cat"), ["cat", "val"]),
        (lambda root: [(root / f"train/ant/{x}.jpg").write_text("no image") for x in "xy"], ["ant/x.jpg", "2 of 18"]),
        (lambda root: [(root / f"val/dog/{x}.png").write_bytes(b"") for x in "xy"], ["dog/x.png", "2 of 10"]),
    ],
)
def test_a_faulty_data_folder_is_named(damage, words, tmp_path, capsys):
    root = write_image_folder(tmp_path / "data", train=4, val=2)
    damage(root)
    code, _, err = run(*good(root, tmp_path), capsys=capsys)
    assert code == 2
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(240)
def test_train_eval_predict_end_to_end(image_folder, tmp_path, capsys):
    command = [*good(image_folder, tmp_path), "--name", "run", "--steps", "12", "--log-every", "3", "--minival", "0.1"]
    command += ["--eval-every", "0"]
    code, out, err = run(*command, capsys=capsys)
    assert code == 0, err
    run_dir = tmp_path / "runs" / "run"
    assert "step 12/12" in out
    assert "data wait" in out
    assert "ETA" in out

    # The folder of the run, with all that belongs to it.
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["steps"] == 12
    assert "torch: " in (run_dir / "env.txt").read_text()
    assert Image.open(run_dir / "samples" / "train.png").size == (8 * 32, 32)
    assert [f.name for f in (run_dir / "checkpoints").glob("step_*")] == ["step_000000012"]
    metrics = read_metrics(run_dir)
    logged = [m for m in metrics if "train/loss" in m]
    assert [m["step"] for m in logged] == [3, 6, 9, 12]
    assert {
        *("train/loss", "train/lr", "train/grad_norm", "perf/images_per_sec", "perf/images_per_sec_per_gpu"),
        *("perf/step_ms", "perf/data_wait_pct"),
    } <= set(logged[0])
    assert {"val/top1", "val/top5", "val/loss", "minival/top1"} <= set(metrics[-1])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [3, 6, 9, 12]
    assert events.Scalars("val/top1")[-1].value == pytest.approx(metrics[-1]["val/top1"])
    assert "samples/train" in events.Tags()["images"]
    texts = {f"{name}/text_summary" for name in ("config", "summary", "environment")}
    assert texts <= set(events.Tags()["tensors"])

    # eval agrees with the trainer's own evaluation and counts every image once.
    code, out, err = run(
        *("eval", "--checkpoint", str(run_dir), "--data", str(image_folder), "--gpus", "0", "--batch-size", "5"),
        "--json",
        capsys=capsys,
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["val/count"] == VAL_PER_CLASS * len(CLASSES)
    assert result["val/top1"] == metrics[-1]["val/top1"]
    assert result["val/loss"] == pytest.approx(metrics[-1]["val/loss"], abs=1e-4)

    # predict names classes with probabilities.
    pictures = [str(image_folder / "val" / name / "000.jpg") for name in CLASSES]
    code, out, err = run(
        "predict", "--checkpoint", str(run_dir), *pictures, "--gpus", "0", "--top", "4", "--json", capsys=capsys
    )
    assert code == 0, err
    predictions = json.loads(out)
    assert [p["image"] for p in predictions] == pictures
    for prediction in predictions:
        assert sorted(p["class"] for p in prediction["predictions"]) == sorted(CLASSES)
        assert sum(p["probability"] for p in prediction["predictions"]) == pytest.approx(1, abs=1e-5)

    # Other settings for the same run are refused with the fields that differ, and nothing changes.
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    code, _, err = run(*command, "--lr", "0.5", "--seed", "3", capsys=capsys)
    assert code == 2
    assert "--lr 0.001 -> 0.5" in err
    assert "--seed 0 -> 3" in err
    code, _, err = run(*command, "--no-resume", capsys=capsys)
    assert (code, "--no-resume" in err) == (2, True)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before

    # Nor is a run begun anew over the metrics of one whose checkpoints somebody has removed.
    shutil.rmtree(run_dir / "checkpoints")
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    code, _, err = run(*command, "--no-resume", capsys=capsys)
    assert (code, "holds metrics of a run without a checkpoint" in err) == (2, True)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before

    # Without the flag it is, and what was logged is set aside.
    code, out, err = run(*command, capsys=capsys)
    assert code == 0, err
    assert f"{run_dir / 'metrics.jsonl'}.1 is what was logged before" in out
    for name in ("config.yaml", "env.txt", "metrics.jsonl"):
        assert (run_dir / f"{name}.1").read_bytes() == before[run_dir / name]
        assert (run_dir / name).exists()


@pytest.mark.parametrize("left", ["", "data:\n  dat"])
def test_a_folder_whose_config_was_cut_short_is_a_runs(left, image_folder, tmp_path, capsys):
    """A disk was full when it began."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.yaml").write_text(left)
    flags = ("--data", str(image_folder), "--name", "r", "--runs-dir", str(tmp_path), "--gpus", "0", *TINY)
    code, _, err = run("train", *flags, "--steps", "4", capsys=capsys)
    assert code == 0, err


@pytest.mark.parametrize("name", ["config.yaml", "env.txt"])
def test_a_folder_that_is_no_run_is_left_alone(name, image_folder, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).write_text("mine: 1\n")
    flags = ("--data", str(image_folder), "--name", "r", "--runs-dir", str(tmp_path), "--gpus", "0", *TINY)
    code, _, err = run("train", *flags, "--steps", "4", capsys=capsys)
    assert (code, err) == (
        2,
        f"dali-vit: {tmp_path / 'r'}: holds a {name} that is not a run's; choose another --name\n",
    )
    assert [path.read_text() for path in (tmp_path / "r").iterdir()] == ["mine: 1\n"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("steps", "recorded"), [(16, {10, 11}), (3, {1, 2}), (1, {0})])
def test_profile_writes_a_trace(steps, recorded, image_folder, tmp_path, capsys):
    """Of the steps after the first 10, of a shorter run its last."""
    command = [*good(image_folder, tmp_path), "--name", "p", "--profile", "2", "--eval-every", "0"]
    command += ["--steps", str(steps), "--warmup-steps", "0"]
    code, _, err = run(*command, capsys=capsys)
    assert code == 0, err
    (trace,) = (tmp_path / "runs" / "p" / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    names = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep#")}
    assert names == {f"ProfilerStep#{step}" for step in recorded}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--checkpoint", "x", ""],
        ["verify", ""],
        ["prepare", "", "set"],
        ["eval", "--checkpoint=", "--data", "x"],
    ],
)
def test_an_empty_path_is_not_the_working_directory(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert ": empty; give it a value, or leave it out (is a variable of the shell not set?)" in err
    assert not list(tmp_path.iterdir())


def test_predict_takes_no_url(tmp_path, capsys):
    code, out, err = run("predict", "--checkpoint", str(tmp_path), "https://x.org/a.jpg", capsys=capsys)
    assert (code, out) == (2, "")
    assert "https://x.org/a.jpg: must be on this machine's disks" in err


def test_predict_names_a_missing_image(tmp_path, capsys):
    code, _, err = run("predict", "--checkpoint", str(tmp_path), str(tmp_path / "no.jpg"), capsys=capsys)
    assert code == 2
    assert "no.jpg" in err


@pytest.mark.timeout(60)
def test_doctor_says_what_works():
    result = dali_vit("doctor", anew=True)
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout
    assert "DALI decodes and augments" in result.stdout
    assert re.search(r"^compile +torch.compile works$", result.stdout, re.MULTILINE)
    assert re.search(r"^input .*: works$", result.stdout, re.MULTILINE)
    assert re.search(r"^verdict +fit to train", result.stdout.splitlines()[-1])
