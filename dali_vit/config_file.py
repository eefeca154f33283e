"""`--config FILE`: a run's settings from YAML, in the form of a run's config.yaml and of --print-config's output.

A run's folder stands for its config.yaml.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from dali_vit.config import GROUPS, UserError
from dali_vit.files import at_home
from pipelines.words import one_line

__all__ = ["expand", "named_file"]

FLAG = "--config"
_MEANT = "give a run's folder or config.yaml, or what --print-config printed"
_MERGE = "tag:yaml.org,2002:merge"  # the key <<, by which a mapping takes over another
_TEXTS = ("str", "str | None", "Path")
# Settings of the file that a flag on the command line removes, besides the one of the flag's own name.
_TAKES = {"--steps": {"epochs"}, "--epochs": {"steps"}, "--model": {"width", "depth", "num_heads", "mlp_dim"}}


def expand(argv: list[str]) -> list[str]:
    """The arguments with --config replaced by flags for the file's settings, in front so that all others override them.

    Settings that the file leaves out are those of its recipe. UserError for a file that holds anything but settings.
    """
    path, rest = _taken(argv)
    if path is None:
        return argv
    if "--recipe" in _names(rest):
        raise UserError(f"--recipe and {FLAG}: give one of them, not both; the file has all settings")
    return _left(path, rest) + rest


def named_file(argv: list[str], flag: str) -> str | None:
    """The file of --config if it gave the setting of `flag`; None if a flag did, or if it can no longer be read."""
    path, rest = _taken(argv)
    if path is None or flag in _names(rest) or not os.path.isfile(at_home(Path(path))):  # a pipe was read before
        return None
    try:
        of_file = [own for own in _left(path, rest) if not own.endswith("=None")]
    except UserError:  # it has changed since
        return None
    return path if flag in _names(of_file) else None


def _left(path: str, rest: list[str]) -> list[str]:
    """The flags for a file's settings, without those that the flags beside it remove."""
    removed = {name for flag in _names(rest) for name in _TAKES.get(flag, ())}
    return [flag for name, flag in _flags(path) if name not in removed]


def _names(argv: list[str]) -> set[str]:
    """The flags' documented names; the parser also accepts them with underscores."""
    return {argument.partition("=")[0].replace("_", "-") for argument in argv}


def _taken(argv: list[str]) -> tuple[str | None, list[str]]:
    """The file that --config names, if given, and the other arguments."""
    path, rest = None, []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name != FLAG:
            rest.append(argument)
            continue
        if path is not None:
            raise UserError(f"{FLAG} {path}: is one file too many; give one, and flags for what is to differ from it")
        path = value if equals else next(arguments, "")
        if not path or path.startswith("--"):
            raise UserError(f"{FLAG}: names no file; {_MEANT}")
        if os.path.isdir(folder := at_home(Path(path))):
            path = str(folder / "config.yaml")
    return path, rest


def _flags(path: str) -> list[tuple[str, str]]:
    """Each setting of a file and the flag that stands for it."""
    flags = []
    for group, values in _read(path).items():
        fields = {field.name: str(field.type) for field in dataclasses.fields(GROUPS[group])}
        for name, value in values.items():
            if name not in fields:
                raise UserError(f"{FLAG} {path}: {group} has no setting {name}; {_MEANT}")
            if isinstance(value, dict | list):
                raise UserError(f"{FLAG} {path}: {name} has more than one value; give it one")
            if value == "" or (value is None and "None" not in fields[name]):
                raise UserError(f"{FLAG} {path}: {name} has no value; give it one, or leave it out")
            if (fields[name] == "bool") != isinstance(value, bool):
                wanted = "true or false" if fields[name] == "bool" else "neither true nor false"
                raise UserError(f"{FLAG} {path}: {name} must be {wanted}")
            if fields[name] in _TEXTS and not isinstance(value, str | None):
                raise UserError(
                    f"{FLAG} {path}: {name} {value} is no text to YAML, which may write it otherwise; quote it"
                )
            if isinstance(value, int) and "int" in fields[name] and value.bit_length() > 64:
                raise UserError(f"{FLAG} {path}: {name} is a number of more than 64 bits; give it a smaller one")
            flag = str(name).replace("_", "-")
            if isinstance(value, bool):
                flags.append((name, f"--{flag}" if value else f"--no-{flag}"))
            elif value is not None or "str" not in fields[name]:  # as a text setting, None would become the text
                flags.append((name, f"--{flag}={value}"))
    return flags


class _Twice(yaml.YAMLError):
    """A key that a mapping has twice, of which YAML would take the last without a word."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        keys = [key.value for key in scalars if key.tag != _MERGE]
        if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise _Twice(twice)
        return super().construct_mapping(node, deep)


def _read(path: str) -> dict[str, dict[str, Any]]:
    """The settings by group."""
    try:
        groups = yaml.load(at_home(Path(path)).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{FLAG} {path}: {error.strerror}; {_MEANT}") from error
    except _Twice as error:
        raise UserError(f"{FLAG} {path}: {error} is given twice; give it once") from error
    # Besides YAML's own: what only looks like a number or a date, or has a tag that does not suit it.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = one_line(error)[:200]
        raise UserError(f"{FLAG} {path}: is not YAML ({reason}); {_MEANT}") from error
    if not isinstance(groups, dict) or not all(isinstance(values, dict) for values in groups.values()):
        raise UserError(f"{FLAG} {path}: must hold the groups {', '.join(GROUPS)}, of settings each; {_MEANT}")
    if unknown := set(map(str, groups)) - set(GROUPS):
        raise UserError(f"{FLAG} {path}: {min(unknown)} is none of the groups {', '.join(GROUPS)}; {_MEANT}")
    return groups
