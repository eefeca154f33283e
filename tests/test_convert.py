"""convert: weights from big_vision's arrays to ours and back, and their loading in timm."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dali_vit import big_vision, checkpoint
from dali_vit.model import create_model
from tests.conftest import run
from tests.test_inference import CONFIG


@pytest.mark.timeout(120)
def test_convert_there_and_back_is_bit_exact(tmp_path, capsys):
    model = create_model(CONFIG, num_classes=5, resolution=32, seed=3)
    with torch.no_grad():
        model.head.weight.normal_()
    big_vision.save_npz(tmp_path / "a.npz", big_vision.to_big_vision(model))
    steps = [("a.npz", "b.safetensors"), ("b.safetensors", "c.npz")]
    for source, target in steps:
        code, out, err = run("convert", str(tmp_path / source), str(tmp_path / target), capsys=capsys)
        assert code == 0, err
        assert target in out
    expected, actual = np.load(tmp_path / "a.npz"), np.load(tmp_path / "c.npz")
    assert sorted(expected.files) == sorted(actual.files)
    for name in expected.files:
        assert np.array_equal(expected[name], actual[name]), name
    state = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    # Every --checkpoint takes either file.
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        logits = [checkpoint.load_model(tmp_path / name)(images) for name in ("a.npz", "b.safetensors", "c.npz")]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_what_convert_writes_loads_in_timm(tmp_path, capsys):
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    model = create_model(CONFIG, num_classes=5, resolution=32, seed=3).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    big_vision.save_npz(tmp_path / "a.npz", big_vision.to_big_vision(model))
    assert (
        run("convert", str(tmp_path / "a.npz"), str(tmp_path / "b.safetensors"), "--resolution", "32", capsys=capsys)[0]
        == 0
    )
    stock = VisionTransformer(
        img_size=32,
        patch_size=8,
        num_classes=5,
        embed_dim=32,
        depth=1,
        num_heads=2,
        mlp_ratio=2,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        act_layer=partial(torch.nn.GELU, approximate="tanh"),
    ).eval()
    stock.load_state_dict(load_file(tmp_path / "b.safetensors"), strict=True)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(stock(images), model(images), rtol=1e-6, atol=1e-6)


@pytest.mark.timeout(60)
def test_what_is_wrong_with_an_npz_file_is_told(tmp_path, monkeypatch, capsys):
    path, out, scale = tmp_path / "a.npz", str(tmp_path / "b.safetensors"), "Transformer/encoder_norm/scale"
    params = big_vision.to_big_vision(create_model(CONFIG, num_classes=5, resolution=32))
    np.savez(path, **{**params, scale: params[scale].astype(object)})
    code, told, err = run("convert", str(path), out, capsys=capsys)
    assert (code, err) == (2, f"dali-vit: {path}: 1 parameter is missing: {scale}\n")
    assert told.startswith(f"{path}: left out, as they are no arrays of numbers: {scale}\n")
    with zipfile.ZipFile(path, "w") as damaged:
        np.save(whole := io.BytesIO(), params[scale])
        damaged.writestr(f"{scale}.npy", whole.getvalue()[:-1])
    code, _, err = run("convert", str(path), out, capsys=capsys)
    assert (code, err.startswith(f"dali-vit: {path}: not a whole .npz file (")) == (2, True)
    assert "no ZIP archive" not in err
    path.write_text("an HTML page")
    told = f"dali-vit: {path}: not a whole .npz file (it is no ZIP archive); fetch or copy it again\n"
    assert run("convert", str(path), out, capsys=capsys)[::2] == (2, told)
    with monkeypatch.context() as patched:
        patched.setattr(np, "load", lambda *_, **__: (tmp_path / "absent").read_bytes())
        told = f"dali-vit: {path}: not a whole .npz file ([Errno 2] No such file or directory: '{tmp_path / 'absent'}')"
        assert run("convert", str(path), out, capsys=capsys)[2].startswith(told)
    params[scale][3] = np.inf
    big_vision.save_npz(path, params)
    code, told, err = run("convert", str(path), out, "--resolution", "32", capsys=capsys)
    assert (code, err) == (0, "")
    assert told.startswith(f"{path}: not all of its weights are finite: {scale}\n")


@pytest.mark.timeout(60)
def test_convert_resamples_positions_and_overwrites_nothing(tmp_path, capsys):
    model = create_model(CONFIG, num_classes=5, resolution=32, seed=3)
    big_vision.save_npz(tmp_path / "a.npz", big_vision.to_big_vision(model))
    arguments = ["convert", str(tmp_path / "a.npz"), str(tmp_path / "b.safetensors")]
    assert run(*arguments, "--resolution", "64", capsys=capsys)[0] == 0
    opened = checkpoint.open_model(tmp_path / "b.safetensors")
    assert opened.resolution == 64
    assert opened.model.pos_embed.shape == (1, 64, 32)
    code, _, err = run(*arguments, capsys=capsys)
    assert (code, "exists" in err) == (2, True)
    for source, words in [("missing.npz", "no such file"), ("cut.npz", "cut.npz")]:
        (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
        code, _, err = run("convert", str(tmp_path / source), str(tmp_path / "d.safetensors"), capsys=capsys)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err
        assert "--checkpoint" not in err  # which convert does not have
    assert not (tmp_path / "d.safetensors").exists()
