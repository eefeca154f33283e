"""Sets of shards in an object store: copied once to this machine's disk, then read like any other.

Shards are fetched whole and read from a memory map. Reading single images out of a store would take a request for
each, and DALI's readers for stores shuffle within a buffer and cannot be set to a step: order, exact epochs and
resuming would be lost. A copy keeps them, and training runs at the speed of the disk.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from dali_vit.config import UserError
from dali_vit.files import cache_folder, file_sha256, flush, replacing
from dali_vit.manifest import MANIFEST, read_manifest
from pipelines.words import one_line, why_not_imported

__all__ = ["fetch", "is_remote"]

log = logging.getLogger(__name__)

_SCHEMES = {"s3": None, "gs": "https://storage.googleapis.com"}
_PARALLEL = 4  # files at a time; each is fetched in several ranges at once


def is_remote(data: str | Path) -> bool:
    """Whether this names a place in an object store: s3://bucket/prefix or gs://bucket/prefix.

    UserError for another scheme and for a place without a bucket.
    """
    scheme, separator, rest = str(data).partition("://")
    if not separator:
        return False
    if scheme not in _SCHEMES or not rest.partition("/")[0]:
        raise UserError(f"--data {data}: give a folder, or s3://bucket/prefix or gs://bucket/prefix")
    return True


@dataclass(frozen=True)
class _File:
    """A file of a set: its path below the set, and what it must be."""

    path: str
    bytes: int | None
    sha256: str | None


class _Unreachable(UserError):
    """The store cannot be asked what it holds, or refuses to say."""


class _Store:
    """One prefix of a bucket, through the S3 interface that both stores have."""

    def __init__(self, uri: str) -> None:
        try:
            import boto3
            from boto3.exceptions import Boto3Error
            from boto3.s3.transfer import TransferConfig
            from botocore.config import Config
            from botocore.exceptions import BotoCoreError, ClientError
            from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError, S3ValidationError
        except ImportError as error:
            raise UserError(f"{uri}: object stores take boto3, and {why_not_imported('boto3', error)}") from error
        scheme, _, rest = uri.partition("://")
        self.uri = uri.rstrip("/")
        self.bucket, _, prefix = rest.partition("/")
        self.prefix = prefix.strip("/")
        of_transfers = (Boto3Error, RetriesExceededError, S3DownloadFailedError, S3ValidationError)
        self._errors: tuple[type[Exception], ...] = (BotoCoreError, ClientError, *of_transfers)
        self._transfer = TransferConfig(max_concurrency=8)
        settings = Config(retries={"mode": "standard", "max_attempts": 5}, connect_timeout=10, read_timeout=60)
        try:
            session = boto3.session.Session()
            # An endpoint in the environment or in AWS's configuration takes precedence over Google's.
            named = session.client("s3", config=settings, region_name=session.region_name or "us-east-1")
            endpoint = _SCHEMES[scheme]
            if endpoint and named.meta.endpoint_url.endswith("amazonaws.com"):
                named = session.client("s3", config=settings, region_name="auto", endpoint_url=endpoint)
        # The last two where a section of the configuration is not of the form that botocore expects.
        except (BotoCoreError, ValueError, AttributeError, TypeError) as error:
            reason = one_line(error)
            raise UserError(
                f"{uri}: {reason}: check AWS_PROFILE, AWS_ENDPOINT_URL and the like, and AWS's configuration files"
            ) from error
        self._client = named

    def key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def read(self, path: str) -> bytes:
        """Bytes of a small file."""
        return self._ask(path, lambda: self._client.get_object(Bucket=self.bucket, Key=self.key(path))["Body"].read())

    def copy(self, path: str, to: Path, progress: Callable[[int], None]) -> None:
        with open(to, "wb") as file:
            self._ask(
                path,
                lambda: self._client.download_fileobj(
                    self.bucket, self.key(path), file, Callback=progress, Config=self._transfer
                ),
            )

    def _ask(self, path: str, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except self._errors as error:
            # Of a stream that breaks off, the response is None.
            code = (getattr(error, "response", None) or {}).get("Error", {}).get("Code", "")
            kind: type[UserError] = UserError
            if code in ("404", "NoSuchKey", "NoSuchBucket"):
                what = f"there is no bucket {self.bucket}" if code == "NoSuchBucket" else f"there is no {path}"
                remedy = "give the place that a set made by `dali-vit prepare --to shards` was copied to"
            elif code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
                what, remedy = f"access to {path} is denied", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                kind = _Unreachable
            else:
                kind = _Unreachable
                reason = one_line(getattr(error, "last_exception", error))
                what = f"{path} cannot be read ({reason})"
                remedy = "check the network, the credentials and AWS_ENDPOINT_URL"
            raise kind(f"{self.uri}: {what}: {remedy}") from error


def fetch(uri: str, splits: tuple[str, ...]) -> Path:
    """Copies the files of these splits to this machine, except those that are there, and returns the copy's folder.

    The copy lies in the cache folder (`files.cache_folder`), under a name that changes
    with the set's manifest. A file appears there once it is whole and has the manifest's checksum; after an
    interruption only the missing files are copied. Processes that want the same set wait for the one that copies it.
    Where the store cannot be asked, a whole copy of the set as it was last seen there is used, with a warning: else a
    run would not be started again while the network is away or a token has expired.
    Raises UserError for a set that is missing, damaged or not of shards, and for a disk that is too small.
    """
    store = _Store(uri)
    latest = cache_folder() / "sets" / f"{sha256(store.uri.encode()).hexdigest()[:16]}.json"
    try:
        text = store.read(MANIFEST)
    except _Unreachable as error:
        root = _last_copy(store, latest, splits)
        if root is None:
            raise
        log.warning("%s; the copy in %s is used", error, root, extra={"of_machine": True})
        return root
    root = _copy_of(store, text)
    try:
        # Without the lock first: on a disk that is read-only there is none, and many processes would wait in line.
        if _has(root / MANIFEST, text) and not _missing(root, _files(uri, root, splits)):
            _remember(latest, text)
            return root
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f"{root.name}.lock")):
            if not _has(root / MANIFEST, text):
                _place(root / MANIFEST, lambda path: path.write_bytes(text))
            _copy_files(store, root, _files(uri, root, splits))
            _remember(latest, text)
    except OSError as error:
        raise UserError(
            f"{uri}: cannot be copied to {root} ({error.strerror or error}): mend that, or set DALI_VIT_CACHE to"
            " another folder"
        ) from error
    return root


def _copy_of(store: _Store, manifest: bytes) -> Path:
    """The folder of a copy, which changes with the set's manifest."""
    digest = sha256(store.uri.encode() + b"\0" + manifest).hexdigest()[:16]
    return cache_folder() / "sets" / f"{PurePosixPath(store.prefix or store.bucket).name}-{digest}"


def _remember(latest: Path, manifest: bytes) -> None:
    with suppress(OSError):  # the copy is usable all the same
        if not _has(latest, manifest):
            with replacing(latest) as temporary:
                temporary.write_bytes(manifest)


def _last_copy(store: _Store, latest: Path, splits: tuple[str, ...]) -> Path | None:
    """The copy of a set with the manifest that was kept in `latest`; None if there is none, or it is not whole."""
    try:
        text = latest.read_bytes()
        root = _copy_of(store, text)
        return root if _has(root / MANIFEST, text) and not _missing(root, _files(store.uri, root, splits)) else None
    except (OSError, UserError):
        return None


def _has(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def _files(uri: str, root: Path, splits: tuple[str, ...]) -> list[_File]:
    """The files of these splits, by the manifest at `root`; UserError for a set that is not to be copied."""
    try:
        manifest = read_manifest(root)
    except UserError as error:
        raise UserError(f"{uri}: {error}") from error
    assert manifest is not None
    if manifest.layout != "shards":
        raise UserError(
            f"{uri}: is of layout {manifest.layout}: only sets that `prepare --to shards` made can be fetched"
        )
    files = []
    for name in splits:
        if split := manifest.splits.get(name):
            files.append(_File(f"{name}.index.npz", None, split.index_sha256))
            files += [_File(shard.file, shard.bytes, shard.sha256) for shard in split.shards]
    for file in files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{uri}: its {MANIFEST} names {file.path}, which lies outside of the set")
    return files


def _missing(root: Path, files: list[_File]) -> list[_File]:
    """Those that are not there or not whole: they were when they got their names, but may have been cut short since."""
    return [file for file in files if not _is_there(root / file.path, file)]


def _copy_files(store: _Store, root: Path, files: list[_File]) -> None:
    missing = _missing(root, files)
    if not missing:
        return
    total = sum(file.bytes or 0 for file in missing)
    free = shutil.disk_usage(root).free
    if total > free:
        raise UserError(
            f"{store.uri}: {total / 2**30:.1f} GiB are to be copied to {root}, where {free / 2**30:.1f} GiB are free:"
            " make room there, or set DALI_VIT_CACHE to a folder on a larger disk"
        )
    log.info("%s is copied to %s: %d files, %.2f GiB", store.uri, root, len(missing), total / 2**30)
    counting, given_up = threading.Lock(), threading.Event()
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="fetching", disable=None) as bar,
        ThreadPoolExecutor(_PARALLEL) as pool,
    ):

        def progress(count: int) -> None:
            if given_up.is_set():
                raise InterruptedError("the copy is given up")
            with counting:
                bar.update(count)

        jobs = [pool.submit(_copy_file, store, root, file, progress) for file in missing]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            given_up.set()  # ends those that are in progress
            for job in jobs:
                job.cancel()
            raise


def _is_there(path: Path, file: _File) -> bool:
    """By its size, or by its checksum where the manifest has no size: an index has 50 bytes an image."""
    if not path.exists():
        return False
    return file_sha256(path) == file.sha256 if file.bytes is None else path.stat().st_size == file.bytes


def _copy_file(store: _Store, root: Path, file: _File, progress: Callable[[int], None]) -> None:
    def write(path: Path) -> None:
        store.copy(file.path, path, progress)
        if file.sha256 is not None and file_sha256(path) != file.sha256:
            raise UserError(f"{store.uri}: {file.path} is not the file that prepare wrote: copy the set there again")

    (root / file.path).parent.mkdir(parents=True, exist_ok=True)
    _place(root / file.path, write)


def _place(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under a temporary name first, so that under its own name it is always whole."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
