"""How many files a process may have open at once: 1,024 on most systems, which a single batch can exceed."""

from __future__ import annotations

import resource

__all__ = ["TooManyFiles", "allow", "allow_shards"]

# Other files that a process has open: libraries, devices and sockets, logs, checkpoints.
_OTHERS_AT_LEAST, _OTHERS_AT_MOST = 64, 512


class TooManyFiles(ValueError):
    """More files would have to be open at once than the system allows this process."""


def allow(files: int, what: str, instead: str) -> None:
    """Raises the limit where needed: to twice `files`, and some hundred for all else that is open.

    what, instead: how the error names the files, and what it advises where the limit cannot be raised.

    The limit is raised for this process and its children alone, and never lowered. Raises TooManyFiles where the hard
    limit (`ulimit -Hn`), which only an administrator can raise, is too low for the files themselves.
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
    """`allow` for `count` shards, whose memory maps keep files open; the other split hardly has more of them."""
    allow(count, f"{count:,} shards", "prepare larger shards")
