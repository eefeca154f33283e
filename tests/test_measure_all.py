"""tools/measure_all.py: what is measured in which order, within limits."""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where Python looks when the tool is run as a script

import bench_throughput
import make_jpegs
import measure_all
import measure_ddp
import measure_input
import measure_kernels
import measure_step

from tests.conftest import environment

pytestmark = pytest.mark.timeout(60)


class Parsed(Exception):
    pass


@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_every_command_is_one_that_its_tool_takes(gpus, tmp_path, monkeypatch):
    modules = (bench_throughput, make_jpegs, measure_ddp, measure_input, measure_kernels, measure_step)
    tools = {f"{module.__name__}.py": module for module in modules}
    (tmp_path / "out").mkdir()
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse_args(self, *arguments)
        raise Parsed

    measurements = measure_all.plan(gpus, tmp_path / "jpegs", tmp_path / "out")
    assert measurements[0].name == "jpegs"
    assert len({m.name for m in measurements}) == len(measurements)
    for measurement in measurements:
        tool, *arguments = measurement.command
        if tool == "bench_throughput.py":
            options, config = bench_throughput.parse(arguments)
            assert config.data.data == str(tmp_path / "jpegs")
            assert options.json == tmp_path / "out" / f"{measurement.name}.json"
            assert (options.gpus or 0) <= gpus
            assert config.optim.batch_size % max(1, options.gpus or 0) == 0
            continue
        with monkeypatch.context() as patched:
            patched.setattr(argparse.ArgumentParser, "parse_args", parse)
            patched.setattr(sys, "argv", [tool, *arguments])
            with pytest.raises(Parsed):
                tools[tool].main()


def test_only_data_of_ours_is_drawn(tmp_path):
    def names(data: Path) -> list[str]:
        return [m.name for m in measure_all.plan(0, data, tmp_path)]

    users, begun = tmp_path / "imagenet", tmp_path / "begun"
    for folder in (users, begun):
        folder.mkdir()
    (begun / "make_jpegs.json").write_text("{}")
    assert "jpegs" not in names(users)
    assert "jpegs" in names(begun)
    assert "jpegs" in names(tmp_path / "not there")


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A folder of tools: `good.py FILE` adds a line to a file, `bad.py` fails, `slow.py FILE` and its child go on."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "good.py").write_text("import sys; print('x', file=open(sys.argv[1], 'a')); print('fine')")
    (folder / "bad.py").write_text("import sys; sys.exit('one\\ntwo')")
    (folder / "slow.py").write_text(
        "import os, sys, time\n"
        "child = os.fork()\n"
        "if child: print(os.getpid(), child, file=open(sys.argv[1], 'w'), flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(measure_all, "TOOLS", folder)
    return folder


def test_what_fails_costs_nothing_else_and_what_is_there_is_not_measured_again(tools, tmp_path, capsys):
    out, lines = tmp_path / "out", tmp_path / "lines"
    out.mkdir()
    measurements = [
        measure_all.Measurement("first", ("bad.py",), 1),
        measure_all.Measurement("second", ("good.py", str(lines)), 1),
    ]
    for _ in range(2):
        assert measure_all._measure(measurements, out, time.monotonic() + 60) == 1
    printed = capsys.readouterr().out
    assert printed.count("| two") == 2
    assert printed.count("there already") == 1
    assert lines.read_text() == "x\n"
    assert (out / "second.txt").read_text() == "fine\n"
    records = measure_all.read_records(out)
    assert {name: record["exit_code"] for name, record in records.items()} == {"first": 1, "second": 0}
    summary = (out / "summary.md").read_text()
    assert "- first: `tools/bad.py` (failed with exit code 1" in summary
    assert f"- second: `tools/good.py {lines}` (" in summary

    (out / "second.txt").unlink()
    assert measure_all._measure(measurements[1:], out, time.monotonic() + 60) == 0
    assert lines.read_text() == "x\nx\n"
    changed = [measure_all.Measurement("second", ("good.py", str(lines), "another flag"), 1)]
    (out / "second.json").write_text('{"earlier": {}}')
    assert measure_all._measure(changed, out, time.monotonic() + 60) == 0
    assert lines.read_text() == "x\nx\nx\n"
    assert not (out / "second.json").exists()
    assert json.loads((out / "second.before.json").read_text()) == {"earlier": {}}


def test_what_was_measured_with_other_code_is_measured_again(tools, tmp_path, monkeypatch):
    out, lines = tmp_path / "out", tmp_path / "lines"
    out.mkdir()

    def times_measured() -> int:
        """By three commands, of which the later ones find what the first did, if the code is the same."""
        lines.write_text("")
        for _ in range(3):
            measurements = [measure_all.Measurement("it", ("good.py", str(lines)), 1)]
            assert measure_all._measure(measurements, out, time.monotonic() + 60) == 0
        return lines.read_text().count("x")

    assert times_measured() == 1
    assert times_measured() == 0
    for folder in ("tools", "dali_vit", "pipelines/kernels"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / ".#lock.py").symlink_to("nowhere")  # as of an editor
        (tmp_path / folder / "notes.md").write_text("none")
        assert times_measured() == 0
        (tmp_path / folder / "of_the_code.py").touch()
        assert times_measured() == 1
        (tmp_path / folder / "of_the_code.py").write_text("changed")
        assert times_measured() == 1
    monkeypatch.setattr(measure_all, "versions", lambda: {"torch": "0.1"})
    assert times_measured() == 1
    edits = "import sys; print('x', file=open(sys.argv[1], 'a')); open(__file__, 'a').write(' ')"
    (tools / "good.py").write_text(edits)  # each time it measures what is no longer there
    assert times_measured() == 3


def test_one_that_takes_too_long_is_ended_with_its_children_and_the_rest_is_left(tools, tmp_path, capsys):
    out, pids = tmp_path / "out", tmp_path / "pids"
    out.mkdir()
    measurements = [
        measure_all.Measurement("slow", ("slow.py", str(pids)), 1),
        measure_all.Measurement("next", ("good.py", str(tmp_path / "lines")), 1),
    ]
    assert measure_all._measure(measurements, out, time.monotonic() + 5) == 1
    assert "left: the time is over" in capsys.readouterr().out
    assert not (tmp_path / "lines").exists()
    assert measure_all.read_records(out)["slow"]["exit_code"] is None
    wait_for_the_end_of(*map(int, pids.read_text().split()))


def test_what_a_measurement_leaves_behind_is_ended(tools, tmp_path):
    out, pid = tmp_path / "out", tmp_path / "pid"
    out.mkdir()
    (tools / "leaves.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
    )
    assert measure_all._measure([measure_all.Measurement("x", ("leaves.py", str(pid)), 1)], out, 1e9) == 0
    wait_for_the_end_of(int(pid.read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_by_a_signal_it_leaves_nothing_running(number, tools, tmp_path):
    out, pids = tmp_path / "out", tmp_path / "pids"
    program = (
        "import sys; from pathlib import Path; import measure_all\n"
        f"measure_all.TOOLS = Path({str(tools)!r})\n"
        f"measure_all.plan = lambda *_: [measure_all.Measurement('slow', ('slow.py', {str(pids)!r}), 1)]\n"
        f"sys.argv = ['measure_all.py', '--gpus', '0', '--out', {str(out)!r}]\n"
        "measure_all.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment() | {"PYTHONPATH": str(ROOT / "tools")}, stderr=subprocess.PIPE
    )
    while not pids.exists() or not pids.read_text().endswith("\n"):
        assert process.poll() is None
        time.sleep(0.1)
    command, child = map(int, pids.read_text().split())
    process.send_signal(number)
    _, err = process.communicate()
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert err.decode() == "measure_all.py: stopped; the same command goes on from here\n"
        wait_for_the_end_of(command, child)
    else:
        os.kill(child, signal.SIGKILL)  # the tools' own children look after themselves, or their pools do
        wait_for_the_end_of(command)


def wait_for_the_end_of(*pids: int) -> None:
    for pid in pids:
        for _ in range(100):
            if not is_running(pid):
                break
            time.sleep(0.1)
        assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "{file}/below"], "--out {file}/below: cannot be made (Not a directory)"),
        (["--out", "{folder}", "--only", "nothing"], "--only nothing: no such measurement; there are jpegs, compare-1"),
        (["--out", "{folder}", "--count", "0"], "--count 0: must be at least 1"),
        (["--out", "{folder}", "--minutes", "nan"], "--minutes nan: must be above 0"),
        (["--out", "{folder}", "--gpus", "99"], "--gpus 99: 0 visible on this machine"),
        (["--out", "{damaged}"], "{damaged}/measured.json: cannot be read"),
        (["--out", "{list}"], "{list}/measured.json: cannot be read ('list' object has no attribute 'values'); remove"),
        (
            ["--out", "{short}"],
            "{short}/measured.json: cannot be read (an entry lacks one of command, ended, exit_code,",
        ),
        (["--nothing"], "unrecognized arguments: --nothing (--help lists the flags)"),
    ],
)
def test_a_mistake_is_said_in_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    records = {"damaged": "{", "list": "[]", "short": '{"input": {"exit_code": 0}}'}
    places = {name: tmp_path / name for name in ("file", "folder", *records)}
    places["file"].touch()
    for name, text in records.items():
        places[name].mkdir()
        (places[name] / "measured.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["measure_all.py", *(flag.format(**places) for flag in flags)])
    with pytest.raises(SystemExit) as stopped:
        measure_all.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"measure_all.py: {message.format(**places)}")
    assert sorted(os.listdir(tmp_path)) == ["damaged", "file", "list", "short"]


def test_a_folder_that_cannot_be_written_to_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "compare-1.txt").mkdir()
    flags = ["--out", str(tmp_path), "--gpus", "0", "--only", "compare-1"]
    monkeypatch.setattr(sys, "argv", ["measure_all.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        measure_all.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"measure_all.py: --out: [Errno 21] Is a directory: '{tmp_path}/compare-1.txt'; mend that")


def test_the_list_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["measure_all.py", "--gpus", "0", "--list"])
    with pytest.raises(SystemExit) as stopped:
        measure_all.main()
    assert stopped.value.code == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *("jpegs", "compare-1", "compare-2", "compare-3", "input", "kernels", "joint-cpu"),
    ]
    assert os.listdir(tmp_path) == []
