"""tools/measure_*.py, the table of where a step's time goes, and the trainer's step as CUDA graphs replay it."""
# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import Block
from torch._inductor import config as inductor_config
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where Python looks when the tool is run as a script

import measure_ddp
import measure_index
import measure_input
import measure_kernels
import measure_step
from benchmark import goals, kernels, modes, windows

import dali_vit.compiling
import dali_vit.step
from dali_vit.blocks import LeanBlock
from dali_vit.model import create_model
from dali_vit.optim import create_optimizer
from dali_vit.step import build_update

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64_32x6_nn>", "matrix products"),
        ("triton_tem_fused_addmm_gelu_3", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimiser"),
        ("triton_per_fused_add_native_layer_norm_native_layer_norm_backward_5", "fused by torch.compile"),
        ("triton_poi_fused__to_copy_add_mul_0", "fused by torch.compile"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("write_pixels", "input"),
        ("void dali::BatchCopy<dali::kernels::ResamplingFilter>", "input"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("aten::native_layer_norm", "other"),
        ("aten::_softmax_backward_data", "other"),
    ],
)
def test_kernels_are_known_by_their_names(name, kind):
    assert kernels.kind(name) == kind


def test_time_in_which_any_of_several_streams_works():
    assert kernels.union([]) == 0
    assert kernels.union([(5, 6), (0, 2), (1, 3), (1.5, 1.7), (6, 7)]) == 5


def test_kernels_of_a_gpu_are_summed_by_kind_and_idle_time_is_seen():
    def event(name: str, start: float, end: float, *, on_gpu: bool = True, annotation: bool = False):
        return SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=start, end=end),
            device_type=DeviceType.CUDA if on_gpu else DeviceType.CPU,
            is_user_annotation=annotation,
        )

    profiler = SimpleNamespace(
        events=lambda: [
            event("step 0", 0, 9000, annotation=True),
            event("cudaLaunchKernel", 0, 500, on_gpu=False),
            event("nvjet_tst", 1000, 4000),
            event("write_pixels", 3000, 5000),
            event("nvjet_tst", 6000, 7000),
        ]
    )
    summary = kernels.summarize(profiler, steps=2, seconds=0.01, on_gpu=True)
    assert summary == {
        "step_ms": 5.0,
        "busy": pytest.approx(0.5),
        "launches": 1.5,
        "kinds": {"matrix products": 2.0, "input": 1.0},
        "longest": {"nvjet_tst": 2.0, "write_pixels": 1.0},
    }
    lines = kernels.table(summary).splitlines()
    assert lines[0] == "5.00 ms a step, 3.00 ms of kernels; the GPU is busy 50.0 % of the time, 2 launches"
    assert [line.split() for line in lines[1:3]] == [
        ["2.00", "ms", "66.7", "%", "matrix", "products"],
        ["1.00", "ms", "33.3", "%", "input"],
    ]


def test_the_step_is_measured_and_profiled_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows, "WINDOW_SECONDS", 0.1)
    out = tmp_path / "step.json"
    flags = ["--gpus", "0", "--model", "mu/16", "--batch-size", "2", "--seconds", "0.2", "--profile", "2"]
    flags += ["--inductor", "combo_kernels=True", "--compile", "off", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["measure_step.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        measure_step.main()
    assert stopped.value.code == 0
    result = json.loads(out.read_text())
    assert set(result) == {"environment", "config", "inductor", "off"}
    assert result["inductor"]["combo_kernels"] is True
    assert result["config"]["timm_blocks"] is False
    assert result["off"]["images_per_sec"] > 0
    profile = result["off"]["profile"]
    assert (profile["busy"], profile["launches"], result["off"]["mfu"]) == (None, None, None)
    assert profile["kinds"]["matrix products"] > 0
    assert 0 < sum(profile["longest"].values()) <= sum(profile["kinds"].values()) * (1 + 1e-9)
    assert kernels.table(profile) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seconds", "0"], "--seconds 0: must be above 0 and finite"),
        (["--seconds", "nan"], "--seconds nan: must be above 0 and finite"),
        (["--profile", "0"], "--profile 0: must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    ],
)
def test_what_leaves_nothing_to_measure_is_refused(flags, message, monkeypatch, capsys):
    tools = [measure_step] if flags[0] == "--profile" else [measure_step, measure_input]
    for tool in tools:
        data = ["--data", "none"] if tool is measure_input else []
        monkeypatch.setattr(sys, "argv", ["tool", *data, *flags])
        with pytest.raises(SystemExit) as stopped:
            tool.main()
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"{tool.__name__}.py: {message}\n"


def test_the_compilers_settings_and_timms_blocks_are_there_while_a_step_is_measured(tmp_path, monkeypatch):
    used = []

    def used_by(config, model, *_):
        layers = {type(layer) for layer in model.modules()}
        used.append((inductor_config.combo_kernels, inductor_config.max_fusion_size, layers & {Block, LeanBlock}))
        raise RuntimeError("seen")

    monkeypatch.setattr(modes, "training_step", used_by)
    before = inductor_config.combo_kernels, inductor_config.max_fusion_size
    flags = ["--gpus", "0", "--model", "mu/16", "--compile", "off", "--inductor"]
    settings = ["combo_kernels=True", "max_fusion_size=7"]
    for more in ([], ["--timm-blocks"]):
        monkeypatch.setattr(sys, "argv", ["measure_step.py", *flags, *settings, *more])
        with pytest.raises(SystemExit):
            measure_step.main()
    assert used == [(True, 7, {LeanBlock}), (True, 7, {Block})]
    assert (inductor_config.combo_kernels, inductor_config.max_fusion_size) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("combo_kernel=True", "has no setting 'combo_kernel'"),
        ("combo_kernels", "give NAME=VALUE, such as combo_kernels=True"),
        ("combo_kernels=yes", "give NAME=VALUE, such as combo_kernels=True"),
        ("=1", "has no setting ''"),
    ],
)
def test_a_setting_of_the_compiler_that_is_none_is_named(setting, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure_step.py", "--inductor", setting])
    with pytest.raises(SystemExit) as stopped:
        measure_step.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"measure_step.py: --inductor {setting}: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("flags", "tried"),
    [
        ([], {"off", "default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"}),
        (["--attention", "packed"], {"default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"}),
        (["--attention", "packed", "--compile", "off"], {"off"}),
    ],
)
def test_every_way_that_takes_the_attention_is_measured_by_default(flags, tried, monkeypatch):
    measured = set()
    monkeypatch.setattr(measure_step, "measure_step", lambda config, *_, **__: measured.add(config.run.compile) or {})
    monkeypatch.setattr(sys, "argv", ["measure_step.py", "--gpus", "0", *flags])
    with pytest.raises(SystemExit) as stopped:
        measure_step.main()
    assert (stopped.value.code, measured) == (0, tried)


def test_a_way_that_fails_does_not_keep_the_others_from_being_measured(tmp_path, monkeypatch, capsys):
    def measured(config, *_, **__):
        if config.run.compile == "reduce-overhead":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"images_per_sec": 7.0 if config.run.compile == "default" else 3.0}

    monkeypatch.setattr(measure_step, "measure_step", measured)
    out = tmp_path / "step.json"
    ways = ["--compile", "default", "reduce-overhead", "off"]
    monkeypatch.setattr(sys, "argv", ["measure_step.py", "--gpus", "0", *ways, "--json", str(out)])
    with pytest.raises(SystemExit) as stopped:
        measure_step.main()
    assert stopped.value.code == 1
    result = json.loads(out.read_text())
    assert [result[way] for way in ways[1:]] == [
        {"images_per_sec": 7.0},
        {"fails": "OutOfMemoryError: CUDA out of memory"},
        {"images_per_sec": 3.0},
    ]
    assert "OutOfMemoryError" in capsys.readouterr().err
    assert {row.what.split(", ")[-1]: row.measured for row in goals.rows({"step-128": result})} == {
        "off": 3,
        "default": 7,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "Zz/16"], "measure_step.py: --model Zz/16: no such model"),
        (["--json", "/nowhere/step.json"], "measure_step.py: --json /nowhere/step.json: cannot be written"),
        (["--json", f"{__file__}/x.json"], f"measure_step.py: --json {__file__}/x.json: cannot be written"),
        (["--inductor", "triton=1"], f"measure_step.py: --inductor triton=1: torch {torch.__version__} has no setting"),
    ],
)
def test_a_mistake_is_said_in_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["measure_step.py", "--gpus", "0", "--batch-size", "2", *flags])
    with pytest.raises(SystemExit) as stopped:
        measure_step.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("tool", "gpus", "flags", "message"),
    [
        (measure_kernels, 0, ["--size", "0"], "measure_kernels.py: --size 0: must be at least 1"),
        (measure_kernels, 0, ["--magnitude", "11"], "measure_kernels.py: --magnitude 11: must be from 0 to 10"),
        (
            measure_index,
            0,
            ["--images", "9", "--classes", "2"],
            "measure_index.py: --batch-size 64: must be from 1 to 9",
        ),
        (measure_index, 0, ["--images", "99"], "measure_index.py: --images 99: must be from 1,000 to"),
        (measure_index, 0, ["--classes", "0"], "measure_index.py: --classes 0: must be at least 1"),
        (measure_index, 0, ["--json", "."], "measure_index.py: --json .: cannot be written"),
        (measure_kernels, 0, ["--gpu"], "measure_kernels.py: --gpu: no GPU is visible here"),
        (measure_ddp, 0, ["--gpus", "3"], "measure_ddp.py: --gpus 3: 0 visible on this machine"),
        (measure_ddp, 1, ["--processes", "1"], "measure_ddp.py: --processes 1: at least 2 have gradients to exchange"),
        (measure_ddp, 0, ["--gpus", "0", "--rounds", "0"], "measure_ddp.py: --rounds 0: must be at least 1"),
        (measure_ddp, 4, ["--processes", "8"], "measure_ddp.py: --processes 8: there are 4 GPUs"),
        (measure_ddp, 4, ["--processes", "3", "--gpus", "2"], "measure_ddp.py: --processes 3: there are 2 GPUs"),
    ],
)
def test_impossible_numbers_and_gpus_that_are_not_there_are_said_in_one_line(
    tool, gpus, flags, message, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sys, "argv", [f"{tool.__name__}.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_loss_outlives_the_next_replay_of_a_cuda_graph(mode, tiny_config, cpu, monkeypatch):
    config = replace(tiny_config, run=replace(tiny_config.run, compile=mode))
    buffer = torch.zeros(())

    def replayed(step, **options):
        assert options == {"mode": mode}

        class InPlace(torch.autograd.Function):
            @staticmethod
            def forward(context, loss):
                return buffer.copy_(loss)

            @staticmethod
            def backward(context, gradient):
                return gradient

        return lambda *arguments: InPlace.apply(step(*arguments))

    monkeypatch.setattr(torch, "compile", replayed)
    monkeypatch.setattr(dali_vit.compiling, "compile_fault", lambda device: None)
    model = create_model(config.model, num_classes=3, resolution=32)
    update, how = build_update(config, model, create_optimizer(model, config.optim), cpu)
    assert how == {"compile": f"torch.compile, {mode} mode, for which the first step waits"}
    images = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    labels = torch.arange(8) % 3
    losses = [update(images[i], labels, 0.7, 1e-2)[0] for i in range(2)]
    assert losses[1] == buffer
    assert losses[0] != losses[1]
