"""What eval leaves out: undecodable images, by --max-bad-share, and files that are not taken; exact counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines.order import EvalOrder
from tests.conftest import run
from tests.processes import run_ranks
from tests.test_inference import BLUE, GREEN, RED, paint, save

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven images, of which the model names five rightly; the second is cut short."""
    paint(tmp_path / "data/val/a", RED, RED, GREEN)
    paint(tmp_path / "data/val/b", GREEN, GREEN)
    paint(tmp_path / "data/val/c", BLUE, RED)
    cut(tmp_path / "data", 1)
    return tmp_path / "data"


def cut(data: Path, number: int) -> Path:
    (image,) = data.glob(f"val/*/ILSVRC2012_val_{number:08d}.png")
    image.write_bytes(image.read_bytes()[:60])
    return image


def command(data: Path, *options: str) -> list[str]:
    model = save(data.parent / "m.safetensors", 3, ("a", "b", "c"))
    return ["eval", "--checkpoint", str(model), "--data", str(data), "--gpus", "0", "--batch-size", "2", *options]


def test_what_is_left_out_is_named_and_counted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So a run's own number, which leaves them out too, can be had from its checkpoint."""
    (tmp_path / "real.json").write_text(json.dumps([[0], [0], [0, 1], [], [1], [0], [2, 0]]))
    options = ["--max-bad-share", "0.01", "--real", str(tmp_path / "real.json"), "--json"]
    code, out, err = run(*command(data, *options), capsys=capsys)
    assert code == 0, err
    metrics = json.loads(out)
    assert (metrics["val/count"], metrics["val/bad_samples"]) == (6, 1)
    assert metrics["val/top1"] == pytest.approx(100 * 4 / 6)
    # Of the six that have right answers the cut one is not counted.
    assert (metrics["real/count"], metrics["real/top1"]) == (5, pytest.approx(100 * 4 / 5))
    path = data / "val/a/ILSVRC2012_val_00000001.png"
    assert f"1 of 7 images of val left out: {path} " in err


def test_without_the_flag_it_ends_the_evaluation(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(*command(data), capsys=capsys)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"dali-vit: {data}/val/a/ILSVRC2012_val_00000001.png ")
    assert err.endswith(": replace or remove it, or leave images out by --max-bad-share\n")


def test_beyond_the_share_it_ends_the_evaluation(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(data, 4)
    code, out, err = run(*command(data, "--max-bad-share", "0.2"), capsys=capsys)
    assert (code, out) == (2, "")
    assert err.endswith(": replace or remove them, or give a higher --max-bad-share than 0.2\n")
    code, out, _ = run(*command(data, "--max-bad-share", "0.3", "--json"), capsys=capsys)
    assert code == 0
    assert json.loads(out)["val/bad_samples"] == 2


@pytest.mark.parametrize("share", ["0.2", "0.3"])
def test_the_share_is_that_of_all_ranks_together(share: str, data: Path) -> None:
    """Each of two ranks finds one, which alone is within both shares: of seven images 0.2 is one, 0.3 two."""
    cut(data, 6)
    shards = [set(EvalOrder(7, 2, rank, 2).indices(batch)) for rank in range(2) for batch in range(2)]
    assert 1 in shards[0] | shards[1]
    assert 6 in shards[2] | shards[3]
    (out, err), (other_out, _) = run_ranks(
        2,
        *("-m", "dali_vit", *command(data, "--max-bad-share", share, "--json")),
        code=2 if share == "0.2" else 0,
    )
    assert other_out == ""
    if share == "0.2":
        of = r"2 of 7 images of val cannot be read, decoded or cropped \(--max-bad-share 0.2\)"
        remedy = "put good ones in their place, or go on with a higher share"
        assert re.search(f"^dali-vit: {of}: {remedy}$", err, re.MULTILINE)
        return
    metrics = json.loads(out)
    assert (metrics["val/count"], metrics["val/bad_samples"]) == (5, 2)
    first, second = (data / f"val/{name}.png" for name in ("a/ILSVRC2012_val_00000001", "c/ILSVRC2012_val_00000006"))
    assert re.search(rf"2 of 7 images of val left out: {first} .*; {second} ", err)


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan"])
def test_a_share_that_is_none_is_refused(share: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(*command(data, "--max-bad-share", share), capsys=capsys)
    assert code == 2
    assert err.startswith(f"dali-vit: --max-bad-share {share}: must be ")


def test_files_that_are_no_images_of_a_class_are_told_of_first(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("val/a/x.gif", "val/b/deep/y.jpg"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    code, out, err = run(*command(data, "--max-bad-share", "0.2", "--json"), capsys=capsys)
    assert (code, json.loads(out)["val/count"]) == (0, 6)
    val = data / "val"
    assert err.splitlines()[:2] == [
        f"{val}: files in a subfolder are left out (1, such as {val}/b/deep/y.jpg): move images into the class folder"
        " itself",
        f"{val}: files of another suffix are left out (1, such as {val}/a/x.gif): save images as JPEG or PNG",
    ]
