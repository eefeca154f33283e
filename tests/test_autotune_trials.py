"""Settings that a process has not survived in the search for the fastest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dali_vit import autotune, environment, loaders, trials
from dali_vit import data as datasets
from dali_vit.config import Config, LocalUserError
from dali_vit.loaders import Decoder, LoaderSettings
from tests.test_autotune import CPU, CUDA, MODEL, config, dataset, path_of  # noqa: F401

FIRST, SECOND = LoaderSettings(2), LoaderSettings(2, decoder=Decoder(hw_decoder_load=0.85))


class Search:
    """Searches in which a process ends at some depths of prefetching."""

    def __init__(self, dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        self.dataset, self.config = dataset, config
        self.fatal: list[int] = []
        self.asked: list[int] = []
        monkeypatch.setattr(autotune, "_rate", self.rate)
        self.path = path_of(dataset, config).with_suffix(".trying")

    def rate(self, dataset: Any, config: Any, group: Any, settings: LoaderSettings, *_: Any) -> float:  # noqa: F811
        self.asked.append(settings.prefetch)
        if settings.prefetch in self.fatal:
            raise SystemExit(139)
        return 100.0 * settings.threads + settings.prefetch

    def run(self) -> LoaderSettings:
        self.asked.clear()
        return autotune.loader_settings(self.dataset, self.config, CPU, MODEL)


@pytest.fixture
def search(dataset: datasets.Dataset, config: Config, monkeypatch: pytest.MonkeyPatch) -> Search:  # noqa: F811
    return Search(dataset, config, monkeypatch)


@pytest.mark.parametrize("damage", [None, "", "{", "[1]", '{"a": "b"}'])
def test_settings_that_end_two_processes_are_left_out(
    damage: str | None, search: Search, caplog: pytest.LogCaptureFixture
) -> None:
    """A crash in a decoder, or a hang that the watchdog ends; the run, started again, comes to its end."""
    if damage is not None:
        search.path.parent.mkdir(parents=True)
        search.path.write_text(damage)
    search.fatal = [3, 4]
    for prefetch in (3, 3, 4, 4):
        with pytest.raises(SystemExit):
            search.run()
        assert search.asked[-1] == prefetch
    threads = loaders.num_threads(search.config, CPU)
    found = search.run()
    assert found == LoaderSettings(threads + threads // 2)
    assert search.asked == [2, 2, 2]
    assert [message for message in caplog.messages if "left out" in message][-2:] == [
        f"autotune: threads {found.threads}, prefetch {n} is left out, as 2 processes ended at it" for n in (3, 4)
    ]
    assert not search.path.exists()
    assert search.run() == found  # which was kept
    assert search.asked == []


def test_one_end_is_no_reason(search: Search, caplog: pytest.LogCaptureFixture) -> None:
    """As the process may have been stopped there: by Ctrl-C, or a scheduler."""
    search.fatal = [3]
    with pytest.raises(SystemExit):
        search.run()
    search.fatal = []
    assert search.run().prefetch == 4
    assert search.asked == [2, 2, 2, 3, 4]
    assert "left out" not in caplog.text


def test_where_the_defaults_end_the_process_others_are_found(search: Search) -> None:
    threads = loaders.num_threads(search.config, CPU)
    search.fatal = [2]
    for _ in range(6):  # the defaults, more threads, and fewer
        with pytest.raises(SystemExit):
            search.run()
    assert search.run() == LoaderSettings(threads, prefetch=4)
    assert search.asked == [3, 4]


def test_a_cache_that_cannot_be_written_to_is_no_obstacle(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(trials, "replacing", refuse)
    assert search.run().prefetch == 4


def test_what_is_remembered_and_cannot_be_removed_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "it.trying").mkdir()
    trials.Trials(tmp_path / "it.trying", CPU).done()
    assert (tmp_path / "it.trying").is_dir()


@pytest.mark.parametrize("kept", ["twice", None, [2], 2.5])
def test_what_is_remembered_and_is_no_number_does_not_count(kept: Any, tmp_path: Path) -> None:
    path = tmp_path / "it.trying"
    path.write_text(json.dumps({trials._key(FIRST): kept, trials._key(SECOND): 2}))
    assert trials.Trials(path, CPU).begin(FIRST)
    assert not trials.Trials(path, CPU).begin(SECOND)


def test_a_gpu_that_is_lost_hides_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it leave the model in another mode than it was in."""

    def fail() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    model = torch.nn.Identity().train()
    with pytest.raises(LocalUserError, match=r"^told already$"), autotune._training_like(model, CUDA):
        raise LocalUserError("told already")
    assert model.training


def test_settings_that_break_the_use_of_the_gpu_count_as_an_end(
    dataset: datasets.Dataset,  # noqa: F811
    config: Config,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever is tried after them would fail, too, and training with it."""
    config = replace(config, run=replace(config.run, threads=2))
    lost: list[bool] = []

    class Loader:
        bad_samples = ()

        def __init__(self, settings: LoaderSettings) -> None:
            self.breaks = settings.prefetch == 3

        def __next__(self) -> tuple[torch.Tensor, None]:
            if self.breaks or lost:
                lost.append(True)
                raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")
            return torch.zeros(1), None

        def close(self) -> None:
            pass

    monkeypatch.setattr(autotune, "_SECONDS_PER_SETTING", 0.01)
    monkeypatch.setattr(loaders, "train_loader", lambda *_, settings, **__: Loader(settings))
    monkeypatch.setattr(environment, "is_lost", lambda device: bool(lost))
    for _ in range(2):
        lost.clear()
        with pytest.raises(
            LocalUserError,
            match=r"^autotune: threads \d+, prefetch 3 broke .*was encountered\); give --autotune off, or start again",
        ):
            autotune.loader_settings(dataset, config, CPU, MODEL)
        assert not path_of(dataset, config).exists()
    lost.clear()
    assert autotune.loader_settings(dataset, config, CPU, MODEL).prefetch != 3
    (told,) = (message for message in caplog.messages if "left out" in message)
    assert told.endswith(", prefetch 3 is left out, as 2 processes ended at it")
    assert path_of(dataset, config).exists()


def test_rank_0_alone_remembers_and_decides_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it.trying"
    first = trials.Trials(path, CPU)
    for settings in (FIRST, SECOND, FIRST):
        assert first.begin(settings)
    other = trials.Trials(tmp_path / "elsewhere", replace(CPU, rank=1, world_size=2))
    monkeypatch.setattr(trials, "gather_objects", lambda value: [2, value])  # rank 0 says so
    assert not other.begin(FIRST)
    monkeypatch.setattr(trials, "gather_objects", lambda value: [1, value])
    assert other.begin(FIRST)
    other.survived(FIRST)
    other.done()
    assert not (tmp_path / "elsewhere").exists()

    monkeypatch.undo()
    assert not first.begin(FIRST)
    assert first.begin(SECOND)
    first.survived(SECOND)
    for _ in range(2):
        assert first.begin(SECOND)
    assert not first.begin(SECOND)
