"""Lists of files, and what they hand to the graphs."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.order import EvalOrder, TrainOrder
from pipelines.readers import EvalSource, FileList, TrainSource

PATHS = ["/data/a.JPEG", "relative/b c.png", "/data/žába/鳥.webp", "/" + "x" * 300, os.fsdecode(b"/data/\xff.jpg")]


def batch(iteration: int) -> SimpleNamespace:
    return SimpleNamespace(iteration=iteration)


def decoded(paths: list[np.ndarray]) -> list[str]:
    return [os.fsdecode(path.tobytes()) for path in paths]


def test_file_list_gives_back_paths_and_labels() -> None:
    files = FileList.from_paths(PATHS, [4, 3, 2, 1, 0])
    assert len(files) == 5
    assert [files.path(i) for i in range(5)] == PATHS
    assert files.labels.dtype == np.int64
    assert files.labels.tolist() == [4, 3, 2, 1, 0]
    encoded = files.encoded_path(2)
    assert encoded.dtype == np.uint8
    assert np.shares_memory(encoded, files.buffer)
    assert encoded.tobytes() == os.fsencode(PATHS[2])


def test_subset_keeps_order_and_repeats_and_shares_the_paths() -> None:
    files = FileList.from_paths(PATHS, np.arange(5))
    subset = files.subset([3, 0, 3]).subset(np.array([2, 1]))
    assert [subset.path(i) for i in range(2)] == [PATHS[3], PATHS[0]]
    assert subset.labels.tolist() == [3, 0]
    assert subset.buffer is files.buffer
    assert len(files.subset([])) == 0


def test_file_list_is_compact() -> None:
    paths = [f"/imagenet/train/n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(10_000)]
    files = FileList.from_paths(paths, np.zeros(10_000, np.int64))
    held = sum(array.nbytes for array in (files.buffer, files.starts, files.lengths, files.labels))
    assert held == sum(map(len, paths)) + 20 * 10_000


def test_file_list_needs_a_label_per_path() -> None:
    with pytest.raises(ValueError, match="5 paths but 4 labels"):
        FileList.from_paths(PATHS, [0] * 4)


def test_train_source_is_a_pure_function_of_the_step() -> None:
    files = FileList.from_paths([f"{i}.jpg" for i in range(10)], np.arange(10) * 10)
    order = TrainOrder(10, 4, 1, 2, seed=0)
    source, later = TrainSource(files, order, (3, 1, 2)), TrainSource(files, order, (3, 1, 2), start_step=5)
    for step in (7, 5, 6):  # in any order
        paths, labels, *groups = source(batch(step))
        indices = order.indices(step)
        assert decoded(paths) == [f"{i}.jpg" for i in indices]
        assert labels.tolist() == (indices * 10).tolist()
        assert [group.shape for group in groups] == [(2, 3), (2, 1), (2, 2)]
        assert all(group.flags.c_contiguous for group in groups)
        np.testing.assert_array_equal(np.concatenate(groups, axis=1), order.uniforms(step, 6))

        paths_later, labels_later, *groups_later = later(batch(step - 5))
        assert decoded(paths_later) == decoded(paths)
        np.testing.assert_array_equal(labels_later, labels)
        for a, b in zip(groups_later, groups, strict=True):
            np.testing.assert_array_equal(a, b)


def test_eval_source_pads_with_a_real_file_and_ends() -> None:
    files = FileList.from_paths([f"{i}.jpg" for i in range(5)], [7, 8, 9, 10, 11])
    source = EvalSource(files, EvalOrder(5, 2, 1, 2))
    paths, labels = source(batch(0))
    assert (decoded(paths), labels.tolist()) == (["2.jpg", "3.jpg"], [9, 10])
    paths, labels = source(batch(1))
    assert (decoded(paths), labels.tolist()) == (["0.jpg", "0.jpg"], [-1, -1])
    with pytest.raises(StopIteration):
        source(batch(2))
