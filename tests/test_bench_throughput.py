"""tools/bench_throughput.py: whole runs on a few small images; its arithmetic is in test_benchmark.py."""
# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where Python looks when the tool is run as a script

import bench_throughput
from benchmark import compare, kernels, report, windows

from dali_vit import data as datasets
from dali_vit import memory, recipes
from dali_vit.config import LocalUserError, ModelConfig, UserError
from dali_vit.model import create_model, flops_per_image
from pipelines.bad_samples import DecodeError
from pipelines.order import TrainOrder
from tests.conftest import TINY_MODEL
from tests.processes import run_ranks

pytestmark = pytest.mark.timeout(120)


def flags(image_folder: Path) -> list[str]:
    sizes = ["--resolution", "32", "--batch-size", "8", "--randaug-magnitude", "2", "--threads", "2"]
    return ["--data", str(image_folder), "--gpus", "0", "--seconds", "0.2", *TINY_MODEL, *sizes]


# RandAugment's graph takes a second to build, for each trial of a sweep.
QUICK = ["--randaug-layers", "0"]


def run(*arguments: str, capsys) -> tuple[int, str, str]:
    """Calls the tool in this process."""
    with pytest.raises(SystemExit) as stopped:
        bench_throughput.main(list(arguments))
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_SECONDS", 0.1)


def test_all_modes_and_a_profile(image_folder, tmp_path, capsys, short_windows, monkeypatch):
    monkeypatch.setattr(bench_throughput, "peak_flops", lambda device: 1e9)
    out, traces = tmp_path / "out.json", tmp_path / "traces"
    profile = ["--profile", "3", "--profile-dir", str(traces)]
    code, printed, err = run(*flags(image_folder), "--json", str(out), *profile, "--randaug-cost", capsys=capsys)
    assert code == 0, err
    result = json.loads(out.read_text())
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["out.json"]
    assert set(result) == {
        *("environment", "config", "loader", "model", "joint", "stall_fraction", "mfu", "joint_to_model"),
        *("randaug_cost", "profile"),
    }
    for mode in ("loader", "model", "joint"):
        values = result[mode]
        rates = values["windows"]
        assert values["images_per_sec"] == pytest.approx(np.median(rates))
        assert (values["min"], values["max"]) == (min(rates), max(rates))
        assert values["spread"] == pytest.approx(np.percentile(rates, 75) - np.percentile(rates, 25))
        assert sum(values["window_images"] / rate for rate in rates) >= 0.2
        assert values["window_images"] % 8 == 0
        assert values["window_images"] >= 5 * 8
        # No batch is faster than the mean of the fastest window, and so not the worst one either.
        assert values["worst_batch_ms"] >= 1e3 * 8 / values["max"]
    rates = [result[mode]["images_per_sec"] for mode in ("loader", "model", "joint")]
    assert result["joint_to_model"] == rates[2] / rates[1]
    assert 0 < result["stall_fraction"] < 1
    model = create_model(ModelConfig("Ti/8", width=32, depth=1, num_heads=2, mlp_dim=64), num_classes=4, resolution=32)
    assert result["mfu"] == pytest.approx(3 * flops_per_image(model, 32) * rates[2] / 1e9)
    assert result["config"]["model"]["width"] == 32
    assert result["config"]["optim"]["batch_size"] == 8
    assert result["config"]["benchmark"]["seconds"] == 0.2
    assert result["config"]["loader"]["threads"] == 2
    cost = result["randaug_cost"]
    assert cost["cost"] == pytest.approx(
        np.median([1 - a / b for a, b in zip(cost["with"], cost["without"], strict=True)])
    )
    assert report.randaug_cost(cost) in printed
    assert result["config"]["compiled"].startswith("off")
    assert result["environment"]["torch"] == torch.__version__.split("+")[0]
    assert report.verdict(*rates, result["stall_fraction"]) in printed

    (trace,) = traces.iterdir()
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert [names.count(f"step {i}") for i in range(4)] == [1, 1, 1, 0]
    assert str(trace) in printed
    assert result["profile"]["step_ms"] > 0
    assert kernels.table(result["profile"]) in printed


def test_one_mode_gives_its_own_keys_alone(image_folder, tmp_path, capsys, short_windows, monkeypatch):
    monkeypatch.setattr(bench_throughput, "usable_cores", lambda: {0, 1, 2, 5})
    for mode, keys, busy in [("loader", {"loader"}, 1.04), ("model", {"model", "mfu"}, 1.0)]:
        monkeypatch.setattr(bench_throughput, "busy_cores", lambda busy=busy: busy)
        out = tmp_path / f"{mode}.json"
        code, printed, err = run(*flags(image_folder), *QUICK, "--mode", mode, "--json", str(out), capsys=capsys)
        assert code == 0, err
        result = json.loads(out.read_text())
        assert set(result) == keys | {"environment", "config"}
        assert ("others keep 1.0 of 4 cores busy: expect low, uneven rates" in err) == (busy > 1)
        assert result["environment"]["cores busy before"] == "1.0"
        assert "--mode all says which stage limits" in printed


def test_a_step_that_memory_may_not_hold_is_warned_of(image_folder, capsys, short_windows, monkeypatch, caplog):
    monkeypatch.setattr(memory, "available_memory", lambda: 1.0)
    for mode, warned in [("loader", False), ("model", True)]:
        code, _, err = run(*flags(image_folder), *QUICK, "--mode", mode, capsys=capsys)
        assert code == 0, err
        assert ("give --grad-accum-steps 8 or a smaller --batch-size" in caplog.text) == warned


def test_compare_and_sweep(image_folder, tmp_path, capsys, short_windows):
    out = tmp_path / "out.json"
    command = [*flags(image_folder), *QUICK, "--mode", "loader", "--compare", "--sweep", "--json", str(out)]
    code, printed, err = run(*command, capsys=capsys)
    assert code == 0, err
    result = json.loads(out.read_text())

    compared = result["compare"]
    rounds = {name: values["rounds"] for name, values in compared["loaders"].items()}
    assert list(rounds) == ["dali-vit", "torchvision, PIL", "torchvision, decode_image", "timm"]
    assert all(len(rates) == 3 and min(rates) > 0 for rates in rounds.values())
    assert compared == {"workers": 2, **compare.summarize(rounds)}
    assert f"dali-vit loads {compared['ratio']:.2f} times as fast" in printed

    trials = result["sweep"]["trials"]
    assert {key for key, value in trials[0]["settings"].items() if value != result["sweep"]["best"][key]} <= {
        *("threads", "prefetch", "antialias", "region", "fast_idct"),
    }
    assert {t["settings"]["threads"] for t in trials} == {1, 2, 3, 4}
    assert {t["settings"]["region"] for t in trials} == {"window", "full"}
    assert {t["settings"]["prefetch"] for t in trials} == {2, 3, 4}
    assert sorted(t["same_images"] for t in trials)[:3] == [False, False, True]
    assert [t["images_per_sec"] for t in trials] == sorted((t["images_per_sec"] for t in trials), reverse=True)
    assert result["sweep"]["best"] in [t["settings"] for t in trials if t["same_images"]]


def test_the_other_loaders_take_our_batches_and_rest_between_rounds(image_folder, tiny_config, cpu):
    files = datasets.load_dataset(image_folder, minival=0.1).split("train")
    order = TrainOrder(len(files), 8, 0, 1, tiny_config.run.seed)
    for contestant in compare.others(tiny_config, files, cpu, workers=2).values():
        step = 0
        for _ in range(2):
            with contestant.batches() as batches:
                for _ in range(3):
                    images, labels = next(batches)
                    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (8, 3, 32, 32))
                    assert labels.tolist() == files.labels[order.indices(step)].tolist()
                    step += 1
            with pytest.raises(StopIteration):
                next(batches)
            step += 2 * 2  # what the workers had been asked for by then


def test_two_processes(image_folder, tmp_path):
    out = tmp_path / "out.json"
    tool = str(ROOT / "tools" / "bench_throughput.py")
    command = [tool, *flags(image_folder), *QUICK, "--mode", "joint", "--threads", "1", "--json", str(out)]
    assert "".join(told for told, _ in run_ranks(2, *command, timeout=100)).count("worst batch") == 1
    measured = json.loads(out.read_text())
    assert measured["config"]["world_size"] == 2
    assert measured["joint"]["window_images"] % 8 == 0
    assert 0 < measured["stall_fraction"] < 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--recipe", "nonsense"], ["--recipe nonsense"]),
        (["--mode", "everything"], ["--mode", "everything"]),
        (["--secnods", "3"], ["--secnods"]),
        (["--seconds", "0"], ["--seconds 0"]),
        (["--step-stream", "own"], ["--step-stream own: needs a GPU"]),
        (["--seconds", "nan"], ["--seconds nan"]),
        (["--profile", "-1"], ["--profile -1"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--gpus", "64"], ["--gpus 64"]),
        (["--data", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--resolution", "33"], ["--resolution 33"]),
        (["--json", "/nowhere/at/all.json"], ["--json /nowhere/at/all.json"]),
        (["--profile-dir", f"/tmp/{300 * 'x'}"], ["File name too long"]),
        (["--profile", "2", "--profile-dir", "/dev/null/traces"], ["--profile-dir /dev/null/traces: cannot be made"]),
        (["--randaug-layers", "-1"], ["--randaug-layers -1"]),
    ],
)
def test_a_mistake_is_one_line_and_code_2(changes, words, image_folder, capsys):
    code, out, err = run(*flags(image_folder), *changes, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("bench_throughput.py: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_recipe_supplies_the_settings():
    options, config = bench_throughput.parse(["--recipe", "b32-90ep", "--data", "x", "--width", "64", "--seed", "3"])
    assert (config.model.model, config.model.width, config.optim.batch_size) == ("B/32", 64, 1024)
    assert (config.run.recipe, config.run.seed, options.seconds) == ("b32-90ep", 3, 10.0)
    demo = bench_throughput.parse(["--recipe=demo"])[1]
    recipe = recipes.get("demo")
    assert (demo.data, demo.model) == (recipe.data, recipe.model)
    assert demo.optim.batch_size == recipe.optim.batch_size


def test_the_search_for_settings_may_be_left_out():
    assert bench_throughput.parse(["--data", "x"])[1].run.autotune == "auto"
    assert bench_throughput.parse(["--data", "x", "--autotune", "off"])[1].run.autotune == "off"


def test_compare_names_shared_memory_that_is_too_small(image_folder, monkeypatch, capsys):
    """8 images of 32 px a batch, 3 batches of each of the 2 workers."""
    needed = 8 * 3 * 2 * 3 * 32**2
    disk = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(compare.shutil, "disk_usage", lambda path: disk if path == "/dev/shm" else None)
    monkeypatch.setattr(compare, "others", lambda *_: pytest.fail("begun in spite of it"))
    code, _, err = run(*flags(image_folder), *QUICK, "--mode", "loader", "--compare", capsys=capsys)
    assert code == 2
    (line,) = (line for line in err.splitlines() if line.startswith("bench_throughput.py: "))
    assert "/dev/shm, which has 0 MB free of the 1 MB that they need" in line
    disk.free = needed
    with pytest.raises(pytest.fail.Exception, match="begun"):
        run(*flags(image_folder), *QUICK, "--mode", "loader", "--compare", capsys=capsys)


def test_compare_names_an_image_that_the_other_loaders_cannot_decode(image_folder, tmp_path, capsys, short_windows):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    for bad in (paths := sorted(data.glob("train/*/*"))):  # all, as a short round does not get to each
        bad.write_bytes(bad.read_bytes()[:300])
    code, _, err = run(*flags(data), *QUICK, "--mode", "loader", "--compare", capsys=capsys)
    assert code == 2
    (line,) = (line for line in err.splitlines() if line.startswith("bench_throughput.py: "))
    start, _, rest = line.partition(" cannot read ")
    assert start == "bench_throughput.py: --compare: one of the other loaders, which need every image,"
    assert rest.partition(": ")[0] in map(str, paths)
    assert "truncated" in rest.partition("; ")[0].lower()


def test_a_cost_of_randaugment_needs_randaugment():
    with pytest.raises(UserError, match=r"^--randaug-cost: without RandAugment there is nothing to measure"):
        bench_throughput.parse(["--data", "x", "--randaug-cost", "--randaug-layers", "0"])
    assert bench_throughput.parse(["--data", "x", "--randaug-cost"])[0].randaug_cost


@pytest.mark.parametrize(
    ("error", "told"), [(DecodeError("x.jpg", []), True), (LocalUserError("x.jpg"), True), (UserError("x.jpg"), False)]
)
def test_an_error_of_one_rank_alone_is_told_by_it(error, told, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(bench_throughput, "_main", fail)
    for processes, is_told in (("", True), ("2", told)):  # without WORLD_SIZE the rank is one left over
        monkeypatch.setenv("WORLD_SIZE", processes)
        code, _, err = run(capsys=capsys)
        assert (code, err) == (2, "bench_throughput.py: x.jpg\n" * is_told)
