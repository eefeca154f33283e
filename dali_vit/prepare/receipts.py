"""Receipts: small JSON files, each of which says that a part of the work is done and records its result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dali_vit.files import flush

__all__ = ["read_receipt", "write_receipt"]


def write_receipt(path: Path, content: Any) -> None:
    """Writes a receipt in one piece, once everything written before it is on the disk.

    Otherwise a loss of power might leave the receipt without the files that it stands for.
    """
    os.sync()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    flush(temporary)
    temporary.rename(path)
    flush(path.parent)


def read_receipt(path: Path) -> Any:
    """The content of a receipt; None if there is no such file, or no whole one: then the work is to be done again."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
