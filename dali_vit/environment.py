"""What a run ran on: versions, processors, GPUs, the state of the code."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability: the Ampere generation
_WITH_JPEG_ENGINE = ((8, 0), (9, 0), (10, 0), (10, 3))  # compute capabilities of A100, H100 and H200, B200, B300
_JPEG_ENGINE_LIBRARY = "libnvcuvid.so.1"

PACKAGES = (
    "dali-vit",
    "torch",
    "triton",
    "torchvision",
    "nvidia-dali-cuda120",
    "nvidia-nvimgcodec-cu12",
    "nvidia-nvjpeg-cu12",
    "timm",
    "numba",
    "numpy",
    "pillow",
    "tensorboard",
)


def versions() -> dict[str, str]:
    """Version of each package the results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_count() -> int:
    """How many cores this process may use: a scheduler or container may limit them, or the CPU time by a quota."""
    return max(1, int(min(len(usable_cores()), cpu_quota())))


def usable_cores() -> set[int]:
    """Numbers of the cores this process may run on."""
    return os.sched_getaffinity(0)


def machine() -> str:
    """An id of this machine, the same in all its containers and no other machine's: host names may be shared."""
    return _read_text(Path("/proc/sys/kernel/random/boot_id")) or platform.node()


def control_groups() -> str:
    """The control groups of this process, a line each, as in /proc/self/cgroup; empty if the kernel has none."""
    return _read_text(Path("/proc/self/cgroup"))


def quota_holder() -> str:
    """An id that processes share if they share a `cpu_quota`: groups of different containers may have the same name."""
    try:
        namespace = os.readlink("/proc/self/ns/cgroup")
    except OSError:
        namespace = ""
    return f"{namespace} {_groups_of('cpu', control_groups())}"


def cpu_quota(groups: str | None = None, root: Path = Path("/sys/fs/cgroup")) -> float:
    """CPU seconds per second that control groups grant all their processes together; infinite without a limit.

    groups: as `control_groups` returns them, by default this process's; root: the folder of their files. Source: the
    kernel's cgroup-v2.rst (cpu.max) and, for version 1, sched-bwc.rst (cpu.cfs_quota_us).
    """
    quotas = [math.inf]
    for folder, version in _group_folders("cpu", groups, root):
        if version == 1:
            limits = [_read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        else:
            limits = _read_text(folder / "cpu.max").split()
        if len(limits) == 2 and all(limit.isdecimal() for limit in limits):  # neither "max" nor -1
            quotas.append(int(limits[0]) / int(limits[1]))
    return min(quotas)


def available_memory(
    groups: str | None = None, root: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")
) -> float:
    """Bytes of memory that processes of this machine may still take; infinite if the machine does not tell.

    The least of MemAvailable and the control groups' limits; what the groups already use is not subtracted from these.
    groups, root: as in `cpu_quota`. Source: the kernel's cgroup-v2.rst (memory.max) and, for version 1, memory.rst.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read_text(meminfo), re.MULTILINE)
    limits = [1024.0 * int(found[1]) if found else math.inf]
    for folder, version in _group_folders("memory", groups, root):
        limit = _read_text(folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).strip()
        if limit.isdecimal():  # not "max"
            limits.append(float(limit))
    return min(limits)


def _group_folders(controller: str, groups: str | None, root: Path) -> Iterator[tuple[Path, int]]:
    """Folders of the groups that may limit what a controller grants, innermost first, each with its cgroup version."""
    for controllers, path in _groups_of(controller, control_groups() if groups is None else groups):
        # In a container, the tree that it sees may begin at its own group.
        own = root / controllers / path.strip("/")
        for folder in (own, *own.parents):
            yield folder, 1 if controllers else 2


def _groups_of(controller: str, groups: str) -> list[tuple[str, str]]:
    """Controllers and path of each group that may limit the given controller; version 2 names no controllers."""
    lines = [line.split(":", 2)[1:] for line in groups.splitlines()]
    return [(names, path) for names, path in lines if not names or controller in names.split(",")]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's model name as Linux reports it, or `unknown`."""
    found = re.search(r"^model name\s*:(.*)$", _read_text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else "unknown"


def gpu_names() -> list[str]:
    """Name and memory of each visible GPU."""
    if not torch.cuda.is_available():
        return []
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return names


def why_no_gpu() -> str:
    """Why torch sees no GPU, as far as can be told; call it only where it sees none."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    driver = gpu_driver()
    if driver is None:
        return "no NVIDIA driver"
    return (
        f"torch, built for CUDA {torch.version.cuda}, sees none; check CUDA_VISIBLE_DEVICES, and whether driver"
        f" {driver} is recent enough"
    )


def too_old(device: torch.device) -> str | None:
    """A GPU without matrix products in bfloat16, which training takes, by name and compute capability; else None."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else _FIRST_WITH_BFLOAT16
    if capability >= _FIRST_WITH_BFLOAT16:
        return None
    return f"{torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}"


def jpeg_engine(device: torch.device) -> str:
    """Whether a GPU's own JPEG decoder can be used: `usable`, `none known`, or `unusable: ` and why, with the remedy.

    A100, H100 and their successors in data centres have such a decoder. nvJPEG reaches it through a library of the
    driver, which containers lack unless they ask for it; without that library nvJPEG silently decodes in another way.
    Source: libnvjpeg, which loads the library; NVIDIA in CUDALibrarySamples, issue 132.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) not in _WITH_JPEG_ENGINE:
        return "none known"
    try:
        ctypes.CDLL(_JPEG_ENGINE_LIBRARY)
    except OSError:
        return (
            f"unusable: {_JPEG_ENGINE_LIBRARY} of the driver is not to be found; in a container that takes"
            " NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    return "usable"


def is_lost(device: torch.device) -> bool:
    """Whether a GPU is of no more use to this process, as after a kernel that wrote where it must not; waits for it."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def gpu_driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    try:
        lines = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((word for word in lines[0].split() if word.count(".") >= 1 and word[0].isdigit()), None)


def git_commit() -> str | None:
    """Commit of the code and whether it was changed since; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        # A checkout may be another user's, for which git asks to be told so: its code runs in this process already.
        command = ["git", "-c", "safe.directory=*", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed copy may lie in another project's checkout
        return git("rev-parse", "HEAD") + (" (changed)" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _one_line(value: str) -> str:
    return value.replace("\n", "\\n").replace("\r", "\\r")  # the command or a path may have line breaks


def describe_environment() -> dict[str, str]:
    """The environment, for env.txt and for what a tool measured: values by name, each on one line."""
    found = {
        "command": shlex.join(sys.argv),
        "commit": git_commit() or "unknown",
        **versions(),
        "cuda (torch)": torch.version.cuda or "none",
        "driver": gpu_driver() or "none",
        "gpus": "; ".join(gpu_names()) or "none",
        "jpeg engine": jpeg_engine(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")),
        "cpu": f"{cpu_name()} x {cpu_count()}",
        "platform": platform.platform(),
        "host": platform.node(),
    }
    return {name: _one_line(value) for name, value in found.items()}
