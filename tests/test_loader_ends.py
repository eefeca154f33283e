"""What a loader takes, how far it works ahead, and its end after an error."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import loader as loading
from pipelines.loader import DecodeError, EvalLoader
from pipelines.readers import FileList
from pipelines.train import train_pipeline
from tests.bad_images import BAD, InMemory, encoded, loader, with_bad, write

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


class Failing(InMemory):
    """Samples of which reading fails once."""

    fault: BaseException | None = None

    def payload(self, indices: np.ndarray) -> list[np.ndarray]:
        fault, self.fault = self.fault, None
        if fault:
            raise fault
        return super().payload(indices)


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError("the archive was away")], ids=["Ctrl-C", "error"])
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_what_ends_a_step_halfway_closes_the_loader_and_the_next_one_goes_on(fault: BaseException, taken: int) -> None:
    """The pipelines are some batches ahead by then: labels would no longer be those of the images."""
    samples = Failing([encoded(seed=i) for i in range(24)], np.arange(24))
    whole = loader(samples)
    expected = [next(whole) for _ in range(taken + 6)]
    whole.close()
    training = loader(samples)
    for images, labels in expected[:taken]:
        assert all(map(torch.equal, next(training), (images, labels)))
    samples.fault = fault
    with pytest.raises(type(fault)):
        list(itertools.islice(training, 5))  # pipelines read ahead
    with pytest.raises(ValueError, match=r"^the loader is closed: make a new one at the step to continue from$"):
        next(training)
    again = loader(samples, start_step=training.step)
    assert taken <= training.step < taken + 5
    for images, labels in expected[training.step :]:
        assert all(map(torch.equal, next(again), (images, labels)))


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (["a.jpg"], "samples is a list: give a split of a data set, as "),
        (
            InMemory([encoded()], np.array([0.0])),
            r"samples\.labels is float64 \[1\]: it must be .* int64 \[1\]",
        ),
        (InMemory([encoded()], np.array([[0]])), r"samples\.labels is int64 \[1, 1\]: it must be .* int64 \[1\]"),
        (InMemory([encoded()] * 2, np.array([0])), r"samples\.labels is int64 \[1\]: it must be .* int64 \[2\]"),
        (InMemory([encoded()], [0]), r"samples\.labels is list: it must be a numpy array int64 \[1\], a label each"),
    ],
)
def test_what_are_no_samples_is_told_at_once(samples: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}"):
        loader(samples)
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "device": "cpu", "num_threads": 1}
    with pytest.raises(ValueError, match=f"^{told}"):
        EvalLoader(samples, batch_size=1, image_size=16, **settings)


def test_the_augmentation_is_not_switched_off_by_false() -> None:
    with pytest.raises(ValueError, match=r"^augment is False: give an Augment, or None for the paper's augmentation$"):
        loader(InMemory([encoded()], np.array([0])), augment=False)
