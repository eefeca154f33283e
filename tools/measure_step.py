#!/usr/bin/env python3
"""How fast the training step runs, compiled in each way, and where its time goes; no data set is needed.

    tools/measure_step.py --batch-size 128                              on a GPU
    tools/measure_step.py --gpus 0 --model mu/16 --batch-size 8         on the CPU

The step is the trainer's own, on random images that stay on the device. One way of compiling after the other is
warmed up, measured and profiled; the table under each rate sums the time of kernels by what they are for. --inductor
sets torch._inductor.config, for instance --inductor combo_kernels=True.
"""

from __future__ import annotations

import ast
import gc
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from benchmark import command  # first, see there

# isort: split

import torch
from benchmark import kernels, modes, report
from benchmark.windows import measure
from torch._inductor import config as inductor_config

from dali_vit import distributed, recipes
from dali_vit.config import AttentionKernel, CompileMode, Config, LocalUserError, ModelConfig, UserError, to_dict
from dali_vit.environment import describe_environment
from dali_vit.metrics import StepTimer, peak_flops
from dali_vit.model import create_model, flops_per_image
from dali_vit.validation import check_range

NUM_CLASSES = 1000


@command.telling_mistakes("measure_step.py")
def main() -> None:
    """Exits with 1 where a way of running the step fails."""
    parser = command.Parser(__doc__)
    parser.add_argument("--gpus", type=int, choices=[0, 1], help="0: the CPU; default: one GPU, else the CPU")
    parser.add_argument("--model", default="S/16", help="as for dali-vit train; default: %(default)s")
    parser.add_argument(
        "--residual",
        default="float32",
        choices=["float32", "bfloat16"],
        help="as for dali-vit train; default: %(default)s",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        choices=get_args(AttentionKernel),
        help="as for dali-vit train; default: %(default)s",
    )
    parser.add_argument("--timm-blocks", action="store_true", help="timm's blocks instead of dali_vit/blocks.py's")
    parser.add_argument("--batch-size", type=int, default=1024, help="default: %(default)s")
    every = [mode for mode in get_args(CompileMode) if mode != "auto"]
    parser.add_argument(
        "--compile", nargs="+", choices=every, help="default: all that take the attention, one after the other"
    )
    parser.add_argument("--inductor", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the compiler")
    parser.add_argument("--seconds", type=float, default=5.0, help="time measured of each; default: %(default)s")
    parser.add_argument("--profile", type=int, default=5, help="steps profiled of each; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    report.check_json(arguments.json)
    report.check_seconds(arguments.seconds)
    check_range("--profile", arguments.profile, 1)
    check_range("--batch-size", arguments.batch_size, 1)
    # The packed attention is for compiled steps alone.
    modes_tried = arguments.compile or [mode for mode in every if (mode, arguments.attention) != ("off", "packed")]
    settings = dict(parse_setting(text) for text in arguments.inductor)

    recipe = recipes.get("s16-90ep")
    config = replace(
        recipe,
        model=ModelConfig(arguments.model, residual=arguments.residual),
        optim=replace(recipe.optim, batch_size=arguments.batch_size),
    )
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "config": to_dict(config) | {"timm_blocks": arguments.timm_blocks},
        "inductor": {name: value for name, value in os.environ.items() if name.startswith("TORCHINDUCTOR_")} | settings,
    }
    gpus = min(1, torch.cuda.device_count()) if arguments.gpus is None else arguments.gpus
    with distributed.connect(gpus) as group, inductor_config.patch(settings):
        for mode in modes_tried:
            tried = replace(config, run=replace(config.run, compile=mode, attention=arguments.attention))
            try:
                result[mode] = measure_step(
                    tried, group, arguments.seconds, arguments.profile, timm_blocks=arguments.timm_blocks
                )
            except (RuntimeError, LocalUserError) as error:  # the compiler, or lack of memory: other ways may work
                traceback.print_exc()
                result[mode] = {"fails": f"{type(error).__name__}: {error}"}
            free(group)
            if arguments.json is not None:  # what has been measured so far
                report.write_json(arguments.json, result)
    sys.exit(int(any("fails" in result[mode] for mode in modes_tried)))


def parse_setting(text: str) -> tuple[str, Any]:
    """The name and value of a setting of torch._inductor.config, from NAME=VALUE with a Python literal as VALUE."""
    name, _, value = text.partition("=")
    try:
        inductor_config.get_config_copy()[name]
        return name, ast.literal_eval(value)
    except KeyError:
        raise UserError(f"--inductor {text}: torch {torch.__version__} has no setting {name!r}") from None
    except (ValueError, SyntaxError):
        raise UserError(f"--inductor {text}: give NAME=VALUE, such as combo_kernels=True") from None


def measure_step(
    config: Config, group: distributed.Group, seconds: float, profiled: int, *, timm_blocks: bool = False
) -> dict[str, Any]:
    """Measures, profiles and prints one way of running the step; returns what the JSON file holds about it."""
    began = time.perf_counter()
    side, count = config.data.resolution, config.optim.batch_size
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, device=group.device)
    labels = torch.randint(0, NUM_CLASSES, (count,), device=group.device)
    model = create_model(config.model, num_classes=NUM_CLASSES, resolution=side).to(group.device)
    if timm_blocks:
        modes.use_timm_blocks(model)
    flops = 3 * flops_per_image(model, side)  # the backward pass costs twice the forward
    train_on, compiled = modes.training_step(config, model, 10**6, group)

    measured = measure(
        lambda: train_on(images, labels), StepTimer(group.device), images=count, seconds=seconds, group=group
    )
    _, profile = modes.profile_steps(lambda: (images, labels), train_on, group, profiled)
    peak = peak_flops(group.device)
    result = {
        **measured.to_json(),
        "compiled": compiled,
        "mfu": measured.images_per_sec * flops / peak if peak else None,
        "seconds_in_all": time.perf_counter() - began,
        "profile": profile,
    }
    if group.device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated(group.device) / 2**30
    mfu = f", MFU {100 * result['mfu']:.1f} %" if peak else ""
    print(f"{compiled}\n{measured.images_per_sec:,.0f} images/s{mfu}\n{kernels.table(profile)}\n", flush=True)
    return result


def free(group: distributed.Group) -> None:
    """Frees the memory of what was measured: two ways of running the step may not fit into a GPU's memory together."""
    torch.compiler.reset()
    gc.collect()
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(group.device)


if __name__ == "__main__":
    command.run(main)
