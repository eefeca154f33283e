"""Sizes, initialisation, options and errors of the models."""

from __future__ import annotations

import math
from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dali_vit.config import ModelConfig
from dali_vit.model import (
    PlainViT,
    check_forward,
    create_model,
    flops_per_image,
    kept_bytes_per_image,
    num_parameters,
    sincos2d,
)
from dali_vit.variants import resolve_variant

TINY = ModelConfig(model="Ti/8", width=32, depth=2, num_heads=2, mlp_dim=48)


def tiny(**changes) -> ModelConfig:
    return ModelConfig(**{**TINY.__dict__, **changes})


def build(config: ModelConfig = TINY, *, num_classes: int = 10, resolution: int = 32, seed: int = 0) -> PlainViT:
    model = create_model(config, num_classes=num_classes, resolution=resolution, seed=seed)
    assert isinstance(model, PlainViT)
    return model


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ModelConfig(), 22_122_472),  # the paper's 22.1 M
        (ModelConfig(pool="tok", posemb="learn", head="linear"), 22_050_664 - 384),
        (ModelConfig(model="Ti/16", pool="tok", posemb="learn", head="linear"), 5_717_416 - 192),
        (ModelConfig(model="B/32", pool="tok", posemb="learn", head="linear"), 88_224_232 - 768),
    ],
)
def test_number_of_parameters(config: ModelConfig, parameters: int) -> None:
    """The long figures are timm's vit_*_patch*_224; ours have one position fewer, [cls] having none."""
    assert num_parameters(create_model(config, num_classes=1000, resolution=224)) == parameters


def test_variants_are_big_visions() -> None:
    assert resolve_variant(ModelConfig(model="S/16")) == ((384, 12, 1536, 6), 16)
    assert resolve_variant(ModelConfig(model="L/14")) == ((1024, 24, 4096, 16), 14)
    assert resolve_variant(ModelConfig(model="So400m/14")) == ((1152, 27, 4304, 16), 14)
    assert resolve_variant(tiny(model="Ti/4")) == ((32, 2, 48, 2), 4)


def test_mlp_width_is_exact_where_its_ratio_is_not() -> None:
    for mlp_dim in range(1, 200):
        model = build(ModelConfig(model="Ti/32", width=36, depth=1, num_heads=3, mlp_dim=mlp_dim))
        assert model.get_parameter("blocks.0.mlp.fc1.bias").shape == (mlp_dim,)


@pytest.mark.parametrize("pool", ["gap", "tok"])
@pytest.mark.parametrize("posemb", ["sincos2d", "learn"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_options_and_timm_names(pool: str, posemb: str, head: str) -> None:
    """timm's own VisionTransformer takes the weights as they are, and computes the same but for the MLP head."""
    model = build(tiny(pool=pool, posemb=posemb, head=head)).eval()
    nn.init.normal_(model.get_parameter("head.weight"))
    reference = VisionTransformer(
        img_size=32,
        patch_size=8,
        num_classes=10,
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=1.5,
        class_token=pool == "tok",
        no_embed_class=True,
        global_pool="token" if pool == "tok" else "avg",
        fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        act_layer="gelu_tanh",
    ).eval()
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert unexpected == (["pre_logits.weight", "pre_logits.bias"] if head == "mlp" else [])
    assert ("pos_embed" in dict(model.named_parameters())) == (posemb == "learn")

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        pooled = reference.forward_head(reference.forward_features(images), pre_logits=True)
        if head == "mlp":
            pooled = torch.tanh(pooled @ model.get_parameter("pre_logits.weight").T)
        torch.testing.assert_close(model(images), reference.head(pooled))


def test_fused_attention_is_on_and_nothing_is_dropped() -> None:
    modules = list(build().modules())
    assert all(m.fused_attn for m in modules if hasattr(m, "fused_attn"))
    assert sum(hasattr(m, "fused_attn") for m in modules) == 2
    assert all(m.p == 0 for m in modules if isinstance(m, nn.Dropout))


def check_distribution(values: Tensor, std: float, bound: float, kurtosis: float) -> None:
    """Mean 0, the std within 5 standard errors, no value past the bound and some near it.

    At the sizes tested a std wrong by 4 % is caught: q, k, v drawn as one matrix would have 0.71 of theirs, a
    truncated normal that is not compensated 0.88.
    """
    values, n = values.flatten().double(), values.numel()
    assert abs(values.mean()) < 5 * std / math.sqrt(n)
    assert abs(values.std() / std - 1) < 5 * math.sqrt((kurtosis - 1) / (4 * n)) < 0.04
    assert 0.95 * bound < values.abs().max() <= bound * (1 + 1e-6)


UNIFORM, TRUNCATED_NORMAL, NORMAL = 1.8, 2.37, 3.0  # kurtosis


def test_initialisation() -> None:
    config = ModelConfig(model="Ti/16", pool="tok", posemb="learn", depth=1)
    model = build(config, num_classes=1000, resolution=224)
    p = dict(model.named_parameters())
    width, mlp_dim = 192, 768

    q, k, v = p["blocks.0.attn.qkv.weight"].split(width)
    for kernel in (q, k, v, p["blocks.0.attn.proj.weight"]):
        bound = math.sqrt(6 / (2 * width))
        check_distribution(kernel, bound / math.sqrt(3), bound, UNIFORM)
    for kernel in (p["blocks.0.mlp.fc1.weight"], p["blocks.0.mlp.fc2.weight"]):
        bound = math.sqrt(6 / (width + mlp_dim))
        check_distribution(kernel, bound / math.sqrt(3), bound, UNIFORM)
    for kernel, fan_in in ((p["patch_embed.proj.weight"], 16 * 16 * 3), (p["pre_logits.weight"], width)):
        std = 1 / math.sqrt(fan_in)
        check_distribution(kernel, std, 2 * std / 0.8796256610342398, TRUNCATED_NORMAL)

    positions = p["pos_embed"].detach()  # unbounded: among 37,632 values one past 3.5 sigma, none past 6
    check_distribution(positions, 1 / math.sqrt(width), positions.abs().max().item(), NORMAL)
    assert 3.5 < positions.abs().max() * math.sqrt(width) < 6
    mlp_biases = torch.cat([p["blocks.0.mlp.fc1.bias"], p["blocks.0.mlp.fc2.bias"]]).detach()
    assert 0.85e-6 < mlp_biases.std() < 1.15e-6  # 960 values: 6.6 standard errors

    ones = {name for name, value in p.items() if torch.equal(value, torch.ones_like(value))}
    zeros = {name for name, value in p.items() if not value.any()}
    assert ones == {"blocks.0.norm1.weight", "blocks.0.norm2.weight", "norm.weight"}
    assert zeros == {
        *("cls_token", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.bias"),
        *("blocks.0.norm1.bias", "blocks.0.norm2.bias", "norm.bias"),
        *("pre_logits.bias", "head.weight", "head.bias"),
    }


@pytest.mark.parametrize("config", [TINY, ModelConfig(model="timm:test_resnet")], ids=["vit", "timm"])
def test_weights_depend_on_the_seed_alone(config: ModelConfig) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = create_model(config, num_classes=10, resolution=32, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = create_model(config, num_classes=10, resolution=32, seed=5).state_dict()
    other = create_model(config, num_classes=10, resolution=32, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_sincos2d_values() -> None:
    """MoCo v3's: omega_k = 10000^(-k / (width / 4 - 1)); [sin x, cos x, sin y, cos y], rows first."""
    rows, columns, width = 3, 5, 16
    positions = sincos2d(rows, columns, width)
    assert positions.shape == (1, rows * columns, width)
    assert positions.dtype == torch.float32
    for y in range(rows):
        for x in range(columns):
            token = positions[0, y * columns + x].tolist()
            for k in range(4):
                omega = 10_000 ** (-k / 3)
                expected = [math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)]
                assert token[k::4] == pytest.approx(expected, abs=1e-7)


def test_flops_are_those_of_the_matrix_products() -> None:
    tokens, width, mlp_dim, depth = 196, 384, 1536, 12
    block = tokens * (4 * width * width + 2 * width * mlp_dim) + 2 * tokens * tokens * width
    expected = 2 * (tokens * 16 * 16 * 3 * width + depth * block + width * width + width * 1000)
    model = create_model(ModelConfig(), num_classes=1000, resolution=224)
    assert flops_per_image(model, 224) == expected
    assert 3 * expected == pytest.approx(27.6e9, rel=0.01)  # as counted by others: forward + backward


@pytest.mark.parametrize(("name", "side"), [("test_resnet", 64), ("test_vit3", 160)])  # the latter's pooling attends
def test_counting_flops_changes_nothing(name: str, side: int) -> None:
    model = create_model(ModelConfig(model=f"timm:{name}"), num_classes=10, resolution=side)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flops = flops_per_image(model, side)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        # On the CPU itself older versions of torch do not count attention.
        model.requires_grad_(False).to("meta")(torch.zeros(2, 3, side, side, device="meta"))
    assert flops == counter.get_total_flops() / 2


def test_of_an_opened_model_the_operations_are_those_of_training() -> None:
    model = create_model(ModelConfig(model="Ti/16"), num_classes=10, resolution=64)
    in_training = flops_per_image(model, 64)
    check_forward(model.eval(), 64, images=2)
    assert flops_per_image(model, 64) == in_training


def test_timm_model_takes_images_in_minus_one_to_one() -> None:
    model = create_model(ModelConfig(model="timm:resnet18"), num_classes=10, resolution=64).eval()
    plain = timm.create_model("resnet18", num_classes=10).eval()
    plain.load_state_dict(model.state_dict())  # the very names of timm
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = plain((pixels - mean[:, None, None]) / std[:, None, None])
        torch.testing.assert_close(model(pixels * 2 - 1), expected, rtol=1e-4, atol=1e-5)


def test_timm_model_of_fixed_size_is_built_for_the_resolution() -> None:
    model = create_model(ModelConfig(model="timm:test_vit"), num_classes=7, resolution=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("config", "resolution", "message"),
    [
        (
            ModelConfig(model="XL/16"),
            224,
            "--model XL/16: no such model; give VARIANT/PATCH with a variant of mu, Ti,",
        ),
        (ModelConfig(model="S16"), 224, "no such model"),
        (ModelConfig(model="S/0"), 224, "no such model"),
        (ModelConfig(model="S/8193"), 224, "--model S/8193: its patch must be at most 8,192 pixels"),
        (ModelConfig(), 225, "--resolution 225: not divisible by the patch of S/16; use 224"),
        (ModelConfig(), 8, "--resolution 8: not divisible by the patch of S/16; use 16"),
        (ModelConfig(width=100), 224, "--width 100: not divisible by 6 heads"),
        (ModelConfig(width=102), 224, "--width 102: sincos2d positions need a multiple of 4"),
        (ModelConfig(depth=0), 224, "--depth 0: must be from 1 to 1,024"),
        (ModelConfig(mlp_dim=10**9), 224, "--mlp-dim 1000000000: must be from 1 to 262,144"),
        (ModelConfig(model="timm:resnet5O"), 224, r"--model timm:resnet5O: no such model.*did you mean .*resnet50"),
        (ModelConfig("timm:resnet50.a1_in1k"), 224, "a1_in1k names weights, and training begins without; give timm:r"),
        (ModelConfig(model="timm:resnet50", head="linear"), 224, "--head linear: has no effect on timm:resnet50"),
        (
            ModelConfig(model="timm:deit_tiny_patch16_224"),
            230,
            "--resolution 230: not divisible by the patch of .*; use 224",
        ),
        (ModelConfig(model="timm:resnet50", depth=3), 224, "--depth 3: has no effect on timm:resnet50"),
    ],
)
def test_what_does_not_fit_is_named(config: ModelConfig, resolution: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        create_model(config, num_classes=10, resolution=resolution)
    assert "\n" not in str(error.value)


def test_a_model_that_memory_does_not_hold_is_named() -> None:
    with pytest.raises(ValueError, match="--model mu/16: memory does not hold its parameters; choose a smaller one"):
        create_model(ModelConfig("mu/16"), num_classes=2**45, resolution=32)  # past any address space


def test_learned_positions_allow_any_width() -> None:
    model = build(ModelConfig(model="Ti/8", width=30, depth=1, num_heads=3, mlp_dim=8, posemb="learn"))
    assert model(torch.zeros(1, 3, 32, 32)).tolist() == [[0.0] * 10]  # the last layer starts at zero


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
def test_type_of_the_residual_stream(residual: str) -> None:
    """Of the tokens that blocks take and give, under autocast; without it they are float32 in any case."""
    model, seen = build(tiny(residual=residual)), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, taken, given: seen.extend([taken[0].dtype, given.dtype]))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for training in (True, False):
        model.train(training)
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        assert logits.dtype == (torch.bfloat16 if training else torch.float32)
        assert set(seen) == {getattr(torch, residual)}
        seen.clear()
        assert model(images).dtype == torch.float32
        assert set(seen) == {torch.float32}


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_logits_of_an_evaluation_are_not_rounded(head: str) -> None:
    """In bfloat16 the first of equal ones would win, whichever it was."""
    model = build(tiny(head=head), num_classes=1000).eval()
    nn.init.normal_(model.head.weight)
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        assert model.train()(images).dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, features.float() @ model.head.weight.T + model.head.bias)
    assert all(len(row.unique()) > 990 for row in logits)
    assert all(len(row.bfloat16().unique()) < 900 for row in logits)


@pytest.mark.parametrize("posemb", ["sincos2d", "learn"])
def test_training_takes_patches_by_a_product_that_is_the_convolution(posemb: str) -> None:
    """Tokens and gradients, channels in any order in memory; in eval mode the convolution itself."""
    patches = build(tiny(posemb=posemb, model="Ti/4")).patch_embed
    images = torch.rand(3, 32, 32, 3).permute(0, 3, 1, 2) * 2 - 1
    upstream = torch.rand(3, 64, 32)
    gradients = []
    for training in (True, False):
        patches.train(training).zero_grad()
        tokens = patches(images)
        tokens.backward(upstream)
        gradients.append([tokens.detach(), *(p.grad.clone() for p in patches.parameters())])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    convolved = nn.functional.conv2d(images, patches.proj.weight, patches.proj.bias, stride=4).flatten(2).mT
    assert torch.equal(patches(images), convolved)
    with pytest.raises(ValueError, match="36 x 32 pixels, not 32 x 32"):
        patches.train()(torch.zeros(1, 3, 36, 32))


@pytest.mark.parametrize("name", ["Ti/8", "timm:test_resnet"])
def test_the_bytes_kept_are_those_of_a_real_pass(name):
    model = create_model(ModelConfig(model=name), num_classes=10, resolution=32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counted = kept_bytes_per_image(model, 32)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.rand(8, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    assert counted == pytest.approx(real / 8, rel=0.02)
