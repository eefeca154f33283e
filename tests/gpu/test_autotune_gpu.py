"""The search for the loader's settings on a GPU: beside a real model, which it leaves as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dali_vit import autotune, loaders
from dali_vit import data as datasets
from dali_vit.config import Config
from dali_vit.distributed import Group
from dali_vit.model import create_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(300),
]

LOADS = {0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.75, 0.85, 1.0}


def test_a_search_beside_the_model(tiny_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DALI_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_SECONDS_PER_SETTING", 0.1)
    config = replace(tiny_config, run=replace(tiny_config.run, threads=None, autotune="auto"))
    dataset = datasets.load_dataset(config.data.data, minival=config.data.minival)
    group = Group(0, 1, 0, 1, torch.device("cuda", 0))
    model = create_model(config.model, num_classes=4, resolution=32).to(group.device)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    defaults = loaders.default_settings(config, group)
    with autotune._training_like(model, group) as work:
        rates = autotune.search(dataset, config, group, defaults, float("inf"), work)
        for load in {load for shares in autotune._HW_LOADS for tried in shares.values() for load in tried}:
            settings = replace(defaults, decoder=replace(defaults.decoder, hw_decoder_load=load))
            if settings not in rates:  # which are tried depends on how fast the others were
                rates[settings] = autotune._rate(dataset, config, group, settings, set(), work)
    assert min(rates.values()) > 0, "no setting fails"
    assert {settings.decoder.region for settings in rates} == {"full", defaults.decoder.region}
    assert {settings.decoder.hw_decoder_load for settings in rates} == LOADS

    found = autotune.loader_settings(dataset, config, group, model)
    assert autotune.loader_settings(dataset, config, group, model) == found
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
