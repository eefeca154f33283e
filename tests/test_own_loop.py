"""The program of docs/own_loop.md learns, in one process and in two, from the same images."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.processes import run_ranks, run_to_end

pytestmark = pytest.mark.timeout(300)

DOCUMENT = Path(__file__).parents[1] / "docs" / "own_loop.md"


def program(folder: Path, data: Path, *, steps: int) -> str:
    """Writes the program as the document has it but for its data and length, and a line every ten steps."""
    source = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert source is not None
    text = source[1]
    for old, new in (
        ('data, steps, batch_size = "demo", 300, 64', f"data, steps, batch_size = {str(data)!r}, {steps}, 16"),
        ("step % 50", "step % 10"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "own_loop.py"
    path.write_text(text)
    return str(path)


def accuracy(out: str) -> float:
    """The accuracy that the program prints last, in percent, of all 28 images of val."""
    last = re.fullmatch(r"(\S+) % of 28 images", out.splitlines()[-1])
    assert last is not None, out
    return float(last[1])


def test_the_program_of_the_document_learns(image_folder: Path, tmp_path: Path) -> None:
    done = run_to_end(program(tmp_path, image_folder, steps=31))
    assert (done.returncode, done.stderr) == (0, "")
    steps, losses = zip(*re.findall(r"^step (\d+): loss (\S+)$", done.stdout, re.MULTILINE), strict=True)
    assert steps == ("0", "10", "20", "30")
    assert float(losses[0]) == pytest.approx(math.log(4), rel=0.15)  # of four classes, none of which is known yet
    assert accuracy(done.stdout) > 75  # by chance it would be 25


def test_two_processes_evaluate_every_image_once_between_them(image_folder: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, program(tmp_path, image_folder, steps=1))
    out = max(first[0], second[0])  # they come in the order in which they ended
    assert out.startswith("step 0: loss ")
    assert 0 <= accuracy(out) <= 100
    assert {first[1], second[1], min(first[0], second[0])} == {""}
