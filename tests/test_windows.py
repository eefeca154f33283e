"""Whether windows of JPEGs are decoded alone: the trial, how its outcome is judged, and what training does then."""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from dali_vit.config import Config
from dali_vit.distributed import Group
from dali_vit.loaders import LoaderSettings, default_settings
from pipelines import crop, windows
from pipelines.crop import Decoder

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if there were a GPU, for which nothing is known yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    windows.fault.cache_clear()
    yield
    windows.fault.cache_clear()


def ends_by(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(windows, "_COMMAND", ("-c", program))


def test_on_a_cpu_windows_decoded_alone_are_those_of_whole_images(capsys: pytest.CaptureFixture[str]) -> None:
    windows.try_out(None)
    assert capsys.readouterr().err == "".join(f"hw_decoder_load {load}\n" for load in (0.0, 0.65, 1.0))


def test_the_trial_sees_another_window(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_window = crop.cut_window

    def shifted(encoded: Any, image: Any, start: Any, window: Any, *, device: str, decoder: Decoder) -> Any:
        if decoder.region == "window":
            start = start * 0.0
        return cut_window(encoded, image, start, window, device=device, decoder=decoder)

    monkeypatch.setattr(crop, "cut_window", shifted)
    with pytest.raises(RuntimeError, match=r"^the pixels differ by \d+ levels$"):
        windows.try_out(None)
    monkeypatch.setattr(windows, "_LEAST", 640)  # no window is as large
    windows.try_out(None)


def test_what_is_tried_is_within_the_image_and_of_all_kinds() -> None:
    images, sizes, starts, shapes = windows._draw()
    assert len(images) == len(sizes) == len(starts) == len(shapes) == 64
    for size, start, window in zip(sizes, starts, shapes, strict=True):
        assert (start >= 0).all()
        assert (window >= size // 4).all()
        assert (start + window <= size).all()
        assert (np.concatenate([size, start, window]) % 1 == 0).all()
    progressive = [b"\xff\xc2" in image.tobytes() for image in images]
    assert 16 <= sum(progressive) < 48
    modes = [Image.open(io.BytesIO(image.tobytes())).mode for image in images]
    assert (modes.count("RGB"), modes.count("L")) == (56, 8)
    assert sum((size == window).all() for size, window in zip(sizes, shapes, strict=True)) >= 8
    assert sum(max(size) < 64 for size in sizes) == 8


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the process that tried it was ended by SIGSEGV"),
        (
            "import os, sys; [print(x, file=sys.stderr, flush=True) for x in"
            " ('hw_decoder_load 0.0', 'hw_decoder_load 0.65', 'DALI: x')]; os.kill(os.getpid(), 11)",
            "the process that tried it was ended by SIGSEGV at hw_decoder_load 0.65",
        ),
        (
            "import sys; print('DALI: x', file=sys.stderr); sys.exit('RuntimeError: failure #8')",
            "RuntimeError: failure #8",
        ),
        ("import os; os._exit(3)", "without a word"),
        (
            "import sys; sys.exit('RuntimeError: all CUDA-capable devices are busy or unavailable')",
            "it cannot be tried out, as the GPU admits one process alone; see nvidia-smi --compute-mode",
        ),
    ],
)
def test_how_it_fails_is_said_once(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, program: str, reason: str
) -> None:
    ends_by(monkeypatch, program)
    with caplog.at_level(logging.WARNING):
        assert [windows.fault(), windows.fault()] == [reason, reason]
    assert [record.getMessage() for record in caplog.records] == [
        f"whole JPEGs are decoded and windows cut out, as decoding windows alone fails here ({reason})"
    ]


def test_a_trial_that_hangs_is_ended(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    ends_by(monkeypatch, f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    monkeypatch.setattr(windows, "_PATIENCE", 3.0)
    began = time.monotonic()
    assert windows.fault() == "it has not ended after 3 s"
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_one_that_ends_well_is_no_fault(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ends_by(monkeypatch, "import sys; assert sys.argv[1:] == ['0']")
    with caplog.at_level(logging.DEBUG):
        assert windows.fault() is None
    assert not caplog.records


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_the_trial_itself_runs_in_any_folder(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far as it gets without a GPU."""
    for name in ("pipelines", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    reason = windows.fault()
    assert reason is not None
    assert "CUDA is not available" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    windows.fault.cache_clear()
    monkeypatch.setattr(windows.subprocess, "run", lambda *_, **__: pytest.fail("tried"))
    assert windows.fault() is None


@pytest.mark.parametrize(
    ("region", "fault", "decoders"),
    [
        ("window", None, {"image_slice"}),
        ("window", "SIGSEGV", {"image"}),
        ("full", None, {"image"}),
        ("full", "SIGSEGV", {"image"}),
    ],
)
def test_where_windows_fail_whole_images_are_decoded(
    monkeypatch: pytest.MonkeyPatch, region: Any, fault: str | None, decoders: set[str]
) -> None:
    called: set[str] = set()
    for name in ("image", "image_slice"):
        operator = getattr(fn.decoders, name)
        monkeypatch.setattr(
            fn.decoders, name, lambda *a, name=name, operator=operator, **k: called.add(name) or operator(*a, **k)
        )
    monkeypatch.setattr(windows, "fault", lambda: fault)

    @pipeline_def(batch_size=2, num_threads=1, device_id=0)
    def graph() -> Any:
        numbers = [types.UINT8, *[types.FLOAT] * 3]
        drawn = fn.external_source(lambda: (), num_outputs=4, dtype=numbers)
        options: dict[str, Any] = {"size": 32, "antialias": True, "decoder": Decoder(region=region)}
        return crop.decode_window(*drawn, None, device="gpu", **options)

    graph()
    assert called == decoders


@pytest.mark.parametrize(
    ("device", "fault", "region"),
    [("cuda", None, "window"), ("cuda", "SIGSEGV", "full"), ("cpu", "SIGSEGV", "window")],
)
def test_what_is_reported_is_what_is_loaded_with(
    monkeypatch: pytest.MonkeyPatch, device: str, fault: str | None, region: Any
) -> None:
    monkeypatch.setattr(windows, "fault", lambda: fault)
    group = Group(0, 1, 0, 1, torch.device(device), cores=5)
    assert default_settings(Config(), group) == LoaderSettings(5, 2, Decoder(region=region))
