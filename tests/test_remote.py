"""Shards in an object store, on a local S3 server: the same stream as from a folder, and mistakes told in one line."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import torch
from botocore.exceptions import ResponseStreamingError
from botocore.response import StreamingBody
from filelock import FileLock

from dali_vit import remote
from dali_vit.config import UserError
from dali_vit.data import Dataset, load_dataset
from dali_vit.manifest import MANIFEST
from pipelines.loader import TrainLoader
from tests import datasets
from tests.conftest import TINY_MODEL, read_metrics
from tests.processes import dali_vit

pytestmark = pytest.mark.timeout(240)
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    datasets.write_source("folder", root / "folder", datasets.draw_images())
    done = dali_vit("prepare", root / "folder", root / "shards", "--to", "shards")
    assert done.returncode == 0, done.stderr
    return root / "shards"


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # The server's buckets are this process's, and outlive it.
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "DALI_VIT_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="images")
    yield client
    server.stop()


def upload(client: Any, root: Path, prefix: str = "sets/ours/") -> None:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "images", f"{prefix}{path.relative_to(root)}")


def loader(dataset: Dataset, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {"batch_size": 4, "image_size": 32, "seed": 3, "rank": 0, "world_size": 1}
    return TrainLoader(dataset.split("train"), device="cpu", num_threads=1, **settings | options)


@pytest.mark.parametrize("uri", ["s3://images/sets/ours", "s3://images/sets/ours/", "gs://images/sets/ours"])
def test_the_stream_is_that_of_the_local_shards(uri: str, shards: Path, client: Any) -> None:
    upload(client, shards)
    here, there = load_dataset(shards, minival=0.2), load_dataset(uri, minival=0.2)
    assert there.classes == here.classes
    for split in ("train", "minival", "val"):
        assert there.split(split).labels.tolist() == here.split(split).labels.tolist()
    for options in ({"rank": 0, "world_size": 2}, {"rank": 1, "world_size": 2}, {"start_step": 3}):
        ours, theirs = loader(here, **options), loader(there, **options)
        for _ in range(4):
            for expected, actual in zip(next(ours), next(theirs), strict=True):
                assert torch.equal(expected, actual)


def test_a_set_at_the_root_of_a_bucket(shards: Path, client: Any) -> None:
    upload(client, shards, prefix="")
    assert len(load_dataset("s3://images", minival=0).split("train")) == datasets.NUM_TRAIN


def test_train_eval_and_verify_by_the_command_line(shards: Path, client: Any, tmp_path: Path) -> None:
    upload(client, shards)
    data = ("--data", "s3://images/sets/ours")
    runs = ("--runs-dir", tmp_path / "runs", "--name", "run", "--gpus", "0", "--threads", "1")
    sizes = ("--resolution", "32", "--batch-size", "4", "--steps", "4", "--warmup-steps", "1", "--log-every", "2")
    done = dali_vit("train", *data, *runs, *TINY_MODEL, *sizes, "--minival", "0", "--eval-every", "0")
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "runs" / "run")[-1]["step"] == 4
    done = dali_vit("eval", "--checkpoint", tmp_path / "runs" / "run", *data, "--gpus", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val/count"] == datasets.VAL_IMAGES
    done = dali_vit("verify", "s3://images/sets/ours", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == {"train": datasets.NUM_TRAIN, "val": datasets.VAL_IMAGES}


def test_only_what_is_needed_is_copied_and_only_once(
    shards: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(client, shards)
    copied: list[str] = []
    copy = remote._Store.copy

    def counted(store: Any, path: str, *arguments: Any) -> None:
        copied.append(path)
        copy(store, path, *arguments)

    monkeypatch.setattr(remote._Store, "copy", counted)
    load_dataset("s3://images/sets/ours", split="val")
    assert copied
    assert all(path.startswith("val") for path in copied)
    load_dataset("s3://images/sets/ours")
    manifest = json.loads((shards / MANIFEST).read_text())
    shard_files = [shard["file"] for split in manifest["splits"].values() for shard in split["shards"]]
    assert len(shard_files) == 2
    assert sorted(copied) == sorted([*shard_files, "train.index.npz", "val.index.npz"])
    load_dataset("s3://images/sets/ours")
    assert len(copied) == len(shard_files) + 2


def test_an_interrupted_copy_goes_on_with_what_is_missing(
    shards: Path, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    upload(client, shards)
    copy = remote._Store.copy
    calls = 0

    def fails_at_the_third(store: Any, path: str, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        copy(store, path, *arguments)

    monkeypatch.setattr(remote, "_PARALLEL", 1)
    monkeypatch.setattr(remote._Store, "copy", fails_at_the_third)
    with pytest.raises(UserError, match=r"No space left on device.*DALI_VIT_CACHE"):
        load_dataset("s3://images/sets/ours")
    assert not list((tmp_path / "cache").rglob("*.part"))
    whole = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".npz", ".tar")]
    assert len(whole) in (2, 3)  # the fourth may have begun before the others were given up
    calls = 100
    dataset = load_dataset("s3://images/sets/ours", minival=0)
    assert next(loader(dataset))[0].shape == (4, 32, 32, 3)
    assert calls - 100 == 4 - len(whole)


@pytest.mark.parametrize("name", ["train/shard-000000.tar", "train.index.npz", MANIFEST])
def test_what_was_cut_short_in_the_cache_is_copied_again(name: str, shards: Path, client: Any, tmp_path: Path) -> None:
    upload(client, shards)
    file = load_dataset("s3://images/sets/ours").root / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    load_dataset("s3://images/sets/ours")
    assert file.read_bytes() == whole


def test_an_index_that_was_damaged_in_the_cache_is_copied_again(shards: Path, client: Any) -> None:
    upload(client, shards)
    index = load_dataset("s3://images/sets/ours").root / "train.index.npz"
    whole = index.read_bytes()
    index.write_bytes(bytes(len(whole)))
    load_dataset("s3://images/sets/ours")
    assert index.read_bytes() == whole


@pytest.mark.parametrize("of_manifest", [False, True])
def test_a_stream_that_breaks_off_is_told_in_one_line(
    of_manifest: bool, shards: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(client, shards)
    broken = "dataset.json" if of_manifest else "train/shard-000000.tar"
    send = StreamingBody.read

    def read(body: StreamingBody, amt: int | None = None) -> bytes:
        data: bytes = send(body, amt)
        if body._content_length == str((shards / broken).stat().st_size):
            raise ResponseStreamingError(error="Connection broken: InvalidChunkLength")
        return data

    monkeypatch.setattr(StreamingBody, "read", read)
    with pytest.raises(UserError) as raised:
        load_dataset("s3://images/sets/ours")
    assert str(raised.value).startswith(f"s3://images/sets/ours: {broken} cannot be read (")
    assert str(raised.value).endswith("): check the network, the credentials and AWS_ENDPOINT_URL")
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("AWS_ENDPOINT_URL", "Invalid endpoint: nonsense"),
        ("AWS_PROFILE", "The config profile (nonsense) could not be"),
        ("AWS_CONFIG_FILE", "'str' object has no attribute 'get'"),
    ],
)
def test_settings_of_aws_that_are_wrong_are_told_in_one_line(
    variable: str, told: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\ns3 = yes\n")
    monkeypatch.setenv(variable, str(tmp_path / "config") if variable == "AWS_CONFIG_FILE" else "nonsense")
    with pytest.raises(UserError) as raised:
        load_dataset("s3://images/sets/ours")
    assert str(raised.value).startswith(f"s3://images/sets/ours: {told}")
    assert "check AWS_PROFILE, AWS_ENDPOINT_URL" in str(raised.value)


def test_a_bad_manifest_is_told_by_its_place_in_the_store(client: Any) -> None:
    client.put_object(Bucket="images", Key="sets/ours/dataset.json", Body=b"{")
    with pytest.raises(UserError, match=r"^s3://images/sets/ours: .*dataset.json is not a manifest that prepare wrote"):
        load_dataset("s3://images/sets/ours")


@pytest.mark.parametrize("place", ["s3://", "gs:///sets", "http://host/sets"])
def test_what_is_no_place_in_an_object_store_is_refused(place: str) -> None:
    with pytest.raises(
        UserError, match=f"^--data {place}: give a folder, or s3://bucket/prefix or gs://bucket/prefix$"
    ):
        load_dataset(place)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no set", r"s3://images/sets/ours: there is no dataset.json: give the place"),
        ("no bucket", r"s3://others/sets: there is no bucket others"),
        ("missing shard", r"there is no train/shard-000000.tar"),
        ("other bytes", r"train/shard-000000.tar is not the file that prepare wrote"),
        ("outside", r"names ../train/x.tar, which lies outside of the set"),
        ("outside, absolute", r"names /.*/elsewhere/x.tar, which lies outside of the set"),
        ("no server", r"dataset.json cannot be read .*check the network"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    damage: str, message: str, shards: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(shards, root)
    uri = "s3://others/sets" if damage == "no bucket" else "s3://images/sets/ours"
    shard = root / "train" / "shard-000000.tar"
    if damage == "missing shard":
        shard.unlink()
    elif damage == "other bytes":
        data = bytearray(shard.read_bytes())
        data[700] ^= 1
        shard.write_bytes(data)
    elif damage.startswith("outside"):
        outside = "../train/x.tar" if damage == "outside" else f"{tmp_path}/elsewhere/x.tar"
        text = (root / MANIFEST).read_text()
        (root / MANIFEST).write_text(text.replace("train/shard-000000.tar", outside))
    elif damage == "no server":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    if damage != "no set":
        upload(client, root)
    with pytest.raises(UserError, match=message) as raised:
        load_dataset(uri)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "cache").rglob("*.tar" if damage.startswith(("outside", "no set")) else "*.part"))
    assert not (tmp_path / "elsewhere").exists()


def test_a_disk_that_a_set_does_not_fit_on_is_told_of_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = SimpleNamespace(uri="s3://images")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(UserError, match=r"2\.0 GiB are to be copied to .*, where 1\.0 GiB are free: make room there"):
        remote._copy_files(store, tmp_path, [remote._File("a", 2 * 2**30, None)])


def test_a_copy_waits_for_another_of_the_same_set(shards: Path, client: Any) -> None:
    upload(client, shards)
    root = load_dataset("s3://images/sets/ours").root
    shard = root / "train/shard-000000.tar"
    shard.unlink()
    done = threading.Event()
    copying = threading.Thread(target=lambda: (load_dataset("s3://images/sets/ours"), done.set()))
    with FileLock(root.with_name(f"{root.name}.lock")):
        copying.start()
        assert not done.wait(1)
        assert not shard.exists()
    assert done.wait(60)
    assert shard.exists()


def test_a_whole_copy_is_read_without_the_lock(shards: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a disk that is read-only by now."""
    upload(client, shards)
    root = load_dataset("s3://images/sets/ours").root
    monkeypatch.setattr(remote, "FileLock", lambda path: pytest.fail(f"{path} taken"))
    assert load_dataset("s3://images/sets/ours").root == root


def test_copies_in_progress_are_given_up_with_the_first_that_fails(
    shards: Path, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    upload(client, shards)
    in_progress = threading.Event()
    ended: list[str] = []

    def copy(store: Any, path: str, to: Path, progress: Any) -> None:
        to.touch()
        if path.startswith("val"):
            assert in_progress.wait(60)
            raise UserError("of the first")
        in_progress.set()
        try:
            for _ in range(6000):
                progress(1)
                time.sleep(0.01)
        finally:
            ended.append(path)

    monkeypatch.setattr(remote._Store, "copy", copy)
    began = time.monotonic()
    with pytest.raises(UserError, match="of the first"):
        load_dataset("s3://images/sets/ours")
    assert time.monotonic() - began < 30
    assert sorted(ended) == ["train.index.npz", "train/shard-000000.tar"]
    assert not list((tmp_path / "cache").rglob("*.part"))
