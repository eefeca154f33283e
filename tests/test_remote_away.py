"""A copy of a set whose object store cannot be asked any more."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from dali_vit import remote
from dali_vit.config import UserError
from dali_vit.files import cache_folder
from tests.test_remote import client, moto_server, shards, upload  # noqa: F401

pytestmark = pytest.mark.timeout(240)
URI = "s3://images/sets/ours"
BOTH = ("train", "val")


def answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Makes the store answer every request with an error."""

    def ask(self: Any, path: str, request: Any) -> Any:
        def fail() -> Any:
            raise error

        return before(self, path, fail)

    before = remote._Store._ask
    monkeypatch.setattr(remote._Store, "_ask", ask)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def refusal(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "no"}}, "GetObject")


@pytest.fixture
def copy(shards: Path, client: Any) -> Path:  # noqa: F811
    """A whole copy of a set in a store."""
    upload(client, shards)
    return remote.fetch(URI, BOTH)


def forget() -> Path:
    """Removes what is remembered of the set in the store; returns where that was."""
    (remembered,) = (cache_folder() / "sets").glob("*.json")
    remembered.unlink()
    return remembered


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refusal("AccessDenied"), "access to dataset.json is denied"),
        (refusal("ExpiredToken"), "ExpiredToken"),
        (EndpointConnectionError(endpoint_url="http://away"), "Could not connect to the endpoint"),
        (NoCredentialsError(), "Unable to locate credentials"),
    ],
    ids=["denied", "expired", "away", "no credentials"],
)
def test_a_whole_copy_is_used_where_the_store_cannot_be_asked(
    error: Exception, said: str, copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a run is started again after hours, with a token that has expired."""
    answer(monkeypatch, error)
    assert remote.fetch(URI, BOTH) == remote.fetch(f"{URI}/", ("val",)) == copy
    first, _ = warnings(caplog)
    assert first.startswith(f"{URI}: ")
    assert said in first
    assert first.endswith(f"; the copy in {copy} is used")
    assert all(record.of_machine for record in caplog.records if record.levelno == logging.WARNING)  # told once there

    (copy / "train" / "shard-000000.tar").write_bytes(b"")
    assert remote.fetch(URI, ("val",)) == copy
    with pytest.raises(UserError, match=said):
        remote.fetch(URI, BOTH)


def test_a_copy_that_was_made_before_is_remembered_at_its_next_use(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = forget()
    remote.fetch(URI, BOTH)
    answer(monkeypatch, refusal("AccessDenied"))
    assert remote.fetch(URI, BOTH) == copy
    remembered.write_bytes(b"{}")
    with pytest.raises(UserError, match="is denied"):
        remote.fetch(URI, BOTH)


def test_a_cache_that_cannot_be_written_to_is_no_obstacle_to_a_copy_that_is_there(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(path)

    forget()
    monkeypatch.setattr(remote, "replacing", refuse)
    assert remote.fetch(URI, BOTH) == copy


@pytest.mark.usefixtures("copy")
def test_a_set_that_is_gone_from_the_store_is_no_reason_to_use_a_copy(
    client: Any,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    client.delete_object(Bucket="images", Key="sets/ours/dataset.json")
    with pytest.raises(UserError, match=r"there is no dataset\.json"):
        remote.fetch(URI, BOTH)
    assert not warnings(caplog)
