"""Images that a run left out, tried again when it goes on: who tries which, and what all ranks know afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dali_vit import left_out
from dali_vit.config import Config, UserError
from dali_vit.data import Dataset, load_dataset
from dali_vit.distributed import Group
from tests.conftest import write_image_folder

STATES: list[dict[str, Any]] = [{"bad_samples": [1, 3]}, {"bad_samples": [2, 3, 9]}]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_image_folder(tmp_path / "images"), minival=0.0)


def test_what_any_rank_left_out_counts_once() -> None:
    assert left_out.of_all_ranks(STATES) == [1, 2, 3, 9]
    assert left_out.of_all_ranks(reversed(STATES)) == [1, 2, 3, 9]


@pytest.mark.parametrize(("rank", "tried"), [(0, [1, 3]), (1, [2, 9])])
def test_ranks_share_the_trials_and_all_know_the_result(
    rank: int, tried: list[int], dataset: Dataset, tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: list[list[int]] = []

    def still_undecodable(samples: Any, indices: list[int], **_: Any) -> list[int]:
        own.append(indices)
        return indices[1:]

    monkeypatch.setattr(left_out, "still_undecodable", still_undecodable)
    monkeypatch.setattr(left_out, "gather_objects", lambda found: [[9], [3]] if found == tried[1:] else found)
    group = replace(cpu, rank=rank, world_size=2)
    assert left_out.still_bad(STATES, dataset, tiny_config, group) == [3, 9]
    assert own == [tried]


def test_an_error_of_one_rank_is_told_to_the_others(
    dataset: Dataset, tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for its result."""
    met: list[str] = []

    def fail(*_: Any, **__: Any) -> list[int]:
        raise UserError("lost")

    def together(work: Any) -> Any:
        with pytest.raises(UserError, match="lost") as raised:
            work()
        met.append(str(raised.value))
        raise raised.value

    monkeypatch.setattr(left_out, "still_undecodable", fail)
    monkeypatch.setattr(left_out, "together", together)
    with pytest.raises(UserError, match="lost"):
        left_out.still_bad(STATES, dataset, tiny_config, cpu)
    assert met == ["lost"]


def test_where_nothing_was_left_out_nothing_is_tried(
    dataset: Dataset, tiny_config: Config, cpu: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "still_undecodable", None)
    assert left_out.still_bad([{"bad_samples": []}], dataset, tiny_config, cpu) == []
