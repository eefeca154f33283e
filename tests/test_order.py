"""The order of samples: exactly once an epoch, whatever the batch size and the number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.order import EvalOrder, TrainOrder, _permutation
from tests.statistical import chi_square_uniform_p, kolmogorov_smirnov_p


def stream(num_samples: int, batch_size: int, world_size: int, steps: int) -> np.ndarray:
    """Indices of the first steps in the order of positions, from all ranks."""
    orders = [TrainOrder(num_samples, batch_size, rank, world_size, seed=3) for rank in range(world_size)]
    return np.concatenate([order.indices(step) for step in range(steps) for order in orders])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_samples", "batch_size"), [(100, 12), (96, 12), (7, 30), (1, 6)])
def test_train_order_holds_every_sample_once_an_epoch(num_samples: int, batch_size: int, world_size: int) -> None:
    epochs = 3
    indices = stream(num_samples, batch_size, world_size, steps=-(-epochs * num_samples // batch_size))
    per_epoch = indices[: epochs * num_samples].reshape(epochs, num_samples)
    np.testing.assert_array_equal(np.sort(per_epoch), np.tile(np.arange(num_samples), (epochs, 1)))
    if num_samples > 10:
        assert len({tuple(epoch) for epoch in per_epoch.tolist()} | {tuple(range(num_samples))}) == epochs + 1


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_train_order_is_the_same_for_any_world_size(world_size: int) -> None:
    alone = TrainOrder(50, 12, 0, 1, seed=5)
    ranks = [TrainOrder(50, 12, rank, world_size, seed=5) for rank in range(world_size)]
    for step in (0, 3, 4, 1000):
        np.testing.assert_array_equal(np.concatenate([r.indices(step) for r in ranks]), alone.indices(step))
        uniforms = np.concatenate([r.uniforms(step, 11) for r in ranks])
        np.testing.assert_array_equal(uniforms, alone.uniforms(step, 11))


def test_train_order_does_not_change_between_versions() -> None:
    # A run resumed after an update goes on with its own order and augmentation.
    order = TrainOrder(10, 5, 0, 1, seed=0)
    assert [order.indices(step).tolist() for step in range(3)] == [[1, 7, 9, 0, 6], [4, 5, 8, 2, 3], [2, 0, 3, 1, 9]]
    np.testing.assert_array_equal(
        order.uniforms(7, 9)[3, [0, 7, 8]],
        np.array([0.07859838008880615, 0.6043388843536377, 0.18604987859725952], np.float32),
    )


def test_a_batch_of_two_epochs_shuffles_each_once() -> None:
    """However often its indices are asked for: those of its files, and those of its labels."""
    _permutation.cache_clear()
    order = TrainOrder(10, 4, 0, 1, seed=0)
    first = order.indices(2)
    for _ in range(3):
        np.testing.assert_array_equal(order.indices(2), first)
    assert _permutation.cache_info().misses == 2


def test_a_permutation_that_others_will_be_given_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        _permutation(10, 0, 0)[0] = 1


def test_train_order_depends_on_the_seed() -> None:
    orders = [TrainOrder(1000, 100, 0, 1, seed) for seed in (0, 1, 2**40)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a].indices(0) != orders[b].indices(0)).sum() > 90
        assert (orders[a].uniforms(0, 8) != orders[b].uniforms(0, 8)).all()


def test_permutations_put_a_sample_anywhere() -> None:
    order = TrainOrder(20, 20, 0, 1, seed=0)
    places = [int(np.flatnonzero(order.indices(epoch) == 7)[0]) for epoch in range(4000)]
    assert chi_square_uniform_p(np.bincount(places, minlength=20)) > 0.001


def test_uniforms_are_uniform_and_independent() -> None:
    order = TrainOrder(1000, 500, 0, 1, seed=0)
    values = np.stack([order.uniforms(step, 13) for step in range(20)]).reshape(-1, 13)  # [10000, 13]
    assert values.dtype == np.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert len(np.unique(values[:, 0])) > 9990  # 24 bits: 3 repeats expected among 10,000
    grid = (np.arange(100_000) + 0.5) / 100_000
    for column in values.T:
        assert kolmogorov_smirnov_p(column, grid) > 0.001
    correlations = np.corrcoef(np.concatenate([values[:-1], values[1:]], axis=1).T) - np.eye(26)
    assert np.abs(correlations).max() < 0.05  # 5 standard deviations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 0, 1, 0), "num_samples is 0"),
        ((10, 0, 0, 1, 0), "batch_size is 0"),
        ((10, 8, 0, 3, 0), "8 is not divisible by the world size 3"),
        ((10, 8, 2, 2, 0), "rank is 2"),
        ((10, 8, 0, 0, 0), "rank is 0"),
        ((10, 8, 0, 1, -1), "seed is -1"),
    ],
)
def test_train_order_rejects(arguments: tuple[int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOrder(*arguments)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 8, 23, 24, 25])
def test_eval_order_holds_every_sample_once(num_samples: int, world_size: int) -> None:
    orders = [EvalOrder(num_samples, 4, rank, world_size) for rank in range(world_size)]
    batches = {order.num_batches for order in orders}
    assert batches == {-(-num_samples // (4 * world_size))}
    indices = np.concatenate([order.indices(batch) for order in orders for batch in range(order.num_batches)])
    assert len(indices) == batches.pop() * 4 * world_size
    np.testing.assert_array_equal(np.sort(indices[indices >= 0]), np.arange(num_samples))
    assert set(indices[indices < 0]) <= {-1}


def test_eval_order_keeps_the_order_of_the_set() -> None:
    order = EvalOrder(10, 4, 0, 1)
    assert [order.indices(batch).tolist() for batch in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]


def test_eval_order_rejects_an_empty_set() -> None:
    with pytest.raises(ValueError, match="num_samples is 0"):
        EvalOrder(0, 4, 0, 1)
