"""Bytes that the compiled step's kernels for a GPU read and write, counted in the generated code; no GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

pytest.importorskip("triton")

TOOLS = Path(__file__).parents[1] / "tools"
TOKENS, WIDTH, FLOAT32, BFLOAT16 = 196, 384, 4, 2
BATCH = 256


# In one process, of its own: the compiler is loaded once, and is left believing in a GPU.
SCRIPT = """
import sys
tools, *commands = sys.argv[1:]
sys.path.insert(0, tools)
import measure_traffic

for command in commands:
    sys.argv[1:] = command.split()
    measure_traffic.main()
"""


@pytest.mark.timeout(650)
def test_each_lean_block_moves_fewer_bytes(tmp_path: Path) -> None:
    """What an image saves in a block: the terms of the biases of qkv and of the MLP's first layer are not read again.
    Nor, with a residual stream in float32, is its gradient, twice, to be rounded, and no normalised tokens are written;
    there blocks differ in turn, so that it is the mean of two. The packed attention saves reading the gradients of q, k
    and v and writing them again.
    """
    flags = [
        f"--residual {residual} --depth {depth} --blocks {blocks} --batch-size {BATCH} --json {residual}-{depth}.json"
        for residual, depth, blocks in (
            ("float32", 2, "timm lean packed"),
            ("float32", 4, "timm lean"),
            ("bfloat16", 1, "timm lean"),
            ("bfloat16", 2, "timm lean"),
        )
    ]
    command = [sys.executable, "-c", SCRIPT, str(TOOLS), *flags]
    subprocess.run(command, cwd=tmp_path, env=environment(), timeout=600, check=True)
    for residual, two_depths in {"float32": (2, 4), "bfloat16": (1, 2)}.items():
        few, more = (json.loads((tmp_path / f"{residual}-{depth}.json").read_text()) for depth in two_depths)
        block = {
            blocks: {
                what: sum(more[blocks][way][what] - few[blocks][way][what] for way in ("forward", "backward"))
                / (two_depths[1] - two_depths[0])
                / BATCH
                for what in ("all", "generated")
            }
            for blocks in ("timm's blocks", "lean blocks")
        }
        saved = (3 + 4) * TOKENS * WIDTH * BFLOAT16
        if residual == "float32":
            saved += (2 + 2) * TOKENS * WIDTH * FLOAT32
        assert block["timm's blocks"]["all"] - block["lean blocks"]["all"] == pytest.approx(saved, rel=0.05)
        # Matrix products and attention are left as they are.
        outside = [values["all"] - values["generated"] for values in block.values()]
        assert outside[0] == pytest.approx(outside[1], rel=0.01)
        if residual == "float32":
            lean, packed = (
                sum(few[blocks][way]["all"] for way in ("forward", "backward")) / 2 / BATCH
                for blocks in ("lean blocks", "packed attention")
            )
            assert lean - packed == pytest.approx(2 * 3 * TOKENS * WIDTH * BFLOAT16, rel=0.02)
