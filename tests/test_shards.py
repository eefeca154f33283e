import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.loader import EvalLoader, TrainLoader
from pipelines.order import TrainOrder
from pipelines.readers import FileList
from pipelines.shards import ShardList
from tests.datasets import encode

COUNT = 22


def write_shards(root: Path, payloads: list[bytes]) -> ShardList:
    """Samples dealt in turn to three files of no format, each behind bytes of something else."""
    shards: list[bytearray] = [bytearray(b"head" * (1000 * i)) for i in range(3)]
    offsets = []
    for i, data in enumerate(payloads):
        shards[i % 3] += b"between"
        offsets.append(len(shards[i % 3]))
        shards[i % 3] += data
    paths = [root / f"{i}.bin" for i in range(3)]
    for path, content in zip(paths, shards, strict=True):
        path.write_bytes(content)
    labels = np.arange(len(payloads))
    names = FileList.from_paths([f"class/{i}.jpg" for i in labels], labels)
    lengths = np.array([len(data) for data in payloads])
    return ShardList(tuple(map(str, paths)), names, (labels % 3).astype(np.int32), np.array(offsets), lengths, labels)


def jpegs(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (*rng.integers(30, 60, 2), 3), np.uint8)) for _ in range(count)]


@pytest.fixture
def payloads() -> list[bytes]:
    return jpegs(COUNT)


@pytest.fixture
def samples(tmp_path, payloads) -> ShardList:
    return write_shards(tmp_path, payloads)


def test_payload_is_the_bytes_of_the_samples(samples, payloads, tmp_path):
    indices = np.array([5, 0, 21, 5])
    found = samples.payload(indices)
    assert [data.tobytes() for data in found] == [payloads[i] for i in indices]
    assert all(data.dtype == np.uint8 and data.base is not None for data in found)  # views, not copies
    assert len(samples) == COUNT
    assert samples.path(4) == f"{tmp_path}/1.bin: class/4.jpg"
    assert repr(samples) == "ShardList of 22 samples in 3 shards"


def test_subset_keeps_order_labels_and_maps(samples, payloads):
    samples.payload(np.arange(3))
    some = samples.subset([7, 3, 19]).subset(np.array([2, 0]))
    assert [data.tobytes() for data in some.payload(np.array([0, 1]))] == [payloads[19], payloads[7]]
    assert some.labels.tolist() == [19, 7]
    assert some.path(1).endswith("/1.bin: class/7.jpg")
    assert some._maps is samples._maps


def test_empty_samples_are_empty(tmp_path):
    samples = write_shards(tmp_path, [b"abc", b"", b"d" * 9000])
    assert [data.tobytes() for data in samples.payload(np.arange(3))] == [b"abc", b"", b"d" * 9000]


def test_memory_is_48_bytes_a_sample_besides_the_name():
    count = 200_000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    labels = np.zeros(count, np.int64)
    starts = np.arange(count, dtype=np.int64)
    names = FileList(np.zeros(0, np.uint8), starts, np.zeros(count, np.int32), labels)
    columns = np.zeros(count, np.int32), np.zeros(count, np.int64), np.zeros(count, np.int64)
    samples = ShardList(("a",), names, *columns, labels)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(samples) == count
    assert used / count < 48


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("batch_size", "epochs"), [(2, 1), (4, 2)])
def test_every_sample_once_an_epoch_over_two_ranks(samples, payloads, batch_size, epochs):
    seen: Counter[bytes] = Counter()
    for rank in range(2):
        order = TrainOrder(COUNT, batch_size, rank, 2, seed=1)
        for step in range(epochs * COUNT // batch_size):
            indices = order.indices(step)
            found = [data.tobytes() for data in samples.payload(indices)]
            assert samples.labels[indices].tolist() == [payloads.index(data) for data in found]
            seen.update(found)
    assert seen == dict.fromkeys(payloads, epochs)


@pytest.mark.timeout(60)
def test_training_and_evaluation_are_those_of_files(samples, payloads, tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(COUNT)]
    for path, data in zip(paths, payloads, strict=True):
        path.write_bytes(data)
    files = FileList.from_paths([str(path) for path in paths], samples.labels)
    common = {"image_size": 32, "rank": 0, "world_size": 1, "device": "cpu", "num_threads": 1}
    loaders = [TrainLoader(s, batch_size=8, seed=5, **common) for s in (files, samples)]
    for _ in range(6):
        expected, found = (next(loader) for loader in loaders)
        assert torch.equal(expected[1], found[1])
        assert torch.equal(expected[0], found[0])
    resumed = TrainLoader(samples, batch_size=8, seed=5, start_step=5, **common)
    assert torch.equal(next(resumed)[0], found[0])
    for expected, found in zip(*(EvalLoader(s, batch_size=8, **common) for s in (files, samples)), strict=True):
        assert torch.equal(expected[1], found[1])
        assert torch.equal(expected[0], found[0])


@pytest.mark.timeout(60)
def test_more_shards_than_files_may_be_open(tmp_path):
    """Both splits of a set, as a run has them; 1,024 is the usual limit."""
    program = (
        "import resource, sys, numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))\n"
        "from pipelines.readers import FileList\n"
        "from pipelines.shards import ShardList\n"
        "def load(split, count):\n"
        "    numbers = np.arange(count)\n"
        "    names = FileList.from_paths([f'c/{i}' for i in numbers], numbers)\n"
        "    shards = tuple(f'{sys.argv[1]}/{i}' for i in numbers)\n"
        "    samples = ShardList(shards, names, numbers.astype(np.int32), numbers * 0, numbers * 0 + 4, numbers)\n"
        "    assert [d.tobytes() for d in samples.payload(numbers)] == [b'%04d' % i for i in numbers]\n"
        "    return samples\n"
        "splits = [load('train', 1500), load('val', 300)]\n"
    )
    for i in range(1500):
        (tmp_path / str(i)).write_bytes(b"%04d" % i)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
