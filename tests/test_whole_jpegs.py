"""Whether a JPEG is whole shows in its bytes: its end marker comes after its first scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines import bad_samples
from pipelines.bad_samples import is_whole_jpeg
from pipelines.readers import FileList
from tests.bad_images import InMemory, encoded, loader, write


def with_thumbnail(jpeg: bytes, thumbnail: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + jpeg[2:]


def test_a_jpegs_end_is_that_of_the_image_and_not_of_a_thumbnail() -> None:
    whole, small = encoded(seed=1), encoded((16, 16), seed=2)
    progressive = encoded(seed=1, progressive=True, quality=95)
    assert progressive.count(b"\xff\xda") > 1
    for jpeg in (whole, progressive, with_thumbnail(whole, small), with_thumbnail(progressive, small)):
        assert all(is_whole_jpeg(jpeg + after) for after in (b"", bytes(100), small, small[:-9]))
        assert all(is_whole_jpeg(jpeg[:2] + b"\xff" * fill + jpeg[2:]) for fill in (1, 2, 3))
        assert not is_whole_jpeg(jpeg[:2] + b"\x00\xda" + jpeg[2:])
        assert not any(is_whole_jpeg(jpeg[:length]) for length in range(len(jpeg)))
    assert not is_whole_jpeg(encoded(name="PNG"))


def test_what_cannot_be_read_any_more_may_be_cut_short(tmp_path: Path) -> None:
    files = FileList.from_paths([str(tmp_path / "gone.jpg")], [0])
    assert bad_samples._may_be_cut_short(files, files.payload(np.array([0]))[0])


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_thumbnail_does_not_hide_that_its_jpeg_was_cut_short(in_memory: bool, tmp_path: Path) -> None:
    contents = [with_thumbnail(encoded(), encoded((16, 16)))[:-20], with_thumbnail(encoded(), encoded((16, 16)))]
    files = write(tmp_path / "images", contents)
    train = loader(InMemory(contents, files.labels) if in_memory else files, batch_size=2)
    assert sorted(next(train)[1].tolist()) == [-1, 1]
    assert train.bad_samples == (0,)
