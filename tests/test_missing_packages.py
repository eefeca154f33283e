"""Packages that only some sources of images take: not installed, or installed but unfit for what else is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dali_vit.config import UserError
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.remote import fetch
from tests import datasets
from tests.datasets import IMAGES, prepare_fails, write_source


@pytest.fixture(params=["missing", "unfit"])
def without(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes imports of a package fail from then on; returns what is to be said of it."""

    def make(package: str) -> str:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        if request.param == "missing":

            class Finder:
                @staticmethod
                def find_spec(name: str, *_: Any) -> None:
                    if name == package:
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

            monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
            return f"{package}, and it is not installed: pip install {package}"
        unfit = tmp_path / "site" / package
        unfit.mkdir(parents=True)
        (unfit / "__init__.py").write_text("raise ImportError('it takes NumPy 9.0 or newer,\\nfound 2.4')\n")
        monkeypatch.syspath_prepend(unfit.parent)
        return f"{package}, and it cannot be imported: it takes NumPy 9.0 or newer, found 2.4"

    return make


def test_parquet(without: Any, tmp_path: Path) -> None:
    arguments = write_source("parquet", tmp_path / "source")
    said = without("pyarrow")
    prepare_fails(PrepareArguments(arguments.source, tmp_path / "set"), "-00002.parquet: ", said)
    assert not (tmp_path / "set").exists()


def test_the_devkit(without: Any, tmp_path: Path) -> None:
    root = datasets.write_ilsvrc(tmp_path / "source", IMAGES)
    datasets.write_devkit(root, IMAGES)
    said = without("scipy")
    prepare_fails(PrepareArguments(root, tmp_path / "set"), said, "; or give --val-labels ")
    labels = root / "val_wnids.txt"
    prepare(PrepareArguments(root, tmp_path / "set", val_labels=labels, workers=2))


def test_an_object_store(without: Any) -> None:
    said = without("boto3")
    with pytest.raises(UserError) as error:
        fetch("s3://bucket/imagenet", ("train",))
    assert str(error.value) == f"s3://bucket/imagenet: object stores take {said}"
