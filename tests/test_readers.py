"""Lists of files, and the payloads and labels that they pass to the graphs."""

from __future__ import annotations

import io
import math
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.order import EvalOrder, TrainOrder
from pipelines.readers import EvalSource, FileList, TrainSource, _placeholder, stack_paths

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


def test_paths_are_stacked_for_dali() -> None:
    files = FileList.from_paths(PATHS, np.arange(5))
    indices = np.array([3, 0, 4, 2, 0])
    rows, lengths = stack_paths(files.payload(indices))
    assert (rows.dtype, lengths.dtype) == (np.uint8, np.int32)
    assert rows.shape == (5, 301)
    assert decoded([row[:length] for row, length in zip(rows, lengths, strict=True)]) == [PATHS[i] for i in indices]
    assert [int(row[length:].sum()) for row, length in zip(rows, lengths, strict=True)] == [0] * 5


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


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ([0.7, 0, 1, 2, 3], "0.7"),
        ([0, 1, 2, 3, -1], "-1"),
        ([True] * 5, "True"),
        ([0, 1, 2, 3, math.nan], "0.0"),
        (["0", "1", "2", "3", "4"], "'0'"),  # as a table in a text file gives them
        ([None, 1, 2, 3, 4], "None"),
    ],
)
def test_labels_are_class_indices(labels: list[Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"^labels such as .*{wrong}.*: give class indices, integers from 0$"):
        FileList.from_paths(PATHS, labels)


def test_labels_are_the_lists_own() -> None:
    labels = np.arange(5)
    files = FileList.from_paths(PATHS, labels)
    labels[:] = 9
    assert files.labels.tolist() == [0, 1, 2, 3, 4]
    assert len(FileList.from_paths([], [])) == 0


def test_a_subset_may_be_given_by_a_mask() -> None:
    chosen = FileList.from_paths(PATHS, np.arange(5)).subset(np.array([False, True, False, False, True]))
    assert chosen.labels.tolist() == [1, 4]
    assert [chosen.path(i) for i in range(2)] == [PATHS[1], PATHS[4]]


def test_train_source_is_a_pure_function_of_the_step() -> None:
    files = FileList.from_paths([f"{i}.jpg" for i in range(10)], np.arange(10) * 10)
    order = TrainOrder(10, 4, 1, 2, seed=0)
    source, later = TrainSource(files, order, (3, 1, 2)), TrainSource(files, order, (3, 1, 2), start_step=5)
    for step in (7, 5, 6):  # in any order
        paths = source.payload(batch(step))
        labels, *groups = source.arrays(batch(step))
        indices = order.indices(step)
        assert decoded(paths) == [f"{i}.jpg" for i in indices]
        assert labels.tolist() == (indices * 10).tolist()
        assert [group.shape for group in groups] == [(2, 3), (2, 1), (2, 2)]
        assert all(group.flags.c_contiguous for group in groups)
        np.testing.assert_array_equal(np.concatenate(groups, axis=1), order.uniforms(step, 6))

        labels_later, *groups_later = later.arrays(batch(step - 5))
        assert decoded(later.payload(batch(step - 5))) == decoded(paths)
        np.testing.assert_array_equal(labels_later, labels)
        for a, b in zip(groups_later, groups, strict=True):
            np.testing.assert_array_equal(a, b)


def test_train_source_replaces_bad_samples_in_their_places() -> None:
    files = FileList.from_paths([f"{i}.jpg" for i in range(6)], np.arange(6))
    order = TrainOrder(6, 6, 0, 1, seed=0)
    bad = np.zeros(6, bool)
    source = TrainSource(files, order, (1,), bad=bad)
    before, uniforms = source.arrays(batch(0))
    bad[[1, 4]] = True  # from now on
    labels, same_uniforms = source.arrays(batch(0))
    np.testing.assert_array_equal(labels, np.where((before == 1) | (before == 4), -1, before))
    np.testing.assert_array_equal(same_uniforms, uniforms)
    names = [os.path.basename(path) for path in decoded(source.payload(batch(0)))]
    assert names == ["placeholder.jpg" if label < 0 else f"{label}.jpg" for label in labels]


@pytest.mark.parametrize("encoded", [False, True])
def test_the_placeholder_is_a_grey_image(encoded: bool) -> None:
    payload = _placeholder(encoded).tobytes()
    with Image.open(io.BytesIO(payload) if encoded else os.fsdecode(payload)) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
        assert (np.asarray(image) == 128).all()


def test_eval_source_pads_with_the_placeholder_and_ends() -> None:
    files = FileList.from_paths([f"{i}.jpg" for i in range(5)], [7, 8, 9, 10, 11])
    source = EvalSource(files, EvalOrder(5, 2, 1, 2))
    assert decoded(source.payload(batch(0))) == ["2.jpg", "3.jpg"]
    assert source.arrays(batch(0))[0].tolist() == [9, 10]
    assert decoded(source.payload(batch(1))) == decoded([_placeholder(False)]) * 2
    assert source.arrays(batch(1))[0].tolist() == [-1, -1]
    bad = EvalSource(files, EvalOrder(5, 4, 0, 1), 1, np.array([True, False, True, False, False]))
    assert decoded(bad.payload(batch(0))) == ["4.jpg", *decoded([_placeholder(False)]) * 3]
    assert bad.arrays(batch(0))[0].tolist() == [11, -1, -1, -1]
    for callable_ in (source.payload, source.arrays):
        with pytest.raises(StopIteration):
            callable_(batch(2))
