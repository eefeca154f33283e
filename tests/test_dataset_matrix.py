"""From each source format to each layout by the command line: prepare, verify, train and eval with exact counts.

One made-up ILSVRC, with a PNG under a JPEG's name, a CMYK JPEG and a truncated file, in all the forms in which
people have it. A set is trained on in the same order whatever its layout: every run must end in the same bits.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from dali_vit import checkpoint, cli
from dali_vit.data import load_dataset
from dali_vit.manifest import MANIFEST
from dali_vit.prepare.sources import read_sample, sample_names
from pipelines.loader import TrainLoader
from tests import datasets
from tests.conftest import TINY_MODEL, read_metrics
from tests.datasets import NUM_TRAIN, SOURCES, TRAIN_PER_CLASS, VAL_IMAGES, WNIDS, Images
from tests.processes import dali_vit

TRUNCATED = 20  # index of the file in train; it is of the last class
# An index needs images that lie in one piece in the source's own files.
TARGETS = [(kind, to) for kind in SOURCES for to in ("shards", "folder")] + [
    (kind, "index") for kind in ("ilsvrc", "tfds", "inception")
]
MINIVAL = 3
SHARE = str(MINIVAL / NUM_TRAIN)
BATCH_SIZE, EPOCHS = 7, 2
STEPS = EPOCHS * (NUM_TRAIN - MINIVAL) // BATCH_SIZE


@pytest.fixture(scope="module")
def images() -> dict[str, Images]:
    drawn = datasets.draw_images()
    wnid, name, data = drawn["train"][TRUNCATED]
    drawn["train"][TRUNCATED] = (wnid, name, data[: len(data) * 2 // 3])
    return drawn


@pytest.fixture(scope="module")
def sources(images: dict[str, Images], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images in every format; ILSVRC's tars with the devkit."""
    root = tmp_path_factory.mktemp("sources")
    for kind in SOURCES:
        datasets.write_source(kind, root / kind, images)
    (root / "ilsvrc" / "val_wnids.txt").unlink()
    datasets.write_devkit(root / "ilsvrc", images)
    return {kind: root / kind for kind in SOURCES}


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Calls the command line in this process: exit code, standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0), out.getvalue(), err.getvalue()


def train(data: Path, runs: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """What two epochs print, and the weights they end in; the run is `run`."""
    code, out, err = run(
        *("train", "--data", data, "--runs-dir", runs, "--name", "run", "--gpus", "0", "--threads", "1"),
        *(*TINY_MODEL, "--resolution", "32", "--batch-size", str(BATCH_SIZE), "--steps", str(STEPS)),
        *("--warmup-steps", "2", "--randaug-magnitude", "2", "--minival", SHARE, "--log-every", "1"),
        *("--eval-every", "0"),
    )
    assert code == 0, err
    newest = checkpoint.newest(runs / "run")
    assert newest is not None
    return out, newest.model_state()


@pytest.fixture(scope="module")
def expected(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that the plain image folder leads to."""
    return train(sources["folder"], tmp_path_factory.mktemp("runs"))[1]


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Labels of all that training is given."""
    given: list[int] = []
    original = TrainLoader.__next__

    def recording(loader: TrainLoader) -> tuple[torch.Tensor, torch.Tensor]:
        batch = original(loader)
        given.extend(batch[1].tolist())
        return batch

    monkeypatch.setattr(TrainLoader, "__next__", recording)
    return given


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "to"), TARGETS)
def test_prepare_verify_train_eval(kind, to, images, sources, expected, labels, tmp_path):
    data = tmp_path / "set"
    code, out, err = run("prepare", sources[kind], data, "--to", to)
    assert code == 0, err
    assert f"train {NUM_TRAIN}, val {VAL_IMAGES} images of {len(WNIDS)} classes" in out
    splits = json.loads((data / MANIFEST).read_text())["splits"]
    for split, files in images.items():
        assert (splits[split]["count"], splits[split]["bytes"]) == (len(files), sum(len(f) for _, _, f in files))

    code, out, _ = run("verify", data, "--json")
    report = json.loads(out)
    assert code == 2
    assert report["images"] == {"train": NUM_TRAIN, "val": VAL_IMAGES}
    assert report["problems"] == {"truncated": 1, "CMYK": 1, "other format": 1}
    (truncated,) = (found for found in report["found"] if found["kind"] == "truncated")
    name = "/".join(images["train"][TRUNCATED][:2])
    assert truncated["path"].endswith(name)

    out, weights = train(data, tmp_path)
    assert f"train {NUM_TRAIN - MINIVAL}, minival {MINIVAL}, val {VAL_IMAGES} images, {len(WNIDS)} classes" in out
    assert out.count("cannot be read, decoded or cropped: left out") == 1
    assert f"{truncated['path']} cannot be read, decoded or cropped" in out
    # Every epoch holds every good sample once, by class, and a blank in the place of the bad one.
    dataset = load_dataset(data, minival=MINIVAL / NUM_TRAIN)
    held_out = Counter(name.split("/")[0] for name in sample_names(dataset.split("minival"), WNIDS))
    counts = {label: TRAIN_PER_CLASS - held_out[wnid] for label, wnid in enumerate(WNIDS)}
    counts[WNIDS.index(images["train"][TRUNCATED][0])] -= 1
    for epoch in torch.tensor(labels).reshape(EPOCHS, NUM_TRAIN - MINIVAL).tolist():
        assert Counter(epoch) == Counter(counts) + Counter({-1: 1})
    metrics = read_metrics(tmp_path / "run")
    assert [line["data/bad_samples"] for line in metrics if "data/bad_samples" in line][-1] == 1
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)

    evaluate = ("eval", "--checkpoint", tmp_path / "run", "--data", data, "--gpus", "0", "--minival", SHARE, "--json")
    for split, count in (("val", VAL_IMAGES), ("minival", MINIVAL)):
        code, out, err = run(*evaluate, "--split", split)
        assert code == 0, err
        result = json.loads(out)
        assert result[f"{split}/count"] == count
        assert result[f"{split}/top1"] == metrics[-1][f"{split}/top1"]
        assert result[f"{split}/loss"] == pytest.approx(metrics[-1][f"{split}/loss"], abs=1e-5)
    code, _, err = run(*evaluate, "--split", "train")
    assert (code, err.count("\n"), truncated["path"] in err) == (2, 1, True)


@pytest.mark.timeout(120)
def test_what_verify_moves_aside_is_trained_on_no_more(images, sources, tmp_path):
    data, aside = tmp_path / "set", tmp_path / "aside"
    assert run("prepare", sources["ilsvrc"], data, "--to", "folder")[0] == 0
    code, out, _ = run("verify", data, "--quarantine", aside)
    assert code == 0
    assert "1 problem moved" in out
    wnid, name, content = images["train"][TRUNCATED]
    assert (aside / "train" / wnid / name).read_bytes() == content
    assert not (data / "train" / wnid / name).exists()
    assert (aside / "quarantined.tsv").read_text().startswith(f"{data}/train/{wnid}/{name}\ttruncated\t")
    code, out, _ = run("verify", data, "--json")
    assert code == 0
    assert json.loads(out)["images"] == {"train": NUM_TRAIN - 1, "val": VAL_IMAGES}
    out, _ = train(data, tmp_path)
    assert f"train {NUM_TRAIN - 1 - MINIVAL}, minival {MINIVAL}, val {VAL_IMAGES} images" in out
    assert {m["data/bad_samples"] for m in read_metrics(tmp_path / "run") if "data/bad_samples" in m} == {0}
    evaluate = ("eval", "--checkpoint", tmp_path / "run", "--data", data, "--gpus", "0", "--minival", SHARE, "--json")
    code, out, err = run(*evaluate, "--split", "train")
    assert code == 0, err
    assert json.loads(out)["train/count"] == NUM_TRAIN - 1 - MINIVAL


@pytest.mark.timeout(240)
def test_a_resized_set_goes_the_same_way_in_processes_of_its_own(images, sources, tmp_path):
    data, side = tmp_path / "set", 48
    made = dali_vit("prepare", sources["ilsvrc"], data, "--shorter-side", str(side), "--quality", "92")
    assert made.returncode == 0, made.stderr
    manifest = json.loads((data / MANIFEST).read_text())
    assert {name: split["count"] for name, split in manifest["splits"].items()} == {
        "train": NUM_TRAIN,
        "val": VAL_IMAGES,
    }
    assert (manifest["settings"]["shorter_side"], manifest["settings"]["quality"]) == (side, 92)
    samples, truncated = load_dataset(data, minival=0).split("train"), "/".join(images["train"][TRUNCATED][:2])
    whole = [i for i, name in enumerate(sample_names(samples, WNIDS)) if name != truncated]
    sizes = [Image.open(io.BytesIO(read_sample(samples, i))).size for i in whole]
    assert max(min(size) for size in sizes) == side

    verified = dali_vit("verify", data, "--json")
    assert verified.returncode == 2
    # The CMYK image was larger, and became RGB.
    assert json.loads(verified.stdout)["problems"] == {"truncated": 1, "other format": 1}
    trained = dali_vit(
        *("train", "--data", data, "--runs-dir", tmp_path, "--name", "run", "--gpus", "0", "--threads", "1"),
        *(
            *TINY_MODEL,
            "--resolution",
            "32",
            "--batch-size",
            str(BATCH_SIZE),
            "--steps",
            str(STEPS),
            "--warmup-steps",
            "2",
        ),
        *("--minival", SHARE, "--log-every", "1"),
    )
    assert trained.returncode == 0, trained.stderr
    bad = [m["data/bad_samples"] for m in read_metrics(tmp_path / "run") if "data/bad_samples" in m]
    assert bad[-1] == 1
    evaluated = dali_vit("eval", "--checkpoint", tmp_path / "run", "--data", data, "--gpus", "0", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["val/count"] == VAL_IMAGES
