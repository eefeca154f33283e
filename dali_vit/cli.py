"""The command line: the only module that prints results.

Exit codes: 0 done; 2 a fault that the user can mend (one line on stderr); 75 stopped by a signal or --max-hours with a
checkpoint (with --gpus N also before the first), to be started again; 130 Ctrl-C where there is nothing to save (while
processes wait for each other SIGINT kills them, which a shell shows as 130, too); 1 a defect of ours (traceback).
`stopping` ends a run that hangs with 70. A run that is told to stop a second time, and an evaluation with --gpus N that
is told to stop once, end with 128 + the signal.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

import tyro

from dali_vit import parsing, process
from dali_vit.arguments import (
    ConvertArguments,
    DoctorArguments,
    EvalArguments,
    ExportArguments,
    PredictArguments,
    PreviewArguments,
)
from dali_vit.config import LocalUserError, UserError, mendable, to_yaml
from dali_vit.config_file import expand
from dali_vit.parsing import PROGRAM, named_recipe, naming_file, parse, parse_train, stdout_may_be_full
from dali_vit.predictions import as_json, as_table
from dali_vit.variants import check_config

if TYPE_CHECKING:
    from dali_vit.distributed import Group

T = TypeVar("T")


def run() -> NoReturn:
    """`dali-vit` as a process."""
    process.end_at_ctrl_c()
    process.run(main, PROGRAM)


def _tell(line: str) -> None:
    """Prints a line on stderr; it is no error if nobody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _say(what: object) -> None:
    """Prints on stdout; UserError if stdout is a file on a full disk."""
    with stdout_may_be_full():
        print(what, flush=True)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command that the arguments name; exits with one of the codes in the module's docstring."""
    argv = list(sys.argv[1:] if argv is None else argv)
    rank = 0
    try:
        rank = _rank()
        _set_up_logging(rank)
        code = parsing.after_log(_dispatch(argv))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 0
    except (ValueError, OSError) as error:
        told = mendable(error) if isinstance(error, OSError) else error
        if told is None or not _is_the_users(told):
            raise
        # Every rank raises a UserError that is not local, so rank 0 alone reports it.
        if rank == 0 or not isinstance(error, UserError) or isinstance(error, LocalUserError):
            _tell(f"{PROGRAM}: {parsing.without_control_characters(' '.join(str(told).split()))}")
        code = 2
    # Once more in a process of a group: what the error's frames held outlived the collection in `distributed.connect`.
    # One that runs alone has no threads of gloo, and need not search through all of torch's objects, which takes 0.3 s.
    if code and os.environ.get("WORLD_SIZE"):
        gc.collect()
    sys.exit(code)


def _rank() -> int:
    """This process's rank; `distributed` is not asked, as it imports torch and has not taken over srun's variables."""
    rank, tasks = process.int_from_environment("RANK", 0), process.int_from_environment("SLURM_STEP_NUM_TASKS", 1)
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE"):
        return rank
    return process.int_from_environment("SLURM_PROCID", 0) if tasks > 1 else 0


def _is_the_users(error: ValueError) -> bool:
    if isinstance(error, UserError):
        return True
    from pipelines.bad_samples import DecodeError  # imported here, as --help must not wait for DALI

    return isinstance(error, DecodeError)


def _dispatch(argv: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "predict": _predict,
        "convert": _convert,
        "export": _export,
        "prepare": _prepare,
        "verify": _verify,
        "preview": _preview,
        "doctor": _doctor,
    }
    if not argv or argv[0] in ("-h", "--help", "help"):
        _say(_overview())
        return 0
    if argv[0] in ("-V", "--version"):
        from importlib.metadata import version

        _say(version("dali-vit"))
        return 0
    if argv[0] not in commands:
        raise UserError(f"{argv[0]}: no such command; there are {', '.join(commands)}")
    process.check_surroundings()
    with naming_file(argv) if argv[0] in ("train", "preview") else contextlib.nullcontext():
        return commands[argv[0]](argv[1:])


def _overview() -> str:
    return f"""usage: {PROGRAM} COMMAND [OPTIONS]

Trains plain Vision Transformers from raw JPEGs, ImageNet-1k's or your own.

  {PROGRAM} train --recipe demo              a ViT on the built-in dataset, in minutes
  {PROGRAM} train --data PATH --gpus 8       the paper's ViT-S/16 on ImageNet-1k, 90 epochs
  {PROGRAM} eval --checkpoint C --data PATH
  {PROGRAM} predict --checkpoint C IMAGE...  the likeliest classes of files and folders
  {PROGRAM} convert IN.npz OUT.safetensors
  {PROGRAM} export --checkpoint C --out DIR  a folder that timm.create_model loads
  {PROGRAM} prepare SOURCE TARGET            shards or folders from ILSVRC's tars, TFRecords, parquet, a folder
  {PROGRAM} verify PATH                      reads every image and names what would hurt training
  {PROGRAM} preview --data PATH --out F.png  a grid of augmented images; takes all settings of train
  {PROGRAM} doctor                           what this machine has and what it will be used for

`{PROGRAM} COMMAND --help` lists a command's options, `{PROGRAM} --version` says which version this is."""


def _train(argv: list[str]) -> int:
    config, print_config = parse_train(argv)
    if print_config:
        check_config(config)
        _say(to_yaml(config).removesuffix("\n"))
        return 0
    from dali_vit import distributed, plan, runlock, train
    from dali_vit.launch import REQUEUE, launch
    from dali_vit.stopping import Interrupted

    if not distributed.is_worker():
        processes = distributed.resolve_gpus(config.run.gpus)
        if processes > 1:
            plan.plan(config, processes)  # reports the user's mistakes once, before any worker starts
            return launch(processes, ["train", *argv], max_restarts=config.run.max_restarts)
    try:
        with distributed.connect(config.run.gpus, config.run.hang_timeout) as group:
            planned = distributed.together(lambda: plan.plan(config, group.world_size, writes=group.is_main))
            with runlock.locked(config, group):
                planned = distributed.together(lambda: plan.up_to_date(planned, config))
                train.train(config, group, planned, ends_process=True)
    except Interrupted as stopped:
        if _rank() == 0:
            _tell(f"{PROGRAM}: {stopped}")
        return REQUEUE
    return 0


def _eval(argv: list[str]) -> int:
    arguments: EvalArguments = parse(EvalArguments, argv, "eval")
    if arguments.json:
        _keep_stdout()
    from dali_vit import distributed, inference
    from dali_vit.launch import launch_once

    if not distributed.is_worker():
        processes = distributed.resolve_gpus(arguments.gpus)
        if processes > 1:
            return launch_once(processes, ["-m", "dali_vit", "eval", *argv])
    process.tidy_up_at_ctrl_c()
    with distributed.connect(arguments.gpus) as group:
        metrics = inference.evaluate_checkpoint(arguments, group)
        if group.is_main:
            if arguments.json:
                # JSON has no NaN or infinity, which a model that has diverged gives.
                _say(json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()}))
            else:
                width = max(map(len, metrics))
                for name, value in metrics.items():
                    _say(f"{name:<{width}}  {f'{value:,}' if isinstance(value, int) else f'{value:.4f}'}")
    return 0


def _predict(argv: list[str]) -> int:
    arguments: PredictArguments = parse(PredictArguments, argv, "predict")
    if not arguments.images:
        raise UserError("IMAGE: missing; name at least one image file or folder")
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: must be at least 1")
    if arguments.gpus is not None and arguments.gpus > 1:
        raise UserError(f"--gpus {arguments.gpus}: predict uses one GPU; give 1, or 0 for the CPU")
    if arguments.json:
        _keep_stdout()
    from dali_vit import distributed, inference

    process.tidy_up_at_ctrl_c()
    with distributed.connect(arguments.gpus) as group:
        lines = as_json if arguments.json else as_table

        def work() -> None:
            asked = arguments.checkpoint, arguments.images, group.device
            found = inference.predict(*asked, top=arguments.top, resolution=arguments.resolution)
            # If this process ended because nobody reads its output, the other ranks would wait for word from it.
            with contextlib.suppress(BrokenPipeError), contextlib.closing(found) as predictions:
                for text in lines(predictions):
                    _say(text)

        _by_main_alone(group, work)
    return 0


def _by_main_alone(group: Group, work: Callable[[], T]) -> T | None:
    """The result of work that only the main process does; None on the other ranks, which its errors end, too."""
    from dali_vit import distributed

    def told() -> T:
        try:
            return work()
        except ValueError as error:
            if isinstance(error, UserError) or not _is_the_users(error):
                raise
            raise UserError(str(error)) from error

    return distributed.on_main(group, told)


def _convert(argv: list[str]) -> int:
    arguments: ConvertArguments = parse(ConvertArguments, argv, "convert")
    from dali_vit import inference

    process.tidy_up_at_ctrl_c()
    _say(inference.convert(arguments.source, arguments.target, arguments.resolution))
    return 0


def _export(argv: list[str]) -> int:
    arguments: ExportArguments = parse(ExportArguments, argv, "export")
    from dali_vit.export import export

    process.tidy_up_at_ctrl_c()
    _say(export(arguments.checkpoint, arguments.out, arguments.resolution))
    return 0


def _prepare(argv: list[str]) -> int:
    from dali_vit.prepare import PrepareArguments, prepare

    process.tidy_up_at_ctrl_c()
    prepare(parse(PrepareArguments, argv, "prepare"))
    return 0


def _verify(argv: list[str]) -> int:
    from dali_vit.verify import VerifyArguments, verify

    process.tidy_up_at_ctrl_c()
    arguments: VerifyArguments = parse(VerifyArguments, argv, "verify")
    if arguments.json:
        _keep_stdout()
        logging.getLogger("dali_vit").setLevel(logging.WARNING)
    report = verify(arguments)
    if arguments.json:
        _say(json.dumps(report.to_json()))
    return report.exit_code


def _preview(argv: list[str]) -> int:
    argv = expand(argv)
    defaults = PreviewArguments(out=tyro.MISSING, config=named_recipe(argv))
    arguments: PreviewArguments = parse(PreviewArguments, argv, "preview", default=defaults)
    from dali_vit import distributed
    from dali_vit.preview import preview

    process.tidy_up_at_ctrl_c()
    config = arguments.config
    with distributed.connect(config.run.gpus) as group:
        written = _by_main_alone(
            group, lambda: preview(config, group, arguments.out, step=arguments.at_step, count=arguments.images)
        )
    if written is not None:
        _say(written)
    return 0


def _doctor(argv: list[str]) -> int:
    parse(DoctorArguments, argv, "doctor")
    from dali_vit import doctor

    process.tidy_up_at_ctrl_c()
    text, fit = doctor.report()
    _say(text)
    return 0 if fit else 2


def _keep_stdout() -> None:
    """Keeps stdout for the JSON alone: messages go to stderr."""
    for handler in logging.getLogger("dali_vit").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


def _set_up_logging(rank: int) -> None:
    handler = parsing.LogHandler(sys.stdout)
    handler.setFormatter(parsing.LogFormatter())
    if process.int_from_environment("LOCAL_RANK", process.int_from_environment("SLURM_LOCALID", 0)):
        # Of what a machine lacks, and what all its processes find, the first of them tells.
        handler.addFilter(lambda record: not getattr(record, "of_machine", False))
    logger = logging.getLogger("dali_vit")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
