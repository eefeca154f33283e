"""What is left to the CPU where a GPU decodes is measured, and what keeps it from being measured is told in a line."""

# ruff: noqa: E402

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where Python looks when the tool is run as a script

import measure_input

from pipelines import crop
from pipelines.crop import REGIONS

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("region", REGIONS)
def test_the_cpu_s_part_of_the_input_is_measured(region, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_input, "WINDOW_SECONDS", 0.1)
    out = tmp_path / "input.json"
    flags = ["--batch-size", "8", "--threads", "1", "--seconds", "0.3", "--region", region, "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["measure_input.py", "--data", str(image_folder), *flags])
    refused = []  # as too large, by what the decoder of a window or of a whole image is given
    for name in ("start_unless_too_large", "refuse_too_large"):
        own = getattr(crop, name)
        monkeypatch.setattr(crop, name, lambda *given, own=own, name=name: refused.append(name) or own(*given))
    measure_input.main()
    assert refused == ["start_unless_too_large" if region == "window" else "refuse_too_large"]
    result = json.loads(out.read_text())
    assert set(result) == {"environment", "threads", "region", "images_per_sec", "cpu_us", "python_us"}
    assert result["region"] == region
    assert 0 < result["python_us"] <= result["cpu_us"]
    assert result["python_us"] <= 1e6 / result["images_per_sec"]
    assert f"{result['images_per_sec']:,.0f} images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/nowhere"], "measure_input.py: /nowhere: no such folder"),
        (["--data", "demo", "--threads", "0"], "measure_input.py: --threads 0: must be from 1 to 1,024"),
        ([], "measure_input.py: the following arguments are required: --data (--help lists the flags)"),
    ],
)
def test_mistakes_in_measuring_the_input_are_said_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure_input.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        measure_input.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_images_without_a_size_are_told_of_where_the_input_is_measured(image_folder, tmp_path, monkeypatch, capfd):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    for path in data.glob("train/*/*"):
        path.write_bytes(path.read_bytes()[:20])
    monkeypatch.setattr(sys, "argv", ["measure_input.py", "--data", str(data), "--batch-size", "8", "--threads", "1"])
    with pytest.raises(SystemExit) as stopped:
        measure_input.main()
    assert stopped.value.code == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("measure_input.py: "))
    start, _, rest = line.partition("(")
    assert start == f"measure_input.py: --data {data}: cannot be loaded "
    reason, _, rest = rest.partition("); ")
    assert "nvImageCodec failure" in reason or "dali::" in reason or "mage" in reason
    assert rest == f"if an image is at fault, `dali-vit verify {data}` names it"
