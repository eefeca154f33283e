"""How far a loader works ahead, and its end after an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import loader as loading
from pipelines.loader import DecodeError
from pipelines.readers import FileList
from pipelines.train import train_pipeline
from tests.bad_images import BAD, encoded, loader, with_bad, write

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("bad", [BAD["text"], encoded(seed=7)[:-50]], ids=["text", "cut short"])
def test_a_loader_that_has_found_too_many_bad_samples_is_closed(bad: bytes, tmp_path: Path) -> None:
    """Also where the decoder takes what is cut short, and its pipelines have not failed."""
    training = loader(write(tmp_path / "images", with_bad(8, {7: bad})), max_bad_share=0.0)
    with pytest.raises(DecodeError):
        next(training)
    with pytest.raises(ValueError, match=r"^the loader is closed"):
        next(training)


def test_a_loader_is_closed_where_nothing_can_be_read_any_more() -> None:
    training = loader(FileList.from_paths([f"/nowhere/{i}.jpg" for i in range(40)], np.arange(40)), batch_size=40)
    with pytest.raises(RuntimeError, match="/nowhere/"):
        next(training)
    with pytest.raises(ValueError, match=r"^the loader is closed"):
        next(training)


def test_pipelines_work_as_many_batches_ahead_as_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def recording(*given: Any, **options: Any) -> Any:
        made.append(train_pipeline(*given, **options))
        return made[-1]

    monkeypatch.setattr(loading, "train_pipeline", recording)
    training = loader(write(tmp_path / "images", with_bad(8, {})), prefetch=3)
    training.close()
    assert [pipeline.prefetch_queue_depth for pipeline in made] == [3, 3]
