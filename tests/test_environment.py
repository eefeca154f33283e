"""What a machine is found to have: CPU cores and memory within its limits, a JPEG engine, a cache folder."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dali_vit import cli, doctor, environment, files, process

V1 = "9:name=systemd:/init\n4:memory:/m\n1:{controllers}:{path}\n0::/"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, math.inf),
        ("0::/", {}, math.inf),
        ("0::/", {"cpu.max": "max 100000"}, math.inf),
        ("0::/", {"cpu.max": "400000 100000"}, 4.0),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        # A job of a scheduler: any of the groups above its own may have the tightest limit.
        ("0::/jobs/7/step", {"jobs/7/step/cpu.max": "max 100000", "jobs/7/cpu.max": "1250000 50000"}, 25.0),
        ("0::/jobs/7", {"jobs/7/cpu.max": "800000 100000", "jobs/cpu.max": "300000 100000"}, 3.0),
        # A container whose name outside is not to be found inside.
        ("0::/../docker/abc", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/", {"cpu.max": "what is this"}, math.inf),
        (V1.format(controllers="cpu", path="/"), {"cpu/cpu.cfs_quota_us": "-1"}, math.inf),
        (
            V1.format(controllers="cpu,cpuacct", path="/docker/abc"),
            {"cpu,cpuacct/cpu.cfs_quota_us": "600000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            6.0,
        ),
        (
            V1.format(controllers="cpu", path="/slurm/job"),
            {"cpu/slurm/job/cpu.cfs_quota_us": "150000", "cpu/slurm/job/cpu.cfs_period_us": "50000"},
            3.0,
        ),
    ],
)
def test_quotas(groups: str, files: dict[str, str], expected: float, tmp_path: Path) -> None:
    assert environment.cpu_quota(groups, write(tmp_path, files)) == expected


AVAILABLE = "MemTotal:       16384 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\n"
MIB = 2**20


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, math.inf),
        ("0::/", {"meminfo": "MemTotal: 16384 kB\n"}, math.inf),
        ("0::/", {"meminfo": AVAILABLE}, 8 * MIB),
        ("0::/", {"meminfo": AVAILABLE, "memory.max": "max\n"}, 8 * MIB),
        ("0::/jobs/7", {"meminfo": AVAILABLE, "jobs/7/memory.max": "max", "jobs/memory.max": f"{5 * MIB}\n"}, 5 * MIB),
        ("0::/", {"meminfo": AVAILABLE, "memory.max": str(64 * MIB)}, 8 * MIB),
        ("4:memory:/docker/abc", {"meminfo": AVAILABLE, "memory/memory.limit_in_bytes": str(2 * MIB)}, 2 * MIB),
        ("4:cpu:/docker/abc", {"meminfo": AVAILABLE, "memory/memory.limit_in_bytes": str(2 * MIB)}, 8 * MIB),
    ],
)
def test_available_memory(groups: str, files: dict[str, str], expected: float, tmp_path: Path) -> None:
    root = write(tmp_path, files)
    assert environment.available_memory(groups, root, root / "meminfo") == expected


def test_this_machine_says_what_memory_it_has() -> None:
    assert 2**26 < environment.available_memory() < 2**50


def test_containers_with_groups_of_the_same_name_have_quotas_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "control_groups", lambda: "0::/")
    holders = []
    for namespace in ("cgroup:[1]", "cgroup:[2]", "cgroup:[1]"):
        monkeypatch.setattr(os, "readlink", lambda path, namespace=namespace: namespace)
        holders.append(environment.quota_holder())
    assert holders[0] == holders[2] != holders[1]
    # Groups that have nothing to do with time may be each process's own.
    monkeypatch.setattr(environment, "control_groups", lambda: "4:memory:/task0\n0::/")
    assert environment.quota_holder() == holders[0]


def test_a_machine_is_known_by_more_than_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "localhost")
    assert environment.machine() == Path("/proc/sys/kernel/random/boot_id").read_text()
    monkeypatch.setattr(environment, "_read_text", lambda path: "")
    assert environment.machine() == "localhost"


@pytest.mark.parametrize(
    ("cores", "quota", "expected"), [(8, math.inf, 8), (8, 64.0, 8), (8, 3.5, 3), (8, 0.5, 1), (1, 2.0, 1)]
)
def test_cores_that_may_be_used(cores: int, quota: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: set(range(cores)))
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert environment.cpu_count() == expected


def test_a_process_bound_to_one_core_has_one() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert environment.usable_cores() == {min(before)}
        assert environment.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("device", "capability", "library", "expected"),
    [
        ("cpu", None, "libc.so.6", "none known"),
        ("cuda", (7, 5), "libc.so.6", "none known"),
        ("cuda", (8, 6), "no-such-library.so", "none known"),
        ("cuda", (8, 0), "libc.so.6", "usable"),
        ("cuda", (9, 0), "libc.so.6", "usable"),
        ("cuda", (9, 0), "no-such-library.so", "unusable: no-such-library.so of the driver is not to be found; in a"),
    ],
)
def test_the_jpeg_engine(
    device: str,
    capability: tuple[int, int] | None,
    library: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: capability)
    monkeypatch.setattr(environment, "_JPEG_ENGINE_LIBRARY", library)
    found = environment.jpeg_engine(torch.device(device))
    assert found == expected or (expected.startswith("unusable") and found.startswith(expected))
    if expected.startswith("unusable"):
        assert found.endswith("NVIDIA_DRIVER_CAPABILITIES=compute,utility,video")


def test_a_tilde_in_the_caches_variables_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no shell puts in its place within quotes, nor a file of variables."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DALI_VIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert files.cache_folder() == tmp_path / "xdg/dali-vit"
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-knows/xdg")
    assert files.cache_folder() == Path(tempfile.gettempdir()) / f"dali-vit-{os.getuid()}"
    monkeypatch.setenv("DALI_VIT_CACHE", "~/own")
    assert files.cache_folder() == tmp_path / "own"


def test_a_home_of_another_user_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Docker's `--user`, whose HOME is /, and sudo leave it; what is in a cache that is there can be read."""
    monkeypatch.delenv("DALI_VIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "others/.cache"))
    assert files.cache_folder() == tmp_path / "others/.cache/dali-vit"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert files.cache_folder() == Path(tempfile.gettempdir()) / f"dali-vit-{os.getuid()}"
    (tmp_path / "others/.cache/dali-vit").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert files.cache_folder() == tmp_path / "others/.cache/dali-vit"


def test_what_numba_compiles_is_kept_where_the_source_is_not_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> str | None:
        monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
        process._keep_what_numba_compiles()
        return os.environ.get("NUMBA_CACHE_DIR")

    monkeypatch.setenv("DALI_VIT_CACHE", str(tmp_path / "cache"))
    assert kept() is None  # Numba's own choice, beside the source
    source = str(Path(environment.__file__).parents[1])
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(source))
    user = os.getuid()
    assert kept() == str(tmp_path / f"cache/numba-{user}")
    for folder in ("cache", "home/.cache/dali-vit"):
        (tmp_path / folder).mkdir(parents=True)
    assert kept() == str(tmp_path / f"cache/numba-{user}")
    monkeypatch.setattr(os, "getuid", lambda: user + 1)  # whose folders they are not, but for the one that is named
    own = f"numba-{user + 1}"
    assert kept() == str(tmp_path / "cache" / own)
    (tmp_path / "cache" / own).symlink_to(tmp_path / "nowhere")  # by another user: what is there would be run
    assert kept() is None
    monkeypatch.delenv("DALI_VIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/.cache"))
    assert kept() == (str(tmp_path / "home/.cache/dali-vit" / own) if user == 0 else None)  # root may be trusted


def test_numba_is_told_where_to_keep_it_before_it_is_imported(tmp_path: Path) -> None:
    program = "import os; os.access = lambda *_: False; import dali_vit.process; print(os.environ['NUMBA_CACHE_DIR'])"
    env = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    told = subprocess.check_output(
        [sys.executable, "-c", program],
        env={**env, "DALI_VIT_CACHE": str(tmp_path)},
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert told.strip() == str(tmp_path / f"numba-{os.getuid()}")


def test_where_nothing_can_be_written_there_is_still_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a set looks for an index there."""

    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.delenv("DALI_VIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert files.cache_folder() == tmp_path / "dali-vit"


@pytest.fixture
def five_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On which everything works, as far as the doctor is told."""
    for name, value in {"gpu_names": ["H200"] * 5, "jpeg_engine": "usable", "cpu_count": 12}.items():
        monkeypatch.setattr(environment, name, lambda *_, value=value: value)
    for name in ("_input_fault", "compile_fault", "peak_flops"):
        monkeypatch.setattr(doctor, name, lambda _: None)
    monkeypatch.setattr(doctor.windows, "fault", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


@pytest.mark.usefixtures("five_gpus")
def test_doctor_says_how_many_threads_a_process_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "on the GPU, 2 threads a process: works" in doctor.report()[0]
    monkeypatch.setattr(environment, "gpu_names", list)
    assert "on the CPU, 12 threads a process: works" in doctor.report()[0]


@pytest.mark.usefixtures("five_gpus")
def test_doctor_says_whether_a_machine_is_fit_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict() -> tuple[str, bool]:
        text, fit = doctor.report()
        name, words = text.splitlines()[-1].split(maxsplit=1)
        assert name == "verdict"
        return words, fit

    assert verdict() == ("fit to train on the GPU", True)
    monkeypatch.setattr(environment, "jpeg_engine", lambda _: "none known")
    assert verdict() == ("fit to train on the GPU", True)
    monkeypatch.setattr(environment, "jpeg_engine", lambda _: "unusable: no library")
    monkeypatch.setattr(doctor.windows, "fault", lambda: "it crashes")
    assert verdict() == ("fit to train on the GPU, but slower than it could: see jpeg engine, jpeg windows", True)
    monkeypatch.setattr(doctor, "compile_fault", lambda _: "no compiler")
    assert verdict()[0].endswith("see compile, jpeg engine, jpeg windows")
    monkeypatch.setattr(doctor, "_input_fault", lambda _: "no decoder")
    assert verdict() == ("not fit to train: input fails", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index else (7, 5))
    assert verdict() == (
        "not fit to train: gpu 0 is older than Ampere (hide it by CUDA_VISIBLE_DEVICES), input fails",
        False,
    )
    monkeypatch.setattr(environment, "gpu_names", list)
    assert verdict() == ("not fit to train: input fails", False)
    monkeypatch.setattr(doctor, "_input_fault", lambda _: None)
    assert verdict() == ("fit to train on the CPU", True)  # where nothing is compiled unless asked for


@pytest.mark.parametrize(("fit", "code"), [(True, 0), (False, 2)])
def test_doctor_ends_with_2_on_a_machine_that_is_not_fit(
    fit: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "report", lambda: ("verdict  it", fit))
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert (ended.value.code, capsys.readouterr().out) == (code, "verdict  it\n")


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "Tesla T4, compute capability 7.5"), ((8, 0), None), ((12, 0), None)]
)
def test_which_gpus_are_too_old(
    capability: tuple[int, int], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert environment.too_old(torch.device("cuda", 0)) == expected
    assert environment.too_old(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("cuda", "driver", "expected"),
    [
        (None, "580.1", "this torch was built without CUDA"),
        ("13.2", None, "no NVIDIA driver"),
        (
            "13.2",
            "535.1",
            "torch, built for CUDA 13.2, sees none; check CUDA_VISIBLE_DEVICES, and whether driver 535.1 is recent"
            " enough",
        ),
    ],
)
def test_why_there_is_no_gpu(
    cuda: str | None, driver: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(environment, "gpu_driver", lambda: driver)
    assert environment.why_no_gpu() == expected


@pytest.mark.parametrize(("status", "expected"), [("", "abc"), (" M a.py\n", "abc (changed)")])
def test_a_commit_says_whether_the_code_was_changed(
    status: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"ls-files": "", "rev-parse": "abc\n", "status": status}
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(stdout=said[command[5]]))
    assert environment.git_commit() == expected
