"""What all tools in tools/ have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = sorted(Path(__file__).parents[1].glob("tools/*.py"))


@pytest.mark.timeout(60)
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
