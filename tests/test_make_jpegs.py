import hashlib
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from dali_vit.data import check_images, load_dataset
from tests.test_measure_all import wait_for_the_end_of
from tools import make_jpegs

ROOT = Path(__file__).parents[1]
TOOL = [sys.executable, str(ROOT / "tools" / "make_jpegs.py")]

pytestmark = pytest.mark.timeout(120)


def write(out: Path, count: int, val_count: int = 0, *, classes: int = 3, workers: int = 2, seed: int = 0):
    counts = {"train": count, "val": val_count}
    return make_jpegs.make_jpegs(out, counts, classes=classes, workers=workers, seed=seed)


def digests(folder: Path) -> dict[str, str]:
    files = folder.rglob("*.JPEG")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """14 training and 6 validation images of 3 classes."""
    out = tmp_path_factory.mktemp("jpegs") / "out"
    written = write(out, 14, 6)
    assert [w.is_new for w in written] == [True] * 20
    return out


@pytest.fixture(scope="module")
def scenes() -> make_jpegs.Scenes:
    return make_jpegs.make_scenes(0)


def test_folder_is_a_dataset(small):
    dataset = load_dataset(small, minival=0)
    assert dataset.classes == ("class_0000", "class_0001", "class_0002")
    assert dataset.counts == {"train": 14, "val": 6}
    assert np.bincount(dataset.train.labels).tolist() == [5, 5, 4]
    check_images(dataset.train)
    assert len(set(digests(small).values())) == 20


def test_images_do_not_depend_on_workers_or_count(small, tmp_path):
    write(tmp_path / "out", 4, 3, workers=1)
    few, many = digests(tmp_path / "out"), digests(small)
    assert len(few) == 7
    assert few.items() <= many.items()


def test_goes_on_where_it_stopped(small, tmp_path):
    out = tmp_path / "out"
    write(out, 5, 3)
    first = out / "train" / "class_0000" / "train_00000000.JPEG"
    before = first.stat().st_mtime_ns
    # What a killed run leaves: a file under its temporary name, which is no image to any reader of the folder.
    (out / "train" / "class_0002" / ".train_00000005.JPEG.partial").write_bytes(b"\xff\xd8\xff half")
    assert load_dataset(out, minival=0).counts == {"train": 5, "val": 3}
    written = write(out, 14, 6)
    assert sum(w.is_new for w in written) == 12
    assert digests(out) == digests(small)
    assert first.stat().st_mtime_ns == before
    assert not list(out.rglob("*.partial"))
    for path, w in zip(sorted(out.glob("train/*/*"), key=lambda p: p.name), written, strict=False):
        assert (w.num_bytes, (w.width, w.height)) == (path.stat().st_size, Image.open(path).size)


def test_seeds_differ(small, tmp_path):
    write(tmp_path / "out", 3, seed=1, workers=1)
    assert not set(digests(tmp_path / "out").values()) & set(digests(small).values())


def test_files_are_baseline_jpegs_with_subsampled_colour(small):
    for path in small.rglob("*.JPEG"):
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert "progressive" not in image.info
            assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0


def test_sizes_spread_as_imagenets():
    sizes = np.array([make_jpegs.draw_size(np.random.default_rng(i)) for i in range(20_000)])
    np.testing.assert_allclose(sizes.mean(0), [455, 400], atol=8)  # width, height
    assert np.median(sizes.max(1)) == 500
    assert 0.35 < np.mean((sizes == [500, 375]).all(1)) < 0.37
    megapixels = sizes.prod(1) / 1e6
    assert 0.18 < megapixels.mean() < 0.22
    assert 0.001 < np.mean(megapixels > 1.5) < 0.005
    assert sizes.min() >= 75
    assert 2500 < sizes.max() <= 3000


def test_bytes_spread_as_imagenets(small, tmp_path):
    kilobytes = np.array([w.num_bytes for w in write(tmp_path / "out", 400)]) / 1e3
    # 4,000 images: mean 111.6, percentiles 5, 50, 95: 24, 100, 200 (standard errors of 400: 5, 2, 3, 9).
    assert 92 < kilobytes.mean() < 135
    assert 90 < np.median(kilobytes) < 110
    assert 10 < np.percentile(kilobytes, 5) < 45
    assert 165 < np.percentile(kilobytes, 95) < 260


def test_spectrum_falls_as_a_photographs(scenes):
    """Amplitudes of photographs fall about as 1/f (Field 1987: exponents of 0.8 to 1.5)."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    rings = np.geomspace(0.015, 0.25, 12)
    exponents = []
    for number in range(40):
        image = make_jpegs.draw_image(scenes, np.random.default_rng(number)).convert("L")
        if min(image.size) < 256:
            continue
        grey = np.asarray(image.crop((0, 0, 256, 256)), np.float32)
        window = np.hanning(256)[:, None] * np.hanning(256)
        amplitude = np.abs(np.fft.fft2((grey - grey.mean()) * window))
        means = [amplitude[(frequency >= a) & (frequency < b)].mean() for a, b in pairwise(rings)]
        exponents.append(-np.polyfit(np.log(np.sqrt(rings[:-1] * rings[1:])), np.log(means), 1)[0])
    assert len(exponents) > 25
    assert 0.8 < np.mean(exponents) < 1.5


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--count", "10", "--classes", "20"], "--count 10 leaves some of 20 classes empty"),
        (["--val-count", "5", "--classes", "20"], "--val-count 5 leaves some of 20 classes empty"),
        (["--workers", "0"], "--workers 0: must be from 1 to 1,024"),
        (["--workers", "100000"], "--workers 100000: must be from 1 to 1,024"),
        (["--count", "many"], "invalid int value: 'many'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, fault):
    with pytest.raises(SystemExit) as exit_:
        make_jpegs.main(["--out", str(tmp_path / "out"), *flags])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert fault in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(small, tmp_path, capsys):
    (tmp_path / "photo.jpg").touch()
    flags = ["--count", "3", "--classes", "3"]
    for out, fault in [
        (tmp_path, "holds something else"),
        (tmp_path / "photo.jpg", "cannot be written"),
        (small, "holds images of {'classes': 3, 'seed': 0}, not {'classes': 3, 'seed': 5}"),
    ]:
        assert make_jpegs.main(["--out", str(out), *flags, "--seed", "5"]) == 2
        message = capsys.readouterr().err
        assert fault in message
        assert message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_note_that_cannot_be_read_is_named(content, tmp_path, capsys):
    (tmp_path / "make_jpegs.json").write_bytes(content)
    assert make_jpegs.main(["--out", str(tmp_path), "--count", "3", "--classes", "3"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"make_jpegs.py: {tmp_path}/make_jpegs.json cannot be read (")
    assert message.endswith("): choose another --out folder\n")
    assert (tmp_path / "make_jpegs.json").read_bytes() == content


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("ctrl_c_is_minded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_its_workers_end_with_it(number, tmp_path):
    command = [*TOOL, "--out", str(tmp_path / "out"), "--count", "100000", "--classes", "2", "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        while len(list((tmp_path / "out").rglob("*.JPEG"))) < 4:
            assert running.poll() is None
            time.sleep(0.1)
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        assert len(workers) == 2
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    assert running.returncode == (-number if number == signal.SIGKILL else 130)
    assert said == ("make_jpegs.py: stopped; the same command goes on from here\n" * (number != signal.SIGKILL))
    wait_for_the_end_of(*map(int, workers))


def test_runs_as_a_script_from_any_folder(tmp_path):
    flags = ["--out", "out", "--count", "4", "--val-count", "2", "--classes", "2", "--workers", "1"]
    result = subprocess.run([*TOOL, *flags], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "out: 4 training and 2 validation images of 2 classes" in result.stdout
    assert "6 written in" in result.stdout
    result = subprocess.run([*TOOL, *flags], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "0 written in" in result.stdout
    assert load_dataset(tmp_path / "out", minival=0).counts == {"train": 4, "val": 2}


def test_rates_are_told_by_the_minute(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 5.0, 12.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr(make_jpegs.time, "perf_counter", lambda: next(clock))
    assert list(make_jpegs._with_progress(iter("abcd"), 4)) == list("abcd")
    assert capsys.readouterr().err == "2 of 4 (10 a minute)\n"

    written = [make_jpegs.Written(i < 20, 1000, 10, 10) for i in range(30)]
    monkeypatch.setattr(make_jpegs, "make_jpegs", lambda *_, **__: written)
    clock = iter([0.0, 10.0])
    assert make_jpegs.main(["--out", str(tmp_path / "x"), "--count", "30", "--classes", "3", "--workers", "2"]) == 0
    assert "20 written in 10.0 s by 1 worker, 120 a minute" in capsys.readouterr().out
    clock = iter([0.0, 10.0])
    assert make_jpegs.main(["--out", str(tmp_path / "x"), "--count", "33", "--classes", "3", "--workers", "3"]) == 0
    assert "by 2 workers, 120 a minute" in capsys.readouterr().out
