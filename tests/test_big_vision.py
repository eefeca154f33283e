"""big_vision's checkpoints: every published layout, the conversion back, and files that are no checkpoints."""

from __future__ import annotations

import io
import logging
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dali_vit import big_vision
from dali_vit.config import ModelConfig, UserError
from dali_vit.model import PlainViT, create_model, sincos2d

SIZES = {"width": 32, "depth": 3, "num_heads": 4, "mlp_dim": 48}


def random_vit(pool: str = "tok", posemb: str = "learn", head: str = "mlp", resolution: int = 32) -> PlainViT:
    """A small ViT with every parameter random, so that no two can be mistaken for each other."""
    config = ModelConfig(model="Ti/8", pool=pool, posemb=posemb, head=head, **SIZES)  # type: ignore[arg-type]
    model = create_model(config, num_classes=7, resolution=resolution)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    assert isinstance(model, PlainViT)
    return model.eval()


def images(resolution: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("pool", ["gap", "tok"])
@pytest.mark.parametrize("posemb", ["sincos2d", "learn"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_round_trip_is_bit_exact(tmp_path: Path, pool: str, posemb: str, head: str) -> None:
    model = random_vit(pool, posemb, head)
    params = big_vision.to_big_vision(model)
    big_vision.save_npz(tmp_path / "a.npz", params)
    loaded = big_vision.load_npz(tmp_path / "a.npz")
    assert same_bits(loaded, params)
    opened, config, resolution = big_vision.open_npz(tmp_path / "a.npz", 32)
    assert (config.pool, config.posemb, config.head, resolution) == (pool, posemb, head, 32)
    assert same_bits(opened.state_dict(), model.state_dict())
    assert not opened.training
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_names_and_shapes_are_big_visions() -> None:
    shapes = {name: array.shape for name, array in big_vision.to_big_vision(random_vit()).items()}
    block = {
        "LayerNorm_0/scale": (32,),
        "LayerNorm_0/bias": (32,),
        "LayerNorm_1/scale": (32,),
        "LayerNorm_1/bias": (32,),
        "MlpBlock_0/Dense_0/kernel": (32, 48),
        "MlpBlock_0/Dense_0/bias": (48,),
        "MlpBlock_0/Dense_1/kernel": (48, 32),
        "MlpBlock_0/Dense_1/bias": (32,),
        "MultiHeadDotProductAttention_0/out/kernel": (4, 8, 32),
        "MultiHeadDotProductAttention_0/out/bias": (32,),
    }
    for name in ("query", "key", "value"):
        block[f"MultiHeadDotProductAttention_0/{name}/kernel"] = (32, 4, 8)
        block[f"MultiHeadDotProductAttention_0/{name}/bias"] = (4, 8)
    assert shapes == {
        **{f"Transformer/encoderblock_{i}/{name}": shape for i in range(3) for name, shape in block.items()},
        "Transformer/encoder_norm/scale": (32,),
        "Transformer/encoder_norm/bias": (32,),
        "embedding/kernel": (8, 8, 3, 32),
        "embedding/bias": (32,),
        "pos_embedding": (1, 16, 32),
        "cls": (1, 1, 32),
        "pre_logits/kernel": (32, 32),
        "pre_logits/bias": (32,),
        "head/kernel": (32, 7),
        "head/bias": (7,),
    }


def scanned(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [n.removeprefix("Transformer/encoderblock_0/") for n in params if "encoderblock_0/" in n]
    stacks = {
        f"Transformer/encoderblock/{name}": np.stack([params[f"Transformer/encoderblock_{i}/{name}"] for i in range(3)])
        for name in names
    }
    return {**{n: a for n, a in params.items() if "encoderblock_" not in n}, **stacks}


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("params/", ["opt/0/mu/embedding/kernel", "chrono/accum_train_time"]),
        ("opt/target/", ["opt/state/step", "extra/accum_train_time"]),
        ("", []),
    ],
)
@pytest.mark.parametrize("layout", [dict, scanned])
def test_prefixes_and_scanned_layers(tmp_path: Path, prefix: str, others: list[str], layout) -> None:
    model = random_vit()
    tree = {prefix + name: array for name, array in layout(big_vision.to_big_vision(model)).items()}
    tree |= {name: np.zeros(3) for name in others}
    big_vision.save_npz(tmp_path / "a.npz", tree)
    opened, _, _ = big_vision.open_npz(tmp_path / "a.npz")
    assert same_bits(opened.state_dict(), model.state_dict())


def test_augreg_layout(tmp_path: Path) -> None:
    """Positions under Transformer/ with the [cls] token's among them, and pre-Linen submodule numbers."""
    model = random_vit()
    params = big_vision.to_big_vision(model)
    cls_position = np.full((1, 1, 32), 0.25, np.float32)
    old = {}
    for name, array in params.items():
        name = name.replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        name = name.replace("MlpBlock_0", "MlpBlock_3").replace("LayerNorm_1", "LayerNorm_2")
        old[name] = array
    positions = np.concatenate([cls_position, old.pop("pos_embedding")], axis=1)
    old["Transformer/posembed_input/pos_embedding"] = positions
    big_vision.save_npz(tmp_path / "a.npz", old)

    opened, config, resolution = big_vision.open_npz(tmp_path / "a.npz")
    assert (config.pool, config.posemb, config.head, resolution) == ("tok", "learn", "mlp", 32)
    state = opened.state_dict()
    assert torch.equal(state["cls_token"], model.state_dict()["cls_token"] + 0.25)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if name != "cls_token")


def test_the_resolution_is_noted_beside_the_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of fixed positions nothing in a file tells it; and a file that is not ours notes none, which is said."""
    model = create_model(
        ModelConfig(model="Ti/8", width=32, depth=1, num_heads=2, mlp_dim=64), num_classes=3, resolution=32
    )
    params = big_vision.to_big_vision(model)
    path = tmp_path / "a.npz"
    big_vision.save_npz(path, params, resolution=32)
    with np.load(path) as archive:
        assert sorted(archive.files) == sorted(params)
    opened, _, resolution = big_vision.open_npz(path)
    assert resolution == 32
    assert same_bits(opened.state_dict(), model.state_dict())
    assert big_vision.open_npz(path, 64)[2] == 64
    assert caplog.messages == []
    big_vision.save_npz(path, params)
    assert big_vision.open_npz(path)[2] == 224
    assert caplog.messages == [f"{path} does not say for which images it is: --resolution 224 is assumed"]


def test_positions_of_the_encoder_before_2022(tmp_path: Path) -> None:
    model = random_vit(pool="gap")
    params = big_vision.to_big_vision(model)
    params["Transformer/pos_embedding"] = params.pop("pos_embedding")
    big_vision.save_npz(tmp_path / "a.npz", params)
    assert same_bits(big_vision.open_npz(tmp_path / "a.npz")[0].state_dict(), model.state_dict())


def test_bfloat16_saved_as_void_is_widened(tmp_path: Path) -> None:
    params = big_vision.to_big_vision(random_vit())
    rounded = {name: torch.from_numpy(array).bfloat16() for name, array in params.items()}
    tree = {name: tensor.view(torch.int16).numpy().view("V2") for name, tensor in rounded.items()}
    big_vision.save_npz(tmp_path / "a.npz", tree)
    loaded = big_vision.load_npz(tmp_path / "a.npz")
    assert same_bits(loaded, {name: tensor.float().numpy() for name, tensor in rounded.items()})
    assert {array.dtype for array in loaded.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("new", [2, 3, 7, 14])
def test_positions_are_resampled_with_corners_on_corners(new: int) -> None:
    """Against the separable interpolation written with numpy.interp; scipy.ndimage.zoom(order=1) is the same."""
    old = 4
    grid = np.random.default_rng(0).normal(size=(old, old, 6)).astype(np.float32)
    at = np.arange(new) * (old - 1) / (new - 1)
    rows = np.apply_along_axis(lambda v: np.interp(at, np.arange(old), v), 0, grid)
    expected = np.apply_along_axis(lambda v: np.interp(at, np.arange(old), v), 1, rows)
    result = big_vision.resample_posemb(torch.from_numpy(grid.reshape(1, 16, 6)), new * new)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy().reshape(new, new, 6), expected, rtol=0, atol=1e-6)


def test_another_resolution_resamples_learned_and_recomputes_fixed_positions(tmp_path: Path) -> None:
    for posemb in ("learn", "sincos2d"):
        model = random_vit(posemb=posemb)
        big_vision.save_npz(tmp_path / "a.npz", big_vision.to_big_vision(model))
        opened, _, resolution = big_vision.open_npz(tmp_path / "a.npz", 64)
        positions = opened.state_dict()["pos_embed"]
        assert resolution == 64
        assert opened(images(64)).shape == (2, 7)
        if posemb == "sincos2d":
            assert torch.equal(positions, sincos2d(8, 8, 32))
        else:
            assert torch.equal(positions, big_vision.resample_posemb(model.state_dict()["pos_embed"], 64))
            assert torch.equal(positions[0, [0, 7, 56, 63]], model.state_dict()["pos_embed"][0, [0, 3, 12, 15]])
        # Our own checkpoints go the same way, from state dict to state dict.
        larger = random_vit(posemb=posemb, resolution=64)
        state = big_vision.resample_positions(model.state_dict(), larger)
        assert same_bits(state, opened.state_dict())


def test_config_is_inferred_from_the_shapes() -> None:
    for name in ("S/16", "Ti/32"):
        config = ModelConfig(model=name, pool="tok", head="linear")
        params = big_vision.to_big_vision(create_model(config, num_classes=5, resolution=64))
        assert big_vision.infer_config(params) == (config, 5, None)
    inferred = big_vision.infer_config(big_vision.to_big_vision(random_vit()))
    assert inferred == (ModelConfig(model="S/8", pool="tok", posemb="learn", head="mlp", **SIZES), 7, 32)


def test_default_resolution_without_learned_positions(tmp_path: Path) -> None:
    big_vision.save_npz(tmp_path / "a.npz", big_vision.to_big_vision(random_vit(posemb="sincos2d")))
    assert big_vision.open_npz(tmp_path / "a.npz")[2] == 224


def test_what_cannot_be_mapped_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = big_vision.to_big_vision(random_vit())
    params["aux_head/kernel"] = np.zeros((32, 5), np.float32)
    state, unmapped = big_vision.from_big_vision(params, random_vit())
    assert unmapped == ["aux_head/kernel"]
    assert state.keys() == random_vit().state_dict().keys()
    others = {"mask": np.ones(3, bool), "name": np.array("x"), "when": np.array("2026-11-30", "M8")}
    big_vision.save_npz(tmp_path / "a.npz", params | others)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("readme", b"text")
    with caplog.at_level(logging.WARNING, "dali_vit"):
        big_vision.open_npz(tmp_path / "a.npz", 32)
    assert caplog.messages == [
        f"{tmp_path}/a.npz: left out, as they are no arrays of numbers: name, when, readme",
        f"{tmp_path}/a.npz: left out, as the model has no place for them: aux_head/kernel, mask",
    ]


def test_missing_and_misshapen_parameters_are_named(tmp_path: Path) -> None:
    complete = big_vision.to_big_vision(random_vit())
    mlp = {name: array for name, array in complete.items() if "encoderblock_1/MlpBlock_0" not in name}
    with pytest.raises(ValueError, match="4 parameters are missing: Transformer/encoderblock_1/MlpBlock_0"):
        big_vision.from_big_vision(mlp, random_vit())
    headless = {name: array for name, array in complete.items() if not name.startswith("head/")}
    big_vision.save_npz(tmp_path / "a.npz", headless)
    with pytest.raises(ValueError, match=r"a\.npz: 1 parameter is missing: head/kernel"):
        big_vision.open_npz(tmp_path / "a.npz")
    other = {**complete, "pre_logits/kernel": np.zeros((32, 16), np.float32)}
    with pytest.raises(ValueError, match=re.escape("pre_logits/kernel of shape (32, 16): the model needs (32, 32)")):
        big_vision.from_big_vision(other, random_vit())


def test_models_of_other_kinds_are_refused() -> None:
    params = big_vision.to_big_vision(random_vit())
    with pytest.raises(ValueError, match="attention pooling"):
        big_vision.infer_config({**params, "MAPHead_0/probe": np.zeros((1, 1, 32))})
    with pytest.raises(ValueError, match="not that of square RGB patches"):
        big_vision.infer_config({**params, "embedding/kernel": np.zeros((8, 4, 3, 32))})
    resnet = create_model(ModelConfig(model="timm:test_resnet"), num_classes=5, resolution=32)
    with pytest.raises(ValueError, match="plain ViTs only"):
        big_vision.to_big_vision(resnet)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    big_vision.save_npz(path, big_vision.to_big_vision(random_vit()))
    whole = path.read_bytes()
    for content in (b"", b"not a zip file", whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz: not a whole \.npz file"):
            big_vision.load_npz(path)
    with pytest.raises(ValueError, match="not a whole"):
        big_vision.load_npz(tmp_path / "absent.npz")
    big_vision.save_npz(path, {"embedding/kernel": np.array([{"an": "object"}], dtype=object)})  # would need pickle
    with pytest.raises(ValueError, match="holds no ViT"):
        big_vision.load_npz(path)
    big_vision.save_npz(path, {"weights": np.zeros(3)})
    with pytest.raises(ValueError, match="holds no ViT"):
        big_vision.load_npz(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="not a whole"):
        big_vision.load_npz(path)


ODD: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "positions without axes": ({"pos_embedding": np.zeros(())}, "its arrays are not of a plain ViT's shapes ("),
    "positions of one axis": ({"pos_embedding": np.zeros(3)}, "its arrays are not of a plain ViT's shapes ("),
    "no positions": ({"pos_embedding": np.zeros((1, 0, 32))}, "its arrays are not of a plain ViT's shapes ("),
    "a layer": ({"Transformer/encoderblock/x": np.zeros(())}, "its arrays are not of a plain ViT's shapes ("),
    "heads": (
        {"Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias": np.zeros(())},
        "its arrays are not of a plain ViT's shapes (",
    ),
    "no heads": (
        {"Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias": np.zeros((0, 8))},
        "--num-heads 0: must be from 1 to 4,096",
    ),
    "an MLP": (
        {"Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias": np.zeros(())},
        "its arrays are not of a plain ViT's shapes (",
    ),
    "a classifier": ({"head/kernel": np.zeros(3)}, "its arrays are not of a plain ViT's shapes ("),
    "no classes": ({"head/kernel": np.zeros((32, 0))}, "head/kernel has no classes; give an image classifier"),
    "no patch": ({"embedding/kernel": np.zeros((0, 0, 3, 32))}, "its arrays are not of a plain ViT's shapes ("),
    "a classifier of texts": ({"head/kernel": np.array([["abc"]])}, "1 parameter is missing: head/kernel"),
}


@pytest.mark.parametrize("kind", ODD)
def test_arrays_of_shapes_that_no_vit_has_are_told_of_by_the_files_name(kind: str, tmp_path: Path) -> None:
    changed, message = ODD[kind]
    big_vision.save_npz(tmp_path / "a.npz", big_vision.to_big_vision(random_vit()) | changed)
    with pytest.raises(UserError) as raised:
        big_vision.open_npz(tmp_path / "a.npz")
    assert str(raised.value).startswith(f"{tmp_path}/a.npz: {message}")


def test_members_that_cannot_be_read_are_told_of_by_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    whole = io.BytesIO()
    np.save(whole, np.zeros(3, np.float32))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (%d,), }".ljust(127) + b"\n"
    members = {
        "a header that is none": ("x.npy", header.replace(b"'descr'", b"'descr\n("), "not a whole .npz file ("),
        "a size beyond all memory": ("x.npy", header % 10**17, "does not fit into memory, or is damaged ("),
    }
    for name, content, message in members.values():
        big_vision.save_npz(path, big_vision.to_big_vision(random_vit()))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, content)
        with pytest.raises(UserError) as raised:
            big_vision.open_npz(path)
        assert str(raised.value).startswith(f"{path}: {message}")
    big_vision.save_npz(path, big_vision.to_big_vision(random_vit()))
    data = path.read_bytes()
    for flag, method in ((1, 0), (0, 99)):  # encrypted; compressed in a way that nobody knows
        start = data.rindex(b"PK\x01\x02")
        path.write_bytes(data[: start + 8] + struct.pack("<HH", flag, method) + data[start + 12 :])
        with pytest.raises(UserError, match=r"a\.npz: not a whole \.npz file"):
            big_vision.open_npz(path)


def test_number_of_classes() -> None:
    assert big_vision.num_classes(random_vit().state_dict()) == 7
    with pytest.raises(ValueError, match="no classifier"):
        big_vision.num_classes({})
