"""verify: an image that could not be read is not one that is bad."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from dali_vit.prepare.sources import read_sample
from dali_vit.verify import VerifyArguments, verify
from tests.datasets import write_source


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE])
def test_what_could_not_be_read_is_not_moved(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The image may be good, and the disk away for a moment."""
    caplog.set_level(logging.INFO, "dali_vit")
    root, aside = tmp_path / "set", tmp_path / "aside"
    write_source("folder", root)

    def read(samples: Any, index: int) -> bytes:
        if index % 2:
            raise OSError(number, os.strerror(number))
        return read_sample(samples, index)

    monkeypatch.setattr("dali_vit.verify.read_sample", read)
    report = verify(VerifyArguments(root, quarantine=aside))
    half = sum(count // 2 for count in report.counts.values())
    assert [problem.kind for problem in report.problems if problem.hurts] == ["not read"] * half
    assert (report.quarantined, report.exit_code) == (0, 2)
    assert not aside.exists()
    said = f"not read (could not be read, and stays: see to the disk and its permissions, and run verify again): {half}"
    assert said in caplog.messages


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EINVAL])
def test_what_leads_to_no_file_is_told_from_what_could_not_be_read(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source("folder", tmp_path / "set")

    def fail(*_: Any) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("dali_vit.verify.read_sample", fail)
    report = verify(VerifyArguments(tmp_path / "set", workers=1))
    assert {problem.kind for problem in report.problems} == {"no file"}
