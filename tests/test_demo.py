import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dali_vit import demo
from dali_vit.config import UserError
from dali_vit.data import check_images, load_dataset
from dali_vit.demo import CLASSES, demo_folder, draw_image, make_demo

ROOT = Path(__file__).parents[1]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start_drawing(folder: Path, train_per_class: int, val_per_class: int) -> subprocess.Popen[str]:
    code = (
        "import logging, sys, pathlib; logging.basicConfig(level='INFO'); from dali_vit.demo import make_demo;"
        "make_demo(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
    )
    arguments = [sys.executable, "-c", code, str(folder), str(train_per_class), str(val_per_class)]
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """4 training and 2 validation images of each class."""
    folder = tmp_path_factory.mktemp("demo") / "demo-v1"
    make_demo(folder, 4, 2)
    return folder


def test_whole_dataset_is_two_thousand_and_five_hundred_images(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "_draw_files", lambda folder, per_class: calls.append(per_class))
    make_demo(tmp_path / "demo-v1")
    assert calls == [{"train": 200, "val": 50}]
    assert len(CLASSES) == 10


def test_indexed_as_an_image_folder(small):
    dataset = load_dataset(small, minival=0.05)
    assert dataset.classes == CLASSES == tuple(sorted(CLASSES))
    assert dataset.counts == {"train": 38, "minival": 2, "val": 20}
    assert dataset.val.labels.tolist() == sorted(list(range(10)) * 2)
    for files in (dataset.train, dataset.minival, dataset.val):
        check_images(files)
    for path in small.glob("*/*/*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")


def test_same_bytes_every_time_whatever_the_number_of_images(small, tmp_path):
    make_demo(tmp_path / "again", 4, 2)
    assert digests(tmp_path / "again") == digests(small)
    make_demo(tmp_path / "fewer", 3, 1)
    fewer, more = digests(tmp_path / "fewer"), digests(small)
    assert len(fewer) == 41
    assert all(fewer[path] == more[path] for path in fewer if path.endswith(".jpg"))


def test_no_image_occurs_twice(small):
    images = [digest for path, digest in digests(small).items() if path.endswith(".jpg")]
    assert len(set(images)) == len(images) == 60


def test_sizes_spread_as_imagenets():
    sizes = np.array([demo._draw_size(np.random.default_rng(seed)) for seed in range(4000)])
    assert sizes.min() >= 200
    assert sizes.max() == 700
    np.testing.assert_allclose(sizes.mean(0), [366, 415], atol=10)  # height, width
    assert 0.72 < np.mean(sizes[:, 1] > sizes[:, 0]) < 0.78  # landscape
    assert np.percentile(sizes, 5) < 270
    assert np.percentile(sizes, 95) > 540
    assert draw_image(0, (0, 1)).shape == (*demo._draw_size(np.random.default_rng([1, 0, 0, 1])), 3)


@pytest.mark.timeout(120)
def test_classes_differ_in_texture_but_not_in_colour():
    def features(split: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        colours, spectra, labels = [], [], []
        for label in range(10):
            for number in range(count):
                image = draw_image(label, (split, number))
                colours.append(image.mean((0, 1)))
                grey = Image.fromarray(image).convert("L").resize((48, 48), Image.Resampling.BOX)
                spectrum = np.log(np.abs(np.fft.fft2(np.asarray(grey, np.float32) / 255)) + 1)
                spectra.append(spectrum.ravel()[1:] / np.linalg.norm(spectrum.ravel()[1:]))
                labels.append(label)
        return np.array(colours), np.array(spectra), np.array(labels)

    train, val = features(0, 40), features(1, 20)

    def nearest_centroid_accuracy(kind: int) -> float:
        centroids = np.stack([train[kind][train[2] == label].mean(0) for label in range(10)])
        distances = np.linalg.norm(val[kind][:, None] - centroids, axis=-1)
        return float(np.mean(distances.argmin(1) == val[2]))

    # Chance is 10 % of 200 images, with a standard deviation of 2.1 %.
    assert nearest_centroid_accuracy(0) < 0.2
    assert nearest_centroid_accuracy(1) > 0.5


def test_whole_folder_is_left_alone(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*.jpg")}
    make_demo(small, 4, 2)
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*.jpg")} == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", ["manifest", "image", "truncated", "counts"])
def test_damaged_folder_is_redone(small, tmp_path, damage):
    folder = tmp_path / "demo-v1"
    make_demo(folder, 4, 2)
    victim = folder / "train" / CLASSES[3] / "00002.jpg"
    if damage == "manifest":
        (folder / "manifest.json").unlink()
    elif damage == "image":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"per_class": {"train": 9, "val": 2}}))
    make_demo(folder, 4, 2)
    assert digests(folder) == digests(small)


@pytest.mark.timeout(120)
def test_killed_drawing_leaves_nothing_half_and_is_redone(small, tmp_path):
    folder = tmp_path / "demo-v1"
    process = start_drawing(folder, 200, 50)
    while len(list(tmp_path.glob("demo-v1.partial-*/*/*/*.jpg"))) < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not folder.exists()
    assert len(list(tmp_path.glob("demo-v1.partial-*"))) == 1
    make_demo(folder, 4, 2)
    assert digests(folder) == digests(small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-v1", "demo-v1.lock"]


def test_failed_drawing_leaves_nothing(tmp_path, monkeypatch):
    def fail(class_index, seed):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "draw_image", fail)
    monkeypatch.setenv("DALI_VIT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"demo-v1 \(No space left on device\): set DALI_VIT_CACHE"):
        demo_folder()
    assert [path.name for path in tmp_path.iterdir()] == ["demo-v1.lock"]


@pytest.mark.timeout(120)
def test_processes_that_start_at_once_draw_it_once(small, tmp_path):
    processes = [start_drawing(tmp_path / "demo-v1", 4, 2) for _ in range(3)]
    logs = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], logs
    assert sum("drawing the demo dataset" in log for log in logs) == 1
    assert digests(tmp_path / "demo-v1") == digests(small)


def test_place_of_the_cache(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(demo, "make_demo", made.append)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DALI_VIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    places = [demo_folder()]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    places.append(demo_folder())
    monkeypatch.setenv("DALI_VIT_CACHE", str(tmp_path / "own"))
    places.append(demo_folder())
    assert places == made
    expected = ["home/.cache/dali-vit/demo-v1", "xdg/dali-vit/demo-v1", "own/demo-v1"]
    assert [os.path.relpath(place, tmp_path) for place in places] == expected


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DALI_VIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"demo-v1 .*set DALI_VIT_CACHE"):
        demo_folder()
