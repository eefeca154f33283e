"""How many files a process may have open at once: 1,024 on most systems, which one batch can pass."""

from __future__ import annotations

import resource

__all__ = ["TooManyFiles", "allow", "allow_shards"]

# What a process has open besides: libraries, devices and sockets, logs, checkpoints.
_OTHERS_AT_LEAST, _OTHERS_AT_MOST = 64, 512


class TooManyFiles(ValueError):
    """More files would have to be open at once than the system allows this process."""


def allow(files: int, what: str, instead: str) -> None:
    """Makes room for so many files, open at once, and as many again.

    what, instead: how the error names them, and what it advises where the limit cannot be raised.

    The limit is raised for this process and its children alone, and never lowered. Raises TooManyFiles where the hard
    limit (`ulimit -Hn`), which only an administrator raises, is too low for the files themselves.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < files + _OTHERS_AT_LEAST:
        raise TooManyFiles(
            f"{what} must be open at once, but this process may open {hard:,} files (`ulimit -Hn`): raise that limit"
            f" to {2 * files + _OTHERS_AT_MOST:,}, or {instead}"
        )
    wanted = 2 * files + _OTHERS_AT_MOST
    if soft != resource.RLIM_INFINITY and soft < wanted:
        highest = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))


def allow_shards(count: int) -> None:
    """`allow` of so many shards in memory maps, which keep their files open; the other split's are hardly more."""
    allow(count, f"{count:,} shards", "prepare larger shards")
