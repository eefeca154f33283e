"""Images and shards of rare kinds, and what is said of bad ones."""

from __future__ import annotations

import logging
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from botocore.exceptions import ClientError
from PIL import Image

from dali_vit import big_vision, doctor, inference, remote
from dali_vit import preview as previews
from dali_vit.arguments import EvalArguments
from dali_vit.config import ModelConfig, UserError
from dali_vit.data import check_images
from dali_vit.distributed import Group
from dali_vit.model import create_model
from dali_vit.quarantine import _one_field
from dali_vit.undecodable import saying_why
from pipelines import bad_samples, randaugment
from pipelines.bad_samples import DecodeError
from pipelines.readers import FileList
from pipelines.shards import ShardList
from tests.conftest import TINY, run, write_image_folder
from tests.test_checkpoint import save


@pytest.mark.parametrize("head", [b"RIFF\x0a\x0a\x0a\x00WEBPVP8 ", b"RIFF\x0d\x0a\x00\x00WEBPVP8L"])
def test_a_webp_may_be_of_any_size(head: bytes, tmp_path: Path) -> None:
    """Its length, which may have the byte of a line break, stands in its head."""
    (tmp_path / "image.webp").write_bytes(head)
    check_images(FileList.from_paths([str(tmp_path / "image.webp")], [0]))


def test_a_jpeg_2000_may_be_a_bare_codestream(tmp_path: Path) -> None:
    (tmp_path / "x.jp2").write_bytes(b"\xff\x4f\xff\x51" + bytes(12))
    check_images(FileList.from_paths([str(tmp_path / "x.jp2")], [0]))


def test_a_moved_image_is_one_line_of_the_list_whatever_its_name() -> None:
    assert _one_field("a\\b\tc\nd\re") == r"a\\b\tc\nd\re"


@pytest.mark.parametrize("code", ["403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_a_refusal_of_the_store_names_the_variables_of_the_keys(code: str) -> None:
    store = remote._Store("s3://images/set")

    def refuse() -> None:
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, "GetObject")

    with pytest.raises(remote._Unreachable) as raised:
        store._ask("dataset.json", refuse)
    said = "access to dataset.json is denied: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    assert str(raised.value) == f"s3://images/set: {said}"


@pytest.mark.parametrize(
    ("scheme", "variables", "endpoint"),
    [
        ("gs", {}, "https://storage.googleapis.com"),
        ("gs", {"AWS_DEFAULT_REGION": "eu-west-1"}, "https://storage.googleapis.com"),
        ("gs", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
        ("s3", {}, "https://s3.amazonaws.com"),
        ("s3", {"AWS_DEFAULT_REGION": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com"),
    ],
)
def test_a_store_is_asked_at_its_own_endpoint_unless_another_is_set(
    scheme: str, variables: dict[str, str], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert remote._Store(f"{scheme}://bucket/set")._client.meta.endpoint_url == endpoint


def test_weights_that_are_left_out_need_not_be_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = ModelConfig(model="Ti/8", width=32, depth=1, num_heads=2, mlp_dim=64)
    params = big_vision.to_big_vision(create_model(config, num_classes=3, resolution=32))
    big_vision.save_npz(tmp_path / "a.npz", {**params, "t": np.full(2, np.nan, np.float32)}, 32)
    big_vision.open_npz(tmp_path / "a.npz")
    assert caplog.messages == [f"{tmp_path}/a.npz: left out, as the model has no place for them: t"]


def test_preview_names_images_of_which_too_many_are_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_image_folder(tmp_path / "data", train=3, val=1)
    for name in ("000.jpg", "001.jpg"):
        (data / "train/ant" / name).write_bytes(b"")
    out = str(tmp_path / "grid.png")
    code, _, err = run("preview", "--data", str(data), "--out", out, "--gpus", "0", *TINY, capsys=capsys)
    told = (
        f"{data}/train/ant/000.jpg is an empty file; {data}/train/ant/001.jpg is an empty file (unusable images: 2 of"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"dali-vit: {told} 12 looked at, more than --max-bad-share 0.01 allows)")


@pytest.mark.parametrize("error", [SyntaxError, Image.DecompressionBombError, ValueError, OSError])
def test_what_pillow_refuses_is_shown_as_blank(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI may have taken it: Pillow has errors of many kinds."""

    def refuse(*_: Any) -> None:
        raise error("no")

    (tmp_path / "x.png").write_bytes(b"any")
    monkeypatch.setattr(Image, "open", refuse)
    assert previews._open(FileList.from_paths([str(tmp_path / "x.png")], [0]), 0) is None


def test_the_doctor_tells_what_the_input_fails_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("no\ndecoder"), ValueError("no\ndecoder")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(doctor, "train_loader", fail)
        assert doctor._input_fault(torch.device("cpu")) == "no decoder"


def test_an_empty_sample_may_lie_at_the_end_of_its_shard_or_be_all_of_it(tmp_path: Path) -> None:
    for length in (0, mmap.PAGESIZE):
        shard = tmp_path / f"{length}.tar"
        shard.write_bytes(bytes(length))
        names = FileList.from_paths(["a/1.jpg"], [0])
        columns = np.zeros(1, np.int32), np.array([length]), np.zeros(1, np.int64), np.zeros(1, np.int64)
        (payload,) = ShardList((str(shard),), names, *columns).payload(np.array([0]))
        assert (payload.dtype, payload.shape) == (np.uint8, (0,))


@pytest.mark.parametrize(("device_id", "devices"), [(None, [None]), (0, [None, 0])])
def test_what_was_bad_is_tried_again_on_the_cpu_and_then_on_the_gpu(
    device_id: int | None, devices: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's decoder may take a JPEG that was cut short; the next start would leave it out again."""
    tried: list[tuple[int | None, list[int]]] = []

    def try_samples(samples: Any, make: Any) -> Any:
        tried.append((make.keywords["device_id"], samples.labels.tolist()))
        return [(place, bool(label != 3)) for place, label in enumerate(samples.labels.tolist())]

    monkeypatch.setattr(bad_samples.probe, "try_samples", try_samples)
    files = FileList.from_paths([str(i) for i in range(9)], np.arange(9))
    assert bad_samples.still_bad(files, [1, 3, 5], device_id=device_id, num_threads=1, seconds=60) == [3]
    assert tried == [(device, [1, 3, 5] if device is None else [1, 5]) for device in devices]


def test_without_randaugment_nothing_comes_behind_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the numbers of the flip for its own. Mistakes are named on a CPU, too."""
    settings: dict[str, Any] = {"image_size": 32, "magnitude": 10, "contrast": "paper"}
    monkeypatch.setattr(randaugment.loops_gpu, "available", lambda size: True)
    assert randaugment.behind_graph(0, layers=0, **settings) is None
    assert randaugment.behind_graph(None, layers=2, **settings) is None
    with pytest.raises(ValueError, match="magnitude is from 0 to 10, not 11"):
        randaugment.behind_graph(None, layers=2, **settings | {"magnitude": 11})


def test_the_loaders_warnings_come_again_after_what_says_why() -> None:
    log = logging.getLogger("dali_vit.data")
    before = list(log.filters)
    files = FileList.from_paths(["/nowhere/x.jpg"], [0])
    with saying_why(files):
        assert log.filters != before
    assert log.filters == before
    with pytest.raises(DecodeError), saying_why(files):
        raise DecodeError("any", ["/nowhere/x.jpg"])
    assert log.filters == before


def test_of_an_evaluation_that_allows_none_no_share_is_told(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    (tmp_path / "v2/ant").mkdir(parents=True)
    (tmp_path / "v2/ant/0.jpg").write_bytes(b"")
    asked = EvalArguments(tmp_path / "run", str(tmp_path / "v2"), v2=True)
    told = f"{tmp_path}/v2/ant/0.jpg is an empty file (unusable images: 1 of 1 looked at): remove it or put an image in"
    with pytest.raises(UserError) as raised:
        inference.evaluate_checkpoint(asked, Group(0, 1, 0, 1, torch.device("cpu")))
    assert str(raised.value) == f"{told} its place"
