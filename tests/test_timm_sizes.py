"""Which sides of an image a timm model takes, and what is said of those that it does not take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed

from dali_vit import model as models
from dali_vit.config import ModelConfig, UserError
from dali_vit.model import create_model, set_timm_resolution


@pytest.mark.parametrize("pads", [False, True])
def test_a_model_that_pads_its_images_takes_any_side(pads: bool) -> None:
    """Others would leave out the last rows and columns."""
    embed = PatchEmbed(img_size=None, patch_size=16, embed_dim=8, dynamic_img_pad=pads)
    model: Any = SimpleNamespace(patch_embed=embed)
    config = ModelConfig(model="timm:any")
    models._check_patch(config, model, 96)
    if pads:
        models._check_patch(config, model, 100)
        return
    with pytest.raises(UserError, match=r"^--resolution 100: "):
        models._check_patch(config, model, 100)


def test_a_side_at_which_no_pixel_is_left_is_refused() -> None:
    """By the convolutions themselves, whose error is one of torch's."""
    config = ModelConfig(model="timm:inception_v3")
    model = create_model(config, num_classes=3, resolution=96)
    with pytest.raises(UserError, match=r"^--resolution 32: timm:inception_v3 takes no images of that size \("):
        set_timm_resolution(config, model, 32)


def test_the_one_side_that_a_model_takes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("unexpected keyword argument 'img_size'")

    monkeypatch.setattr(timm, "create_model", refuse)
    config = ModelConfig(model="timm:vit_tiny_patch16_224")
    told = r"^--resolution 96: timm:vit_tiny_patch16_224 takes 224 only \(unexpected keyword argument 'img_size'\)$"
    with pytest.raises(UserError, match=told):
        create_model(config, num_classes=3, resolution=96)


def test_a_model_that_has_other_parameters_at_a_side_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights trained at one side would be no good for those."""
    config = ModelConfig(model="timm:test_resnet")
    model = create_model(config, num_classes=3, resolution=32)
    monkeypatch.setattr(models, "create_model", lambda *_, **__: torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"^--resolution 64: timm:test_resnet has other parameters at that size; "):
        set_timm_resolution(config, model, 64)


def test_patches_are_taken_of_images_of_one_size_alone() -> None:
    embed = models.PatchMatmul(img_size=32, patch_size=8, embed_dim=4).train()
    with pytest.raises(ValueError, match=r"^images are 32 x 40 pixels, not 32 x 32$"):
        embed(torch.zeros(1, 3, 32, 40))
