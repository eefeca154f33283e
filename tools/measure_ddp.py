#!/usr/bin/env python3
"""What DistributedDataParallel's settings cost the training step, on as many processes as asked for.

    tools/measure_ddp.py --processes 8                                 a GPU each
    tools/measure_ddp.py --processes 2 --gpus 0 --model Ti/16 --batch-size 16      the CPU, over gloo

Every process trains on random images that stay on its device, through the trainer's own step. The settings take
turns in rounds; where the step is compiled, as on GPUs by default, each setting runs all its rounds before the next.
The table gives each setting's median time of a step on the slowest rank.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from benchmark import command  # first, see there

# isort: split

import torch
from benchmark import report
from torch._dynamo import config as dynamo_config
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from dali_vit import distributed, recipes, step
from dali_vit.config import CompileMode, Config, ModelConfig, OptimConfig, RunConfig, UserError
from dali_vit.distributed import Group
from dali_vit.launch import launch_once
from dali_vit.model import create_model
from dali_vit.optim import create_optimizer
from dali_vit.validation import check_range

SETTINGS: dict[str, dict[str, Any]] = {
    "neither": {"gradient_as_bucket_view": False, "static_graph": False},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True, "static_graph": False},
    "static_graph": {"gradient_as_bucket_view": False, "static_graph": True},
    "both": {"gradient_as_bucket_view": True, "static_graph": True},
    "both, buckets of 100 MB": {"gradient_as_bucket_view": True, "static_graph": True, "bucket_cap_mb": 100},
    "both, gradients sent in bfloat16": {"gradient_as_bucket_view": True, "static_graph": True},
    "both, compiled in one piece": {"gradient_as_bucket_view": True, "static_graph": True},
}


@command.telling_mistakes("measure_ddp.py")
def main() -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--gpus", type=int, help="0: the CPU; default: a GPU for each process")
    parser.add_argument("--model", default="S/16", help="as for dali-vit train; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a process; default: %(default)s")
    parser.add_argument("--compile", default="auto", choices=get_args(CompileMode), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="each setting once in a round; default: %(default)s")
    parser.add_argument("--steps", type=int, default=10, help="steps of a setting in a round; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    sys.exit(_main(parser.parse_args()))


def _main(arguments: argparse.Namespace) -> int:
    if not distributed.is_worker():  # mistakes are reported once, before any process starts
        report.check_json(arguments.json)
        if arguments.processes < 2:
            raise UserError(f"--processes {arguments.processes}: at least 2 have gradients to exchange")
        for flag in ("batch_size", "rounds", "steps"):
            check_range(f"--{flag.replace('_', '-')}", getattr(arguments, flag), 1)
        create_model(ModelConfig(arguments.model), num_classes=1000, resolution=224)
        gpus = distributed.resolve_gpus(arguments.gpus)
        if 0 < gpus < arguments.processes:
            raise UserError(f"--processes {arguments.processes}: there are {gpus} GPUs; --gpus 0 takes the CPU")
        return launch_once(arguments.processes, [__file__, *sys.argv[1:]])
    with distributed.connect(arguments.gpus) as group:
        medians = measure(arguments, group)
    if group.is_main:
        for name, seconds in medians.items():
            print(f"{name:36} {1e3 * seconds:8.2f} ms  {seconds / medians['neither']:.3f}")
        if arguments.json is not None:
            written = {key: str(v) if isinstance(v, Path) else v for key, v in vars(arguments).items()}
            report.write_json(arguments.json, {"seconds": medians, "arguments": written})
    return 0


def measure(arguments: argparse.Namespace, group: Group) -> dict[str, float]:
    """Median seconds a step of each setting. The settings take turns where nothing is compiled.

    Compiled code is split where DDP's gradient buckets end, so that their exchange overlaps with the backward pass, but
    is found again by the step's code alone: in turns, all settings would run the code compiled for the first. In one
    piece, kernels are fused across those ends, and all gradients are exchanged after the backward pass.
    """
    compiled = arguments.compile not in ("off", "auto") or (arguments.compile == "auto" and group.device.type == "cuda")
    medians: dict[str, float] = {}
    names = [name for name in SETTINGS if compiled or not name.endswith("one piece")]
    for together in [[name] for name in names] if compiled else [names]:
        torch.compiler.reset()
        with dynamo_config.patch(optimize_ddp=not together[0].endswith("one piece")):
            medians |= take_turns({name: make(name, arguments, group) for name in together}, arguments, group)
    return medians


def take_turns(steps: dict[str, Callable[[], Any]], arguments: argparse.Namespace, group: Group) -> dict[str, float]:
    """Median seconds of each of the steps, run in turns."""
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, run in steps.items():
            distributed.barrier()
            began = distributed.now(group)
            for _ in range(arguments.steps):
                run()
            seconds = max(distributed.gather_objects(distributed.now(group) - began)) / arguments.steps
            if turn > 0:  # round 0 compiles and makes the buckets
                rounds[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def make(name: str, arguments: argparse.Namespace, group: Group) -> Callable[[], Any]:
    """A step of training under a setting."""
    optim = OptimConfig(batch_size=arguments.batch_size * group.world_size)
    config = Config(
        recipes.get("s16-90ep").data, ModelConfig(arguments.model), optim, RunConfig(compile=arguments.compile)
    )
    model = create_model(config.model, num_classes=1000, resolution=config.data.resolution).to(group.device)
    made: list[DistributedDataParallel] = []

    class Wrapped(DistributedDataParallel):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    step.DDP_OPTIONS.clear()
    step.DDP_OPTIONS.update(SETTINGS[name])
    step.DistributedDataParallel = Wrapped  # type: ignore[misc]
    update, _ = step.build_update(config, model, create_optimizer(model, optim), group)
    if name.endswith("bfloat16"):
        made[0].register_comm_hook(None, bf16_compress_hook)
    size = (arguments.batch_size, config.data.resolution, config.data.resolution, 3)
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=group.device)
    labels = torch.randint(0, 1000, (arguments.batch_size,), device=group.device)
    return lambda: update(images, labels, 0.8, 1e-4)


if __name__ == "__main__":
    command.run(main)
