"""Turns a command's flags into its dataclass with tyro: recipes supply defaults, mistakes become UserErrors.

And how a command's messages are printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import tyro

from dali_vit import recipes
from dali_vit.config import Config, ModelConfig, UserError, mendable
from dali_vit.config_file import expand, named_file
from dali_vit.process import NOBODY_READS
from dali_vit.variants import TIMM_PREFIX

__all__ = [
    "PROGRAM",
    "LogFormatter",
    "LogHandler",
    "after_log",
    "named_recipe",
    "naming_file",
    "parse",
    "parse_train",
    "stdout_may_be_full",
    "without_control_characters",
]

PROGRAM = "dali-vit"

_OTHERS = {
    **dict.fromkeys(("--data-dir", "--data-path", "--dataset"), "did you mean --data?"),
    **dict.fromkeys(("-b", "--batch"), "did you mean --batch-size?"),
    **dict.fromkeys(("--output", "--output-dir", "--workdir"), "did you mean --runs-dir?"),
    **dict.fromkeys(("--img-size", "--input-size", "--image-size"), "did you mean --resolution?"),
    **dict.fromkeys(("-j", "--workers", "--num-workers"), "did you mean --threads?"),
    "--aa": "did you mean --randaug-layers and --randaug-magnitude?",
    "--checkpoint-hist": "did you mean --keep-checkpoints?",
    "--clip-grad": "did you mean --grad-clip-norm?",
    "--experiment": "did you mean --name?",
    "--log-interval": "did you mean --log-every?",
    "--mixup": "did you mean --mixup-alpha?",
    "--opt": "did you mean --optimizer?",
    "--smoothing": "did you mean --label-smoothing?",
    "--torchcompile": "did you mean --compile?",
    "--warmup-epochs": "did you mean --warmup-steps?",
    "--wd": "did you mean --weight-decay, which is not multiplied by --lr?",
    "--amp": "on GPUs matrix products are in bfloat16 anyway",
    "--num-classes": "the classes are those of --data",
    **dict.fromkeys(("--pretrained", "--initial-checkpoint", "--finetune"), "every run starts from scratch"),
}
"""Flags of timm's, big_vision's and other scripts, and the hint at what dali-vit has in their place."""
_UNRECOGNIZED = "Unrecognized options: "


def parse_train(argv: list[str]) -> tuple[Config, bool]:
    """The resolved Config, and whether it is only to be printed."""
    print_config = "--print-config" in argv
    given = [argument for argument in argv if argument != "--print-config"]
    argv = expand(given)
    with naming_file(given):
        config: Config = parse(
            Config,
            argv,
            "train",
            default=named_recipe(argv),
            description="Trains a model; started again, it goes on from the run's newest checkpoint.\n\n"
            "--print-config prints the resolved settings instead. --config FILE takes settings from such a print, or"
            " from a run's folder or config.yaml; flags beside it override them.\n\n"
            f"Recipes (ImageNet-1k top-1 as the paper reports it):\n{recipes.describe()}",
        )
    return config, print_config


@contextlib.contextmanager
def naming_file(argv: list[str]) -> Iterator[None]:
    """Names the file of --config in UserErrors of the block about a setting that the file has, and no flag."""
    try:
        yield
    except UserError as error:
        said, *of_parser = re.split(rf" \(`{PROGRAM} \w+ --help` lists the options\)$", str(error))
        flag = re.search(r"(?<![\w=-])--[a-z][\w-]*(?![\w.-])", said)
        # What others than the parser say begins with the setting that is wrong; flags further on are remedies.
        wrong = flag and not said.startswith("Unrecognized") and (of_parser or not flag.start())
        if flag and wrong and (file := named_file(argv, flag[0])):
            raise type(error)(f"--config {file}: {error}") from error
        raise


def named_recipe(argv: list[str]) -> Config:
    """The settings of the recipe that the flags name, or of the default one, without those that another flag replaces.

    --steps replaces the epochs; --model the size of the recipe's own model, or, if it names one of timm's, all settings
    of the model.
    """
    recipe, model = _value(argv, "--recipe"), _value(argv, "--model")
    defaults = recipes.get(Config().run.recipe if recipe is None else recipe)
    epochs, steps = (_value(argv, flag) not in (None, "None") for flag in ("--epochs", "--steps"))
    if epochs and steps:
        raise UserError("--epochs and --steps: give one of them, not both")
    if steps:
        defaults = dataclasses.replace(defaults, optim=dataclasses.replace(defaults.optim, epochs=None))
    if model is not None:
        sizeless = dataclasses.replace(defaults.model, width=None, depth=None, num_heads=None, mlp_dim=None)
        own = ModelConfig() if model.startswith(TIMM_PREFIX) else sizeless
        defaults = dataclasses.replace(defaults, model=own)
    return defaults


def _value(argv: list[str], flag: str) -> str | None:
    """The last value given for a flag; None without the flag, or if no value follows, which the parser reports."""
    value = None
    for argument, following in itertools.zip_longest(argv, argv[1:]):
        name, equals, own = argument.partition("=")
        if name == flag:
            value = own if equals else following
    return value


def parse(
    arguments: type, argv: list[str], command: str, *, default: Any = None, description: str | None = None
) -> Any:
    """Parses a command's flags with tyro; a mistake becomes a UserError of one line."""
    _check_no_empty(argv)
    captured = io.StringIO()
    try:
        with stdout_may_be_full(), contextlib.redirect_stderr(captured):
            return tyro.cli(
                arguments,
                args=argv,
                prog=f"{PROGRAM} {command}",
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
                **({} if default is None else {"default": default}),
            )
    except SystemExit as exit_request:
        if exit_request.code in (0, None):
            raise
        raise UserError(_one_line(captured.getvalue(), command, argv)) from None


def _check_no_empty(argv: list[str]) -> None:
    """UserError for an empty value, which a shell makes of an unset variable: as a path it is the working directory."""
    for before, argument in itertools.pairwise(["", *argv]):
        flag, equals, value = argument.partition("=")
        if not argument or (flag.startswith("--") and equals and not value):
            flag = flag or (before if before.startswith("--") and "=" not in before else "an argument")
            raise UserError(f"{flag}: empty; give it a value, or leave it out (is a variable of the shell not set?)")


@contextlib.contextmanager
def stdout_may_be_full() -> Iterator[None]:
    """Turns an OSError of printing to stdout in the block into a UserError, if the user can mend it."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # --help; else it would be flushed, and fail, only as the process ends
    except OSError as error:
        # Else the process would write to the full disk again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = "stdout"
        raise mendable(error) or error from None


class LogHandler(logging.StreamHandler[TextIO]):
    """Prints what is logged, and goes on where that fails."""

    failure: OSError | None = None
    """Why a line could not be printed, the last of them, other than that nobody reads them any more."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError) and error.errno not in NOBODY_READS:
            self.failure = error
        super().handleError(record)


class LogFormatter(logging.Formatter):
    """The message alone, with the control characters of names escaped but for line breaks, which messages have, too."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(without_control_characters, super().format(record).split("\n")))


def without_control_characters(text: str) -> str:
    """Names from elsewhere could move the cursor, clear the screen or pass for a line of ours."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def after_log(code: int) -> int:
    """The exit code given; UserError instead of 0 or 2 where a full disk under stdout did not take lines of the log."""
    for handler in logging.getLogger("dali_vit").handlers:
        failure = handler.failure if isinstance(handler, LogHandler) and handler.stream is sys.stdout else None
        if code in (0, 2) and failure is not None:
            with stdout_may_be_full():  # a buffer has kept the lines, and may be written by now
                if not isinstance(sys.stdout.buffer, io.BufferedWriter):
                    raise failure
    return code


def _one_line(box: str, command: str, argv: list[str]) -> str:
    """The message inside the box that tyro draws around an error, without the help that follows a ruler in it."""
    message: list[str] = []
    for line in box.splitlines()[1:]:  # the first is the box's title
        text = line.strip("│ ")
        if text.strip("─-╰╯"):
            message.append(text)
        elif message:  # without UTF-8 a ruler comes before the message, too
            break
    text = " ".join(message)
    similar = re.search(r"Perhaps you meant.*?(--[\w-]+)", box, re.DOTALL)
    hint = f"did you mean {similar[1]}?" if similar else ""
    if command == "train" and text.startswith(_UNRECOGNIZED):
        hint = _what_instead(text.removeprefix(_UNRECOGNIZED), argv) or hint
    return f"{text}{'; ' if hint else ''}{hint} (`{PROGRAM} {command} --help` lists the options)"


def _what_instead(unknown: str, argv: list[str]) -> str | None:
    """A hint for arguments that other programs have but not this one; unknown: the parser's list, with line breaks."""
    joined = "".join(unknown.split())
    given = [argument.partition("=")[0] for argument in argv]
    flags = {flag: _OTHERS[name] for flag in given if (name := flag.replace("_", "-")) in _OTHERS}
    if len(flags) == 1 and joined.startswith(tuple(flags)):
        return next(iter(flags.values()))
    hints = [_without_flag(joined, argv), *(f"{flag}: {hint}" for flag, hint in flags.items())]
    return "; ".join(filter(None, hints)) or None


def _without_flag(joined: str, argv: list[str]) -> str | None:
    """A hint for the first of the unknown arguments, given without spaces, if it is no flag but what one is to have."""
    given = [*argv, *(argument.partition("=")[2] for argument in argv)]
    starts = [argument for argument in given if argument and joined.startswith("".join(argument.split()))]
    if not starts:
        return None
    argument = max(starts, key=len)
    if argument.startswith("-"):
        return None
    if f"--resume={argument}" in argv or ("--resume", argument) in itertools.pairwise(argv):
        return "--resume takes nothing: --runs-dir and --name say which run"
    if _value(argv, "--data") is None and os.path.isdir(argument):
        return f"did you mean --data {'./demo' if argument == 'demo' else shlex.quote(argument)}?"
    return None
