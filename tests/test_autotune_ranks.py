"""The search for the loader's settings on several ranks and GPUs: who decides, what is kept apart and given back."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dali_vit import autotune, environment, trials
from dali_vit import data as datasets
from dali_vit.config import Config
from dali_vit.loaders import LoaderSettings
from dali_vit.trials import describe
from tests.test_autotune import CPU, CUDA, MODEL, config, dataset, path_of, pretend  # noqa: F401

OTHERS = LoaderSettings(7, 4)


def told_by_rank_0(monkeypatch: pytest.MonkeyPatch, answers: dict[type, Any]) -> None:
    """Of rank 0 each rank hears the answer for the type of what it offers itself; of other types, its own."""
    monkeypatch.setattr(autotune, "gather_objects", lambda own: [answers.get(type(own), own)])


def test_what_rank_0_found_before_is_what_all_take(
    dataset: datasets.Dataset,  # noqa: F811
    config: Config,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is kept on this rank's machine: if one rank searched, the others would not take part."""
    asked = pretend(monkeypatch, {})
    autotune._write(path_of(dataset, config), {}, LoaderSettings(1), 1.0)
    told_by_rank_0(monkeypatch, {type(None): OTHERS})
    second = replace(CPU, rank=1)
    assert autotune.loader_settings(dataset, config, second, MODEL) == OTHERS
    assert asked == []


def test_what_is_kept_on_another_ranks_machine_does_not_keep_it_from_the_search(
    dataset: datasets.Dataset,  # noqa: F811
    config: Config,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, {"prefetch 4": 50})
    autotune.loader_settings(dataset, config, CPU, MODEL)
    assert path_of(dataset, config).exists()
    asked = pretend(monkeypatch, {"prefetch 3": 50})
    monkeypatch.setattr(trials, "gather_objects", lambda own: [0])  # ends, of which rank 0 knows
    assert autotune.loader_settings(dataset, config, replace(CPU, rank=1), MODEL).prefetch == 3
    assert asked


@pytest.mark.parametrize(("own", "of_rank_0", "tried"), [(float("inf"), True, 1), (0.0, False, 10)])
def test_rank_0s_clock_ends_a_search(
    own: float,
    of_rank_0: bool,
    tried: int,
    dataset: datasets.Dataset,  # noqa: F811
    config: Config,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, {"hw_decoder_load 0.85": 20})
    told_by_rank_0(monkeypatch, {bool: of_rank_0})
    assert len(autotune.search(dataset, config, CUDA, LoaderSettings(8), deadline=own)) == tried


@pytest.mark.parametrize(
    ("name", "value"),
    [("gpu_driver", "1.2"), ("cpu_name", "another"), ("cpu_count", 3), ("gpu_names", ["another"])],
)
def test_what_is_found_is_for_the_machine_it_was_found_on(name, value, dataset, config, monkeypatch) -> None:  # noqa: F811
    """A home folder may be shared by several."""
    monkeypatch.setattr(environment, "gpu_names", lambda: ["one"])
    monkeypatch.setattr(environment, "jpeg_engine", lambda device: "usable")

    def path() -> Any:
        return autotune.cache_path(autotune._conditions(dataset, config, CUDA, OTHERS))

    before = path()
    with monkeypatch.context() as patched:
        patched.setattr(environment, name, lambda: value)
        assert path() != before
    assert path() == before


def test_what_is_found_is_for_the_processes_and_data_it_was_found_with(dataset, config, tmp_path) -> None:  # noqa: F811
    def path(dataset: datasets.Dataset, **of_group: int) -> Any:
        return autotune.cache_path(autotune._conditions(dataset, config, replace(CPU, **of_group), OTHERS))

    fewer = replace(dataset, train=dataset.train.subset(np.arange(7)))
    paths = [path(dataset), path(replace(dataset, root=tmp_path)), path(fewer)]
    paths += [path(dataset, **{name: 9}) for name in ("world_size", "local_world_size", "cores")]
    assert len(set(paths)) == len(paths)


def test_one_core_is_one_thread(dataset, config, monkeypatch) -> None:  # noqa: F811
    asked = pretend(monkeypatch, {})
    autotune.search(dataset, config, CPU, LoaderSettings(1), deadline=float("inf"))
    assert {settings.threads for settings in asked} == {1}


def test_a_search_goes_on_from_what_is_clearly_faster_alone(dataset, config, monkeypatch) -> None:  # noqa: F811
    """Of 2 % rates vary by themselves."""
    for gain, threads in ((1.9, 8), (2.1, 12)):
        asked = pretend(monkeypatch, {"threads 12": gain})
        autotune.search(dataset, config, CPU, LoaderSettings(8), deadline=float("inf"))
        assert {settings.threads for settings in asked if settings.prefetch > 2} == {threads}


class Loader:
    """Gives `count` batches, then fails."""

    bad_samples = (2,)

    def __init__(self, count: int) -> None:
        self.left, self.closed = count, 0

    def __next__(self) -> tuple[torch.Tensor, None]:
        if not self.left:
            raise RuntimeError("no memory")
        self.left -= 1
        return torch.zeros(1), None

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("count", [2, 10**9])
def test_a_measured_loader_is_closed_and_its_bad_samples_kept(count, dataset, config, monkeypatch) -> None:  # noqa: F811
    """Else the buffers of about ten would be held while the model trains."""
    loader, bad = Loader(count), {1}
    monkeypatch.setattr(autotune, "_SECONDS_PER_SETTING", 0.01)
    monkeypatch.setattr(autotune.loaders, "train_loader", lambda *_, **__: loader)
    rate = autotune._rate(dataset, config, CPU, LoaderSettings(1), bad, lambda _: None)
    assert (rate > 0) == (count > 2)
    assert (loader.closed, bad) == (1, {1, 2})


def test_settings_are_measured_beside_the_model_in_the_steps_parts(dataset, config, monkeypatch) -> None:  # noqa: F811
    seen: list[Any] = []

    @contextmanager
    def training_like(model: Any, group: Any, parts: int) -> Any:
        seen.append((model, parts))
        yield seen

    def rate(dataset: Any, config: Any, group: Any, settings: Any, bad: Any, work: Any) -> float:
        assert work is seen
        return 1.0

    monkeypatch.setattr(autotune, "_training_like", training_like)
    monkeypatch.setattr(autotune, "_rate", rate)
    in_parts = replace(config, run=replace(config.run, grad_accum_steps=2))
    assert describe(autotune.loader_settings(dataset, in_parts, CPU, MODEL))
    assert seen == [(MODEL, 2)]
