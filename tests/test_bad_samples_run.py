"""Whole runs and evaluations on images of which some cannot be decoded, with exact counts."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dali_vit.config import Config
from dali_vit.data import load_dataset
from dali_vit.distributed import Group
from dali_vit.plan import plan
from dali_vit.train import train
from pipelines.loader import DecodeError, EvalLoader
from pipelines.readers import Samples
from tests.bad_images import BAD, InMemory, encoded, mutations, undecodable, with_bad, write
from tests.conftest import CLASSES, TINY, last_scalars, read_metrics
from tests.processes import dali_vit

pytestmark = pytest.mark.timeout(240)

LEFT_OUT = "cannot be read, decoded or cropped: left out"


def folder_of(root: Path, contents: list[bytes]) -> Path:
    """Training images in turn of each class, and one image a class of val."""
    for i, content in enumerate(contents):
        path = root / "train" / CLASSES[i % len(CLASSES)] / f"{i:03d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for i, name in enumerate(CLASSES):
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / "0.JPEG").write_bytes(encoded(seed=i))
    return root


def test_a_run_survives_300_mutated_images_wherever_they_are(tmp_path: Path) -> None:
    data = folder_of(tmp_path / "data", [encoded(seed=i) for i in range(300)] + mutations(300))
    dataset = load_dataset(data, minival=0.1)
    bad = {split: undecodable(dataset.split(split)) for split in ("train", "minival")}
    assert 150 < len(bad["train"]) < 300
    assert len(bad["minival"]) > 10
    result = dali_vit(
        *("train", "--data", data, "--runs-dir", tmp_path, "--name", "run", "--gpus", "0", "--threads", "1", *TINY),
        *("--minival", "0.1", "--batch-size", "36", "--epochs", "2", "--log-every", "15", "--max-bad-share", "1"),
        *("--checkpoint-every", "30", "--eval-every", "1"),
    )
    assert result.returncode == 0, result.stderr
    named = re.findall(rf"^(.*) {LEFT_OUT}", result.stdout, re.MULTILINE)
    assert sorted(named) == sorted(bad["train"] | bad["minival"])
    metrics = read_metrics(tmp_path / "run")
    assert metrics[-1]["step"] == 30
    assert [m["data/bad_samples"] for m in metrics if "data/bad_samples" in m][-1] == len(bad["train"])
    assert [m["minival/bad_samples"] for m in metrics if "minival/top1" in m] == [len(bad["minival"])] * 2
    assert "val/bad_samples" not in metrics[-1]
    assert np.isfinite(metrics[-1]["minival/loss"])


def test_past_one_percent_a_run_stops(tmp_path: Path) -> None:
    contents = [encoded(seed=i) for i in range(201)]
    for i in (20, 60, 100):
        contents[i] = contents[i][:-20]  # found only by decoding it
    data = folder_of(tmp_path / "data", contents)
    (data / "val" / CLASSES[0] / "1.JPEG").touch()  # one of five, which is allowed
    command = ["train", "--data", data, "--runs-dir", tmp_path, "--name", "run", "--gpus", "0", "--threads", "1", *TINY]
    command += ["--minival", "0", "--steps", "25", "--log-every", "25", "--eval-every", "0"]
    result = dali_vit(*command)
    assert result.returncode == 2
    assert re.search(r"3 of 201 (images of train|samples) cannot be read, decoded or cropped", result.stderr)
    assert "dali-vit verify" in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("dali-vit: ")
    (data / "train" / CLASSES[0] / "100.JPEG").unlink()
    result = dali_vit(*command, "--name", "again")
    assert result.returncode == 0, result.stderr
    logged = last_scalars(tmp_path / "again")
    assert (logged["data/bad_samples"], logged["val/bad_samples"]) == (2, 1)


def test_a_run_that_goes_on_uses_images_again_that_were_mended(
    tmp_path: Path, tiny_config: Config, cpu: Group, caplog: pytest.LogCaptureFixture
) -> None:
    contents = [encoded(seed=i) for i in range(60)]
    bad = {i: contents[i] for i in (20, 40, 50)}
    data = folder_of(tmp_path / "data", [c[:-20] if i in bad else c for i, c in enumerate(contents)])
    places = {i: data / "train" / CLASSES[i % len(CLASSES)] / f"{i:03d}.JPEG" for i in bad}

    def go_on(max_bad_share: float) -> tuple[float, str]:
        """Bad samples at the end, and what was said on the way."""
        for folder in (tiny_config.run_dir / "checkpoints").glob("step_*"):
            if int(folder.name.removeprefix("step_")) > 10:
                shutil.rmtree(folder)
        caplog.clear()
        settings = replace(tiny_config.data, data=str(data), minival=0, max_bad_share=max_bad_share)
        config = replace(tiny_config, data=settings)
        with caplog.at_level(logging.INFO, "dali_vit"):
            train(config, cpu, plan(config, 1))
        lines = [line for line in read_metrics(config.run_dir) if "data/bad_samples" in line]
        return lines[-1]["data/bad_samples"], caplog.text

    assert go_on(0.1)[0] == 3
    count, said = go_on(0.1)
    assert count == 3
    assert "after step 10, 3 images left out" in said
    places[20].write_bytes(bad[20])
    count, said = go_on(0.1)
    assert count == 2
    assert "3 training images were left out: they are tried again" in said
    assert f"1 of them can be decoded now and are used again: {places[20]}\n" in said
    assert "after step 10, 2 images left out" in said
    with pytest.raises(DecodeError, match=r"2 of 60 samples .* more than the 1 "):
        go_on(0.001)
    for i in (40, 50):
        places[i].write_bytes(bad[i])
    count, said = go_on(0)
    assert count == 0
    assert re.search("used again: .*040.JPEG, .*050.JPEG", said)
    assert re.search("resuming +after step 10\n", said)


# ------------------------------------------------------------------------------------------------ evaluation


def eval_loader(samples: Samples, **options: Any) -> EvalLoader:
    defaults: dict[str, Any] = {"batch_size": 8, "image_size": 16, "rank": 0, "world_size": 1, "device": "cpu"}
    return EvalLoader(samples, **(defaults | {"num_threads": 2} | options))


def one_pass(loader: EvalLoader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_evaluation_leaves_bad_images_out_and_nothing_else(
    in_memory: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the first batch, in the last, and where padding repeats the first image."""
    kinds = dict(zip((0, 9, 10, 37), ("half", "text", "half a PNG", "60,000 x 60,000 JPEG"), strict=True))
    contents = with_bad(38, {i: BAD[kind] for i, kind in kinds.items()})
    files = write(tmp_path / "images", contents)
    samples = InMemory(contents, files.labels) if in_memory else files
    good_images, good_labels = one_pass(eval_loader(write(tmp_path / "good", with_bad(38, {}))))
    bad = torch.isin(good_labels, torch.tensor(list(kinds)))

    loader = eval_loader(samples, max_bad_share=0.2)
    with caplog.at_level(logging.WARNING, "dali_vit.data"):
        passes = [one_pass(loader) for _ in range(3)]
    assert loader.bad_samples == tuple(kinds)
    assert [record.message.split(f" {LEFT_OUT}")[0] for record in caplog.records] == [samples.path(i) for i in kinds]
    for images, labels in passes:
        assert torch.equal(labels, torch.where(bad, -1, good_labels))
        assert torch.equal(images[~bad & (good_labels >= 0)], good_images[~bad & (good_labels >= 0)])
        assert (images[bad] == 128).all()

    ranks = [one_pass(eval_loader(samples, rank=rank, world_size=2, max_bad_share=0.2))[1] for rank in range(2)]
    counted = torch.cat(ranks)
    assert sorted(counted[counted >= 0].tolist()) == sorted(set(range(38)) - set(kinds))


def test_an_evaluation_ends_past_its_share_and_every_time(tmp_path: Path) -> None:
    files = write(tmp_path / "images", with_bad(38, dict.fromkeys((3, 12, 30), BAD["half"])))
    with pytest.raises(
        DecodeError,
        match=r"3 of 38 samples .* more than the 2 .* put good ones in their place, .* .`dali-vit verify",
    ):
        one_pass(eval_loader(files, max_bad_share=0.06))
    strict = eval_loader(files)
    for _ in range(2):
        with pytest.raises(DecodeError, match=r"cannot read, decode or crop .*/003"):
            one_pass(strict)
    assert strict.bad_samples == ()
