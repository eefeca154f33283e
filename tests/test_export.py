"""timm's own create_model makes the same model of what export writes, whatever the pooling, positions and head."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dali_vit import checkpoint, weights
from dali_vit.config import ModelConfig
from dali_vit.export import crop_pct
from dali_vit.model import create_model
from tests.conftest import run

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 4, "mlp_dim": 48}
CLASSES = ("ant", "bee", "cat", "dog", "eel")


def save(path: Path, config: ModelConfig, resolution: int = 32, classes: tuple[str, ...] | None = CLASSES) -> Path:
    """A checkpoint in which every value is drawn anew, so that no two tensors can be mistaken for each other."""
    model = create_model(config, num_classes=len(CLASSES), resolution=resolution)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    checkpoint.save_model(path, model.state_dict(), config, resolution, classes, 7)
    return path


def images(resolution: int) -> torch.Tensor:
    """Values in [0, 1], [3, 3, H, W]."""
    return torch.rand(3, 3, resolution, resolution, generator=torch.Generator().manual_seed(1))


def loaded(folder: Path, **options: Any) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


@pytest.mark.parametrize("out", [".", "link", "~/weights", "new"])
def test_out_may_be_any_name_of_an_empty_folder(out, tmp_path, monkeypatch, capsys):
    """The one that the user is in stays the same folder."""
    source = save(tmp_path / "a.safetensors", ModelConfig(model="S/8", **SIZES))
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder if out == "." else tmp_path)
    inode = folder.stat().st_ino
    code, _, err = run("export", "--checkpoint", str(source), "--out", out, capsys=capsys)
    assert code == 0, err
    made = {"~/weights": tmp_path / "home" / "weights", "new": tmp_path / "new"}.get(out, folder)
    files = ["config.json", "head/classifier.safetensors", "model.safetensors"]
    assert sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()) == files
    assert len(list(made.glob("*.safetensors"))) == 1  # timm before 1.0.29 fails where there are two
    assert folder.stat().st_ino == inode
    assert (tmp_path / "link").is_symlink()


def test_in_a_folder_that_is_there_the_file_that_makes_it_a_model_comes_last(tmp_path, monkeypatch, capsys):
    source = save(tmp_path / "a.safetensors", ModelConfig(model="S/8", **SIZES))
    (tmp_path / "out").mkdir()
    came: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (came.append(path.name), rename(path, to))[1])
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(sorted(map(folder.joinpath, os.listdir(folder)))))
    code, _, err = run("export", "--checkpoint", str(source), "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 0, err
    assert came == ["head", "model.safetensors", "config.json"]


@torch.no_grad()
@pytest.mark.parametrize("pool", ["gap", "tok"])
@pytest.mark.parametrize("posemb", ["sincos2d", "learn"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_timm_gives_the_same_logits(pool, posemb, head, tmp_path, capsys):
    config = ModelConfig(model="S/8", pool=pool, posemb=posemb, head=head, **SIZES)
    source, folder = save(tmp_path / "a.safetensors", config), tmp_path / "out"
    code, out, err = run("export", "--checkpoint", str(source), "--out", str(folder), capsys=capsys)
    assert code == 0, err
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    stock = loaded(folder)
    assert type(stock) is timm.models.vision_transformer.VisionTransformer
    x = images(32) * 2 - 1
    result = stock(x)
    if head == "mlp":
        assert "timm's ViT has no MLP head: logits = head(tanh(pre_logits(features)))" in out
        assert "gives [N, 32] features" in out.splitlines()[0]
        assert "label_names" not in json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        parts = load_file(folder / "head" / "classifier.safetensors")
        with safe_open(folder / "head" / "classifier.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        hidden = torch.tanh(torch.nn.functional.linear(result, parts["pre_logits.weight"], parts["pre_logits.bias"]))
        result = torch.nn.functional.linear(hidden, parts["head.weight"], parts["head.bias"])
    else:
        assert len(out.splitlines()) == 1
        assert not (folder / "head").exists()
        assert stock.pretrained_cfg["label_names"] == list(CLASSES)
    assert torch.equal(result, checkpoint.load_model(source)(x))

    # What timm prepares images with is what our evaluation does.
    data = timm.data.resolve_data_config(model=stock)
    assert [list(data[key]) for key in ("mean", "std", "input_size")] == [[0.5] * 3, [0.5] * 3, [3, 32, 32]]
    assert (data["interpolation"], data["crop_pct"], data["crop_mode"]) == ("bilinear", 32 / 37.5, "center")

    # And another classifier may be put on it.
    other = loaded(folder, num_classes=3)
    assert other(x).shape == (3, 3)
    assert torch.equal(other.forward_features(x), stock.forward_features(x))

    # Or other channels, which timm gives the sum of the weights.
    grey = x[:, :1]
    of_grey = loaded(folder, in_chans=1).forward_features(grey)
    torch.testing.assert_close(of_grey, stock.forward_features(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_timm_resizes_to_the_side_that_our_evaluation_does():
    for resolution in range(8, 1025):
        scale = crop_pct(resolution)
        assert math.floor(resolution / scale) == round(resolution * 256 / 224)  # as timm's transforms have it
        assert scale == pytest.approx(0.875, rel=1 / resolution)
    assert (crop_pct(224), crop_pct(512)) == (0.875, 0.875)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "resolution", "said"),
    [
        ("timm:test_resnet", 64, []),
        ("timm:test_vit", 96, []),
        (
            "timm:resnet10t",
            64,
            [
                "it takes (value / 255 - mean) / std with mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225],"
                " not [-1, 1]"
            ],
        ),
    ],
)
def test_comparators_keep_timms_name_and_statistics(model, resolution, said, tmp_path, capsys):
    source = save(tmp_path / "a.safetensors", ModelConfig(model=model), resolution)
    code, out, err = run("export", "--checkpoint", str(source), "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 0, err
    assert out.splitlines()[1:] == said
    stock = loaded(tmp_path / "out")
    data = timm.data.resolve_data_config(model=stock)
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = images(resolution)
    expected = checkpoint.load_model(source)(x * 2 - 1)
    torch.testing.assert_close(stock((x - mean) / std), expected, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == model.removeprefix("timm:")


def pretend(key: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has timm say something else of the inputs of all models that it makes."""
    create = timm.create_model

    def other(*arguments: Any, **options: Any) -> Any:
        model = create(*arguments, **options)
        model.pretrained_cfg = {**model.pretrained_cfg, key: value}
        return model

    monkeypatch.setattr(timm, "create_model", other)


@pytest.mark.parametrize("other", ["mean", "std"])
def test_inputs_of_another_mean_or_std_alone_are_told_of(other, tmp_path, monkeypatch, capsys):
    source = save(tmp_path / "a.safetensors", ModelConfig(model="timm:test_resnet"), 64)
    pretend(other, (0.25, 0.5, 0.75), monkeypatch)
    code, out, err = run("export", "--checkpoint", str(source), "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 0, err
    mean, std = ([0.25, 0.5, 0.75] if name == other else [0.5] * 3 for name in ("mean", "std"))
    assert out.splitlines()[1:] == [f"it takes (value / 255 - mean) / std with mean {mean} and std {std}, not [-1, 1]"]


def test_a_plain_vit_is_of_fixed_size_whatever_timm_says_of_the_nearest_name(tmp_path, monkeypatch, capsys):
    source = save(tmp_path / "a.safetensors", ModelConfig(model="S/8", **SIZES))
    pretend("fixed_input_size", False, monkeypatch)
    code, _, err = run("export", "--checkpoint", str(source), "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 0, err
    assert json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]["fixed_input_size"] is True


@torch.no_grad()
def test_another_resolution_and_the_nearest_registered_name(tmp_path, capsys):
    for name, registered in [("S/16", "vit_small_patch16_224"), ("M/8", "vit_base_patch16_224")]:
        config = ModelConfig(model=name, posemb="learn", head="linear", **SIZES)
        source = save(tmp_path / f"{name[0]}.safetensors", config, classes=None)
        folder = tmp_path / name[0]
        arguments = ("export", "--checkpoint", str(source), "--out", str(folder), "--resolution", "64")
        assert run(*arguments, capsys=capsys)[0] == 0
        assert json.loads((folder / "config.json").read_text())["architecture"] == registered
        x = images(64) * 2 - 1
        assert torch.equal(loaded(folder)(x), checkpoint.open_model(source, 64).model(x))


def test_of_two_exports_at_once_one_says_that_the_folder_is_there(tmp_path, monkeypatch, capsys):
    source = save(tmp_path / "a.safetensors", ModelConfig(model="S/8", **SIZES))
    out = tmp_path / "out"
    write = weights.write

    def write_meanwhile(*arguments):
        write(*arguments)
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("of the other")

    monkeypatch.setattr(weights, "write", write_meanwhile)
    code, _, err = run("export", "--checkpoint", str(source), "--out", str(out), capsys=capsys)
    assert (code, err) == (2, f"dali-vit: --out {out}: exists; choose another folder or remove it\n")
    assert (out / "config.json").read_text() == "of the other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "out"]


def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path, capsys):
    source = save(tmp_path / "a.safetensors", ModelConfig(model="S/8", **SIZES))
    out = tmp_path / "out"
    for folder in (out, tmp_path):
        for process in (1, 22):
            (folder / f".out.{process}.tmp/head").mkdir(parents=True)
    (tmp_path / ".other.1.tmp").mkdir()
    command = ("export", "--checkpoint", str(source), "--out", str(out))
    written = os.open(out / ".out.22.tmp", os.O_RDONLY)
    fcntl.flock(written, fcntl.LOCK_EX)  # by another export, which goes on
    assert run(*command, capsys=capsys)[0] == 2
    assert [path.name for path in out.iterdir()] == [".out.22.tmp"]
    os.close(written)
    assert run(*command, capsys=capsys)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "head", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.1.tmp", "a.safetensors", "out"]


def test_nothing_is_overwritten_and_nothing_left_half_done(tmp_path, capsys):
    source = save(tmp_path / "a.safetensors", ModelConfig(model="S/8", **SIZES))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    for out, words in [("out", "exists"), ("file", "exists"), ("file/below", "cannot write there")]:
        code, _, err = run("export", "--checkpoint", str(source), "--out", str(tmp_path / out), capsys=capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert f"--out {tmp_path / out}: {words}" in err
    code, _, err = run("export", "--checkpoint", str(source), "--out", "s3://bucket/x", capsys=capsys)
    told = "--out s3://bucket/x: must be on this machine's disks; name a local path, and copy from or to the store"
    assert (code, err) == (2, f"dali-vit: {told}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "file", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
