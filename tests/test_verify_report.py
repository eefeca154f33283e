"""The order of verify's report, what it says once nothing is left, and what it leaves as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dali_vit.manifest import MANIFEST
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.verify import VerifyArguments, verify
from tests import datasets
from tests.datasets import IMAGES, NUM_TRAIN, WNIDS

pytestmark = pytest.mark.timeout(60)


def test_problems_come_in_the_order_of_the_set(tmp_path: Path) -> None:
    """What is found last, in comparing the splits, among them."""
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    folder = root / "train" / WNIDS[0]
    (folder / "0 leaked.JPEG").write_bytes(IMAGES["val"][4][2])
    (folder / "1 empty.JPEG").write_bytes(b"")
    (folder / "2 leaked.JPEG").write_bytes(IMAGES["val"][5][2])
    found = [(p.kind, Path(p.path).name) for p in verify(VerifyArguments(root, workers=2)).problems if p.hurts]
    assert found == [("duplicate", "0 leaked.JPEG"), ("empty", "1 empty.JPEG"), ("duplicate", "2 leaked.JPEG")]


def test_pillows_guard_is_on_again_afterwards(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert before
    verify(VerifyArguments(datasets.write_folder(tmp_path / "set", IMAGES), workers=1))
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_prepared_folder_without_a_training_image_left_is_refused(tmp_path: Path) -> None:
    empty = [(wnid, name, b"") for wnid, name, _ in IMAGES["train"]]
    source = datasets.write_folder(tmp_path / "source", {**IMAGES, "train": empty})
    root = prepare(PrepareArguments(source, tmp_path / "set", to="folder"))
    report = verify(VerifyArguments(root, quarantine=tmp_path / "aside"))
    assert (report.quarantined, report.exit_code) == (NUM_TRAIN, 2)
    assert report.refused == (f"{root / MANIFEST} has no train: prepare the set from a source that has one",)


def test_a_quarantine_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    bad = root / "train" / WNIDS[0] / "bad.JPEG"
    bad.write_bytes(b"")
    assert verify(VerifyArguments(root, quarantine=Path("~/aside"), workers=1)).quarantined == 1
    assert (tmp_path / "home/aside/train" / WNIDS[0] / "bad.JPEG").exists()
    assert not bad.exists()


def test_a_split_without_an_image_is_none_of_verifys_faults(tmp_path: Path) -> None:
    root = datasets.write_folder(tmp_path / "set", {"train": IMAGES["train"]})
    for wnid in WNIDS:
        (root / "val" / wnid).mkdir(parents=True)
    report = verify(VerifyArguments(root, workers=1))
    assert report.counts == {"train": NUM_TRAIN, "val": 0}
    assert [problem for problem in report.problems if problem.hurts] == []
