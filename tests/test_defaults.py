"""Settings by default are those that the documentation tells."""

from __future__ import annotations

import dataclasses

from dali_vit import arguments, recipes
from dali_vit.config import Config, to_dict


def test_the_demo_is_the_recipe_whose_accuracy_the_readme_tells() -> None:
    default, demo = to_dict(Config()), to_dict(recipes.get("demo"))
    assert {name: value for group in demo for name, value in demo[group].items() if default[group][name] != value} == {
        "data": "demo",
        "resolution": 64,
        "randaug_layers": 1,
        "randaug_magnitude": 2.0,
        "model": "Ti/8",
        "width": 96,
        "depth": 3,
        "num_heads": 3,
        "mlp_dim": 384,
        "epochs": 20.0,
        "batch_size": 64,
        "lr": 2e-3,
        "warmup_steps": 60,
        "mixup_alpha": 0.0,
        "recipe": "demo",
        "log_every": 20,
        "checkpoint_every": 200,
        "eval_every": 5.0,
    }


def test_the_defaults_of_the_other_commands_are_frozen() -> None:
    found = {
        kind.__name__: {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
        for kind in (
            arguments.EvalArguments,
            arguments.PredictArguments,
            arguments.ConvertArguments,
            arguments.ExportArguments,
            arguments.PreviewArguments,
        )
    }
    assert found == {
        "EvalArguments": {
            "gpus": None,
            "split": "val",
            "minival": None,
            "v2": False,
            "real": None,
            "max_bad_share": 0.0,
            "batch_size": 256,
            "resolution": None,
            "threads": None,
            "json": False,
        },
        "PredictArguments": {"top": 5, "gpus": None, "resolution": None, "json": False},
        "ConvertArguments": {"resolution": None},
        "ExportArguments": {"resolution": None},
        "PreviewArguments": {"at_step": 0, "images": 32},
    }


def test_what_a_run_does_by_default_is_frozen() -> None:
    """As the documentation tells it; `test_recipes` has what the weights depend on."""
    run = to_dict(Config())["run"]
    assert run == {
        "recipe": "s16-90ep",
        "name": None,
        "runs_dir": "runs",
        "seed": 0,
        "gpus": None,
        "threads": None,
        "autotune": "auto",
        "compile": "auto",
        "attention": "auto",
        "resume": True,
        "log_every": 50,
        "eval_every": 2.0,
        "checkpoint_every": 1000,
        "keep_checkpoints": 3,
        "grad_accum_steps": 1,
        "max_hours": None,
        "max_restarts": 3,
        "max_skipped_steps": 10,
        "hang_timeout": 600.0,
        "profile": 0,
    }
    assert Config().data.max_bad_share == 0.01
