"""The flags of the tools, whose mistakes are told as those of `dali-vit` are."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line on stderr, without the usage; exit code 2."""

    def __init__(self, description: str | None, formatter_class: Any = argparse.RawDescriptionHelpFormatter) -> None:
        super().__init__(description=description, formatter_class=formatter_class)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")
