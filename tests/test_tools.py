"""What all tools in tools/ have in common, and what measure_all.py takes as measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # where Python looks when a tool is run as a script

import measure_all
import measure_ddp

from dali_vit.distributed import Group

TOOLS = sorted(Path(__file__).parents[1].glob("tools/*.py"))


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("ctrl_c_is_minded")
@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_ctrl_c_during_the_imports_ends_a_tool_without_a_traceback(tool: Path, tmp_path: Path) -> None:
    """Here in the first of the packages that take long."""
    for name in ("numpy", "torch", "tyro"):
        (tmp_path / f"{name}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
        )
    ended = subprocess.run(
        [sys.executable, str(tool), "--help"],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_what_was_measured_on_fewer_images_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, lines = tmp_path / "tools", tmp_path / "lines"
    tools.mkdir()
    (tools / "tool.py").write_text("import sys; print('x', file=open(sys.argv[1], 'a'))")
    monkeypatch.setattr(measure_all, "TOOLS", tools)
    for images, expected in ((100, 1), (100, 1), (594, 2), (594, 2), (None, 3)):
        it = measure_all.Measurement("it", ("tool.py", str(lines)), 1, images)
        assert measure_all._measure([it], tmp_path, time.monotonic() + 60) == 0
        assert lines.read_text().count("x") == expected


def test_which_measurements_are_of_the_drawn_images(tmp_path: Path) -> None:
    for gpus in (0, 1, 2):
        planned = measure_all.plan(gpus, tmp_path / "new", tmp_path, 77)
        of_images = {m.name for m in planned if m.images == 77}
        assert of_images == {m.name for m in planned if "--data" in m.command}
        assert of_images
        assert not of_images & {"jpegs", "kernels", "ddp", "step-128"}
    (tmp_path / "own").mkdir()
    assert {m.images for m in measure_all.plan(0, tmp_path / "own", tmp_path)} == {None}


@pytest.mark.timeout(60)
def test_one_setting_of_ddp_alone_is_compiled_in_one_piece(cpu: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is measured after the other, as torch.compile's code is not kept apart by it."""
    turns: list[tuple[list[str], bool]] = []

    def take_turns(steps: dict[str, Any], *_: Any) -> dict[str, float]:
        turns.append((list(steps), torch._dynamo.config.optimize_ddp))
        return dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(measure_ddp, "make", lambda name, *_: name)
    monkeypatch.setattr(measure_ddp, "take_turns", take_turns)
    measure_ddp.measure(Namespace(compile="default"), cpu)
    one_piece = "both, compiled in one piece"
    assert turns == [([name], name != one_piece) for name in measure_ddp.SETTINGS]
    turns.clear()
    measure_ddp.measure(Namespace(compile="off"), cpu)
    assert turns == [([name for name in measure_ddp.SETTINGS if name != one_piece], True)]
