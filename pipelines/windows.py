"""Whether a GPU can decode windows of JPEGs alone, tried out in a process of its own, as the trial may crash.

nvImageCodec 0.9, which DALI 2.4 decodes with, is reported to fail at windows of ordinary JPEGs: with an error on A100
and GB200, with a segmentation fault on H100 and B200 (NVIDIA/nvImageCodec, issue 55). It does decode whole images.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["fault", "try_out"]

log = logging.getLogger("dali_vit.data")  # among the training's own messages

_PATIENCE = 120.0  # seconds; the trial takes about five
_LEAST = 25  # pixels; of smaller windows the average difference says little
_COUNT = 64  # images, enough for both decoders and for all engines of the hardware decoder
_HW_DECODER_LOADS = (0.0, 0.65, 1.0)
_AT = "hw_decoder_load "  # how the trial says what it is about to try
_TOLERANCE = 6.0  # levels, on average; two decoders differ by 3, two windows by 30
_COMMAND = ("-P", __file__)


@functools.cache
def fault() -> str | None:
    """Why the current GPU must not decode windows alone; None where it may, or where there is no GPU.

    The reason is logged once, and by one of a machine's processes.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    reason = _ended_badly(torch.cuda.current_device())
    if reason is not None:
        words = "whole JPEGs are decoded and windows cut out, as decoding windows alone fails here (%s)"
        log.warning(words, reason, extra={"of_machine": True})
    return reason


def _ended_badly(device_id: int) -> str | None:
    """How `try_out` failed in a process of its own; None if it succeeded."""
    try:
        tried = subprocess.run(
            [sys.executable, *_COMMAND, str(device_id)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it has not ended after {_PATIENCE:g} s"
    except OSError as error:
        return f"it cannot be tried out: {error}"
    if tried.returncode < 0:
        at = [f" at {line}" for line in tried.stderr.splitlines() if line.startswith(_AT)]
        ended = f"the process that tried it was ended by {signal.Signals(-tried.returncode).name}"
        return ended + "".join(at[-1:])
    if tried.returncode and "busy or unavailable" in tried.stderr:
        return "it cannot be tried out, as the GPU admits one process alone; see nvidia-smi --compute-mode"
    return _last_line(tried.stderr) if tried.returncode else None


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "without a word")


def try_out(device_id: int | None) -> None:
    """Raises RuntimeError where windows decoded alone differ from the same windows cut out of whole images.

    It runs on the GPU device_id, on the CPU if that is None. A broken decoder may end the process.
    """
    from nvidia.dali import fn, pipeline_def  # imported here, as `crop`, needed below, imports this module

    from pipelines import crop

    device = "cpu" if device_id is None else "gpu"
    images, sizes, starts, windows = _draw()

    @pipeline_def(batch_size=_COUNT, num_threads=4, device_id=device_id)
    def graph(load: float) -> Any:
        drawn = fn.external_source(lambda: (images, sizes, starts, windows), num_outputs=4)
        alone, whole = (crop.Decoder(region=region, hw_decoder_load=load) for region in crop.REGIONS)
        return tuple(crop.cut_window(*drawn, device=device, decoder=decoder) for decoder in (alone, whole))

    for load in _HW_DECODER_LOADS:
        print(f"{_AT}{load}", file=sys.stderr, flush=True)
        pipeline = graph(load)
        for _ in range(3):
            alone, cut = (output.as_cpu() for output in pipeline.run())
            for i in range(_COUNT):
                difference = np.abs(alone.at(i).astype(np.float32) - cut.at(i)).mean()
                if not difference < _TOLERANCE and windows[i].min() >= _LEAST:
                    raise RuntimeError(f"the pixels differ by {difference:.0f} levels")


def _draw() -> tuple[list[np.ndarray], ...]:
    """JPEGs of many sizes and kinds, their sizes, and windows: (top, left) and (height, width), float32 [2].

    Of eight one is as small as ImageNet's smallest, with a window that may lie within one block of the JPEG, one is
    grey, and of one the window is the whole image.
    """
    rng = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [{}, {"subsampling": 0}, {}, {"progressive": True}]
    drawn = []
    for i in range(_COUNT):
        height, width = rng.integers(16, 64, 2) if i % 8 == 2 else rng.integers(100, 640, 2)
        # Smooth, as photographs are: no two decoders make the same pixels of white noise.
        coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
        stream = io.BytesIO()
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        smooth = smooth.convert("L") if i % 8 == 6 else smooth
        smooth.save(stream, "JPEG", quality=90, **kinds[i % len(kinds)])
        size = np.array([height, width])
        window = size if i % 8 == 4 else rng.integers(size // 4, size + 1)
        start = rng.integers(0, size - window + 1)
        numbers = (each.astype(np.float32) for each in (size, start, window))
        drawn.append((np.frombuffer(stream.getvalue(), np.uint8), *numbers))
    return tuple(map(list, zip(*drawn, strict=True)))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # the package may not be installed; last, to hide no other
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file, should it crash
    try:
        try_out(int(sys.argv[1]))
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))
    os._exit(0)  # a crash while libraries are unloaded would say nothing about the decoder
