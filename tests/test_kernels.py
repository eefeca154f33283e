"""The compiled loops against DALI's and torch's resize, and what happens if Numba cannot be used as usual."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines import compiled
from pipelines.kernels.resize import resize
from pipelines.loader import TrainLoader
from pipelines.readers import FileList
from tests.conftest import environment
from tests.datasets import encode

pytestmark = pytest.mark.timeout(120)

SIZES = [(300, 400), (100, 80), (1, 1), (1, 7), (5, 300), (900, 20), (64, 64), (402, 456), (3, 2), (65, 63)]
ROOT = Path(__file__).parents[1]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [64, 50, 7])
def test_resize_is_that_of_dali(size: int, antialias: bool) -> None:
    """White noise, where rounding shows most: never more than a level, and that in few places, mostly exact halves."""
    images = [noise(*shape) for shape in SIZES]
    mirror = [np.bool_(i % 2) for i in range(len(images))]

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None, prefetch_queue_depth=1)
    def graph() -> tuple:
        node, flip = fn.external_source(lambda _: (images, mirror), num_outputs=2, layout=["HWC", ""])
        width = size - flip * (2.0 * size)
        options: dict[str, Any] = {"interp_type": types.INTERP_LINEAR, "antialias": antialias}
        ours = compiled.resize(node, flip, size=size, antialias=antialias)
        unflipped = compiled.resize(node, None, size=size, antialias=antialias)
        return ours, fn.resize(node, resize_y=size, resize_x=width, **options), unflipped

    outputs = graph().run()
    assert [output.layout() for output in outputs] == ["HWC"] * 3
    ours, dalis, unflipped = (output.as_array() for output in outputs)
    difference = np.abs(ours.astype(int) - dalis)
    assert difference.max() <= 1
    shares = (difference > 0).mean(axis=(1, 2, 3))
    assert shares.max() < 0.15
    assert np.median(shares) < 0.03
    np.testing.assert_array_equal(ours[::2], unflipped[::2])
    np.testing.assert_array_equal(ours[1::2, :, ::-1], unflipped[1::2])


@pytest.mark.parametrize("shape", [(300, 400), (90, 33)])
def test_resize_is_that_of_torch(shape: tuple[int, int]) -> None:
    image, out = noise(*shape), np.empty((60, 60, 3), np.uint8)
    planes = torch.tensor(image).permute(2, 0, 1)[None].float()
    for antialias, border in [(False, 0), (True, 4)]:  # where torch leaves out what lies beyond, DALI repeats the last
        resize(image, False, antialias, out)
        expected = torch.nn.functional.interpolate(planes, (60, 60), mode="bilinear", antialias=antialias)
        inner = slice(border, 60 - border)
        expected = expected[0].permute(1, 2, 0).numpy()
        assert np.abs(out - expected)[inner, inner].max() <= 0.501


def test_a_constant_image_stays_constant() -> None:
    """The weights of each place sum to 1, at every scale."""
    for value in (0, 1, 127, 254, 255):
        for shape in SIZES:
            out = np.empty((50, 50, 3), np.uint8)
            resize(np.full((*shape, 3), value, np.uint8), False, True, out)
            assert (out == value).all()


def loader(tmp_path: Path) -> TrainLoader:
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(encode(noise(50 + i, 60)))
    files = FileList.from_paths([str(tmp_path / f"{i}.jpg") for i in range(8)], np.arange(8))
    options: dict[str, Any] = {"batch_size": 8, "image_size": 32, "seed": 3, "rank": 0, "world_size": 1}
    return TrainLoader(files, device="cpu", num_threads=1, **options)


def test_without_numba_dalis_operators_take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = next(loader(tmp_path))
    monkeypatch.setattr(compiled, "available", lambda: False)
    monkeypatch.setitem(sys.modules, "numba", None)  # importing it would raise
    plain_images, plain_labels = next(loader(tmp_path))
    assert labels.tolist() == plain_labels.tolist()
    difference = (images.int() - plain_images.int()).abs().float()
    assert difference.mean() < 1


def test_that_numba_is_missing_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.startswith("nvidia.dali.plugin.numba")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    compiled.available.cache_clear()
    try:
        for _ in range(2):
            next(loader(tmp_path))
        assert not compiled.available()
    finally:
        compiled.available.cache_clear()
    assert [record.message for record in caplog.records if "pip install numba" in record.message] == [
        "without Numba (import of numba halted; None in sys.modules) the CPU's part takes more than twice the time:"
        " pip install numba"
    ]


@pytest.mark.parametrize("cache", ["nowhere", "full"])
def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path, cache: str) -> None:
    """No folder for what is compiled, or a full disk: it is compiled for this process alone."""
    code = (
        "from pipelines.kernels import calls, randaugment, resize, window\n"
        "assert all(f() for f in (resize.resize_sample, randaugment.rand_augment_sample, calls.pairs_shape))\n"
        "assert calls.square_shape(7) and window.window_sample('tensorflow')"
    )
    folder = tmp_path / ("file/folder" if cache == "nowhere" else "cache")
    (tmp_path / "file").write_text("in the way")
    limit = ["bash", "-c", 'ulimit -f 0; trap "" XFSZ; exec "$@"', "-"] if cache == "full" else []
    ran = subprocess.run(
        [*limit, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment(), "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_what_is_compiled_is_kept(tmp_path: Path) -> None:
    code = (
        "from pipelines.kernels import calls, resize, window\n"
        "resize.resize_sample(); window.window_sample('torchvision'); calls.square_shape(5)\n"
        "print(*(compiled.cache_hits for compiled in calls._compiled))"
    )
    env = {**environment(), "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    hits = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=True)
        for _ in range(2)
    ]
    assert [ran.stdout.split() for ran in hits] == [["0", "0", "0"], ["1", "1", "1"]]
    assert any(name.endswith(".nbc") for _, _, names in os.walk(tmp_path) for name in names)


def test_what_is_compiled_follows_the_code_of_other_files(tmp_path: Path) -> None:
    """Numba by itself would look at the file of the function alone, and give 7 again."""
    shutil.copytree(ROOT / "pipelines" / "kernels", tmp_path / "pipelines" / "kernels")
    (tmp_path / "pipelines" / "__init__.py").touch()
    (tmp_path / "pipelines" / "kernels" / "mine.py").write_text(
        "from numba import types\n"
        "from pipelines.kernels import calls, helper\n"
        "def run(out):\n"
        "    out[0] = helper.number()\n"
        "address = calls.address(types.void(types.CPointer(types.int64)), run)\n"
    )
    code = (
        "import ctypes\n"
        "from pipelines.kernels import calls, mine\n"
        "out = ctypes.c_int64()\n"
        "ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64))(mine.address)(ctypes.byref(out))\n"
        "print(out.value, calls._compiled[0].cache_hits)"
    )
    env = {**environment(), "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    printed = []
    for number in (7, 7, 99):
        helper = f"from pipelines.kernels.calls import jit\n@jit\ndef number():\n    return {number}\n"
        (tmp_path / "pipelines" / "kernels" / "helper.py").write_text(helper)
        ran = subprocess.run(
            [sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=True
        )
        printed.append(ran.stdout.split())
    assert printed == [["7", "0"], ["7", "1"], ["99", "0"]]
