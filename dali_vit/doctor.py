"""`dali-vit doctor`: what this machine has and what it will be used for."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from PIL import Image

from dali_vit import environment
from dali_vit.compiling import compile_fault
from dali_vit.config import Config, DataConfig, OptimConfig
from dali_vit.data import Dataset
from dali_vit.distributed import Group
from dali_vit.loaders import train_loader
from dali_vit.metrics import peak_flops
from pipelines import windows
from pipelines.readers import FileList
from pipelines.words import counted, one_line


def report() -> tuple[str, bool]:
    """What the machine has, and whether each part of a run works on it, as lines of `name  value`, the last of which
    says whether it is fit to train; and whether it is."""
    rows: list[tuple[str, str]] = list(environment.versions().items())
    rows.append(("cpu", f"{environment.cpu_name()}, {counted(environment.cpu_count(), 'core')} usable"))
    rows.append(("driver", environment.gpu_driver() or "none"))
    gpus = environment.gpu_names()
    prevents, slows = [], []
    for index, name in enumerate(gpus):
        device = torch.device("cuda", index)
        peak = peak_flops(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        known = f"{peak / 1e12:.0f} TFLOP/s dense bf16" if peak else "peak unknown, so no MFU"
        rows.append((f"gpu {index}", f"{name}, compute capability {capability}, {known}"))
        if environment.too_old(device):
            prevents.append(f"gpu {index} is older than Ampere (hide it by CUDA_VISIBLE_DEVICES)")
    if not gpus:
        rows.append(("gpus", f"none: {environment.why_no_gpu()}"))
    threads = max(1, environment.cpu_count() // max(1, len(gpus)))
    if gpus:
        rows.append(("training", f"{counted(len(gpus), 'process', 'processes')}, bf16 autocast, torch.compile"))
    else:
        rows.append(("training", "on the CPU in float32, torch.compile off unless asked for"))
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    if fault := compile_fault(device):
        slows.append("compile")
    rows.append(("compile", f"torch.compile {_state(fault)}"))
    if gpus:
        rows.append(("jpeg engine", environment.jpeg_engine(device)))
        if rows[-1][1].startswith("unusable"):
            slows.append("jpeg engine")
        if fault := windows.fault():
            slows.append("jpeg windows")
        rows.append(("jpeg windows", f"decoding them alone {_state(fault)}"))
    where = "on the GPU" if gpus else "on the CPU"
    if fault := _input_fault(device):
        prevents.append("input fails")
    rows.append(
        (
            "input",
            f"DALI decodes and augments {where}, {counted(threads, 'thread')} a process: {_state(fault)}",
        )
    )
    rows.append(("verdict", _verdict(prevents, slows if gpus else [], where)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows), not prevents


def _verdict(prevents: list[str], slows: list[str], where: str) -> str:
    """Whether a machine is fit, in words. prevents: what training cannot do with; slows: what it goes slower with."""
    if prevents:
        return f"not fit to train: {', '.join(prevents)}"
    slower = f", but slower than it could: see {', '.join(slows)}" if slows else ""
    return f"fit to train {where}{slower}"


def _state(fault: str | None) -> str:
    return f"fails: {fault}" if fault else "works"


def _input_fault(device: torch.device) -> str | None:
    """What goes wrong when the training graph reads one JPEG on a device; None if nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        Image.new("RGB", (96, 64)).save(path)
        files = FileList.from_paths([str(path)], [0])
        config = Config(data=DataConfig(resolution=32), optim=OptimConfig(batch_size=1))
        dataset = Dataset("doctor", path.parent, ("image",), files, None, None)
        try:
            loader = train_loader(dataset, config, Group(0, 1, 0, 1, device))
            next(loader)
            loader.close()
        except (RuntimeError, ValueError) as error:
            return one_line(error)[:200]
    return None
