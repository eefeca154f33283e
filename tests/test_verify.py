import json
import os
import struct
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dali_vit.config import UserError
from dali_vit.data import load_dataset
from dali_vit.inspection import find_undecodable, inspect_header, why_undecodable
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.verify import KINDS, Report, VerifyArguments, verify
from pipelines.loader import DecodeError, EvalLoader
from pipelines.readers import FileList
from tests import datasets
from tests.bad_images import encoded, mutations, undecodable
from tests.conftest import run
from tests.datasets import WNIDS, encode

IMAGES = datasets.draw_images()
MANY_PIXELS = 10**8

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
JPEG, PNG, WEBP, GIF = (encode(PIXELS, image_format) for image_format in ("JPEG", "PNG", "WEBP", "GIF"))


def judge(data: bytes, name: str, max_pixels: float) -> list[tuple[str, str]]:
    """Kind and detail of everything that verify finds wrong with an image."""
    problems, decodable = inspect_header(data, name, max_pixels)
    return [why_undecodable(data)] if decodable and find_undecodable([data], 1) else problems


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("name", "data", "kinds"),
    [
        ("a.JPEG", JPEG, []),
        ("a.png", PNG, []),
        ("a.jpeg", encode(PIXELS, mode="L"), []),
        ("a.webp", WEBP, []),
        ("a.jpg", b"", ["empty"]),
        ("a.jpg", b"<html>404</html>", ["not an image"]),
        ("a.jpg", bytes(1000), ["not an image"]),
        ("a.jpg", GIF, ["not an image"]),
        ("a.jpg", JPEG[: len(JPEG) // 2], ["truncated"]),
        ("a.jpg", JPEG[:20], ["truncated"]),
        ("a.png", PNG[: len(PNG) // 2], ["truncated"]),
        ("a.webp", WEBP[: len(WEBP) // 2], ["damaged"]),
        ("a.jpg", encode(PIXELS, mode="CMYK"), ["CMYK"]),
        ("a.JPEG", PNG, ["other format"]),
        ("a.png", JPEG, ["other format"]),
        ("a.png", encode(PIXELS, mode="CMYK"), ["CMYK", "other format"]),
        ("a.png", png_of(60_000, 60_000), ["too large"]),
        ("a.png", encode(np.zeros((7, 801, 3), np.uint8), "PNG"), []),
        ("a.png", encode(np.zeros((7, 802, 3), np.uint8), "PNG"), ["too long"]),
        ("a.png", encode(np.zeros((802, 7, 3), np.uint8), "PNG"), ["too long"]),
        ("a.jpg", png_of(10_001, 10_000), ["too large"]),
        ("a.tif", encode(PIXELS, "TIFF"), []),
        ("a.tif", encode(PIXELS, "TIFF", mode="F"), ["floats"]),
        ("a.pbm", encode(PIXELS, "PPM", mode="1"), []),
        ("a.tif", encode(PIXELS, "TIFF", mode="1"), ["damaged"]),  # Pillow decodes it
    ],
)
def test_what_is_wrong_with_an_image(name, data, kinds):
    assert [kind for kind, _ in judge(data, name, MANY_PIXELS)] == kinds
    assert set(kinds) <= set(KINDS)


@pytest.mark.parametrize(("width", "fails"), [(801, False), (802, True)])
def test_what_is_too_long_an_evaluation_refuses(tmp_path, width, fails):
    (tmp_path / "a.png").write_bytes(encode(np.zeros((7, width, 3), np.uint8), "PNG"))
    files = FileList.from_paths([str(tmp_path / "a.png")], [0])
    loader = EvalLoader(files, batch_size=1, image_size=224, rank=0, world_size=1, device="cpu", num_threads=1)
    with pytest.raises(DecodeError) if fails else nullcontext():
        next(iter(loader))


def test_the_limit_is_exclusive():
    assert judge(JPEG, "a.jpg", 60 * 50) == []
    assert judge(JPEG, "a.jpg", 60 * 50 - 1) == [("too large", "50 x 60 pixels")]


@pytest.mark.timeout(120)
def test_of_300_mutated_images_those_are_found_that_training_leaves_out(tmp_path, capfd):
    images = [encoded(seed=i) for i in range(50)] + mutations(300)
    for i, data in enumerate(images):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:03d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    report = verify(VerifyArguments(tmp_path, workers=1))
    assert "marker" not in capfd.readouterr().err  # nor anything else of what libjpeg says of images without a name
    hurt = [problem for problem in report.problems if problem.hurts]
    assert Counter(problem.kind for problem in hurt)["damaged"] > 50
    assert len(hurt) == len({problem.path for problem in hurt})
    assert {problem.path for problem in hurt} == undecodable(load_dataset(tmp_path, minival=0).train)


def test_300_mutated_images_of_each_format_are_judged_without_an_error():
    rng = np.random.default_rng(1)
    images = []
    for i in range(300):
        data = bytearray((JPEG, PNG, WEBP)[i % 3])
        for _ in range(1 + i % 5):
            data[rng.integers(0, len(data))] ^= 1 << int(rng.integers(8))
        images.append(bytes(data[: int(rng.integers(1, len(data)))] if i % 4 == 0 else data))
    headers = [inspect_header(data, "a.jpg", MANY_PIXELS) for data in images]
    decodable = [data for data, (_, may_be) in zip(images, headers, strict=True) if may_be]
    found = Counter(kind for problems, may_be in headers if not may_be for kind, _ in problems)
    found.update(why_undecodable(decodable[i])[0] for i in find_undecodable(decodable, 1))
    assert found["truncated"] + found["damaged"] + found["not an image"] >= 100


def broken_folder(root: Path) -> Path:
    """The images, 24 and 9, and one of each fault; what is CMYK and PNG named JPEG is there already."""
    datasets.write_folder(root, IMAGES)
    train, val = root / "train", root / "val"
    (train / WNIDS[0] / "truncated.JPEG").write_bytes(JPEG[:-500])
    (train / WNIDS[1] / "text.JPEG").write_text("not here")
    (train / WNIDS[1] / "empty.JPEG").write_bytes(b"")
    (train / WNIDS[2] / "huge.JPEG").write_bytes(png_of(60_000, 60_000))
    (train / WNIDS[2] / "leaked.JPEG").write_bytes(IMAGES["val"][4][2])
    (val / WNIDS[2] / "empty.JPEG").write_bytes(b"")
    (val / WNIDS[2] / "gone.JPEG").symlink_to(root / "nowhere")
    return root


FOUND = {
    "no file": ["val/n02086910/gone.JPEG"],
    "empty": ["train/n01443537/empty.JPEG", "val/n02086910/empty.JPEG"],
    "not an image": ["train/n01443537/text.JPEG"],
    "truncated": ["train/n01440764/truncated.JPEG"],
    "too large": ["train/n02086910/huge.JPEG"],
    "duplicate": ["train/n02086910/leaked.JPEG"],
    "CMYK": ["train/n01443537/n01443537_28.JPEG"],
    "other format": ["train/n01440764/n01440764_21.JPEG"],
}
HURT = 7


def by_kind(report: Report, root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for problem in report.problems:
        found.setdefault(problem.kind, []).append(problem.path.removeprefix(f"{root}/"))
    return found


@pytest.mark.timeout(60)
def test_every_fault_of_a_folder_is_found_once(tmp_path):
    root = broken_folder(tmp_path / "set")
    report = verify(VerifyArguments(root, workers=2))
    assert by_kind(report, root) == FOUND
    assert report.counts == {"train": 29, "val": 11}
    assert report.exit_code == 2
    described = json.loads(json.dumps(report.to_json()))
    assert described["images"] == {"train": 29, "val": 11}
    assert described["problems"] == {kind: len(paths) for kind, paths in FOUND.items()}
    assert len(described["found"]) == sum(map(len, FOUND.values()))
    assert described["quarantined"] == 0
    assert described["left_out"] == []


def test_a_clean_set_is_clean(tmp_path, caplog):
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    with caplog.at_level("INFO", "dali_vit"):
        report = verify(VerifyArguments(root, workers=1))
    assert report.exit_code == 0
    assert {problem.kind for problem in report.problems} == {"CMYK", "other format"}
    assert "33 images of train, val: nothing that would hurt training" in caplog.text


@pytest.mark.timeout(60)
def test_all_faults_of_the_classes_are_said_and_the_images_read_nevertheless(tmp_path, capsys):
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    (root / "train" / "n0empty").mkdir()
    (root / "val" / WNIDS[0]).rename(root / "val" / "n09999999")
    next((root / "val" / "n09999999").iterdir()).write_bytes(b"")
    code, out, _ = run("verify", str(root), "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 2
    assert found["refused"] == [
        f"{root}: train/ and val/ differ in their classes, 2 missing from val/ ({WNIDS[0]}, n0empty);"
        " 1 missing from train/ (n09999999): make them equal;"
        f" for a class without images in val, make an empty val/{WNIDS[0]}/",
        f"{root}/train has classes without images (n0empty): add images or remove the folders",
    ]
    assert found["images"] == {"train": 24, "val": 9}
    assert found["problems"]["empty"] == 1


def test_shards_are_reported_on_and_never_changed(tmp_path):
    source = broken_folder(tmp_path / "source")
    (source / "val" / WNIDS[2] / "gone.JPEG").unlink()
    target = prepare(PrepareArguments(source, tmp_path / "set"))
    report = verify(VerifyArguments(target, quarantine=tmp_path / "aside"))
    assert (report.exit_code, report.quarantined) == (2, 0)
    assert not (tmp_path / "aside").exists()
    shards = {"train": target / "train/shard-000000.tar", "val": target / "val/shard-000000.tar"}
    expected = {
        kind: [f"{shards[p.split('/')[0]]}: {p.split('/', 1)[1]}" for p in paths]
        for kind, paths in FOUND.items()
        if kind != "no file"
    }
    assert by_kind(report, Path("/nowhere")) == expected


def test_a_shard_that_was_changed_has_another_checksum(tmp_path):
    source = datasets.write_folder(tmp_path / "source", IMAGES)
    target = prepare(PrepareArguments(source, tmp_path / "set"))
    assert verify(VerifyArguments(target)).exit_code == 0
    shard = target / "val/shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # where no image is
    shard.write_bytes(data)
    report = verify(VerifyArguments(target))
    assert by_kind(report, target)["checksum"] == ["val/shard-000000.tar"]
    assert report.exit_code == 2


def test_files_that_are_left_out_are_remarked_on(tmp_path, caplog):
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    images, notes = f"train/{WNIDS[0]}/more/deep/a.JPEG", f"train/{WNIDS[1]}/a.gif"
    for name in (images, f"val/{WNIDS[2]}/more/b.png", notes, f"train/{WNIDS[1]}/more/b.avif", f"val/{WNIDS[0]}/c.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    for name in (".thumbs/a.JPEG", "more/.b.JPEG", ".DS_Store"):
        (root / "train" / WNIDS[1] / name).parent.mkdir(exist_ok=True)
        (root / "train" / WNIDS[1] / name).write_bytes(JPEG)
    with caplog.at_level("INFO", "dali_vit"):
        report = verify(VerifyArguments(root, workers=1))
    assert (report.exit_code, report.counts) == (0, {"train": 24, "val": 9})
    assert [record.getMessage() for record in caplog.records][-3:] == [
        f"in a subfolder (left out; move images into the class folder itself): 2, such as {root}/{images}",
        f"other suffix (left out; save images as JPEG or PNG): 3, such as {root}/{notes}",
        "33 images of train, val: nothing that would hurt training",
    ]
    described = report.to_json()
    assert described["left_out"] == [
        {"kind": "in a subfolder", "count": 2, "example": f"{root}/{images}"},
        {"kind": "other suffix", "count": 3, "example": f"{root}/{notes}"},
    ]
    assert set(described["problems"]) == {"CMYK", "other format"}


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_reported_and_never_opened(tmp_path):
    """Nor when duplicates are looked for among the images, of which unreadable ones have no hash."""
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    pipes = [f"train/{WNIDS[0]}/z.JPEG", f"val/{WNIDS[0]}/z.JPEG"]
    for name in pipes:
        os.mkfifo(root / name)
    (root / "val" / WNIDS[1] / "z.JPEG").symlink_to(root)
    report = verify(VerifyArguments(root, workers=1))
    found = [(p.path.removeprefix(f"{root}/"), p.detail) for p in report.problems if p.kind == "no file"]
    assert found == [(name, "not a regular file") for name in (*pipes, f"val/{WNIDS[1]}/z.JPEG")]
    assert verify(VerifyArguments(root, quarantine=tmp_path / "aside")).exit_code == 0
    assert (tmp_path / "aside" / pipes[0]).is_fifo()


def test_what_fails_for_lack_of_memory_or_threads_is_not_moved_aside(tmp_path, monkeypatch):
    """Be it for DALI, which then decodes no image, or for Pillow, of an image that is bad to DALI."""
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    files = sorted(root.rglob("*.*"))
    arguments = VerifyArguments(root, quarantine=tmp_path / "bad", workers=1)

    def fail(*_):
        raise RuntimeError("std::bad_alloc")

    with monkeypatch.context() as patch:
        patch.setattr("nvidia.dali.Pipeline.run", fail)
        with pytest.raises(UserError, match=r"^DALI decodes no image here, not even one that is good: memory or"):
            verify(arguments)

    def lack(*_):
        raise MemoryError

    (files[0]).write_bytes(files[0].read_bytes()[:-30])
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lack)
        with pytest.raises(UserError, match=f"^{files[0]}: memory does not suffice to decode it; free some"):
            verify(arguments)
    assert sorted(root.rglob("*.*")) == files
    assert not (tmp_path / "bad").exists()
    assert verify(arguments).quarantined == 1


def test_one_problem_is_a_problem(tmp_path, caplog):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "a.jpg").write_bytes(b"")
    with caplog.at_level("INFO", "dali_vit"):
        verify(VerifyArguments(tmp_path))
        assert caplog.messages[-1] == "2 images of train, val: 2 problems that would hurt training"
        (tmp_path / "val").rename(tmp_path / "aside")
        verify(VerifyArguments(tmp_path))
        assert caplog.messages[-1] == "1 image of train: 1 problem that would hurt training"
        (tmp_path / "aside").rename(tmp_path / "validation")
        verify(VerifyArguments(tmp_path))
        assert caplog.messages[-1] == f"{tmp_path} has no val/; if validation/ is meant, rename it to val/"


def test_mistakes_are_named_with_their_remedy(tmp_path):
    root = datasets.write_folder(tmp_path / "set", IMAGES)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(root)
    arguments = VerifyArguments(root)
    for changed, word in [
        (replace(arguments, path=tmp_path / "absent"), "absent: no such folder"),
        (replace(arguments, max_megapixels=0), "--max-megapixels 0: must be above 0"),
        (replace(arguments, max_megapixels=float("nan")), "--max-megapixels nan: must be above 0 and at most 178.9"),
        (replace(arguments, max_megapixels=500), "--max-megapixels 500: must be above 0 and at most 178.9"),
        (replace(arguments, max_megapixels=float("inf")), "--max-megapixels inf: must be above 0 and at most 178.9"),
        (replace(arguments, workers=0), "--workers 0: must be from 1 to 1,024"),
        (replace(arguments, workers=10**9), "--workers 1000000000: must be from 1 to 1,024"),
        (replace(arguments, quarantine=root / "train" / "bad"), "lies in train/ of the set"),
        (replace(arguments, quarantine=root / "val" / "bad"), "lies in val/ of the set"),
        (replace(arguments, quarantine=tmp_path / "link" / "train" / "bad"), "lies in train/ of the set"),
        (replace(arguments, quarantine=tmp_path / "file"), "is a file"),
        (
            replace(arguments, quarantine=Path("s3://b/q")),
            "--quarantine s3://b/q: must be on this machine's disks; name",
        ),
    ]:
        with pytest.raises(UserError) as error:
            verify(changed)
        assert word in str(error.value)
        assert "\n" not in str(error.value)
