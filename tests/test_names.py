"""Names of folders, classes and images that are not valid UTF-8: to Linux, names are bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dali_vit import cli
from dali_vit.data import load_dataset
from tests.conftest import CLASSES, TINY, environment, write_image_folder

pytestmark = pytest.mark.timeout(120)

NAMES = ("\udcff ü", "日本 \\n", "b'\"\udce9")  # as Python has them: \udcff is the byte 255


@pytest.fixture
def folder(tmp_path) -> Path:
    root = write_image_folder(tmp_path / "set\udcff", train=8, val=2)
    for split in ("train", "val"):
        for plain, name in zip(CLASSES, NAMES, strict=False):
            (root / split / plain).rename(root / split / name)
            for image in (root / split / name).iterdir():
                image.rename(image.with_name(f"\udcfc{image.name}"))
    return root


def run(*arguments: str | Path, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert not stopped.value.code, captured.err
    return captured.out


def test_they_are_trained_on_and_shown(folder, tmp_path, capsys):
    runs = tmp_path / "runs"
    run("train", "--data", folder, "--gpus", "0", "--runs-dir", runs, "--name", "r", *TINY, capsys=capsys)
    assert yaml.safe_load((runs / "r/config.yaml").read_text())["data"]["data"] == str(folder)
    images = sorted(map(str, (folder / "val").glob("*/*")))
    command = [sys.executable, "-m", "dali_vit", "predict", "--checkpoint", str(runs / "r"), "--gpus", "0", *images]
    strict = {**environment(), "PYTHONIOENCODING": "ascii:strict"}
    shown = subprocess.run(command, capture_output=True, env=strict, timeout=100, check=False)
    assert shown.returncode == 0, shown.stderr.decode()
    for name in (*NAMES, *images):
        assert name.encode("ascii", "backslashreplace") in shown.stdout
    told = json.loads(run("predict", "--checkpoint", runs / "r", "--gpus", "0", "--json", *images, capsys=capsys))
    assert [prediction["image"] for prediction in told] == images


@pytest.mark.parametrize("to", ["shards", "folder"])
def test_they_are_kept_by_prepare(to, folder, tmp_path, capsys):
    run("prepare", folder, tmp_path / "out", "--to", to, capsys=capsys)
    made, source = load_dataset(tmp_path / "out"), load_dataset(folder)
    assert set(NAMES) <= set(made.classes)
    assert made.classes == source.classes
    assert made.counts == source.counts
    names = {os.path.basename(made.val.path(i)) for i in range(len(made.val))}
    assert names == {os.path.basename(source.val.path(i)) for i in range(len(source.val))}
