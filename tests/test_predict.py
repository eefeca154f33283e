"""predict: files and folders, the table and JSON, the words of ImageNet's classes, and why an image is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_vit import inference, wordnet
from dali_vit.config import UserError
from dali_vit.image_files import list_images
from dali_vit.undecodable import saying_why
from pipelines.bad_samples import DecodeError
from tests.conftest import run
from tests.test_inference import BLUE, GREEN, RED, data, paint, save

__all__ = ["data"]  # a fixture


def predict(*arguments: str | Path, capsys) -> str:
    code, out, err = run("predict", *map(str, arguments), "--gpus", "0", capsys=capsys)
    assert (code, err) == (0, "")
    return out


@pytest.mark.timeout(60)
def test_the_table_names_the_colour(data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("ruby", "emerald", "sapphire"))
    pictures = [str(p) for p in sorted((data / "val/c").iterdir())]
    lines = predict(*pictures, "--checkpoint", model, "--top", "1", capsys=capsys).splitlines()
    assert [line.split()[-1] for line in lines] == [pictures[0], "sapphire", pictures[1], "ruby"]
    assert [line.split("%")[-1] for line in lines[1::2]] == ["  sapphire", "  ruby"]
    told = json.loads(predict(*pictures, "--checkpoint", model, "--top", "1", "--json", capsys=capsys))
    probabilities = [one["predictions"][0]["probability"] for one in told]
    assert [float(line.split("%")[0]) for line in lines[1::2]] == [round(100 * p, 2) for p in probabilities]


@pytest.mark.timeout(60)
def test_no_name_in_the_table_reaches_the_terminal_as_a_command(data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("\x1b[2J", "a\nb\x9b", "sapphire"))
    picture = tmp_path / "\x1b]0;é\x07.png"
    shutil.copy(sorted((data / "val/c").iterdir())[1], picture)
    first, *lines = predict(picture, "--checkpoint", model, capsys=capsys).splitlines()
    assert first == rf"{tmp_path}/\x1b]0;é\x07.png"
    assert sorted(line.split("%  ")[1] for line in lines) == ["\\x1b[2J", r"a\nb\x9b", "sapphire"]
    (told,) = json.loads(predict(picture, "--checkpoint", model, "--json", capsys=capsys))
    assert told["image"] == str(picture)


@pytest.mark.timeout(60)
def test_a_folder_is_all_images_in_it(data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("ruby", "emerald", "sapphire"))
    alone = data / "val/b/ILSVRC2012_val_00000004.png"
    told = json.loads(predict(alone, data, "--checkpoint", model, "--json", capsys=capsys))
    assert [one["image"] for one in told] == [str(alone), *sorted(map(str, data.rglob("*.png")))]
    classes = [one["predictions"][0]["class"] for one in told]
    assert classes == ["emerald", "ruby", "ruby", "emerald", "emerald", "emerald", "sapphire", "ruby"]
    assert set(told[0]["predictions"][0]) == {"class", "index", "probability"}


def test_folders_are_searched_by_name_and_however_deep(tmp_path):
    names = ["b.PNG", "a/z.jpg", "a.jpg", "a/b/c/d.webp", "a/b.jpeg", "c.tiff", "C.bmp", "\udcff/\udcff.jpg"]
    passed_over = ["notes.txt", "a/.hidden.jpg", ".cache/x.jpg", "a/x.gif"]
    for name in [*names, *passed_over]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "else").mkdir()
    (tmp_path / "else/1.jpg").touch()
    (tmp_path / "set/a/b/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/linked.jpg").symlink_to(tmp_path / "else")
    found = list_images([tmp_path / "set", tmp_path / "set/notes.txt"])
    paths = [os.path.relpath(found.path(i), tmp_path / "set") for i in range(len(found))]
    assert paths == [*map(str, sorted(map(Path, [*names, "linked.jpg/1.jpg"]))), "notes.txt"]
    assert found.labels.tolist() == list(range(10))


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.gif").touch()
    with pytest.raises(UserError, match=f"^{tmp_path}/a: no image files in this folder .*.jpg, .*; name another, or"):
        list_images([tmp_path / "a"])
    (tmp_path / "a/b/.lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a/b/lost.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no image files"):
        list_images([tmp_path / "a"])


def test_what_is_no_image_file_is_told_as_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "lost.jpg").symlink_to("nowhere")
    for name, told in {
        "pipe.jpg": ": not a regular file; name an image or a folder",
        "loop.jpg": " is a link to loop.jpg, which leads round in a circle: remove the link",
        "lost.jpg": " is a link to nowhere, which is not there: mount the disk or remove the link",
        "none.jpg": ": no such image file",
    }.items():
        with pytest.raises(UserError) as refused:
            list_images([tmp_path / name])
        assert str(refused.value) == f"{tmp_path / name}{told}"


@pytest.mark.timeout(60)
def test_a_link_that_leads_nowhere_is_named_after_the_other_images(data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("ruby", "emerald", "sapphire"))
    folder = tmp_path / "images"
    shutil.copytree(data / "val/c", folder)
    for name in ("a.jpg", "folder", "notes.txt"):
        (folder / name).symlink_to(tmp_path / "nowhere")
    (folder / "README").symlink_to(__file__)
    code, out, err = run("predict", "--checkpoint", str(model), str(folder), capsys=capsys)
    assert code == 2
    assert sum("sapphire" in line for line in out.splitlines()) == len(list((data / "val/c").iterdir()))
    (line,) = err.splitlines()
    for name in ("a.jpg", "folder"):
        assert f"{folder / name} is a link to {tmp_path / 'nowhere'}, which is not there" in line
    assert "notes.txt" not in line
    assert "README" not in out + line
    assert line.endswith("which is not there: replace or remove them")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("json_asked", [False, True])
def test_images_in_folders_of_other_formats_are_told_of(json_asked, data, tmp_path, capsys):
    model = save(tmp_path / "m.safetensors", 3, ("ruby", "emerald", "sapphire"))
    folder = data / "val/c"
    others = [folder / "deep/IMG_1.HEIC", folder / "x.gif"]
    for path in (*others, folder / ".hidden.gif", folder / ".thumbnails/x.gif", folder / "notes.txt"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    arguments = ["predict", "--checkpoint", str(model), str(folder), *["--json"] * json_asked]
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 0
    remedy = "save them as JPEG or PNG, or rename .jfif and .jpe to .jpg"
    told = f"left out for their suffixes: {others[1]}, {others[0]}; {remedy}\n"
    assert told in (err if json_asked else out)
    assert (err if not json_asked else err.replace(told, "")) == ""
    if json_asked:
        assert len(json.loads(out)) == 2


@pytest.mark.timeout(60)
def test_results_come_one_by_one_and_messages_after_them(data, tmp_path, capfd):
    model = save(tmp_path / "m.safetensors", 3, ("ruby", "emerald", "sapphire"))
    found = inference.predict(model, [data / "val/c"], torch.device("cpu"), top=1)
    path, (best,) = next(found)
    assert (path, best["class"]) == (data / "val/c/ILSVRC2012_val_00000005.png", "sapphire")
    assert not torch.is_inference_mode_enabled()
    os.write(2, b"one of a library\n")
    assert capfd.readouterr().err == ""
    assert len(list(found)) == 1
    os.write(2, b"another\n")
    assert capfd.readouterr().err == "one of a library\nanother\n"


@pytest.mark.timeout(60)
def test_who_reads_no_further_is_told_nothing_of_images_that_he_has_not_asked_for(data, tmp_path, capfd):
    model = save(tmp_path / "m.safetensors", 3, ("ruby", "emerald", "sapphire"))
    found = inference.predict(model, [data / "val/c"], torch.device("cpu"), top=1)
    next(found)
    os.write(2, b"of a library, about an image that it does not name\n")
    found.close()
    assert capfd.readouterr().err == ""


def test_words_are_those_of_timm(monkeypatch):
    assert wordnet.descriptions(["n01440764", "n02012849"]) == ("tench, Tinca tinca", "crane")
    assert wordnet.descriptions(["n01440764", "n99999999"]) is None
    monkeypatch.setattr(wordnet, "ImageNetInfo", None)  # not to be read for these
    assert wordnet.descriptions(["n01440764", "tench"]) is None
    assert wordnet.descriptions(["n014407640"]) is None


@pytest.mark.timeout(60)
def test_classes_of_imagenet_are_told_in_words(tmp_path, capsys):
    paint(tmp_path / "images", RED, GREEN, BLUE)
    model = save(tmp_path / "m.safetensors", 3, ("n01440764", "n01484850", "n02012849"))
    arguments = (tmp_path / "images", "--checkpoint", model, "--top", "1")
    lines = predict(*arguments, capsys=capsys).splitlines()
    shown = ["n01440764 tench", "n01484850 great white shark", "n02012849 crane"]
    assert [line.split("%  ")[1] for line in lines[1::2]] == shown
    told = json.loads(predict(*arguments, "--json", capsys=capsys))
    best = [one["predictions"][0] for one in told]
    assert [one["class"] for one in best] == ["n01440764", "n01484850", "n02012849"]
    shark = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
    assert [one["description"] for one in best] == ["tench, Tinca tinca", shark, "crane"]


def test_images_are_required(capsys):
    code, out, _ = run("predict", "--help", capsys=capsys)
    assert code == 0
    assert "of which all images at any depth are taken. (required)" in " ".join(out.replace("│", " ").split())
    code, out, err = run("predict", "--checkpoint", "run", capsys=capsys)
    told = "dali-vit: IMAGE: missing; name at least one image file or folder\n"
    assert (code, out, err) == (2, "", told)


def torn(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save(path)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("command", ["predict", "eval"])
@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("torn.jpg", torn, "ends too early (image file is truncated ("),
        (
            "long.png",
            lambda path: Image.new("RGB", (5000, 20)).save(path),
            "is so long and thin that an evaluation refuses it (5000 x 20 pixels)",
        ),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(command, name, make, reason, data, tmp_path, capfd):
    """By us alone: the decoder says that something is wrong, too, but not with which image."""
    model = save(tmp_path / "m.safetensors", 3, ("a", "b", "c"))
    bad = data / "val/c" / name
    make(bad)
    what = {"predict": [str(bad)], "eval": ["--data", str(data)]}[command]
    code, out, err = run(command, *what, "--checkpoint", str(model), "--gpus", "0", capsys=capfd)
    assert (code, out) == (2, {"predict": f"{bad}\n  cannot be used\n", "eval": ""}[command])
    assert err.startswith(f"dali-vit: {bad} {reason}")
    remedy = "" if command == "predict" else ", or leave images out by --max-bad-share"
    assert err.endswith(f"): replace or remove it{remedy}\n")
    assert err.count("\n") == 1


def test_of_many_the_first_three_are_explained(tmp_path, recwarn):
    contents = {"a.png": b"", "b.jpg": b"\xff\xd8\xff", "d.jpg": b"x" * 20, "e.jpg": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = list_images([tmp_path])
    (tmp_path / "a.png").unlink()
    paths = [str(tmp_path / name) for name in contents]
    with pytest.raises(DecodeError) as refused, saying_why(files):
        raise DecodeError("any", paths)
    assert str(refused.value) == (
        f"{paths[0]} cannot be read (No such file or directory); {paths[1]} ends too early (3 bytes hold no whole"
        f" header); {paths[2]} is of no format that DALI decodes (begins with b'xxxxxxxx'); and 1 more cannot be used:"
        " replace or remove them"
    )
    assert refused.value.paths == paths
    assert not recwarn


@pytest.mark.timeout(120)
def test_images_that_cannot_be_used_do_not_keep_the_others_from_being_told(data, tmp_path, capfd):
    """Each in its place, in the second of two batches, too, and where all of many are."""
    model = save(tmp_path / "m.safetensors", 3, ("ruby", "emerald", "sapphire"))
    blue = data / "val/c/ILSVRC2012_val_00000005.png"
    bad = [tmp_path / f"{i}.jpg" for i in range(20)]
    for path in bad:
        torn(path)
    bad[1].write_text("no image")
    bad[2].write_bytes(b"")
    asked = [bad[0], *[blue] * 70, *bad[1:4], blue]
    expected = [
        (str(bad[0]), None),
        *[(str(blue), "sapphire")] * 70,
        *((str(path), None) for path in bad[1:4]),
        (str(blue), "sapphire"),
    ]
    arguments = [*map(str, asked), "--checkpoint", str(model), "--gpus", "0", "--top", "1"]
    code, out, err = run("predict", *arguments, "--json", capsys=capfd)
    found = [(one["image"], one["predictions"]) for one in json.loads(out)]
    assert [(path, best[0]["class"] if best else None) for path, best in found] == expected
    told = [
        f"dali-vit: {bad[0]} ends too early (image file is truncated (",
        f"; {bad[1]} is of no format that DALI decodes (begins with b'no image'); {bad[2]} has no bytes (0 bytes)",
        "; and 1 more cannot be used: replace or remove them\n",
    ]
    assert code == 2
    assert err.startswith(told[0])
    assert err.endswith(told[1] + told[2])
    assert err.count("\n") == 1

    code, out, err = run("predict", *map(str, bad), "--checkpoint", str(model), "--gpus", "0", capsys=capfd)
    assert (code, out) == (2, "".join(f"{path}\n  cannot be used\n" for path in bad))
    assert err.endswith("; and 17 more cannot be used: replace or remove them\n")
    assert err.count("\n") == 1
