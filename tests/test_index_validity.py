"""An index is of one folder, of the suffixes that count as images, and of the form that it was written in."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dali_vit import index_cache, listing
from dali_vit.index_cache import INDEX
from tests.test_index_cache import link, listed, paths  # noqa: F401


@pytest.fixture(autouse=True)
def of_small_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index is kept of a few images that have just been written, too."""
    monkeypatch.setenv("DALI_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "_SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(index_cache, "_MIN_IMAGES", 4)
    index_cache._say.cache_clear()


def write(root: Path, classes: int) -> Path:
    """Five images a class, in folders whose times differ, as of folders that were not made at once."""
    link(root, classes, 5)
    for number, folder in enumerate(sorted((root / "train").iterdir())):
        os.utime(folder, (number, number))
    os.utime(root / "train", (0, 0))
    return root


def test_sets_that_cannot_be_written_to_have_an_index_each(
    tmp_path: Path,
    listed: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the folders of their images have the same name."""
    roots = [write(tmp_path / name, classes) for name, classes in (("one", 2), ("other", 3))]
    write_index = index_cache._write

    def deny(path: Path, columns: dict[str, np.ndarray]) -> None:
        if path.name == INDEX:
            raise OSError(30, "Read-only file system")
        write_index(path, columns)

    monkeypatch.setattr(index_cache, "_write", deny)
    for _ in range(2):
        assert [len(paths(root)) for root in roots] == [10, 15]
    assert len(listed) == 2 + 3
    assert len(list((tmp_path / "cache/index").iterdir())) == 2


def test_an_index_made_by_other_suffixes_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "set", 2)
    (root / "train/n00000000/new.png").write_bytes(b"x")
    with monkeypatch.context() as patched:
        patched.setattr(listing, "IMAGE_SUFFIXES", (".jpeg",))
        assert len(paths(root)) == 10
    assert (root / "train" / INDEX).exists()
    assert len(paths(root)) == 11


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("names", lambda names: names.astype(np.int16)),
        ("counts", lambda counts: counts[:, None]),
        ("counts", lambda counts: counts.sum(keepdims=True)),
        ("counts", lambda counts: counts + 1),
        ("times", lambda times: times[:, :1]),
    ],
)
def test_an_index_of_another_form_is_replaced(
    name: str, change: Callable[[np.ndarray], np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write(tmp_path / "set", 2)
    first, index = paths(root), root / "train" / INDEX
    with np.load(index) as arrays:
        columns = {key: arrays[key] for key in arrays.files}
    np.savez(index, **{**columns, name: change(columns[name])})
    os.utime(root / "train", (0, 0))
    caplog.set_level(logging.INFO, "dali_vit")
    assert paths(root) == paths(root) == first
    assert caplog.messages == [f"{index} is of another form: the images are listed again"]
