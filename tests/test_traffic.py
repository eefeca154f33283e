"""What the compiled step's kernels for a GPU read and write, counted on generated code; no GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(650)

TOOL = Path(__file__).parents[1] / "tools" / "measure_traffic.py"
TOKENS, WIDTH, FLOAT32, BFLOAT16 = 196, 384, 4, 2
BATCH = 256


def count(out: Path, *, depth: int, residual: str) -> dict[str, dict[str, int]]:
    """Bytes of S/16 with so many blocks, forward and backward, with timm's blocks and with lean ones."""
    flags = ["--depth", str(depth), "--batch-size", str(BATCH), "--residual", residual, "--json", str(out)]
    subprocess.run([sys.executable, str(TOOL), *flags], env=environment(), timeout=300, check=True)
    result = json.loads(out.read_text())
    return {
        blocks: {
            what: result[blocks]["forward"][what] + result[blocks]["backward"][what] for what in ("all", "generated")
        }
        for blocks in ("timm's blocks", "lean blocks")
    }


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_each_lean_block_moves_fewer_bytes(residual, tmp_path):
    """What an image saves in a block: the terms of the biases of qkv and of the MLP's first layer are not read again.
    Nor, with a residual stream in float32, is its gradient, twice, to be rounded, and no normalised tokens are written.
    """
    two, four = (count(tmp_path / "traffic.json", depth=depth, residual=residual) for depth in (2, 4))
    block = {
        blocks: {what: (four[blocks][what] - two[blocks][what]) / 2 / BATCH for what in ("all", "generated")}
        for blocks in four
    }
    saved = (3 + 4) * TOKENS * WIDTH * BFLOAT16
    if residual == "float32":
        saved += (2 + 2) * TOKENS * WIDTH * FLOAT32
    assert block["timm's blocks"]["all"] - block["lean blocks"]["all"] == pytest.approx(saved, rel=0.05)
    # Matrix products and attention are left as they are.
    outside = [values["all"] - values["generated"] for values in block.values()]
    assert outside[0] == pytest.approx(outside[1], rel=0.01)
