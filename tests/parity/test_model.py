"""Logits against big_vision's own, its parameters loaded through `dali_vit.big_vision`."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dali_vit import big_vision
from dali_vit.model import create_model
from dali_vit.variants import resolve_variant
from tests.parity.conftest import FOLDER, Reference, references


def load(reference: Reference) -> tuple[nn.Module, torch.Tensor]:
    """The file's model, with its parameters, and its images [N, 3, H, W]."""
    meta = reference.meta
    model = create_model(
        reference.model_config(), num_classes=meta["num_classes"], resolution=meta["resolution"], seed=1
    )
    state, unmapped = big_vision.from_big_vision(big_vision.load_npz(reference.path), model)
    assert unmapped == []
    model.load_state_dict(state)
    return model.eval(), torch.from_numpy(reference.arrays["images"]).permute(0, 3, 1, 2)


def test_logits_in_float32(model_reference: Reference) -> None:
    model, images = load(model_reference)
    with torch.inference_mode():
        logits = model(images).numpy()
    np.testing.assert_allclose(logits, model_reference.arrays["logits"], rtol=0, atol=1e-4)


def test_logits_under_bfloat16_autocast(model_reference: Reference) -> None:
    model, images = load(model_reference)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        assert model.train()(images).dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    expected = model_reference.arrays["logits"]
    assert np.linalg.norm(logits.numpy() - expected) <= 2e-2 * np.linalg.norm(expected)


def test_the_file_alone_tells_the_model(model_reference: Reference) -> None:
    meta, config = model_reference.meta, model_reference.model_config()
    inferred = big_vision.infer_config(big_vision.load_npz(model_reference.path))
    assert inferred.num_classes == meta["num_classes"]
    assert inferred.resolution == (meta["resolution"] if meta["posemb"] == "learn" else None)
    assert resolve_variant(inferred.config) == resolve_variant(config)
    sizes: dict[str, Any] = {"model": config.model, "width": None, "depth": None, "num_heads": None, "mlp_dim": None}
    assert dataclasses.replace(inferred.config, **sizes) == dataclasses.replace(config, **sizes)


def test_opening_the_file_gives_the_same_logits(model_reference: Reference) -> None:
    model, images = load(model_reference)
    opened, _, resolution = big_vision.open_npz(model_reference.path, model_reference.meta["resolution"])
    assert resolution == model_reference.meta["resolution"]
    with torch.inference_mode():
        assert torch.equal(opened(images), model(images))


@pytest.mark.parametrize("kind", ["model", "trajectory"])
def test_the_default_folder_has_files_of_this_kind(kind: str) -> None:
    if FOLDER.name == "reference":
        assert references(kind)
