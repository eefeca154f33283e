"""Batches with more files than the 1,024 that most systems let a process open unless it asks for more."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from PIL import Image

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.plan import plan
from dali_vit.prepare import PrepareArguments, prepare
from pipelines import open_files
from pipelines.open_files import TooManyFiles
from pipelines.readers import FileList, allow_open_files
from tests import datasets

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def limits(monkeypatch):
    """The limits of this process, [soft, hard], as the module sees and changes them."""
    found = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(found))
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: found.__setitem__(slice(None), new))
    return found


@pytest.mark.parametrize(
    ("files", "before", "after"),
    [
        (200, [1024, 4096], [1024, 4096]),  # 2 x 200 + 512 are fewer than there may be already
        (300, [1024, 4096], [1112, 4096]),
        (3000, [1024, 4096], [4096, 4096]),
        (3000, [1024, resource.RLIM_INFINITY], [6512, resource.RLIM_INFINITY]),
        (3000, [resource.RLIM_INFINITY] * 2, [resource.RLIM_INFINITY] * 2),
        (3000, [9000, 10000], [9000, 10000]),
    ],
)
def test_the_limit_is_raised_as_far_as_is_needed(files, before, after, limits):
    limits[:] = before
    open_files.allow(files, "files", "do without")
    assert limits == after


def test_what_cannot_be_had_is_refused_with_its_remedies(limits):
    open_files.allow(4096 - 64, "files", "do without")
    with pytest.raises(TooManyFiles, match=r"^5,000 shards must be open .* 4,096 files .* 10,512, or prepare"):
        open_files.allow(5000, "5,000 shards", "prepare larger shards")
    with pytest.raises(TooManyFiles, match="files of two batches of 2,048 images"):
        allow_open_files(FileList.from_paths(["a.jpg"], [0]), 2048)


def test_a_set_of_more_shards_than_may_be_open_is_refused_as_it_is_loaded(limits, tmp_path):
    root = datasets.write_folder(tmp_path / "images", datasets.draw_images())
    shards = prepare(PrepareArguments(root, tmp_path / "set", to="shards"))
    limits[:] = [64, 64]
    with pytest.raises(UserError, match=rf"^{shards}: 1 shards must be open at once, but .* 64 files"):
        load_dataset(shards)


def test_a_run_asks_for_the_files_of_one_process(limits, tiny_config):
    """A batch over all four would not be allowed."""
    plan(replace(tiny_config, optim=replace(tiny_config.optim, batch_size=2048)), 4)
    assert limits == [2 * 2 * 512 + 512, 4096]


PROGRAM = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 8192))
from pipelines.loader import EvalLoader, TrainLoader
from pipelines.readers import FileList
files = FileList.from_paths([sys.argv[1]] * 1500, [0] * 1500)
common = {"batch_size": 1500, "image_size": 8, "rank": 0, "world_size": 1, "device": "cpu", "num_threads": 2}
if sys.argv[2] == "evaluation":
    images, labels = next(iter(EvalLoader(files, **common)))
else:
    loader = TrainLoader(files, seed=0, **common)
    assert loader.bad_samples == ()
    images, labels = next(loader)
print(*images.shape, labels.sum().item())
"""


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_batch_of_more_files_than_the_usual_limit(kind, tmp_path):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (16, 16)).save(path)
    command = [sys.executable, "-c", PROGRAM, str(path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1500 8 8 3 0\n"


def test_a_run_whose_batch_cannot_be_had_ends_before_anything_is_written(image_folder, tmp_path):
    command = [sys.executable, "-m", "dali_vit", "train", "--data", str(image_folder), "--gpus", "0"]
    command += ["--runs-dir", str(tmp_path / "runs"), "--batch-size", "2048"]
    done = subprocess.run(["bash", "-c", 'ulimit -n 1024; exec "$@"', "-", *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dali-vit: --batch-size: the files of two batches of 2,048 images must be open")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
