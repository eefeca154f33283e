"""Remembers the loader settings at which a process died while the search tried them: twice, and they are left out."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dali_vit.distributed import Group, gather_objects
from dali_vit.files import replacing
from dali_vit.loaders import Decoder, LoaderSettings

log = logging.getLogger(__name__)


def describe(settings: LoaderSettings) -> str:
    """The settings that a search may change, as `name value, ...`; the decoder's only where not the default."""
    decoder = {key: value for key, value in asdict(settings.decoder).items() if value != asdict(Decoder())[key]}
    values = {"threads": settings.threads, "prefetch": settings.prefetch} | decoder
    return ", ".join(f"{name} {value}" for name, value in values.items())


class Trials:
    """Remembers, in a file, at which settings a process has ended: those that end two are not tried again.

    Decoders may crash or hang at settings that others do not use, and a run that is started again would end there again
    and again. Once is no reason, as the process may have been stopped there. Collective.
    """

    _MOST = 2  # ends

    def __init__(self, path: Path, group: Group) -> None:
        self._path, self._is_main = path, group.is_main

    def begin(self, settings: LoaderSettings) -> bool:
        """Call it before settings are tried; False for those that are not to be."""
        ends = gather_objects(self._read().get(_key(settings), 0) if self._is_main else None)[0]
        if ends >= self._MOST:
            if self._is_main:
                log.warning("autotune: %s is left out, as %d processes ended at it", describe(settings), ends)
            return False
        self._note(settings, ends + 1)
        return True

    def survived(self, settings: LoaderSettings) -> None:
        """Call it after settings were tried."""
        self._note(settings, 0)

    def done(self) -> None:
        """Call it at the end of the search."""
        if self._is_main:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _note(self, settings: LoaderSettings, ends: int) -> None:
        if self._is_main:
            with suppress(OSError):  # then it is not remembered
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self._path) as temporary:
                    temporary.write_text(json.dumps({**self._read(), _key(settings): ends}), encoding="utf-8")

    def _read(self) -> dict[str, int]:
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {key: ends for key, ends in kept.items() if isinstance(ends, int)} if isinstance(kept, dict) else {}


def _key(settings: LoaderSettings) -> str:
    return json.dumps(asdict(settings), sort_keys=True)
