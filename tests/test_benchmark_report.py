"""What the benchmark says of its figures, and where it writes them."""
# ruff: noqa: E402

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where Python looks when the tool is run as a script

from benchmark import report

from dali_vit.config import UserError


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        (
            (812.4, 1405.0, 806.0, 0.413),
            "The loader limits: 812 images/s against 1,405 of the step; training waits for data 41 % of the time.",
        ),
        (
            (15300.0, 12100.0, 11895.0, 0.012),
            "The step limits: 12,100 images/s against 15,300 of the loader; training runs at 98 % of the step alone"
            " and waits for data 1 % of the time.",
        ),
        (
            (600.0, 500.0, 260.0, 0.2),
            "Loader and step compete for the processors: 260 images/s together, 52 % of the step alone (500), although"
            " the loader alone reaches 600; training waits for data 20 % of the time.",
        ),
        (
            (600.0, 250.0, 548.0, 0.0),
            "The step limits: 250 images/s against 600 of the loader; training runs at 219 % of the step alone and"
            " waits for data 0 % of the time. Together they reach 548 images/s, more than the slower alone: the"
            " machine's speed has changed meanwhile, so measure again when nothing else uses it.",
        ),
    ],
)
def test_verdict(rates, sentence):
    assert report.verdict(*rates) == sentence


def test_verdict_draws_the_line_at_97_percent():
    assert report.verdict(2000, 1000, 970, 0.03).startswith("The step limits")
    assert report.verdict(2000, 1000, 969, 0.03).startswith("Loader and step compete")
    assert report.verdict(1000, 1000, 970, 0.03).startswith("The step limits")
    assert report.verdict(1000, 1400, 970, 0.3).endswith("30 % of the time.")
    assert report.verdict(1000, 1400, 969, 0.3).endswith(
        "30 % of the time. Together they compete for the processors, too, and reach 969 images/s."
    )


@pytest.mark.parametrize(
    ("loader", "model", "limits"), [(1000, 1400, "The loader limits"), (1400, 1000, "The step limits")]
)
def test_verdict_doubts_a_joint_rate_beyond_105_percent_of_the_slower(loader, model, limits):
    for joint in (1050, 1051):
        sentence = report.verdict(loader, model, joint, 0.0)
        assert sentence.startswith(limits)
        assert ("measure again" in sentence) == (joint == 1051)


def test_json_goes_to_a_device_as_it_does_to_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    report.write_json(pipe, {"loader": 1})
    assert json.loads(os.read(descriptor, 100)) == {"loader": 1}
    os.close(descriptor)
    assert pipe.is_fifo()
    report.write_json(tmp_path / "file", [1])
    assert json.loads((tmp_path / "file").read_text()) == [1]


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_json_to_stdout_comes_after_what_was_printed(mode, tmp_path):
    program = "import sys; sys.path.insert(0, 'tools'); from pathlib import Path; from benchmark import report\n"
    program += "path = Path('/dev/stdout'); print('table'); report.check_json(path); report.write_json(path, [1])"
    (tmp_path / "out").write_text("before\n")
    with (tmp_path / "out").open(mode) as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True, cwd=ROOT)
    before = "before\n" if mode == "ab" else ""
    assert (tmp_path / "out").read_text() == f"{before}table\n[\n  1\n]\n"


def test_what_json_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    asked = []

    def access(path, how):
        asked.append((path.name, how))
        return False

    monkeypatch.setattr(os, "access", access)
    for path in (tmp_path / "pipe", tmp_path / "file", tmp_path / "new", tmp_path, tmp_path / "none/file"):
        with pytest.raises(
            UserError, match=f"^--json {path}: cannot be written; name a file in a folder that is there"
        ):
            report.check_json(path)
    assert asked == [("pipe", os.W_OK), (tmp_path.name, os.W_OK), (tmp_path.name, os.W_OK)]
