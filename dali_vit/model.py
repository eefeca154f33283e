"""The plain ViT of *Better plain ViT baselines for ImageNet-1k*, assembled from timm, and timm's own classifiers.

Every choice that differs from timm's defaults is big_vision's (models/vit.py): LayerNorm epsilon 1e-6, GELU in its
tanh approximation, positions added before a [cls] token that has none of its own, tanh in the MLP head, and the
initialisation of each tensor. Parameter names are timm's; only `pre_logits` (the MLP head's first layer) is new.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from dali_vit.blocks import LeanBlock
from dali_vit.config import ModelConfig, UserError
from dali_vit.variants import TIMM_PREFIX, check_model, indivisible, resolve_variant

LAYER_NORM_EPS = 1e-6  # flax's default; torch's is 1e-5
_META_IMAGES = 2  # batch norm refuses a single image
TRUNCATED_STD = 0.87962566103423978  # standard deviation of a unit normal truncated at 2 sigma (jax.nn.initializers)


class PatchMatmul(PatchEmbed):
    """timm's patch embedding, in training as a matrix product over the pixels of each patch, with the same parameters.

    As patches do not overlap, the product computes the same sums, and faster (BENCHMARKS.md): 3 channels are few for a
    convolution, and in a compiled step the kernel that normalises and mixes pixels also sorts them by patch. In eval
    mode it is timm's convolution, so that an exported model gives the same bits.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        images, channels, height, width = x.shape
        if (height, width) != self.img_size:
            raise ValueError(f"images are {height} x {width} pixels, not {self.img_size[0]} x {self.img_size[1]}")
        side_y, side_x = self.patch_size
        rows, columns = self.grid_size
        x = x.reshape(images, channels, rows, side_y, columns, side_x).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(images, rows * columns, channels * side_y * side_x)
        return self.norm(linear(x, self.proj.weight.flatten(1), self.proj.bias))


class PlainViT(VisionTransformer):
    """timm's VisionTransformer with big_vision's optional MLP head: logits = head(tanh(pre_logits(pooled))).

    Under autocast the residual stream is float32, as the positions are; with `residual` bfloat16 it has the type of the
    patch embedding's output, in which big_vision makes its positions. LayerNorm computes in float32 either way, and so
    does the last layer in evaluation.
    """

    def __init__(self, *, posemb: str, mlp_head: bool, residual: str, **kwargs) -> None:
        super().__init__(**kwargs, weight_init="skip")
        self.residual = residual
        self.pre_logits = nn.Linear(self.embed_dim, self.embed_dim) if mlp_head else None
        if posemb == "sincos2d":
            # A buffer: saved under timm's name, but neither trained nor decayed nor reduced over GPUs.
            rows, columns = self.patch_embed.grid_size
            del self.pos_embed
            self.register_buffer("pos_embed", sincos2d(rows, columns, self.embed_dim))

    def _pos_embed(self, x: Tensor) -> Tensor:
        tokens = super()._pos_embed(x)
        return tokens.to(x.dtype) if self.residual == "bfloat16" else tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pool(x)  # [N, width]
        if self.pre_logits is not None:
            x = torch.tanh(self.pre_logits(x))
        if pre_logits:
            return x
        if self.training:
            return self.head(x)
        # In bfloat16 the two largest of 1,000 logits are now and then equal. The meta device has no autocast.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(next(self.head.parameters()).dtype))


def create_model(config: ModelConfig, *, num_classes: int, resolution: int, seed: int = 0) -> nn.Module:
    """A freshly initialised classifier on the CPU: [N, 3, resolution, resolution] in [-1, 1] to [N, num_classes].

    The weights are a function of `seed` alone: torch's random state is neither used nor changed. Raises UserError
    (a ValueError) for an unknown name, for sizes that do not fit together, and where memory does not hold it.
    """
    check_model(config, resolution)
    create = _create_timm if config.model.startswith(TIMM_PREFIX) else _create_plain
    try:
        return create(config, num_classes=num_classes, resolution=resolution, seed=seed)
    except RuntimeError as error:  # torch's CPU allocator has no class for a lack of memory
        if "allocate memory" not in str(error):
            raise
        raise UserError(f"--model {config.model}: memory does not hold its parameters; choose a smaller one") from error


def _create_plain(config: ModelConfig, *, num_classes: int, resolution: int, seed: int) -> nn.Module:
    with _random_state(seed):
        model = PlainViT(
            **vit_arguments(config, resolution),
            posemb=config.posemb,
            mlp_head=config.head == "mlp",
            residual=config.residual,
            embed_layer=PatchMatmul,
            num_classes=num_classes,
            block_fn=LeanBlock,
            norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
            act_layer=partial(nn.GELU, approximate="tanh"),
        )
        _initialise(model)
    return model


def vit_arguments(config: ModelConfig, resolution: int) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer for a plain ViT's sizes and pooling, as numbers and names."""
    (width, depth, mlp_dim, num_heads), patch = resolve_variant(config)
    cls_token = config.pool == "tok"
    return {
        "img_size": resolution,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": (mlp_dim + 0.5) / width,  # timm takes int(width * ratio): the half outweighs rounding errors
        "class_token": cls_token,
        "no_embed_class": True,
        "global_pool": "token" if cls_token else "avg",
        "fc_norm": False,
    }


def sincos2d(rows: int, columns: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [1, rows * columns, width]: [sin x, cos x, sin y, cos y] (MoCo v3).

    `width` must be a multiple of 4 and at least 8. Computed in float64, returned in float32.
    """
    quarter = width // 4
    omega = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega  # [rows * columns, width / 4]
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].float()


def num_parameters(model: nn.Module) -> int:
    """Number of trainable values; fixed positions are not among them."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops_per_image(model: nn.Module, resolution: int) -> int:
    """Floating-point operations of one image's forward pass, a multiply-add counted as two.

    Counted by torch's FlopCounterMode on shapes alone: nothing is computed and the model is left as it is.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _forward_on_meta(model, resolution)
    return counter.get_total_flops() // _META_IMAGES


def kept_bytes_per_image(model: nn.Module, resolution: int) -> int:
    """Bytes per image that an uncompiled forward pass, in the parameters' type, keeps for the backward pass.

    Counted on shapes alone, like `flops_per_image`, in the mode that the model is in.
    """
    kept: dict[int, Tensor] = {}  # each storage once; a kept tensor's number is not reused

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        parameters = _forward_on_meta(model, resolution)
    for tensor in parameters:
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // _META_IMAGES


def check_forward(model: nn.Module, resolution: int, images: int) -> None:
    """Raises what a forward pass of so many images would raise, in the model's current mode; nothing is computed."""
    with torch.no_grad():
        _forward_on_meta(model, resolution, images)


def _forward_on_meta(model: nn.Module, resolution: int, images: int = _META_IMAGES) -> list[Tensor]:
    """Runs a forward pass on shapes alone; returns the meta tensors that stood in for parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # With gradients disabled, FlopCounterMode fails where a module gets a view of a parameter that requires a gradient.
    graded = torch.is_grad_enabled()
    meta = {name: t.detach().to("meta").requires_grad_(graded and t.requires_grad) for name, t in tensors.items()}
    pixels = torch.empty(images, 3, resolution, resolution, device="meta")
    torch.func.functional_call(model, meta, (pixels,))
    return list(meta.values())


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Runs its body on a CPU random state of its own, so that what is drawn depends on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def _initialise(model: PlainViT) -> None:
    """big_vision's initialisation (models/vit.py); LayerNorm starts at one and zero, as torch makes it."""
    width = model.embed_dim
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) or name == "pre_logits":
            _lecun_normal(layer)
        elif isinstance(layer, nn.Linear):
            # q, k and v are each width x width; drawn as a whole, the fused matrix would have smaller bounds.
            for kernel in layer.weight.split(width) if name.endswith(".qkv") else [layer.weight]:
                nn.init.xavier_uniform_(kernel)
            nn.init.normal_(layer.bias, std=1e-6 if ".mlp." in name else 0.0)
    nn.init.zeros_(model.get_parameter("head.weight"))
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    if isinstance(model.pos_embed, nn.Parameter):
        nn.init.normal_(model.pos_embed, std=1 / math.sqrt(width))


def _lecun_normal(layer: nn.Module) -> None:
    """flax's default kernel: variance 1 / fan-in after truncation at 2 sigma; zero bias."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    assert layer.bias is not None
    std = 1 / math.sqrt(layer.weight[0].numel()) / TRUNCATED_STD
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)


def timm_name(config: ModelConfig) -> str:
    """The model's name in timm; UserError where timm has no such model, or the name has a tag of weights."""
    name = config.model.removeprefix(TIMM_PREFIX)
    if "." in name:
        name, tag = name.split(".", 1)
        raise UserError(f"--model {config.model}: {tag} names weights, and training begins without; give timm:{name}")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"--model {config.model}: no such model in timm {timm.__version__}; {hint}")
    return name


def _create_timm(config: ModelConfig, *, num_classes: int, resolution: int, seed: int) -> nn.Module:
    """A timm classifier with timm's initialisation, its input statistics applied to images in [-1, 1]."""
    name = timm_name(config)
    pretrained_cfg = timm.get_pretrained_cfg(name)
    native = pretrained_cfg.input_size[-1] if pretrained_cfg is not None else resolution
    fixed = pretrained_cfg is not None and pretrained_cfg.fixed_input_size and native != resolution
    arguments: dict[str, Any] = {"img_size": resolution} if fixed else {}
    with _random_state(seed):
        try:
            model = timm.create_model(name, pretrained=False, num_classes=num_classes, **arguments)
        except (AssertionError, TypeError, ValueError) as error:
            if not fixed:
                raise
            raise UserError(f"--resolution {resolution}: {config.model} takes {native} only ({error})") from error
    _check_patch(config, model, resolution)
    _rescale_input(model)
    return model


def _check_patch(config: ModelConfig, model: nn.Module, resolution: int) -> None:
    """Raises UserError where a timm model would silently ignore the last rows and columns of pixels."""
    embed = getattr(model, "patch_embed", None)
    if isinstance(embed, PatchEmbed) and not embed.dynamic_img_pad and resolution % embed.patch_size[0]:
        raise UserError(indivisible(config, resolution, embed.patch_size[0]))


def set_timm_resolution(config: ModelConfig, model: nn.Module, resolution: int) -> None:
    """Makes a timm model take images of another side, in place; timm resamples the tensors that depend on the side.

    UserError where timm cannot do that for this model, or the model cannot take such images.
    """
    _check_patch(config, model, resolution)
    about: Any = model.pretrained_cfg
    resize: Any = getattr(model, "set_input_size", None)
    if about["fixed_input_size"] and resize is None:
        raise UserError(
            f"--resolution {resolution}: {config.model} takes images of the size it was trained on alone; leave it out"
        )
    try:
        if about["fixed_input_size"]:
            # timm would enlarge Swin's windows with the image, though it does not in a model created for that size.
            windows: Any = getattr(model, "_ref_window_sizes", None)
            resize(img_size=(resolution, resolution), **({} if windows is None else {"window_size": windows}))
        flops_per_image(model, resolution)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise no_such_images(config, resolution, error) from error
    made = create_model(config, num_classes=model.num_classes, resolution=resolution)  # type: ignore[arg-type]
    if _shapes(made) != _shapes(model):
        raise UserError(f"--resolution {resolution}: {config.model} has other parameters at that size; leave it out")


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def no_such_images(config: ModelConfig, resolution: int, error: Exception) -> UserError:
    """The error for a timm model that fails with images of a side."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"--resolution {resolution}: {config.model} takes no images of that size ({reason})")


def _rescale_input(model: nn.Module) -> None:
    """Makes a timm model take images in [-1, 1] instead of timm's (pixels / 255 - mean) / std."""
    statistics: Any = model.pretrained_cfg
    mean, std = (torch.tensor(statistics[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    # Not persistent: the state dict keeps exactly timm's names.
    model.register_buffer("input_scale", 0.5 / std, persistent=False)
    model.register_buffer("input_shift", (0.5 - mean) / std, persistent=False)
    model.register_forward_pre_hook(_apply_input_scale)


def _apply_input_scale(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    images, *rest = args
    return (images * model.input_scale + model.input_shift, *rest)  # type: ignore[operator]
