#!/usr/bin/env python3
"""Measures loading and training on this machine, the most telling figures first, and tabulates them beside the goals.

    tools/measure_all.py --out results                 on every GPU, else on the CPU
    tools/measure_all.py --out results --minutes 9     as much as fits; the same command again goes on

Each measurement is a command of another tool, in a process of its own and with a time limit: where one fails or takes
too long, the others are made all the same. The folder --out gets NAME.txt, what a measurement printed, for most also
NAME.json, their figures, and summary.md, which is written anew after each measurement. What was measured with other
code, with other versions of the packages or on another number of drawn JPEGs, is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark import command, goals

from dali_vit import distributed
from dali_vit.config import UserError
from dali_vit.environment import versions
from dali_vit.files import replacing
from dali_vit.process import end_with_parent

TOOLS = Path(__file__).parent
RECORDS = "measured.json"
IMAGES_ON_GPU, IMAGES_ON_CPU = 20_000, 594
_KEYS = {"command", "exit_code", "seconds", "ended"}  # of an entry of RECORDS
_GRACE = 15.0  # seconds that a measurement has to end in, once asked to


@dataclass(frozen=True)
class Measurement:
    """A command that measures something; most write the figures to NAME.json in the folder of the results."""

    name: str
    command: tuple[str, ...]
    """A tool in this file's folder, and its arguments."""
    minutes: float
    """Time limit, after which the command is ended."""
    images: int | None = None
    """How many drawn JPEGs it measures on; None where it takes none, or a data set of the user's."""

    def files(self) -> list[str]:
        """What it leaves in the folder of the results."""
        return [f"{self.name}.txt", *([f"{self.name}.json"] if "--json" in self.command else [])]

    def shown(self) -> str:
        return shlex.join(("tools/" + self.command[0], *self.command[1:]))


def plan(gpus: int, data: Path, out: Path, count: int | None = None) -> list[Measurement]:
    """What to measure, the most telling first; gpus 0: the CPU.

    JPEGs are drawn if `data` does not exist, or holds drawn JPEGs, of which some may still be missing.
    """
    measurements: list[Measurement] = []
    images = None

    def add(name: str, minutes: float, tool: str, *arguments: str | int | Path, has_json: bool = True) -> None:
        to = ("--json", str(out / f"{name}.json")) if has_json else ()
        measurements.append(
            Measurement(name, (tool, *map(str, arguments), *to), minutes, images if "--data" in arguments else None)
        )

    if not data.exists() or (data / "make_jpegs.json").exists():
        images = count or (IMAGES_ON_GPU if gpus else IMAGES_ON_CPU)
        classes = min(images, 1000 if gpus else 10)
        add("jpegs", 30, "make_jpegs.py", "--out", data, "--count", images, "--classes", classes, has_json=False)
    bench: tuple[Any, ...] = ("bench_throughput.py", "--data", data, "--gpus")
    if not gpus:
        for number in (1, 2, 3):
            loaders = ("--mode", "loader", "--compare", "--seconds", 3, "--batch-size", 256)
            add(f"compare-{number}", 10, *bench, 0, *loaders)
        add("input", 5, "measure_input.py", "--data", data)
        add("kernels", 10, "measure_kernels.py", "--repeats", 16, has_json=False)
        add("joint-cpu", 10, *bench, 0, "--model", "Ti/16", "--batch-size", 16, "--seconds", 20)
        return measurements

    def profiled(name: str) -> tuple[str, ...]:
        return "--randaug-cost", "--profile", "5", "--profile-dir", str(out / f"{name}-trace")

    for batch in (128, 1024):
        quick = ("--compile", "default", "reduce-overhead", "off")
        add(f"step-{batch}", 10, "measure_step.py", "--batch-size", batch, *quick)
    for batch in (128, 1024):
        add(f"joint-{batch}", 10, *bench, 1, "--batch-size", batch, *profiled(f"joint-{batch}"))
    add("input", 5, "measure_input.py", "--data", data)
    if gpus > 1:
        add("node", 10, *bench, gpus, "--batch-size", 128 * gpus, *profiled("node"))
        add("ddp", 10, "measure_ddp.py", "--processes", gpus)
    add("kernels", 10, "measure_kernels.py", "--gpu", "--batch-size", 1024, has_json=False)
    add("sweep", 10, *bench, 1, "--mode", "loader", "--sweep", "--seconds", 5, "--autotune", "off")
    for batch in (1024, 128):
        one = ("measure_step.py", "--batch-size", batch, "--compile", "default")
        add(f"step-{batch}-timm", 10, *one, "--timm-blocks")
        add(f"step-{batch}-bfloat16", 10, *one, "--residual", "bfloat16")
        add(f"step-{batch}-combo", 15, *one, "--inductor", "combo_kernels=True")
        add(f"step-{batch}-descent", 15, *one, "--inductor", "coordinate_descent_tuning=True")
        add(f"step-{batch}-pdl", 10, *one, "--inductor", "triton.enable_pdl=True")
    for kernel in ("packed", "cudnn", "flash"):  # the fastest kernel by itself need not make the fastest step
        compiled = ("--batch-size", 1024, "--compile", "default")
        add(f"step-1024-{kernel}", 10, "measure_step.py", *compiled, "--attention", kernel)
    # At this batch the host may need much of a step's time to launch it, beside what the loader needs of its thread.
    add("joint-128-reduce-overhead", 10, *bench, 1, "--batch-size", 128, "--compile", "reduce-overhead")
    for stream in ("own", "high-priority"):
        add(f"joint-1024-{stream}", 10, *bench, 1, "--batch-size", 1024, "--step-stream", stream)
    for mode in ("max-autotune-no-cudagraphs", "max-autotune"):  # a measurement for each, as they take minutes
        for batch in (1024, 128):
            add(f"step-{batch}-{mode}", 20, "measure_step.py", "--batch-size", batch, "--compile", mode)
    add("compare", 10, *bench, 1, "--mode", "loader", "--compare", "--batch-size", 256)
    return measurements


def run(measurement: Measurement, out: Path, seconds: float) -> dict[str, Any]:
    """Runs a measurement for at most `seconds`; returns its entry for RECORDS, `exit_code` None if time ran out."""
    result = out / f"{measurement.name}.json"
    if result.exists():  # from another command, or from one that was given up
        result.replace(out / f"{measurement.name}.before.json")
    sources, began = _code(), time.monotonic()  # before it starts: sources may be edited while it runs
    argv = [sys.executable, str(TOOLS / measurement.command[0]), *measurement.command[1:]]
    with (out / f"{measurement.name}.txt").open("wb") as printed:
        process = subprocess.Popen(
            argv,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # left behind, it would slow down the next measurements
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    return {
        "command": measurement.shown(),
        "images": measurement.images,
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 1),
        "ended": time.strftime("%Y-%m-%d %H:%M:%S"),
        "code": sources,
    }


def _code() -> str:
    """A digest of the sources that are measured and of the versions of the packages that they use."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    sources = (TOOLS.parent / folder for folder in ("dali_vit", "pipelines", TOOLS.name))
    for path in sorted(path for folder in sources for path in folder.rglob("*.py")):
        if path.is_file():  # an editor's lock may be a link that leads nowhere
            digest.update(str(path.relative_to(TOOLS.parent)).encode() + path.read_bytes())
    return digest.hexdigest()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all those that it may have started."""
    for number, patience in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)  # those of its group may have outlived it
            process.wait(patience)


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    try:
        records = json.loads((out / RECORDS).read_text(encoding="utf-8"))
        if not all(record.keys() >= _KEYS for record in records.values()):
            raise ValueError(f"an entry lacks one of {', '.join(sorted(_KEYS))}")
        return records
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:  # AttributeError: of what is no dictionary
        raise UserError(f"{out / RECORDS}: cannot be read ({error}); remove it to measure all again") from error


def write_summary(out: Path, records: dict[str, dict[str, Any]]) -> str:
    """Writes RECORDS and summary.md; returns the text of summary.md."""
    results: dict[str, dict[str, Any]] = {}
    for name in records:
        with contextlib.suppress(OSError, ValueError):  # it failed before it wrote a file, or writes none
            results[name] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    commands = {name: f"`{record['command']}` ({_ending(record)})" for name, record in records.items()}
    text = goals.summary(results, commands)
    for name, content in ((RECORDS, json.dumps(records, indent=1)), ("summary.md", text)):
        with replacing(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return text


def _ending(record: dict[str, Any]) -> str:
    code = record["exit_code"]
    how = "" if code == 0 else "given up after " if code is None else f"failed with exit code {code} after "
    return f"{how}{record['seconds']:.0f} s, {record['ended']}"


def main() -> None:
    """Exits with 0 when all is measured, 1 when something failed or is left, 2 for what the user can mend."""
    # Otherwise SIGTERM would end this process alone, and the measurement in progress would go on without it.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(_main())
    except UserError as error:
        print(f"measure_all.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written to
        print(f"measure_all.py: --out: {error}; mend that, and the same command goes on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("measure_all.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


def _main() -> int:
    parser = command.Parser(__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for what is measured; default: results"
    )
    parser.add_argument("--data", type=Path, help="a data set, or a folder to draw JPEGs into; default: OUT/jpegs")
    parser.add_argument(
        "--count", type=int, help=f"JPEGs to draw; default: {IMAGES_ON_GPU}, on the CPU {IMAGES_ON_CPU}"
    )
    parser.add_argument("--gpus", type=int, help="0: the CPU; default: all, else the CPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no more than so long; default: no limit")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these alone")
    parser.add_argument("--list", action="store_true", help="show the commands and measure nothing")
    arguments = parser.parse_args()
    if arguments.count is not None and arguments.count < 1:
        raise UserError(f"--count {arguments.count}: must be at least 1")
    if not arguments.minutes > 0:
        raise UserError(f"--minutes {arguments.minutes:g}: must be above 0")
    out = arguments.out
    gpus = distributed.resolve_gpus(arguments.gpus)
    measurements = plan(gpus, arguments.data or out / "jpegs", out, arguments.count)
    names = [m.name for m in measurements]
    if unknown := set(arguments.only or ()) - set(names):
        raise UserError(f"--only {' '.join(sorted(unknown))}: no such measurement; there are {', '.join(names)}")
    measurements = [m for m in measurements if arguments.only is None or m.name in arguments.only]
    if arguments.list:
        print("\n".join(f"{m.name:<20} {m.shown()}" for m in measurements))
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); choose another folder") from error
    return _measure(measurements, out, time.monotonic() + 60 * arguments.minutes)


def _measure(measurements: list[Measurement], out: Path, deadline: float) -> int:
    records = read_records(out)
    for measurement in measurements:
        name, before = measurement.name, records.get(measurement.name, {})
        # make_jpegs.py goes on where it stopped, and finds out by itself that nothing is left to do.
        now = {"command": measurement.shown(), "images": measurement.images, "code": _code()}
        done = before.get("exit_code") == 0 and all(before.get(key) == value for key, value in now.items())
        if name != "jpegs" and done and all((out / file).exists() for file in measurement.files()):
            print(f"{name:<20} there already", flush=True)
            continue
        seconds = min(60 * measurement.minutes, deadline - time.monotonic())
        if seconds <= 0:
            print(f"{name:<20} left: the time is over", flush=True)
            continue
        print(f"{name:<20} {measurement.shown()}", flush=True)
        records[name] = run(measurement, out, seconds)
        write_summary(out, records)
        print(f"{'':<20} {_ending(records[name])}", flush=True)
        if records[name]["exit_code"] != 0:
            lines = (out / f"{name}.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"{'':<20} | {line}" for line in lines[-5:]), flush=True)
    print("\n" + write_summary(out, records))
    return int(any(records.get(m.name, {}).get("exit_code") != 0 for m in measurements))


if __name__ == "__main__":
    command.run(main)
