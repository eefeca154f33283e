"""How the processes of a group find each other where torchrun has started them again."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["agree", "init_arguments"]


def init_arguments(rank: int, world_size: int, timeout: timedelta) -> dict[str, Any]:
    """Arguments of init_process_group by which the processes of this attempt meet no others; none without torchrun.

    torchrun keeps its store over --max-restarts. What processes that have died wrote there, addresses of gloo and keys
    of NCCL, would be taken for the new ones', which then wait for the dead (seen with torch 2.15).
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    meeting = agree(store, rank, world_size, timeout)
    return {"store": dist.PrefixStore(meeting, store), "rank": rank, "world_size": world_size}


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all living processes of a group come to share, whatever earlier ones have left in the store.

    Attempts are not numbered alike on all machines: torchrun counts on each how often it was a process there that died.
    So rank 0 makes up a name, and each other rank takes the one that it finds once rank 0 has repeated its own number
    under it, which a dead one cannot. Raises DistStoreError where they do not meet within the timeout.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("dali_vit/meeting", own)
        for other in range(1, world_size):
            store.set(f"{own}/{other}/seen", store.get(f"{own}/{other}").decode())  # which is waited for
        return own
    place = ""
    while time.monotonic() < deadline:
        meeting = store.get("dali_vit/meeting").decode()
        if place != f"{meeting}/{rank}":
            place = f"{meeting}/{rank}"
            store.set(place, own)
        # Asked for now and again: c10d writes warnings to stderr of each wait that is in vain.
        if store.check([f"{place}/seen"]) and store.get(f"{place}/seen").decode() == own:
            return meeting
        time.sleep(0.1)
    raise dist.DistStoreError(f"rank {rank} of {world_size} has met no rank 0 within {timeout}")
