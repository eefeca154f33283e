"""Every recipe against the rows of the paper's table written out field by field."""

import pytest

from dali_vit import config as configs
from dali_vit import recipes
from dali_vit.config import Config, UserError
from dali_vit.validation import validate

PAPER = {
    "model": "S/16",
    "pool": "gap",
    "posemb": "sincos2d",
    "head": "mlp",
    "resolution": 224,
    "crop": "tensorflow",
    "randaug_layers": 2,
    "randaug_magnitude": 10.0,
    "randaug_contrast": "paper",
    "antialias": True,
    "residual": "float32",
    "minival": 0.01,
    "steps": None,
    "batch_size": 1024,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "warmup_steps": 10_000,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "first_moment": "float32",
    "grad_clip_norm": 1.0,
    "label_smoothing": 0.0,
    "mixup_alpha": 0.2,
    # Not the paper's, but what the documentation says.
    "spike_threshold": 10.0,
    "eval_every": 2.0,
}
ROWS = {
    "": {},
    "-no-aug": {"randaug_layers": 0, "mixup_alpha": 0.0},
    "-learned-posemb": {"posemb": "learn"},
    "-batch4096": {"batch_size": 4096},
    "-cls-token": {"pool": "tok"},
    "-linear-head": {"head": "linear"},
    "-original-aug": {"posemb": "learn", "batch_size": 4096, "pool": "tok"},
    "-original": {"posemb": "learn", "batch_size": 4096, "pool": "tok", "randaug_layers": 0, "mixup_alpha": 0.0},
}
TABLE = {f"s16-{e}ep{suffix}": {"epochs": e, **changes} for e in (90, 150, 300) for suffix, changes in ROWS.items()}
TABLE |= {
    "b16-90ep": {"epochs": 90, "model": "B/16"},
    "b32-90ep": {"epochs": 90, "model": "B/32"},
    "resnet50-90ep": {
        "epochs": 90,
        "model": "timm:resnet50",
        "crop": "torchvision",
        "randaug_layers": 0,
        "mixup_alpha": 0.0,
        "optimizer": "sgd",
        "momentum": 0.9,
        "lr": 0.4,
        "label_smoothing": 0.1,
        "grad_clip_norm": None,
        "warmup_steps": 6193,  # 5 x 1,268,355 / 1024
    },
}


def flat(config: Config) -> dict:
    return {name: value for group in configs.to_dict(config).values() for name, value in group.items()}


@pytest.mark.parametrize("name", TABLE)
def test_recipe_resolves_to_the_papers_row(name):
    resolved = flat(recipes.get(name))
    expected = {**PAPER, **TABLE[name]}
    assert {field: resolved[field] for field in expected} == expected
    assert resolved["recipe"] == name
    validate(recipes.get(name))


def test_there_is_no_recipe_outside_the_table_but_the_demo():
    assert set(recipes.RECIPES) == {*TABLE, "demo"}, "TABLE holds what each recipe is to resolve to: add yours"
    demo = flat(recipes.get("demo"))
    assert (demo["randaug_layers"], demo["randaug_magnitude"], demo["mixup_alpha"]) == (1, 2.0, 0.0)


def test_default_recipe_is_the_90_epoch_row():
    assert Config() == recipes.get("s16-90ep")


@pytest.mark.parametrize(
    ("suffix", "accuracies"),
    [
        ("", "76.5 / 78.5 / 80.0"),
        ("-no-aug", "73.6 / 73.7 / 73.7"),
        ("-learned-posemb", "75.0 / 78.0 / 79.6"),
        ("-batch4096", "74.7 / 77.3 / 78.6"),
        ("-cls-token", "75.0 / 76.9 / 78.2"),
        ("-linear-head", "76.7 / 78.6 / 79.8"),
        ("-original-aug", "71.6 / 74.8 / 76.1"),
        ("-original", "66.8 / 67.2 / 67.1"),
    ],
)
def test_descriptions_state_the_papers_accuracy(suffix, accuracies):
    lines = {line.split()[0]: line for line in recipes.describe().splitlines()}
    for epochs, accuracy in zip((90, 150, 300), accuracies.split(" / "), strict=True):
        assert lines[f"s16-{epochs}ep{suffix}"].endswith(f": {accuracy} %")


def test_unknown_recipe_names_a_near_one():
    with pytest.raises(UserError, match=r"--recipe s16-90epp.*did you mean s16-90ep"):
        recipes.get("s16-90epp")
