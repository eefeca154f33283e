"""Which sample goes where: pure functions of (seed, step, rank, world size), with no state to save.

The training stream is infinite. Its position p (counted over all ranks) belongs to epoch p // num_samples
and holds the sample that this epoch's permutation puts at p % num_samples, so an epoch boundary may fall
anywhere in a batch and every sample appears exactly once per epoch whatever the batch size or the number of
ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

__all__ = ["EvalOrder", "TrainOrder"]

# Spawn keys of numpy's SeedSequence: they keep the streams drawn from one seed independent of each other.
_PERMUTATIONS, _UNIFORMS = 0, 1


@functools.lru_cache(maxsize=2)  # a batch may straddle an epoch boundary; 14 M samples take 56 MB an epoch
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of an epoch, int32 [num_samples] (int64 beyond 2^31 samples), read-only."""
    dtype = np.int32 if num_samples <= np.iinfo(np.int32).max else np.int64
    permutation = np.arange(num_samples, dtype=dtype)
    sequence = np.random.SeedSequence(seed, spawn_key=(_PERMUTATIONS, epoch))
    np.random.Generator(np.random.PCG64(sequence)).shuffle(permutation)
    permutation.flags.writeable = False
    return permutation


@functools.lru_cache(maxsize=8)
def _uniforms_key(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed, spawn_key=(_UNIFORMS,)).generate_state(2, np.uint64)


def _check(num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: a data set needs at least one sample")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}: it must be in [0, world_size) with world_size {world_size}")


@dataclass(frozen=True)
class TrainOrder:
    """One rank's share of the infinite, globally reshuffled training stream.

    Step s is made of the positions [s * batch_size, (s + 1) * batch_size); rank r takes the r-th of
    world_size equal slices of them. Raises ValueError if batch_size is not divisible by world_size.
    """

    num_samples: int
    batch_size: int
    """Samples per step over all ranks."""
    rank: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        _check(self.num_samples, self.batch_size, self.rank, self.world_size)
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by the world size {self.world_size}: "
                f"choose a multiple of {self.world_size}"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: it must not be negative")

    @property
    def local_batch_size(self) -> int:
        """Samples of this rank at a step."""
        return self.batch_size // self.world_size

    def _first_position(self, step: int) -> int:
        return step * self.batch_size + self.rank * self.local_batch_size

    def indices(self, step: int) -> np.ndarray:
        """Sample indices of this rank at a step, int64 [local_batch_size]."""
        out = np.empty(self.local_batch_size, np.int64)
        position, done = self._first_position(step), 0
        while done < len(out):
            epoch, start = divmod(position + done, self.num_samples)
            taken = _permutation(self.num_samples, self.seed, epoch)[start : start + len(out) - done]
            out[done : done + len(taken)] = taken
            done += len(taken)
        return out

    def uniforms(self, step: int, count: int) -> np.ndarray:
        """Random numbers of this rank's samples at a step, float32 [local_batch_size, count] in [0, 1).

        A row depends on seed, position and count alone: Philox is counter-based, and every position owns a
        range of counters. Values are multiples of 2^-24.
        """
        blocks = -(-count // 8)  # a Philox counter yields four 64-bit words, that is eight numbers
        counter = self._first_position(step) * blocks
        generator = np.random.Generator(np.random.Philox(key=_uniforms_key(self.seed), counter=counter))
        return generator.random((self.local_batch_size, blocks * 8), np.float32)[:, :count]


@dataclass(frozen=True)
class EvalOrder:
    """One rank's share of a finite set, in the set's own order; over all ranks every index comes exactly once.

    All ranks have the same number of batches, as collective operations need it; where a rank has too few
    samples for them (or none), its batches are padded with -1.
    """

    num_samples: int
    batch_size: int
    """Samples per batch of this rank."""
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        _check(self.num_samples, self.batch_size, self.rank, self.world_size)

    @property
    def num_batches(self) -> int:
        """Batches of each rank; the last may be padding in part or whole."""
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def indices(self, batch: int) -> np.ndarray:
        """Sample indices of this rank in a batch, int64 [batch_size], -1 where padded."""
        start = (batch * self.world_size + self.rank) * self.batch_size
        indices = np.arange(start, start + self.batch_size, dtype=np.int64)
        indices[indices >= self.num_samples] = -1
        return indices
