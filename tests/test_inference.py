"""eval and convert on small made-up sets, with a model whose answers are known: it names the colour."""

from __future__ import annotations

import json
import os
import re
import shutil
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dali_vit import big_vision, checkpoint
from dali_vit.arguments import EvalArguments
from dali_vit.config import Config, DataConfig, ModelConfig, UserError
from dali_vit.distributed import Group
from dali_vit.inference import _progress_bar, evaluate_checkpoint
from dali_vit.model import create_model
from tests.conftest import run

RED, GREEN, BLUE = (250, 5, 5), (5, 250, 5), (5, 5, 250)
CONFIG = ModelConfig(
    model="Ti/8", width=32, depth=1, num_heads=2, mlp_dim=64, posemb="learn", head="linear", pool="gap"
)


def colour_model(num_classes: int) -> torch.nn.Module:
    """A ViT that gives class 0 to red, 1 to green and 2 to blue images: tokens carry their patch's mean colour."""
    model = create_model(CONFIG, num_classes=num_classes, resolution=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1)
        for channel in range(3):
            model.patch_embed.proj.weight[channel, channel].fill_(1 / 64)
            model.head.weight[channel, channel] = 1
        model.head.bias[3:] = -100
    return model


def save(path: Path, num_classes: int, classes: tuple[str, ...] | None) -> Path:
    model = colour_model(num_classes)
    checkpoint.save_model(path, model.state_dict(), CONFIG, 32, classes, None)
    return path


def paint(folder: Path, *colours: tuple[int, int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for colour in colours:
        number = len(list(folder.parent.rglob("*.png")))
        Image.new("RGB", (40, 36), colour).save(folder / f"ILSVRC2012_val_{number:08d}.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    paint(tmp_path / "data/val/a", RED, RED, GREEN)  # files 0, 1, 2
    paint(tmp_path / "data/val/b", GREEN, GREEN)  # files 3, 4
    paint(tmp_path / "data/val/c", BLUE, RED)  # files 5, 6
    return tmp_path / "data"


def evaluate(*arguments: str | Path, capsys) -> dict[str, float]:
    code, out, err = run("eval", *map(str, arguments), "--gpus", "0", "--json", capsys=capsys)
    assert code == 0, err
    return json.loads(out)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("batch_size", ["2", "7", "1048576"])  # no more files are opened than there are
def test_val_counts_by_hand(data, tmp_path, batch_size, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("a", "b", "c"))
    result = evaluate("--checkpoint", model, "--data", data, "--batch-size", batch_size, capsys=capsys)
    assert result["val/count"] == 7
    assert result["val/top1"] == pytest.approx(100 * 5 / 7)
    assert result["val/top5"] == 100


@contextmanager
def on_a_terminal() -> Iterator[list[str]]:
    """Has descriptor 2 be a terminal of 80 columns meanwhile; in the end its text is in the list."""
    shown: list[str] = []
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    stderr = os.dup(2)
    os.dup2(theirs, 2)
    try:
        yield shown
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(theirs)
        text = b""
        with suppress(OSError):  # its end
            while part := os.read(ours, 1 << 16):
                text += part
        os.close(ours)
        shown.append(text.decode())


@pytest.mark.timeout(60)
def test_a_terminal_shows_how_far_eval_is(data, tmp_path, capsys):
    """A bar a pass over the images, each ended with its line."""
    model = save(tmp_path / "m.safetensors", 3, ("a", "b", "c"))
    (tmp_path / "real.json").write_text(json.dumps([[0]] * 7))
    arguments = ("--checkpoint", model, "--data", data, "--batch-size", "4")
    with on_a_terminal() as shown:
        result = evaluate(*arguments, "--real", tmp_path / "real.json", capsys=capsys)
    assert (result["val/count"], result["real/count"]) == (7, 7)
    lines = [line.split("\r")[-1] for line in shown[0].replace("\r\n", "\n").split("\n")]
    assert [line[: line.index("%")] for line in lines[:-1]] == ["val: 100", "real: 100"]
    assert all(" 7/7 [" in line for line in lines[:-1])
    assert lines[-1] == ""


@pytest.mark.timeout(60)
def test_only_the_main_process_shows_it(data, tmp_path):
    model = save(tmp_path / "m.safetensors", 3, ("a", "b", "c"))
    with on_a_terminal() as shown:
        second = Group(1, 2, 1, 2, torch.device("cpu"))
        result = evaluate_checkpoint(EvalArguments(model, str(data), batch_size=2, threads=1), second)
    assert result["val/count"] == 3
    assert shown == [""]


def test_the_bar_is_ended_before_an_error_is_told():
    with on_a_terminal() as shown, suppress(UserError), _progress_bar("val", 7, visible=True) as bar:
        bar.update(3)
        raise UserError("told")
    assert re.search(r"val: +43%\|.*\| 3/7 \[.*\]\r\n$", shown[0])


@pytest.mark.timeout(60)
def test_real_counts_by_hand(data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("a", "b", "c"))
    # Predictions are 0 0 1 1 1 2 0: right, wrong, right, left out, right, wrong, right.
    (tmp_path / "real.json").write_text(json.dumps([[0], [1, 2], [0, 1], [], [1], [0], [2, 0]]))
    result = evaluate(
        "--checkpoint", model, "--data", data, "--real", tmp_path / "real.json", "--batch-size", "4", capsys=capsys
    )
    assert result["real/count"] == 6
    assert result["real/top1"] == pytest.approx(100 * 4 / 6)
    assert result["val/count"] == 7


@pytest.mark.timeout(60)
def test_imagenet_v2_folders_are_class_indices(tmp_path, capsys):
    # As strings, 10 and 11 sort before 2.
    for name, colours in {"0": [RED], "1": [GREEN, RED], "2": [BLUE, BLUE], "10": [RED], "11": [BLUE]}.items():
        paint(tmp_path / "v2" / name, *colours)
    for classes in (None, tuple(f"n{i:08d}" for i in range(12))):
        model = save(tmp_path / f"m{classes is None}.safetensors", 12, classes)
        arguments = ["eval", "--checkpoint", str(model), "--data", str(tmp_path / "v2"), "--v2", "--json"]
        code, out, err = run(*arguments, "--gpus", "0", capsys=capsys)
        assert (code, err) == (0, f"{tmp_path / 'v2'} has images of 5 of the model's 12 classes alone\n")
        result = json.loads(out)
        assert result["v2/count"] == 7
        assert result["v2/top1"] == pytest.approx(100 * 4 / 7)
    shutil.rmtree(tmp_path / "v2" / "10")
    shutil.rmtree(tmp_path / "v2" / "11")
    whole = ["eval", "--checkpoint", str(save(tmp_path / "m3.safetensors", 3, None)), *arguments[3:]]
    assert run(*whole, "--gpus", "0", capsys=capsys)[::2] == (0, "")
    for flag in (["--split", "train"], ["--minival", "0.1"]):
        arguments = ("--checkpoint", str(model), "--data", str(tmp_path / "v2"), "--v2", *flag)
        code, _, err = run("eval", *arguments, capsys=capsys)
        assert (code, err.startswith(f"dali-vit: {' '.join(flag)}: with --v2 all of DATA is evaluated")) == (2, True)


@pytest.mark.timeout(60)
def test_minival_and_train_are_counted_apart(tmp_path, capsys):
    for name, colour in (("a", RED), ("b", GREEN), ("c", BLUE)):
        paint(tmp_path / "data/train" / name, *[colour] * 20)
    model = save(tmp_path / "m.safetensors", 3, ("a", "b", "c"))
    for split, count in (("minival", 6), ("train", 54)):
        result = evaluate(
            "--checkpoint", model, "--data", tmp_path / "data", "--split", split, "--minival", "0.1", capsys=capsys
        )
        assert (result[f"{split}/count"], result[f"{split}/top1"]) == (count, 100)


@pytest.mark.timeout(60)
def test_json_stands_alone_on_stdout(data, tmp_path, capsys):
    """What is said of a checkpoint that does not know its images' size goes to stderr."""
    model = create_model(replace(CONFIG, posemb="sincos2d"), num_classes=3, resolution=32)
    foreign = tmp_path / "foreign.npz"
    big_vision.save_npz(foreign, big_vision.to_big_vision(model))
    image = next((data / "val").rglob("*.png"))
    for command in (["eval", "--data", data], ["predict", image]):
        code, out, err = run(*map(str, command), "--checkpoint", str(foreign), "--gpus", "0", "--json", capsys=capsys)
        assert code == 0, err
        assert json.loads(out)
        assert f"{foreign} does not say for which images it is: --resolution 224 is assumed" in err


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("share", "minival", "train"), [(0.2, 12, 48), (0.0, None, 60)])
def test_minival_is_by_default_what_the_run_held_out(share, minival, train, tmp_path, capsys):
    for name, colour in (("a", RED), ("b", GREEN), ("c", BLUE)):
        paint(tmp_path / "data/train" / name, *[colour] * 20)
    run_dir = tmp_path / "runs/run"
    step = checkpoint.save(
        run_dir,
        step=3,
        config=Config(DataConfig(minival=share, resolution=32), CONFIG),
        classes=("a", "b", "c"),
        model_state=colour_model(3).state_dict(),
        trainer_state={},
        loader_state={},
    )
    found = {}
    for split in ("minival", "train") if minival else ("train",):
        for path in (run_dir, step, step / "model.safetensors"):
            result = evaluate("--checkpoint", path, "--data", tmp_path / "data", "--split", split, capsys=capsys)
            found.setdefault(split, []).append(result[f"{split}/count"])
    assert found.pop("train") == [train, train, 59]  # a file of weights does not say
    assert found == ({"minival": [minival, minival, 1]} if minival else {})


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--batch-size", "0", "must be from 1 to 1,048,576"),
        ("--threads", "0", "must be from 1 to 1,024"),
        ("--threads", "100000", "must be from 1 to 1,024"),
        ("--minival", "nan", "must be a share from 0 to below 1"),
        ("--resolution", "-32", "must be from 1 to 8,192"),
        ("--resolution", "33", "not divisible by the patch of Ti/8; use 32"),
    ],
)
def test_impossible_numbers_are_refused_by_their_flag(flag, value, message, data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("a", "b", "c"))
    code, _, err = run(
        "eval", "--checkpoint", str(model), "--data", str(data), flag, value, "--gpus", "0", capsys=capsys
    )
    assert (code, err) == (2, f"dali-vit: {flag} {value}: {message}\n")


@pytest.mark.parametrize("split", ["train", "minival"])
def test_real_labels_are_of_val_alone(split, data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("a", "b", "c"))
    arguments = ("--checkpoint", str(model), "--data", str(data), "--real", "real.json", "--split", split)
    code, _, err = run("eval", *arguments, "--gpus", "0", capsys=capsys)
    told = f"dali-vit: --real real.json: its labels are those of val; leave --split {split} out\n"
    assert (code, err) == (2, told)


LOCAL = "must be on this machine's disks; name a local path, and copy from or to the store"


def test_checkpoints_are_local(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, url = save(tmp_path / "m.safetensors", 3, ("a", "b", "c")), "s3://bucket/m.npz"
    for arguments, flag in [
        (("eval", "--checkpoint", url, "--data", str(data), "--gpus", "0"), "--checkpoint "),
        (("convert", str(model), url), ""),
        (("convert", url, "out.safetensors"), ""),
    ]:
        code, _, err = run(*arguments, capsys=capsys)
        assert (code, err) == (2, f"dali-vit: {flag}{url}: {LOCAL}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "m.safetensors"]


def test_class_names_may_be_any_bytes(tmp_path):
    names = ("a", "Größe", os.fsdecode(b"\xff"))
    assert checkpoint.open_model(save(tmp_path / "m.safetensors", 3, names)).classes == names


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit3", "test_resnet"])
def test_another_resolution_of_a_timm_model_is_made_as_timm_makes_it(name, tmp_path):
    config = ModelConfig(model=f"timm:{name}")
    model = create_model(config, num_classes=3, resolution=160, seed=1).eval()
    checkpoint.save_model(tmp_path / "m.safetensors", model.state_dict(), config, 160, ("a", "b", "c"), None)
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    opened = checkpoint.open_model(tmp_path / "m.safetensors", 96)
    assert opened.resolution == 96
    if name == "test_vit3":
        with pytest.raises(AssertionError):
            model(images)
        model.set_input_size(img_size=(96, 96))
    assert torch.equal(opened.model(images), model(images))


@torch.no_grad()
@pytest.mark.timeout(120)
def test_windows_stay_what_they_are_at_another_resolution(tmp_path, capsys):
    """Swin's: of a file of weights as of a checkpoint."""
    config = ModelConfig(model="timm:swin_tiny_patch4_window7_224")
    model = create_model(config, num_classes=3, resolution=224, seed=1).eval()
    checkpoint.save_model(tmp_path / "a.safetensors", model.state_dict(), config, 224, ("a", "b", "c"), None)
    for command in (
        ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")],
        ["export", "--checkpoint", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "c")],
    ):
        code, _, err = run(*command, "--resolution", "256", capsys=capsys)
        assert code == 0, err
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    logits = [checkpoint.open_model(tmp_path / name, 256).model(images) for name in ("a.safetensors", "b.safetensors")]
    assert torch.equal(logits[0], logits[1])
    table = load_file(tmp_path / "c" / "model.safetensors")["layers.0.blocks.0.attn.relative_position_bias_table"]
    assert torch.equal(table, model.state_dict()["layers.0.blocks.0.attn.relative_position_bias_table"])


@pytest.mark.parametrize(
    ("name", "resolution", "message"),
    [
        ("deit_tiny_patch16_224", 100, "not divisible by the patch of timm:deit_tiny_patch16_224; use 96"),
        ("cait_xxs24_224", 96, "timm:cait_xxs24_224 takes images of the size it was trained on alone; leave it out"),
    ],
)
def test_a_resolution_that_a_timm_model_does_not_take_is_named(name, resolution, message, tmp_path):
    config = ModelConfig(model=f"timm:{name}")
    model = create_model(config, num_classes=3, resolution=224)
    checkpoint.save_model(tmp_path / "m.safetensors", model.state_dict(), config, 224, None, None)
    with pytest.raises(UserError) as error:
        checkpoint.open_model(tmp_path / "m.safetensors", resolution)
    assert str(error.value) == f"--resolution {resolution}: {message}"


@pytest.mark.timeout(60)
def test_other_classes_than_the_models_are_refused(data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("x", "y", "z"))
    code, _, err = run("eval", "--checkpoint", str(model), "--data", str(data), "--gpus", "0", capsys=capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert "classes are not the 3 that the checkpoint was trained on (they differ in " in err
    model = save(tmp_path / "m4.safetensors", 4, None)
    code, _, err = run("eval", "--checkpoint", str(model), "--data", str(data), "--gpus", "0", capsys=capsys)
    assert code == 2
    assert "3 classes, the checkpoint 4" in err
