"""A table of what was measured beside the goals, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from dali_vit.config import CompileMode
from dali_vit.recipes import IMAGENET_TRAIN_99

__all__ = ["Row", "rows", "summary"]

GOALS_ARE_FOR = "one H200 with 16 CPU cores, ViT-S/16 at 224 px; the loader on the CPU: 2 cores"
EPOCHS, GPUS = 90, 8  # of the training whose time is derived

Results = Mapping[str, Mapping[str, Any]]
"""What the JSON file of each measurement holds, by the measurement's name."""


class Row(NamedTuple):
    """A line of the table."""

    what: str
    measured: float
    unit: str
    least: float | None = None
    """The goal, if it is a least value."""
    most: float | None = None
    """The goal, if it is a greatest value."""
    remark: str = ""

    @property
    def verdict(self) -> str:
        if self.least is None and self.most is None:
            return ""
        met = self.measured >= self.least if self.least is not None else self.measured <= (self.most or 0.0)
        return "met" if met else "missed"

    def cells(self) -> list[str]:
        digits = 0 if self.unit == "images/s" else 2 if self.unit == "times" else 1
        goal = "" if self.least is None else f">= {self.least:,g}"
        goal = goal if self.most is None else f"<= {self.most:,g}"
        return [self.what, goal, f"{self.measured:,.{digits}f} {self.unit}", self.verdict, self.remark]


def rows(results: Results) -> list[Row]:
    """A row for each figure that was measured, beside its goal if it has one."""
    found: list[Row] = []
    for batch, least in ((1024, 12_000), (128, 9_000)):
        step = f"step-{batch}"
        ways = _ways(results, step, f"{step}-max-autotune-no-cudagraphs", f"{step}-max-autotune")
        found += _step(ways, f"step alone, batch {batch}", least)
        for name, what in (
            ("timm", "timm's blocks"),
            ("bfloat16", "bfloat16 residual stream"),
            ("combo", "Inductor's combined kernels"),
            ("descent", "Inductor's coordinate descent"),
            ("pdl", "kernels that begin before the one before ends"),
        ):
            found += _step(_ways(results, f"step-{batch}-{name}"), f"step alone, batch {batch}, {what}")
    for name, what in (
        *(("joint-1024", "batch 1024"), ("joint-128", "batch 128"), ("node", "all GPUs")),
        ("joint-1024-own", "batch 1024, a stream of its own"),
        ("joint-1024-high-priority", "batch 1024, a stream of high priority"),
        ("joint-128-reduce-overhead", "batch 128, CUDA graphs"),
        ("joint-cpu", "Ti/16 on the CPU"),
    ):
        if name in results:
            found += _joint(results[name], what)
    if "input" in results:
        result = results["input"]
        times = f"{result['threads']} threads; {result['cpu_us']:.0f} us an image, {result['python_us']:.0f} in Python"
        found.append(Row("the CPU's part of a GPU's loader", result["images_per_sec"], "images/s", remark=times))
    for name, result in results.items():
        if "compare" in result:
            compared = result["compare"]
            loaders = {loader: values["images_per_sec"] for loader, values in compared["loaders"].items()}
            rates = ", ".join(f"{loader} {rate:,.0f}" for loader, rate in loaders.items())
            on_cpu = _num_gpus(result) == 0  # on a GPU the other loaders still work on the CPU: no goal
            found.append(
                Row(f"loader / best other, {name}", compared["ratio"], "times", 1.6 if on_cpu else None, None, rates)
            )
    return found


def _ways(results: Results, *names: str) -> dict[str, float]:
    """Images/s of each way of compiling the step, by its name."""
    return {
        way: results[name][way]["images_per_sec"]
        for name in names
        for way in get_args(CompileMode)
        if "images_per_sec" in results.get(name, {}).get(way, {})  # it may have failed
    }


def _step(ways: dict[str, float], what: str, least: float | None = None) -> Iterator[Row]:
    """A row for each way: the best of several might meet the goal by luck, or in a way that no run has by default."""
    for way, rate in ways.items():
        yield Row(f"{what}, {way}", rate, "images/s", None if way == "off" else least)


def _joint(result: Mapping[str, Any], what: str) -> Iterator[Row]:
    on_gpus = _num_gpus(result) > 0  # on the CPU loader and step share the cores: no goal
    if "loader" in result:
        goal = 15_000 * _num_gpus(result) or None
        yield Row(f"loader alone, {what}", result["loader"]["images_per_sec"], "images/s", goal)
    if "joint" in result:
        rate = result["joint"]["images_per_sec"]
        yield Row(f"training, {what}", rate, "images/s", None, None, result["config"]["compiled"])
    if "joint_to_model" in result:
        yield Row(f"training / step alone, {what}", 100 * result["joint_to_model"], "%", 97 if on_gpus else None)
        yield Row(f"data wait, {what}", 100 * result["stall_fraction"], "%", None, 3 if on_gpus else None)
    if "randaug_cost" in result:
        cost = 100 * result["randaug_cost"]["cost"]
        yield Row(f"RandAugment's cost, {what}", cost, "%", None, 3 if on_gpus else None)


def _num_gpus(result: Mapping[str, Any]) -> int:
    gpus: int = result["config"]["run"]["gpus"]
    return gpus


def derived_minutes(images_per_sec: float) -> float:
    """Minutes of EPOCHS epochs on GPUS GPUs, each of which trains at the rate of one alone, without evaluation."""
    return EPOCHS * IMAGENET_TRAIN_99 / (GPUS * images_per_sec) / 60


def summary(results: Results, commands: Mapping[str, str]) -> str:
    """The table, the environment and the commands; commands: by name, each measurement's command and how it ended."""
    lines = [f"Goals are for {GOALS_ARE_FOR}.", "", "| | goal | measured | | |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows(results)]
    share = results.get("joint-128", {})
    if "joint" in share:
        rate = share["joint"]["images_per_sec"]
        lines += [
            "",
            f"Derived, not run: {EPOCHS} epochs of {IMAGENET_TRAIN_99:,} images on {GPUS} such GPUs take"
            f" {derived_minutes(rate):.1f} minutes and evaluation besides, if each trains at {rate:,.0f} images/s, as"
            f" one did at its share of batch {128 * GPUS}, and {GPUS} processes slow each other down by nothing.",
        ]
    lines += ["", *_environment(results)]
    lines += ["", *(f"- {name}: {how}" for name, how in commands.items())]
    return "\n".join(lines) + "\n"


_OF_ONE_RUN = ("command", "host", "cores busy before")


def _environment(results: Results) -> Iterator[str]:
    """The environment, a line a property. Values that differ, as in a folder used again later, name what has them."""
    found: dict[str, dict[str, list[str]]] = {}
    for measurement, result in results.items():
        for name, value in result.get("environment", {}).items():
            if name not in _OF_ONE_RUN:
                found.setdefault(name, {}).setdefault(value, []).append(measurement)
    for name, values in found.items():
        if len(values) == 1:
            yield f"- {name}: {next(iter(values))}"
        else:
            yield f"- {name} DIFFERS: " + "; ".join(f"{value} ({', '.join(of)})" for value, of in values.items())
