"""A step at which DALI fails through no fault of an image is loaded again, and does not end the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nvidia.dali import Pipeline

from pipelines import crop
from pipelines.crop import Decoder
from tests.bad_images import BAD, assert_equal, loader, take, with_bad, write

pytestmark = pytest.mark.timeout(120)


def test_a_window_that_fails_of_an_image_that_decodes_whole_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A restart would come to the same step; the images are those of a run that decodes them whole from the start."""
    files = write(tmp_path / "images", with_bad(40, {17: BAD["text"]}))
    cut_window, broken = crop.cut_window, []

    def failing(encoded: Any, image: Any, start: Any, window: Any, *, device: str, decoder: Decoder) -> Any:
        if decoder.region == "window":
            broken.append(decoder)
            start = start + 100_000.0  # outside of any image
        return cut_window(encoded, image, start, window, device=device, decoder=decoder)

    expected = take(loader(files, decoder=Decoder(region="full")), 30)
    caplog.clear()
    monkeypatch.setattr(crop, "cut_window", failing)
    training = loader(files)
    assert_equal(take(training, 30), expected)
    assert broken
    assert training.bad_samples == (17,)
    told = [message for message in caplog.messages if "left out" not in message]
    assert len(told) == 2
    assert told[0].startswith("step 0 is loaded again, as DALI failed at no image that is bad: ")
    assert "\n" not in told[0]
    assert told[1] == "step 0 fails again: whole images are decoded from here on, which is slower"


def test_what_fails_once_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = write(tmp_path / "images", with_bad(40, {}))
    expected = take(loader(files), 20)
    training, run, failing = loader(files), Pipeline.run, {5: 1, 9: 1}

    def once(pipeline: Pipeline) -> Any:
        if pipeline in training._pipelines and failing.get(training.step):  # not where samples are tried
            failing[training.step] -= 1
            raise RuntimeError("Input/output error")
        return run(pipeline)

    monkeypatch.setattr(Pipeline, "run", once)
    assert_equal(take(training, 20), expected)
    again = "is loaded again, as DALI failed at no image that is bad: Input/output error"
    assert caplog.messages == [f"step {step} {again}" for step in (5, 9)]
    failing[training.step] = 3
    with pytest.raises(RuntimeError, match="Input/output error"):
        next(training)


def test_a_step_that_begins_with_a_bad_sample_is_done_again_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sample by which DALI is tried is one that is not left out."""
    files = write(tmp_path / "images", with_bad(40, {17: BAD["text"]}))
    expected = take(loader(files), 60)
    training, run = loader(files), Pipeline.run
    failing = {next(step for step in range(1, 60) if training._order.indices(step)[0] == 17)}
    caplog.clear()

    def once(pipeline: Pipeline) -> Any:
        if pipeline in training._pipelines and training.step in failing:
            failing.clear()
            raise RuntimeError("Input/output error")
        return run(pipeline)

    (step,) = failing
    monkeypatch.setattr(Pipeline, "run", once)
    assert_equal(take(training, 60), expected)
    told = [message for message in caplog.messages if "left out" not in message]
    assert told == [f"step {step} is loaded again, as DALI failed at no image that is bad: Input/output error"]
