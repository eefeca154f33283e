"""Reference arrays for the parity tests: every file of a kind, in whatever folder DALI_VIT_REFERENCE names.

A test that takes an argument `<kind>_reference` (say `model_reference`) runs once for each file of that kind and
receives it as a `Reference`; all settings come from the file's own `meta`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dali_vit.config import ModelConfig

OURS = Path(__file__).parents[1] / "reference"
FOLDER = Path(os.environ.get("DALI_VIT_REFERENCE") or OURS)
KINDS = ("model", "trajectory", "randaug", "crop_windows", "eval_preprocess")
_SUFFIX = "_reference"


@dataclass(frozen=True)
class Reference:
    """One reference file: its settings (`meta`) and its arrays by name, read on first use."""

    path: Path

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path, allow_pickle=False) as npz:
            return {name: npz[name] for name in npz.files if name != "meta"}

    @cached_property
    def meta(self) -> dict[str, Any]:
        with np.load(self.path, allow_pickle=False) as npz:
            return json.loads(str(npz["meta"]))

    def tree(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays under `prefix/`, without the prefix."""
        start = prefix + "/"
        return {name.removeprefix(start): a for name, a in self.arrays.items() if name.startswith(start)}

    def model_config(self) -> ModelConfig:
        """The model that a `model` or `trajectory` file was made with, every size of it given by the file."""
        rows, columns = self.meta["patch_size"]
        assert rows == columns, "a plain ViT of ours has square patches"
        return ModelConfig(
            model=f"S/{rows}",
            pool=self.meta["pool_type"],
            posemb=self.meta["posemb"],
            head="mlp" if self.meta["rep_size"] else "linear",
            width=self.meta["width"],
            depth=self.meta["depth"],
            num_heads=self.meta["num_heads"],
            mlp_dim=self.meta["mlp_dim"],
        )


def references(kind: str) -> list[Reference]:
    """Every reference file of `kind` in the folder, by name."""
    assert kind in KINDS, kind
    if not FOLDER.is_dir():
        raise pytest.UsageError(f"DALI_VIT_REFERENCE: no folder {FOLDER}")
    return [r for r in map(Reference, sorted(FOLDER.glob("*.npz"))) if r.meta["kind"] == kind]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument in metafunc.fixturenames:
        if argument.endswith(_SUFFIX):
            found = references(argument.removesuffix(_SUFFIX))
            metafunc.parametrize(argument, found, ids=[r.path.stem for r in found])
