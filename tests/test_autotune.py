"""The search for the loader's settings: which it tries, which it chooses, which it remembers."""

from __future__ import annotations

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from dali_vit import autotune, environment, loaders
from dali_vit import data as datasets
from dali_vit.config import Config
from dali_vit.distributed import Group
from dali_vit.loaders import Decoder, LoaderSettings
from dali_vit.trials import describe
from pipelines.bad_samples import DecodeError

CPU = Group(0, 1, 0, 1, torch.device("cpu"))
CUDA = replace(CPU, device=torch.device("cuda", 0))
MODEL = torch.nn.Identity()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("DALI_VIT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data"
    for name, count in {"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1}.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (48, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")
    config = Config()
    return replace(
        config,
        data=replace(config.data, data=str(root), resolution=32, minival=0.0),
        optim=replace(config.optim, batch_size=4),
        run=replace(config.run, autotune="on"),
    )


@pytest.fixture
def dataset(config: Config) -> datasets.Dataset:
    return datasets.load_dataset(config.data.data, minival=0.0)


def path_of(dataset: datasets.Dataset, config: Config) -> Path:
    """The file that keeps what is found on one process of the CPU."""
    return autotune.cache_path(autotune._conditions(dataset, config, CPU, loaders.default_settings(config, CPU)))


def pretend(monkeypatch: pytest.MonkeyPatch, rates: dict[str, float]) -> list[LoaderSettings]:
    """Rates instead of measurements: the sum of those whose name is in the settings; and what is asked for."""
    asked: list[LoaderSettings] = []

    def rate(dataset: Any, config: Any, group: Any, settings: LoaderSettings, *_: Any) -> float:
        asked.append(settings)
        return 100.0 + sum(gain for name, gain in rates.items() if name in describe(settings).split(", "))

    monkeypatch.setattr(autotune, "_rate", rate)
    return asked


def test_a_search_combines_what_is_best_of_each_setting(
    dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend(monkeypatch, {"threads 12": 10, "hw_decoder_load 0.85": 20, "prefetch 3": 5})
    rates = autotune.search(dataset, config, CUDA, LoaderSettings(8), deadline=float("inf"))
    best = LoaderSettings(12, 3, Decoder(hw_decoder_load=0.85))
    assert max(rates, key=rates.__getitem__) == best
    assert rates[best] == 135
    assert len(asked) == len(set(asked)) == len(rates) == 10  # 1 + 4 loads, 1 region, 2 threads, 2 prefetches


@pytest.mark.parametrize("peak", [0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.75, 0.85, 1.0])
def test_the_share_of_the_hardware_decoder_is_found_wherever_its_peak_is(
    peak: float, dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def rate(dataset: Any, config: Any, group: Any, settings: LoaderSettings, *_: Any) -> float:
        asked.append(settings.decoder.hw_decoder_load)
        return 100 - 100 * abs(settings.decoder.hw_decoder_load - peak)

    monkeypatch.setattr(autotune, "_rate", rate)
    rates = autotune.search(dataset, config, CUDA, LoaderSettings(8), deadline=float("inf"))
    assert max(rates, key=rates.__getitem__).decoder.hw_decoder_load == peak
    assert len(set(asked)) <= 7  # the other settings are to have their turn within the minute


def test_threads_that_the_user_chose_stay(
    dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend(monkeypatch, {})
    config = replace(config, run=replace(config.run, threads=5))
    assert autotune.loader_settings(dataset, config, CPU, MODEL) == LoaderSettings(5)
    assert {settings.threads for settings in asked} == {5}


def test_a_search_ends_at_its_deadline(
    dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {})
    assert list(autotune.search(dataset, config, CUDA, LoaderSettings(8), deadline=0.0)) == [LoaderSettings(8)]


def test_what_is_hardly_faster_does_not_replace_the_defaults(
    dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {"prefetch 3": 1.5})
    defaults = LoaderSettings(loaders.num_threads(config, CPU))
    assert autotune.loader_settings(dataset, config, CPU, MODEL) == defaults


@pytest.mark.timeout(120)
def test_real_loaders_are_measured_once_and_the_result_is_kept(
    dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autotune, "_SECONDS_PER_SETTING", 0.05)
    caplog.set_level(logging.INFO, autotune.log.name)
    found = autotune.loader_settings(dataset, config, CPU, MODEL)
    (line,) = (message for message in caplog.messages if "images/s" in message)
    (kept,) = (Path(line.split("kept in ")[1]).parent).iterdir()
    assert json.loads(kept.read_text())["settings"]["threads"] == found.threads
    assert json.loads(kept.read_text())["images_per_sec"] > 0

    asked = pretend(monkeypatch, {})
    assert autotune.loader_settings(dataset, config, CPU, MODEL) == found
    assert asked == []
    assert "as found before" in caplog.messages[-1]
    other = replace(config, optim=replace(config.optim, batch_size=2))
    autotune.loader_settings(dataset, other, CPU, MODEL)
    assert asked  # other conditions are searched anew


@pytest.mark.parametrize("parts", [1, 2])
def test_the_model_works_on_every_batch_and_stays_as_it_was(
    parts: int, dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does meanwhile, on the CPU: a model whose batch statistics must not be touched."""
    monkeypatch.setattr(autotune, "_SECONDS_PER_SETTING", 0.05)
    monkeypatch.setattr(autotune, "now", lambda group: time.perf_counter())
    seen: list[torch.Tensor] = []
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Identity())
    model[1].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with autotune._training_like(model, CUDA, parts) as work:
        assert not model.training
        with monkeypatch.context() as patched:
            patched.setattr(torch, "autocast", lambda *_: nullcontext())
            rate = autotune._rate(dataset, config, CPU, LoaderSettings(1), set(), work)
    assert rate > 0
    assert model.training
    assert len(seen) > 6
    assert {(tuple(images.shape), images.requires_grad) for images in seen} == {((4 // parts, 3, 32, 32), False)}
    assert all(-1 <= images.min() <= images.max() <= 1 for images in seen)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ranks_that_differ_search_from_what_all_of_them_can_have(
    config: Config, dataset: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one would skip a setting as known, and with it what the others wait for it in."""
    ranks = [
        LoaderSettings(8, 3, Decoder(region="window")),
        LoaderSettings(6, 3, Decoder(region="full")),
        LoaderSettings(7, 3, Decoder(region="window")),
    ]
    asked = pretend(monkeypatch, {})
    of_ranks = [(settings, None) for settings in ranks]
    monkeypatch.setattr(autotune, "gather_objects", lambda it: of_ranks if isinstance(it, tuple) else [it])
    found = autotune.loader_settings(dataset, config, CPU, MODEL)
    assert found == asked[0] == LoaderSettings(6, 3, Decoder(region="full"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"conditions": 1}'])
def test_a_damaged_file_is_made_anew(
    content: str, dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = path_of(dataset, config)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    asked = pretend(monkeypatch, {"prefetch 4": 50})
    found = autotune.loader_settings(dataset, config, CPU, MODEL)
    assert asked
    assert found.prefetch == json.loads(path.read_text())["settings"]["prefetch"] == 4


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), DecodeError("too many bad", [])])
def test_settings_that_fail_are_passed_over(
    error: Exception, dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(loaders, "train_loader", fail)
    assert autotune._rate(dataset, config, CPU, LoaderSettings(1), set(), lambda images: None) == 0


def test_a_search_in_which_nothing_loads_is_not_kept(
    dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autotune, "_rate", lambda *_: 0.0)
    caplog.set_level(logging.INFO)
    assert autotune.loader_settings(dataset, config, CPU, MODEL) == LoaderSettings(CPU.cores)
    assert "not kept" in caplog.messages[-1]
    assert not path_of(dataset, config).exists()


@pytest.mark.timeout(120)
def test_a_bad_sample_is_named_once(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autotune, "_SECONDS_PER_SETTING", 0.05)
    bad = Path(str(config.data.data)) / "train/a/2.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    caplog.set_level(logging.WARNING)
    dataset = datasets.load_dataset(str(config.data.data), minival=0.0)
    rates = autotune.search(dataset, config, CPU, LoaderSettings(2), deadline=float("inf"))
    assert len(rates) > 3
    assert min(rates.values()) > 0
    assert sum("a/2.jpg" in message for message in caplog.messages) == 1


def test_it_is_off_on_the_cpu_unless_asked_for(
    dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = pretend(monkeypatch, {})
    monkeypatch.setattr(autotune.environment, "jpeg_engine", lambda device: "usable")
    for wanted, group, searches in (
        ("auto", CPU, False),
        ("off", CUDA, False),
        ("auto", CUDA, True),
        ("on", CPU, True),
    ):
        del asked[:]
        autotune.loader_settings(dataset, replace(config, run=replace(config.run, autotune=wanted)), group, MODEL)
        assert bool(asked) == searches
        for path in autotune.cache_path({}).parent.glob("*"):
            path.unlink()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_all_ranks_decode_whole_images_if_one_has_to(
    failing: int, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Why is told by the first process of a machine; the others keep silent about it."""
    of_ranks = [LoaderSettings(8 - i, decoder=Decoder(region="full" if i == failing else "window")) for i in range(3)]
    monkeypatch.setattr(autotune, "gather_objects", lambda _: [(one, "no room") for one in of_ranks])
    off = replace(config, run=replace(config.run, autotune="off"))
    found = autotune.loader_settings(cast(Any, None), off, CPU, MODEL)
    assert found == LoaderSettings(6, decoder=Decoder(region="full"))
    said = f"whole JPEGs are decoded, as decoding windows alone fails on rank {failing} (no room)"
    assert caplog.messages == ([said] if failing else [])


def test_a_jpeg_engine_that_cannot_be_used_is_said_before_anything_is_loaded(
    dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    off = replace(config, run=replace(config.run, autotune="off"))
    for engine, said in (("usable", []), ("none known", []), ("unusable: why", ["has for that, unusable: why"])):
        caplog.clear()
        monkeypatch.setattr(autotune.environment, "jpeg_engine", lambda device, engine=engine: engine)
        autotune.loader_settings(dataset, off, CUDA, MODEL)
        assert [message[-len(said[0]) :] if said else message for message in caplog.messages] == said


@pytest.mark.parametrize(
    ("group", "change"),
    [
        ("data", {"crop": "torchvision"}),
        ("data", {"antialias": False}),
        ("data", {"randaug_layers": 1}),
        ("data", {"resolution": 64}),
        ("optim", {"batch_size": 2}),
        ("run", {"threads": 3}),
        ("run", {"grad_accum_steps": 2}),
        ("model", {"depth": 2}),
    ],
)
def test_what_is_found_is_for_the_work_it_was_found_for(group, change, dataset, config) -> None:
    other = replace(config, **{group: replace(getattr(config, group), **change)})
    assert path_of(dataset, other) != path_of(dataset, config)


@pytest.mark.parametrize("changed", ["nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg-cu12"])
def test_what_is_found_is_for_the_decoders_it_was_found_with(changed, dataset, config, monkeypatch) -> None:
    """Each is a package of its own; and a GPU's engine, or windows of a JPEG, may be there at one start only."""
    before = path_of(dataset, config)
    versions = environment.versions()
    assert versions[changed][0].isdigit()
    with monkeypatch.context() as patched:
        patched.setattr(environment, "versions", lambda: versions | {changed: "0.1"})
        assert path_of(dataset, config) != before
    assert path_of(dataset, config) == before


def test_what_is_found_is_for_the_ways_of_decoding_there_are(dataset, config, monkeypatch) -> None:
    before = path_of(dataset, config)
    for owner, name, value in (
        (environment, "jpeg_engine", lambda device: "usable"),
        (loaders, "default_settings", lambda *_: LoaderSettings(CPU.cores, decoder=Decoder(region="full"))),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, value)
            assert path_of(dataset, config) != before


def test_the_pace_is_that_of_the_slowest_rank(dataset, config, monkeypatch) -> None:
    monkeypatch.setattr(autotune, "_SECONDS_PER_SETTING", 0.02)
    monkeypatch.setattr(autotune, "gather_objects", lambda own: [own, 100.0])
    rate = autotune._rate(dataset, config, CPU, LoaderSettings(1), set(), lambda _: None)
    assert rate == config.optim.batch_size / 100


def test_what_was_loaded_ahead_is_not_measured(dataset, config, monkeypatch) -> None:
    class Counting:
        bad_samples = ()
        given = 0

        def __next__(self):
            self.given += 1
            return torch.zeros(1), None

        def close(self):
            pass

    loader, begun, now = Counting(), [], autotune.now

    def noting(group):
        begun.append(loader.given)
        return now(group)

    monkeypatch.setattr(autotune.loaders, "train_loader", lambda *_, **__: loader)
    monkeypatch.setattr(autotune, "_SECONDS_PER_SETTING", 0.01)
    monkeypatch.setattr(autotune, "now", noting)
    autotune._rate(dataset, config, CPU, LoaderSettings(1, prefetch=3), set(), lambda _: None)
    assert begun[0] >= 2 * 3 + 2
