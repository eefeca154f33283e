"""The program of docs/own_loop.md learns, in one process and in two, and its samples of a zip file are the files."""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dali_vit.data import load_dataset
from pipelines.loader import TrainLoader
from pipelines.readers import FileList
from tests.processes import run_ranks, run_to_end

pytestmark = pytest.mark.timeout(300)

DOCUMENT = Path(__file__).parents[1] / "docs" / "own_loop.md"


def blocks() -> list[str]:
    """The Python code of the document."""
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


def program(folder: Path, data: Path, *, steps: int) -> str:
    """Writes the program as the document has it but for its data and length, and a line every ten steps."""
    text = blocks()[0]
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
    assert accuracy(done.stdout) > 50  # by chance it would be 25, with a standard deviation of 8


def test_two_processes_evaluate_every_image_once_between_them(image_folder: Path, tmp_path: Path) -> None:
    (out, err), second = run_ranks(2, program(tmp_path, image_folder, steps=1))
    assert out.startswith("step 0: loss ")
    assert 0 <= accuracy(out) <= 100
    assert (err, second) == ("", ("", ""))


def test_the_images_of_a_zip_file_are_those_of_the_files(image_folder: Path, tmp_path: Path) -> None:
    program, zipped = blocks()
    assert "class Zipped" not in program
    defined: dict[str, Any] = {}
    exec(zipped, defined)
    train = load_dataset(image_folder, minival=0.0).split("train")
    names = [train.path(i) for i in range(len(train))]
    cut = names[5]
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for name in names:
            data = Path(name).read_bytes()
            archive.writestr(name, data[:300] if name == cut else data)
    damaged = tmp_path / "cut.jpg"
    damaged.write_bytes(Path(cut).read_bytes()[:300])
    files = FileList.from_paths([str(damaged) if name == cut else name for name in names], train.labels)
    samples = defined["Zipped"](zipfile.ZipFile(tmp_path / "train.zip"), names, train.labels)
    settings: dict[str, Any] = {"rank": 0, "world_size": 1, "device": "cpu", "num_threads": 2}
    loaders = [TrainLoader(each, batch_size=15, image_size=32, seed=0, **settings) for each in (files, samples)]
    for _ in range(9):
        (images, labels), batch = (next(loader) for loader in loaders)
        assert all(map(torch.equal, batch, (images, labels)))
    assert [loader.bad_samples for loader in loaders] == [(5,), (5,)]
    for loader in loaders:
        loader.close()
