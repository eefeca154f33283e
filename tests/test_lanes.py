"""Into how many pipelines a loader parts its threads: on a CPU several, on a GPU one, as each has buffers there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import loader as loading
from pipelines.loader import TrainLoader
from tests.bad_images import encoded, write

THREADS = 5


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("device", "threads"), [("cpu", [2, 3]), ("cuda:0", [THREADS])])
def test_a_gpu_has_one_pipeline_with_all_threads(
    device: str, threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int, int]] = []
    built: list[int] = []

    def train_pipeline(*_: Any, num_threads: int, start_step: int, stride: int, **__: Any) -> Any:
        made.append((num_threads, start_step, stride))
        return SimpleNamespace(build=lambda: built.append(num_threads))

    monkeypatch.setattr(loading, "train_pipeline", train_pipeline)
    monkeypatch.setattr(loading, "Runner", lambda _: SimpleNamespace(shut_down=lambda _: None, release=lambda: None))
    monkeypatch.setattr(loading, "behind_graph", lambda *_, **__: None)
    files = write(tmp_path / "images", [encoded(seed=i) for i in range(8)])
    TrainLoader(
        files,
        batch_size=4,
        image_size=16,
        rank=0,
        world_size=1,
        device=device,
        num_threads=THREADS,
        seed=0,
        start_step=6,
    )
    assert built == threads
    assert made == [(count, 6 + lane, len(threads)) for lane, count in enumerate(threads)]
