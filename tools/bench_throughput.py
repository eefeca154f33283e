#!/usr/bin/env python3
"""Measures how fast images are loaded and trained on, apart and together, and says which of the two is the limit.

    tools/bench_throughput.py --data PATH --gpus 1                      loader, step, and both together
    tools/bench_throughput.py --data PATH --gpus 0 --mode loader --compare    beside torchvision and timm
    tools/bench_throughput.py --data PATH --mode loader --sweep         the loader's best settings here

The stages are the trainer's own, under any recipe; the same commands run on GPUs and on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmark import command  # first, see there

# isort: split

import torch
import tyro
from benchmark import compare, kernels, modes, report, sweep
from benchmark.windows import Measurement, busy_cores

from dali_vit import distributed, plan
from dali_vit.autotune import loader_settings
from dali_vit.config import CompileMode, Config, DataConfig, ModelConfig, UserError, mendable, to_dict
from dali_vit.environment import describe_environment, usable_cores
from dali_vit.launch import launch_once
from dali_vit.loaders import LoaderSettings
from dali_vit.memory import warn_of_memory, warn_of_others
from dali_vit.metrics import peak_flops
from dali_vit.model import flops_per_image
from dali_vit.parsing import named_recipe
from pipelines.loader import DecodeError

PROGRAM = "bench_throughput.py"


@dataclass(frozen=True)
class Options:
    """What is measured, and on what."""

    recipe: str = "s16-90ep"
    """Recipe that supplies the settings; `dali-vit train --help` lists them."""
    mode: Literal["loader", "model", "joint", "all"] = "all"
    """The training graph alone, the step alone on a batch in memory, both as in training, or all three."""
    batch_size: int | None = None
    """Images per step over all GPUs; default: the recipe's."""
    gpus: int | None = None
    """GPUs on this machine, one process each; 0: the CPU; default: all, else the CPU."""
    threads: int | None = None
    """DALI's CPU threads per process, and the workers of --compare's loaders; default: the process's share of cores."""
    compile: CompileMode = "auto"
    """torch.compile of the step; auto: default on GPUs, off on the CPU; reduce-overhead, max-autotune: CUDA graphs."""
    autotune: Literal["auto", "on", "off"] = "auto"
    """Search for the loader's fastest settings first, about a minute, unless they are known; auto: on GPUs."""
    step_stream: Literal["default", "own", "high-priority"] = "default"
    """CUDA stream that the step is queued on, to compare: the default stream, as in training, or one of its own."""
    grad_accum_steps: int = 1
    """Parts into which each GPU splits its share of a batch, for GPUs whose memory does not hold it at once."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    seconds: float = 10.0
    """Time measured for each mode, each round of --compare and each trial of --sweep; warming up comes on top."""
    compare: bool = False
    """Also measure torchvision's and timm's loaders, in rounds that alternate with ours."""
    sweep: bool = False
    """Also try settings of the loader, and name the best."""
    randaug_cost: bool = False
    """Also measure training without RandAugment, in rounds that take turns, and say what RandAugment costs."""
    profile: int = 0
    """Also write a trace of this many steps of training, for ui.perfetto.dev, and say where their time goes."""
    profile_dir: Path = Path("runs/profile")
    """Folder of the trace."""
    json: Path | None = None
    """File to write the results to."""


@dataclass(frozen=True)
class Arguments:
    """All flags."""

    bench: tyro.conf.FlagCreatePairsOff[Options]
    data: DataConfig
    model: ModelConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 0; 2 for what the user can mend (one line on stderr); 1 for a defect of ours (traceback)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(argv)
    except (UserError, DecodeError) as error:
        if command.tells(error) or isinstance(error, DecodeError):  # which one rank alone may raise
            print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except OSError as error:
        told = mendable(error)
        if told is None:
            raise
        print(f"{PROGRAM}: {told}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _main(argv: list[str]) -> int:
    options, config = parse(argv)
    if not distributed.is_worker():
        processes = distributed.resolve_gpus(options.gpus)
        if processes > 1:
            plan.plan(config, processes, writes=False)  # reports the user's mistakes once, before any worker starts
            return launch_once(processes, [__file__, *argv])
    with distributed.connect(options.gpus) as group:
        benchmark(options, config, group)
    return 0


def parse(argv: list[str]) -> tuple[Options, Config]:
    """The options, and the config of the run to measure: the recipe as the flags change it. UserError for a mistake."""
    recipe = named_recipe(argv)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            arguments = tyro.cli(
                Arguments,
                args=argv,
                prog=PROGRAM,
                description=__doc__,
                default=Arguments(Options(), recipe.data, recipe.model),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as request:
        if request.code in (0, None):
            raise
        box = [line.strip("│╭╮╰╯─ \t") for line in captured.getvalue().splitlines()[1:]]
        message = " ".join(box[: box.index("")] if "" in box else box)
        raise UserError(f"{message} (--help lists the flags)") from None
    options = arguments.bench
    report.check_seconds(options.seconds)
    if options.randaug_cost and arguments.data.randaug_layers == 0:
        raise UserError("--randaug-cost: without RandAugment there is nothing to measure; give --randaug-layers 2")
    if options.profile < 0:
        raise UserError(f"--profile {options.profile}: must not be negative")
    report.check_json(options.json)
    if options.profile:
        report.check_folder("--profile-dir", options.profile_dir)
    optim = dataclasses.replace(
        recipe.optim,
        batch_size=recipe.optim.batch_size if options.batch_size is None else options.batch_size,
        # Not by epochs: a data set for benchmarks may end before the recipe's warm-up does.
        epochs=None,
        steps=recipe.optim.warmup_steps + 1_000_000,
    )
    config = Config(
        data=arguments.data,
        model=arguments.model,
        optim=optim,
        run=dataclasses.replace(
            recipe.run,
            seed=options.seed,
            gpus=options.gpus,
            threads=options.threads,
            autotune=options.autotune,
            compile=options.compile,
            grad_accum_steps=options.grad_accum_steps,
            # The trainer's checks look into the run's folder, which must not be one of the user's runs.
            name="benchmark",
            runs_dir=options.profile_dir,
        ),
    )
    return options, config


def benchmark(options: Options, config: Config, group: distributed.Group) -> dict[str, Any]:
    """Measures, prints and writes what the options ask for; returns what the JSON file holds. Collective."""
    set_step_stream(options.step_stream, group)
    planned = distributed.together(lambda: plan.plan(config, group.world_size, writes=False))
    dataset, seconds = planned.dataset, options.seconds
    environment = describe_environment()
    busy, cores = distributed.together(busy_cores), len(usable_cores())  # while the other ranks sleep, too
    environment |= {"cores busy before": f"{busy:.1f}", "torch threads": str(torch.get_num_threads())}
    measured_options = {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(options).items()}
    result: dict[str, Any] = {
        "environment": environment,
        "config": {**to_dict(config), "benchmark": measured_options, "world_size": group.world_size},
    }

    def say(text: str) -> None:
        if group.is_main:
            print(text, flush=True)

    say(
        f"{dataset.root}: {dataset.counts['train']:,} images; {config.optim.batch_size} a batch at"
        f" {config.data.resolution} px; {group.world_size} x {group.device.type}, {environment['cpu']} cores"
    )
    if busy > cores / 4 and group.is_main:
        print(f"others keep {busy:.1f} of {cores} cores busy: expect low, uneven rates", file=sys.stderr)
    trains = options.mode != "loader" or options.profile > 0 or options.randaug_cost
    if trains:
        warn_of_memory(planned.model, config, group)
    warn_of_others(group)

    @functools.cache
    def settings() -> LoaderSettings:  # as the trainer has them
        return loader_settings(dataset, config, group, planned.model.to(group.device))

    if options.compare:  # first, as it forks processes
        result["compare"] = compare.compare(config, dataset, settings, group, seconds)
        say(f"\n{report.comparison(result['compare'])}")
    if options.sweep:
        say("\nsweep, setting by setting:")
        trials, best = sweep.sweep(config, dataset, group, seconds, lambda *tried: say(report.trial(*tried)))
        result["sweep"] = sweep.to_json(trials, best)
        say(f"\n{report.sweep_table(trials, best)}")

    wanted = ("loader", "model", "joint") if options.mode == "all" else (options.mode,)
    # The backward pass costs twice the forward.
    train_flops = 3 * flops_per_image(planned.model, config.data.resolution)
    measured: dict[str, Measurement] = {}
    result["config"]["loader"] = dataclasses.asdict(settings())
    say(f"\n{report.HEADER}")

    def add(mode: str, measurement: Measurement) -> None:
        measured[mode] = measurement
        result[mode] = measurement.to_json()
        say(report.row(mode, measurement))

    if "loader" in wanted:
        add("loader", modes.measure_loader(config, dataset, settings(), group, seconds))
    if trains:
        train_on, compiled = modes.training_step(config, planned.model, planned.total_steps, group)
        result["config"]["compiled"] = compiled
    if "model" in wanted:
        add("model", modes.measure_model(train_on, config, dataset, settings(), group, seconds))
    if "joint" in wanted:
        add("joint", modes.measure_joint(train_on, config, dataset, settings(), group, seconds))
        result["stall_fraction"] = measured["joint"].wait_fraction
    trained = measured.get("joint") or measured.get("model")
    if trained:
        peak = peak_flops(group.device)
        rate = trained.images_per_sec / group.world_size
        result["mfu"] = rate * train_flops / peak if peak else None
    if options.mode == "all":
        loader, model, joint = (measured[mode].images_per_sec for mode in wanted)
        result["joint_to_model"] = joint / model
        say(report.details(result))
        say(report.verdict(loader, model, joint, result["stall_fraction"]))
    else:
        say(report.single(options.mode, measured[options.mode]))

    if options.randaug_cost:
        cost = modes.measure_randaug_cost(train_on, config, dataset, settings(), group, seconds)
        result["randaug_cost"] = cost
        say(report.randaug_cost(cost))
    if options.profile:
        trace, result["profile"] = modes.profile_joint(
            train_on, config, dataset, settings(), group, steps=options.profile, folder=options.profile_dir
        )
        say(f"trace of {options.profile} steps: {trace}\n{kernels.table(result['profile'])}")
    if options.json is not None and group.is_main:
        report.write_json(options.json, result)
    return result


def set_step_stream(name: str, group: distributed.Group) -> None:
    """Makes this thread queue everything on another stream of the GPU from now on, unless `default` is asked for.

    Work that a library puts on the default stream waits for the step only if the step is on that stream, too; and while
    a stream of high priority has work left, no blocks of DALI's kernels are started.
    """
    if name == "default":
        return
    if group.device.type != "cuda":
        raise UserError(f"--step-stream {name}: needs a GPU")
    torch.cuda.set_stream(torch.cuda.Stream(group.device, priority=-1 if name == "high-priority" else 0))


if __name__ == "__main__":
    command.run(main)
