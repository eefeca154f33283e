"""What a benchmark says: its tables, one sentence on what limits training, and the JSON file."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark import compare
from benchmark.sweep import NOT_FOR_TRAINING, Settings, Trial
from benchmark.windows import Measurement
from dali_vit.config import UserError
from dali_vit.files import replacing

# Training outruns neither its loader nor its step: where it does by more than this, the machine's speed has changed.
_MOST_JOINT = 1.05

# The goal for the joint rate, as a share of the step alone; from this share on the loader does not hinder training.
UNHINDERED = 0.97

HEADER = f"{'':<7} {'images/s':>10} {'min':>10} {'max':>10} {'spread':>10} {'worst batch':>14}"


def row(mode: str, measurement: Measurement) -> str:
    """A line under HEADER; spread is the interquartile range of the windows."""
    values = measurement.to_json()
    rates = " ".join(f"{values[key]:>10,.0f}" for key in ("images_per_sec", "min", "max", "spread"))
    return f"{mode:<7} {rates} {measurement.worst_batch_ms:>11,.1f} ms"


def details(result: Mapping[str, Any]) -> str:
    """What else was measured in mode `all`, in percent."""
    mfu = "" if result["mfu"] is None else f", MFU {100 * result['mfu']:.1f} %"
    share, stall = result["joint_to_model"], result["stall_fraction"]
    return f"joint / model {100 * share:.1f} %, data wait {100 * stall:.1f} %{mfu}"


def verdict(loader: float, model: float, joint: float, stall: float) -> str:
    """Which stage limits training and by how much; a second sentence where the rates cannot all be right.

    The three rates are in images/s; stall is the measured share of the joint time spent waiting for data.
    """
    sentence = _limits(loader, model, joint, stall)
    if joint <= _MOST_JOINT * min(loader, model):
        return sentence
    return (
        f"{sentence} Together they reach {joint:,.0f} images/s, more than the slower alone: the machine's speed has"
        " changed meanwhile, so measure again when nothing else uses it."
    )


def _limits(loader: float, model: float, joint: float, stall: float) -> str:
    waits = f"training waits for data {100 * stall:.0f} % of the time"
    if loader < model:
        limits = f"The loader limits: {loader:,.0f} images/s against {model:,.0f} of the step; {waits}."
        if joint >= UNHINDERED * loader:
            return limits
        return f"{limits} Together they compete for the processors, too, and reach {joint:,.0f} images/s."
    share = joint / model
    if share >= UNHINDERED:
        return (
            f"The step limits: {model:,.0f} images/s against {loader:,.0f} of the loader; training runs at"
            f" {100 * share:.0f} % of the step alone and {waits.removeprefix('training ')}."
        )
    return (
        f"Loader and step compete for the processors: {joint:,.0f} images/s together, {100 * share:.0f} % of the step"
        f" alone ({model:,.0f}), although the loader alone reaches {loader:,.0f}; {waits}."
    )


def randaug_cost(result: Mapping[str, Any]) -> str:
    """What RandAugment costs training, in one sentence."""
    rounds = zip(result["without"], result["with"], strict=True)
    rates = ", ".join(f"{augmented:,.0f} of {bare:,.0f}" for bare, augmented in rounds)
    return f"RandAugment costs training {100 * result['cost']:.1f} % of its images/s ({rates} by round)."


def single(mode: str, measurement: Measurement) -> str:
    """The sentence for one mode alone, which does not tell what limits training."""
    subject = {"loader": "The loader alone reaches", "model": "The step alone reaches", "joint": "Training reaches"}
    waits = f" and waits for data {100 * measurement.wait_fraction:.0f} % of the time" if mode == "joint" else ""
    return f"{subject[mode]} {measurement.images_per_sec:,.0f} images/s{waits}; --mode all says which stage limits."


def comparison(result: Mapping[str, Any]) -> str:
    """The loaders, fastest first, and the ratio."""
    loaders: Mapping[str, Any] = result["loaders"]
    lines = [f"{'':<26} {'images/s':>10}   by round"]
    for name, values in sorted(loaders.items(), key=lambda item: -item[1]["images_per_sec"]):
        rounds = " ".join(f"{rate:,.0f}" for rate in values["rounds"])
        lines.append(f"{name:<26} {values['images_per_sec']:>10,.0f}   {rounds}")
    decode = result["torchvision_decode"]
    ratios = ", ".join(f"{ratio:.2f}" for ratio in result["ratios"])
    return "\n".join(
        [
            *lines,
            f"{compare.OURS} loads {result['ratio']:.2f} times as fast as the best of the others ({ratios} by round);"
            f" torchvision decodes faster with {decode}; the others have {result['workers']}"
            " worker processes each.",
        ]
    )


def trial(tried: Trial, baseline: Settings) -> str:
    """A trial of a sweep on one line."""
    settings = tried.settings.differences(baseline) or "as it is"
    other = "" if tried.same_images else "   (other pixels)"
    if tried.measurement is None:
        return f"{'fails':>10} {'':>14}   {settings}{other}"
    return f"{tried.images_per_sec:>10,.0f} {tried.worst_batch_ms:>11,.1f} ms   {settings}{other}"


def sweep_table(trials: list[Trial], best: Trial) -> str:
    """The trials of a sweep, fastest first, and the best."""
    baseline = trials[0].settings
    lines = [f"{'images/s':>10} {'worst batch':>14}   settings"]
    lines += [trial(tried, baseline) for tried in sorted(trials, key=lambda t: -t.images_per_sec)]
    settings = best.settings.differences(baseline)
    gain = best.images_per_sec / trials[0].images_per_sec
    found = (
        f"{settings}, {gain:.2f} times the rate of the settings as they are" if settings else "the settings as they are"
    )
    ours, theirs = best.settings.flat(), baseline.flat()
    if unused := [name for name in NOT_FOR_TRAINING if ours[name] != theirs[name]]:
        found += f" (training does not try {', '.join(unused)})"
    return "\n".join([*lines, f"Best: {found}."])


def check_json(path: Path | None) -> None:
    """UserError, before anything is measured, if a file of results could not be written."""
    if path is None or _is_stdout(path):
        return
    is_device = path.exists() and not path.is_file() and not path.is_dir()
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if is_device else path.parent, os.W_OK):
        raise UserError(f"--json {path}: cannot be written; name a file in a folder that is there")


def check_seconds(seconds: float) -> None:
    """UserError unless --seconds says for how long to measure."""
    if not 0 < seconds < math.inf:
        raise UserError(f"--seconds {seconds:g}: must be above 0 and finite")


def check_folder(flag: str, path: Path) -> None:
    """UserError, before anything is measured, if a folder cannot be written to; makes the folder if there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be made ({error.strerror}); choose another folder") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: cannot be written to; choose another folder")


def write_json(path: Path, result: Mapping[str, Any] | list[Any]) -> None:
    """Writes the file as a whole or not at all; a device or pipe is written to, and so is stdout by whatever name."""
    text = json.dumps(result, indent=2) + "\n"
    if _is_stdout(path):
        print(text, end="")
        return
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _is_stdout(path: Path) -> bool:
    """Whether this is what stdout goes to, such as /dev/stdout: replaced, it would lose what was printed before."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # ValueError: stdout has no descriptor
        return False
