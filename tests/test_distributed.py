"""Several processes (gloo, on the CPU) train like one with the same global batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dali_vit import checkpoint, distributed
from dali_vit.config import LocalUserError, UserError
from dali_vit.mixup import sample_lambda
from tests.conftest import TINY, last_scalars, needs_a_compiler, python, read_metrics
from tests.processes import dali_vit, run_ranks

RECORDER = str(Path(__file__).with_name("recorder.py"))
PLAIN = ("--mixup-alpha", "0", "--randaug-layers", "0")
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29998"}
LARGER = ("--width", "192", "--depth", "1", "--num-heads", "3", "--mlp-dim", "768")  # 2 MB of gradients


def arguments(image_folder: Path, runs_dir: Path, *more: str, steps: int = 20) -> list[str]:
    return [
        *("train", "--data", str(image_folder), "--runs-dir", str(runs_dir), "--name", "run", "--gpus", "0", *TINY),
        *("--steps", str(steps), "--threads", "1", "--log-every", "1", "--eval-every", "0", *more),
    ]


def record(folder: Path, processes: int, command: list[str], **variables: str) -> list[list[dict[str, Any]]]:
    """Runs a command under the recorder; what each rank trained on, by rank and step."""
    folder.mkdir()
    run_ranks(processes, RECORDER, *command, RECORD=str(folder), **variables)
    files = [folder / f"rank{rank}.jsonl" for rank in range(processes)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.timeout(300)
def test_two_and_four_processes_train_like_one(image_folder, tmp_path):
    ranks, losses, ends = {}, {}, {}
    for processes in (1, 2, 4):
        folder = tmp_path / str(processes)
        ranks[processes] = record(folder, processes, arguments(image_folder, folder, *PLAIN))
        logged = [m for m in read_metrics(folder / "run") if "train/loss" in m]
        assert [m["step"] for m in logged] == list(range(1, 21))
        losses[processes] = torch.tensor([m["train/loss"] for m in logged])
        ends[processes] = checkpoint.newest(folder / "run")
    for processes in (2, 4):
        # Dropout, where a model has it, differs between ranks.
        assert len({rank[0]["seed"] for rank in ranks[processes]}) == processes
        # The same images with the same windows and labels in every step, whoever gets them.
        for step in range(20):
            expected = sorted(ranks[1][0][step]["samples"])
            shares = [rank[step]["samples"] for rank in ranks[processes]]
            assert [len(share) for share in shares] == [8 // processes] * processes
            assert sorted(sample for share in shares for sample in share) == expected
            assert len({rank[step]["weights"] for rank in ranks[processes]}) == 1
        torch.testing.assert_close(losses[processes], losses[1], rtol=0, atol=1e-5)
        # Counts of right answers do not depend on how the images are spread over processes.
        assert ends[processes].metrics["val/top1"] == ends[1].metrics["val/top1"]
        assert ends[processes].metrics["val/loss"] == pytest.approx(ends[1].metrics["val/loss"], abs=1e-5)


@pytest.mark.timeout(120)
def test_an_evaluation_by_two_processes_is_that_of_the_weights_saved(image_folder, tmp_path):
    """Each has batch statistics of its own share of the images until then."""
    model = ("--model", "timm:test_resnet", "--resolution", "32", "--batch-size", "8", "--warmup-steps", "2")
    command = [*arguments(image_folder, tmp_path, steps=8)[:9], *model, "--steps", "8", "--threads", "1"]
    run_ranks(2, "-m", "dali_vit", *command, "--eval-every", "0")
    ours = checkpoint.newest(tmp_path / "run").metrics
    flags = ("--checkpoint", str(tmp_path / "run"), "--data", str(image_folder), "--gpus", "0", "--json")
    evaluated = dali_vit("eval", *flags)
    assert evaluated.returncode == 0, evaluated.stderr
    theirs = json.loads(evaluated.stdout)
    assert ours["val/loss"] == pytest.approx(theirs["val/loss"], abs=1e-5)
    assert ours["val/top1"] == theirs["val/top1"]


@needs_a_compiler
@pytest.mark.timeout(300)
def test_compiled_two_processes_train_like_one_that_is_not(image_folder, tmp_path):
    """In several graphs, as a model of more than one bucket of gradients is parted: each is sent when it is done."""
    one, two = tmp_path / "1", tmp_path / "2"
    record(one, 1, arguments(image_folder, one, *PLAIN, *LARGER, steps=8))
    command = arguments(image_folder, two, *PLAIN, *LARGER, "--compile", "default", steps=8)
    ranks = record(two, 2, command, BUCKETS="1")
    losses = [[m["train/loss"] for m in read_metrics(folder / "run") if "train/loss" in m] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for rank in ranks:
        assert [line["weights"] for line in rank] == [line["weights"] for line in ranks[0]]
        assert rank[1]["graphs"] >= 3
        assert len({line["graphs"] for line in rank[1:]}) == 1  # nothing is compiled again


@needs_a_compiler
@pytest.mark.timeout(300)
def test_two_processes_take_their_share_of_a_batch_in_parts(image_folder, tmp_path):
    """Compiled, with Mixup, whose partner of a part's first image lies in another part, and several buckets."""
    compiled = (*LARGER, "--compile", "default")
    losses, norms = [], []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        accumulating = ("--grad-accum-steps", str(parts))
        ranks = record(folder, 2, arguments(image_folder, folder, *compiled, *accumulating, steps=8), BUCKETS="1")
        assert [line["weights"] for line in ranks[0]] == [line["weights"] for line in ranks[1]]
        assert len({line["weights"] for line in ranks[0][1:]}) == 7
        assert ranks[0][0]["samples"] != ranks[1][0]["samples"]
        losses.append([m["train/loss"] for m in read_metrics(folder / "run") if "train/loss" in m])
        norms.append([m["train/grad_norm"] for m in read_metrics(folder / "run") if "train/grad_norm" in m])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("parts", ["1", "2"])
def test_ranks_share_the_lambda_of_mixup_and_leave_the_same_steps_out(parts, image_folder, tmp_path):
    """One rank alone has a spike: the mean over both is one, so that both leave the step out."""
    command = arguments(
        image_folder, tmp_path / "a", "--grad-clip-norm", "None", "--grad-accum-steps", parts, steps=115
    )
    ranks = record(tmp_path / "a", 2, command, SPIKE="1:110:113")
    lams = [[line["lam"] for line in rank] for rank in ranks]
    assert lams[0] == lams[1] == [sample_lambda(0.2, 0, step) for step in range(115)]
    assert len(set(lams[0])) > 100
    assert ranks[0][0]["samples"] != ranks[1][0]["samples"]
    for rank in ranks:
        assert [line["left_out"] for line in rank] == [False] * 110 + [True] * 3 + [False] * 2
    assert [line["weights"] for line in ranks[0]] == [line["weights"] for line in ranks[1]]
    assert len({line["weights"] for line in ranks[0][109:113]}) == 1
    assert last_scalars(tmp_path / "a" / "run")["train/skipped_steps"] == 3


@pytest.mark.timeout(150)
def test_a_preview_is_written_and_told_once(image_folder, tmp_path):
    command = ["preview", "--data", str(image_folder), "--out", str(tmp_path / "grid.png"), "--gpus", "0", *TINY]
    written = run_ranks(2, "-m", "dali_vit", *command, "--images", "4")
    assert "".join(out for out, _ in written).count("grid.png: 4 images of step 0") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.timeout(150)
def test_a_mistake_is_said_once_by_the_workers(image_folder, tmp_path):
    command = [*arguments(image_folder, tmp_path / "odd"), "--batch-size", "7"]
    written = run_ranks(2, "-m", "dali_vit", *command, code=2)
    told = "".join(err for _, err in written)
    assert told.count("dali-vit: --batch-size 7: not divisible by 2 processes; use 8") == 1
    assert not (tmp_path / "odd").exists()


@pytest.fixture
def destroyed() -> list[int]:
    """Local ranks of those that have destroyed the process group."""
    return []


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, destroyed: list[int]) -> Callable[..., torch.device]:
    """The device that one of several processes on a machine takes, of as many GPUs as it sees."""

    def device_of(local_rank: int, processes: int, visible: int, failing: RuntimeError | None = None) -> torch.device:
        def init(backend: str, *, device_id: torch.device, **_: Any) -> None:
            assert backend == "nccl"
            if failing is not None:
                raise failing

        variables = {"RANK": local_rank, "WORLD_SIZE": processes, "LOCAL_RANK": local_rank, **MEETING}
        for name, value in {**variables, "LOCAL_WORLD_SIZE": processes}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(distributed.dist, "init_process_group", init)
        monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: destroyed.append(local_rank))
        with distributed.connect(None) as group:
            assert (group.rank, group.world_size) == (local_rank, processes)
            return group.device

    return device_of


def test_each_process_takes_the_gpu_of_its_local_rank(worker):
    assert [worker(rank, 4, visible=8).index for rank in range(4)] == [0, 1, 2, 3]


def test_a_process_that_sees_its_own_gpu_alone_takes_that(worker):
    """What srun shows with --gpus-per-task=1."""
    assert [worker(rank, 4, visible=1).index for rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize("rank", [0, 3])
def test_more_processes_than_gpus_are_refused_by_each(worker, rank):
    with pytest.raises(UserError, match=r"^4 processes on this machine, but 2 GPUs: start as many"):
        worker(rank, 4, visible=2)


# torch 2.11's and 2.15's.
of_nccl = pytest.mark.parametrize("error", [torch.distributed.DistBackendError, RuntimeError])


@pytest.mark.parametrize(
    "said",
    [
        "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 5000",
        "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI_RANK_GPU_ENABLE=1 to enable",
    ],
)
@of_nccl
def test_processes_that_see_the_same_single_gpu_are_refused(worker, said, error):
    with pytest.raises(UserError, match=r"^2 processes on this machine, but 1 GPUs: start as many"):
        worker(0, 2, visible=1, failing=error(f"NCCL error in: init.cpp, invalid usage. Last error:\n{said}"))


@pytest.mark.parametrize("when", ["at once", "with the first gradients"])
@pytest.mark.parametrize(
    "said",
    [
        "Error while creating shared memory segment /dev/shm/nccl-WU88OE (size 9637888), error: No space left (28)",
        "Error: failed to extend /dev/shm/nccl-WU88OE to 9637892 bytes, error: No space left on device (28)",
    ],
)
@of_nccl
def test_shared_memory_that_is_too_small_for_nccl_is_named(worker, said, error, when):
    failing = error(f"NCCL error in: init.cpp, unhandled system error. Last error:\n{said}")
    expected = r"^/dev/shm is too small .* `docker run --shm-size=1g`$"
    if when == "at once":
        with pytest.raises(LocalUserError, match=expected):
            worker(0, 2, visible=2, failing=failing)
        return
    worker(0, 2, visible=2)  # the variables and the functions in place of NCCL's stay
    with pytest.raises(LocalUserError, match=expected), distributed.connect(None):
        raise failing


def test_a_process_that_fails_alone_does_not_wait_for_the_others(worker, destroyed):
    """As NCCL does when its groups are taken apart, while the others wait for this one's gradients."""
    worker(1, 2, visible=2)
    assert destroyed == [1]
    with pytest.raises(KeyError), distributed.connect(None):
        raise KeyError
    assert destroyed == [1]


@pytest.mark.parametrize(
    ("said", "expected", "message"),
    [
        (
            "Gloo connectFullMesh failed with timed out connecting: SO_ERROR: Connection refused",
            LocalUserError,
            "set GLOO_SOCKET_IFNAME on",
        ),
        (
            "[enforce fail at device.cc:84] ifa != nullptr. Unable to find address for: eth9",
            LocalUserError,
            "^GLOO_SOCKET_IFNAME=eth9: no network interface of this machine, ",
        ),
        ("something else", RuntimeError, "something else"),
    ],
)
def test_a_machine_that_the_others_do_not_reach_is_named(said, expected, message, monkeypatch):
    """As by gloo where no server knows its name, or the interface that it is to use is none."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(said)

    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", **MEETING}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "init_process_group", fail)
    with pytest.raises(expected, match=message), distributed.connect(0):
        raise AssertionError
    if expected is LocalUserError and "GLOO_SOCKET_IFNAME on" in message:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        message = r": its other processes are not reached from here; set GLOO_SOCKET_IFNAME to one of its"
        with pytest.raises(expected, match=message), distributed.connect(0):
            raise AssertionError


@of_nccl
def test_other_errors_of_nccl_are_no_mistake_of_the_user(worker, error):
    with pytest.raises(error, match="unhandled"):
        worker(0, 2, visible=1, failing=error("NCCL error: unhandled system error"))


@pytest.mark.parametrize(
    ("mine", "others", "quota", "expected"),
    [
        (range(12), [], math.inf, 12),
        (range(96), [range(96)] * 7, math.inf, 12),  # nobody is bound
        (range(12), [range(12 * i, 12 * i + 12) for i in range(1, 8)], math.inf, 12),  # each to cores of its own
        (range(16), [range(16), range(16, 32), range(16, 32)], math.inf, 8),  # in pairs
        (range(3), [range(2)], math.inf, 2),
        (range(2), [range(2)] * 7, math.inf, 1),
        (range(96), [range(96)] * 7, 32.0, 4),  # a container's quota
        (range(12), [range(12, 24)], 6.0, 3),
        (range(12), [range(12, 24)], 0.5, 1),
    ],
)
def test_the_cores_of_a_machine_are_shared_by_those_who_may_use_them(mine, others, quota, expected, monkeypatch):
    def gather(value: tuple[str, set[int], str]) -> list[tuple[str, set[int], str]]:
        where, cores, holder = value
        elsewhere = ("another machine", cores, holder)
        return [elsewhere, value, *((where, set(them), holder) for them in others), elsewhere]

    monkeypatch.setattr(distributed, "usable_cores", lambda: set(mine))
    monkeypatch.setattr(distributed, "cpu_quota", lambda: quota)
    monkeypatch.setattr(distributed, "gather_objects", gather)
    assert distributed._core_share() == expected


def test_a_quota_is_shared_by_the_processes_of_its_group_alone(monkeypatch):
    """A scheduler's, of the task of each process."""
    monkeypatch.setattr(distributed, "usable_cores", lambda: set(range(64)))
    monkeypatch.setattr(distributed, "cpu_quota", lambda: 12.0)
    others = [(set(range(64)), f"0::/job/task{i}") for i in range(1, 4)]
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, *((value[0], *other) for other in others)])
    monkeypatch.setattr(distributed, "quota_holder", lambda: "0::/job/task0")
    assert distributed._core_share() == 12


@pytest.mark.parametrize(("quota", "threads", "expected"), [(1.0, 8, (1, 1)), (64.0, 8, (2, 2)), (64.0, 1, (2, 1))])
def test_torch_has_no_more_threads_than_cores(quota, threads, expected):
    """Nor more than it was given, say by OMP_NUM_THREADS."""
    program = f"""
import torch
from dali_vit import distributed, environment
environment.usable_cores, environment.cpu_quota = lambda: {{0, 1}}, lambda: {quota}
torch.set_num_threads({threads})
with distributed.connect(0) as group:
    print((group.cores, torch.get_num_threads()))
"""
    result = python("-c", program)
    assert result.stdout == f"{expected}\n", result.stderr


def test_a_launcher_that_does_not_say_how_many_share_a_machine(monkeypatch):
    """There are at least as many as this one's number tells."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", **MEETING}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(UserError, match=r"^4 processes on this machine, but 2 GPUs: "), distributed.connect(None):
        raise AssertionError
