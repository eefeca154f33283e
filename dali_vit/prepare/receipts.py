"""Receipts: small JSON files that say that a part of the work is done, and what came of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["read_receipt", "write_receipt"]


def write_receipt(path: Path, content: Any) -> None:
    """Writes a receipt in one piece, once everything written before it is on the disk.

    Otherwise, after a loss of power, there might be the receipt but not what it stands for.
    """
    os.sync()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.rename(path)


def read_receipt(path: Path) -> Any:
    """What a receipt says; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None
