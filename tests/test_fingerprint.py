"""A run goes on only with the images it was begun with, recognised by their names in any layout."""

import dataclasses
from pathlib import Path

import pytest

from dali_vit.config import Config, UserError
from dali_vit.data import load_dataset
from dali_vit.distributed import Group
from dali_vit.names import chunks_of_names, fingerprint
from dali_vit.plan import plan, up_to_date
from dali_vit.prepare import PrepareArguments, prepare
from dali_vit.train import train
from pipelines.readers import FileList
from tests.conftest import write_image_folder


def of_train(root: Path) -> str:
    return fingerprint(load_dataset(root, minival=0.1).split("train"), root / "train")


def test_the_fingerprint_is_of_classes_and_names_in_order_whatever_the_layout(tmp_path, monkeypatch):
    folder = write_image_folder(tmp_path / "images")
    expected = of_train(folder)
    assert len(expected) == 32
    assert of_train(prepare(PrepareArguments(folder, tmp_path / "shards"))) == expected
    assert of_train(prepare(PrepareArguments(folder, tmp_path / "folder", to="folder"))) == expected
    files = load_dataset(folder, minival=0.1).split("train")
    monkeypatch.setattr("dali_vit.names._CHUNK", 7)
    assert of_train(folder) == expected  # however many are taken at a time
    for others in (files.subset([1, 0, *range(2, len(files))]), files.subset(range(len(files) - 1))):
        assert fingerprint(others, folder / "train") != expected


@pytest.mark.timeout(120)
@pytest.mark.parametrize("to", ["ant/new.jpg", "dog/new.jpg"])
def test_a_run_does_not_go_on_with_images_renamed_or_moved(tmp_path, tiny_config, cpu, to):
    """Their number is the same, but from the changed one on the stream would hold other samples."""
    folder = write_image_folder(tmp_path / "images")
    prepare(PrepareArguments(folder, tmp_path / "shards"))
    config = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, data=str(folder), minival=0))
    first = plan(config, 1)
    train(config, cpu, first)

    (folder / "train/ant/003.jpg").rename(folder / "train" / to)
    with pytest.raises(UserError, match=r"--data .*: as many training images as .*tiny .* other names"):
        plan(config, 1)
    with pytest.raises(UserError, match="other names or classes"):
        up_to_date(dataclasses.replace(first, train_fingerprint="other"), config)

    for added, remedy in ((True, "remove what was added"), (False, "put back what was removed, under the same names")):
        image = folder / "train" / to
        if added:
            (folder / "train/ant/zzz.jpg").write_bytes(image.read_bytes())
        else:
            (folder / "train/ant/zzz.jpg").unlink()
            image.unlink()
        with pytest.raises(UserError, match=rf"training images, .* was begun with \d+; {remedy}, or choose"):
            plan(config, 1)

    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, data=str(tmp_path / "shards")))
    assert plan(moved, 1).checkpoint.step == 12


@pytest.mark.timeout(120)
def test_a_run_that_goes_on_with_other_images_in_val_says_so(tmp_path, tiny_config, cpu, caplog):
    folder = write_image_folder(tmp_path / "images")
    config = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, data=str(folder), minival=0))
    first = plan(config, 1)
    assert not first.has_other_val_images
    train(config, cpu, first)
    assert not plan(config, 1).has_other_val_images
    (folder / "val/ant/003.jpg").rename(folder / "val/dog/new.jpg")
    again = plan(config, 1)
    assert again.has_other_val_images
    train(config, cpu, again)
    assert f"{folder}: val has other images than before" in caplog.text


def test_a_run_is_known_by_names_below_the_folder_of_each_split(image_folder, tiny_config):
    planned = plan(tiny_config, 1)
    dataset = load_dataset(image_folder, minival=0.1)
    assert planned.train_fingerprint == fingerprint(dataset.split("train"), image_folder / "train")
    assert planned.val_fingerprint == fingerprint(dataset.split("val"), image_folder / "val")


def with_data(config: Config, root: Path) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=str(root)))


def refusal(begun: Config, other: Config, cpu: Group) -> str:
    """What is said where a run that was made with one set is to go on with another."""
    train(begun, cpu, plan(begun, 1))
    with pytest.raises(UserError) as refused:
        plan(other, 1)
    return str(refused.value)


@pytest.fixture
def originals(tmp_path):
    return write_image_folder(tmp_path / "images")


@pytest.fixture
def small(originals, tmp_path):
    return prepare(PrepareArguments(originals, tmp_path / "small", shorter_side=24))


@pytest.mark.timeout(120)
def test_a_run_does_not_go_on_with_images_of_another_size(originals, small, tmp_path, tiny_config, cpu):
    assert refusal(with_data(tiny_config, originals), with_data(tiny_config, small), cpu) == (
        f"--data {small}: its images were resized to a shorter side of 24 pixels at JPEG quality 92, those"
        f" {tiny_config.run_dir} was begun with were never resized; give those, or choose another --name"
    )
    again = prepare(PrepareArguments(small, tmp_path / "again"))
    assert load_dataset(again).resized == load_dataset(small).resized is not None
    shards = prepare(PrepareArguments(originals, tmp_path / "shards"))
    assert plan(with_data(tiny_config, shards), 1).checkpoint.step == 12


@pytest.mark.timeout(120)
def test_a_run_begun_with_small_images_does_not_go_on_with_the_originals(originals, small, tiny_config, cpu):
    assert refusal(with_data(tiny_config, small), with_data(tiny_config, originals), cpu) == (
        f"--data {originals}: its images were never resized, those {tiny_config.run_dir} was begun with were resized to"
        " a shorter side of 24 pixels at JPEG quality 92; give those, or choose another --name"
    )
    assert plan(with_data(tiny_config, small), 1).checkpoint.step == 12


def test_names_of_many_lengths_are_taken_apart_in_chunks(monkeypatch):
    names = [f"c{i}/{'x' * (i % 13)}.jpg" for i in range(50)]
    files = FileList.from_paths([f"/data/{name}" for name in names], [0] * 50)
    monkeypatch.setattr("dali_vit.names._CHUNK", 7)
    chunks = list(chunks_of_names(files, Path("/data")))
    assert [name.decode() for chunk in chunks for name in chunk] == names
