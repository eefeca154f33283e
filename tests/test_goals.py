"""The table that sets what was measured beside the goals."""
# ruff: noqa: E402

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where Python looks when the tool is run as a script

from benchmark import goals


def test_goals_are_met_or_missed_by_what_was_measured():
    where = {"gpus": "NVIDIA H200", "torch": "2.15.0", "host": "secret", "command": "x"}

    def joint(rate: float, gpus: int) -> dict[str, Any]:
        return {
            "environment": where,
            "config": {"run": {"gpus": gpus}, "compiled": "default mode"},
            "loader": {"images_per_sec": 16_000.0},
            "joint": {"images_per_sec": rate},
            "joint_to_model": 0.96,
            "stall_fraction": 0.03,
            "randaug_cost": {"cost": 0.035},
        }

    loaders = {"dali-vit": {"images_per_sec": 1700.0}, "timm": {"images_per_sec": 680.0}}
    compared = {"config": {"run": {"gpus": 0}}, "compare": {"ratio": 2.5, "loaders": loaders}}
    results = {
        "step-1024": {"default": {"images_per_sec": 11_900.0}, "off": {"images_per_sec": 3_000.0}},
        "step-1024-max-autotune": {"max-autotune": {"images_per_sec": 12_000.0}},
        "step-128": {"default": {"images_per_sec": 8_999.0}},
        "joint-128": joint(7_927.0, 1),
        "node": joint(63_000.0, 2),
        "joint-cpu": joint(40.0, 0),
        "input": {"images_per_sec": 29_449.0, "cpu_us": 60.5, "python_us": 6.7, "threads": 2},
        "compare-1": compared,
        "compare": compared | {"config": {"run": {"gpus": 1}}},
        "compare-2": compared | {"compare": {"ratio": 1.6, "loaders": loaders}},
        "compare-3": compared | {"compare": {"ratio": 1.59, "loaders": loaders}},
    }
    found = {row.what: row for row in goals.rows(results)}
    assert {what: (round(row.measured, 6), row.verdict) for what, row in found.items()} == {
        "step alone, batch 1024, off": (3_000, ""),
        "step alone, batch 1024, default": (11_900, "missed"),
        "step alone, batch 1024, max-autotune": (12_000, "met"),
        "step alone, batch 128, default": (8_999, "missed"),
        "loader alone, batch 128": (16_000, "met"),
        "training, batch 128": (7_927, ""),
        "training / step alone, batch 128": (96, "missed"),
        "data wait, batch 128": (3, "met"),
        "RandAugment's cost, batch 128": (3.5, "missed"),
        "loader alone, all GPUs": (16_000, "missed"),  # of 2 GPUs
        "training, all GPUs": (63_000, ""),
        "training / step alone, all GPUs": (96, "missed"),
        "data wait, all GPUs": (3, "met"),
        "RandAugment's cost, all GPUs": (3.5, "missed"),
        "loader alone, Ti/16 on the CPU": (16_000, ""),
        "training, Ti/16 on the CPU": (40, ""),
        "training / step alone, Ti/16 on the CPU": (96, ""),
        "data wait, Ti/16 on the CPU": (3, ""),
        "RandAugment's cost, Ti/16 on the CPU": (3.5, ""),
        "the CPU's part of a GPU's loader": (29_449, ""),
        "loader / best other, compare-1": (2.5, "met"),
        "loader / best other, compare": (2.5, ""),
        "loader / best other, compare-2": (1.6, "met"),
        "loader / best other, compare-3": (1.59, "missed"),
    }
    text = goals.summary(results, {"step-128": "`tools/measure_step.py` (80 s)"})
    assert "| step alone, batch 128, default | >= 9,000 | 8,999 images/s | missed |  |" in text
    assert "| data wait, batch 128 | <= 3 | 3.0 % | met |  |" in text
    assert "90 epochs of 1,268,355 images on 8 such GPUs take 30.0 minutes" in text  # 90 x 1,268,355 / (8 x 7,927 x 60)
    assert "if each trains at 7,927 images/s, as one did at its share of batch 1024, and 8 processes" in text
    assert "- gpus: NVIDIA H200" in text
    assert "secret" not in text
    assert "DIFFERS" not in text
    of_runs = {"cores busy before": "1.0", "command": "x", "host": "y"}
    assert "DIFFERS" not in goals.summary(results | {"sweep": {"environment": where | of_runs}}, {})
    assert "busy" not in goals.summary(results | {"sweep": {"environment": where | of_runs}}, {})
    mixed = results | {"sweep": {"environment": where | {"gpus": "NVIDIA H100"}}}
    assert "- gpus DIFFERS: NVIDIA H200 (joint-128, node, joint-cpu); NVIDIA H100 (sweep)" in goals.summary(mixed, {})
    assert text.endswith("- step-128: `tools/measure_step.py` (80 s)\n")
