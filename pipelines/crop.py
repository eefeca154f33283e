"""Random crops: which window of an image to take, and how it is decoded and resized.

Windows are computed on the CPU from the size in the image's header, before anything is decoded, so that only
the window needs decoding. All coordinates are in pixels, rows before columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode

from pipelines import compiled as loops
from pipelines import windows

__all__ = [
    "MAX_PIXELS",
    "NUM_UNIFORMS",
    "REGIONS",
    "SAMPLERS",
    "Decoder",
    "Region",
    "cut_window",
    "decode",
    "decode_window",
    "image_size",
    "refuse_too_large",
    "sample_window_tensorflow",
    "sample_window_torchvision",
    "start_unless_too_large",
    "width_to_resize_to",
]

# A larger image counts as undecodable, as it does for Pillow: decoded, it would take more than 512 MiB, and a file that
# claims such a size in a data set of photographs has a broken header or is a decompression bomb.
MAX_PIXELS = 2**29 // 3

Region = Literal["window", "full"]
REGIONS: tuple[Region, ...] = get_args(Region)

Uniforms = tuple[DataNode, DataNode, DataNode]

# Per sampler, how many uniforms in [0, 1) its three inputs hold: two per attempt, and two for the position.
# A sampler takes all attempts at once, as vectors: an operator costs about the same for 1 number as for 100.
NUM_UNIFORMS: dict[str, tuple[int, int, int]] = {"tensorflow": (100, 100, 2), "torchvision": (10, 10, 2)}


@dataclass(frozen=True)
class Decoder:
    """How image files are decoded. On the CPU only fast_idct and region matter."""

    fast_idct: bool = True
    """Fast inverse DCT where libjpeg-turbo decodes: TensorFlow's default, which the paper ran with. It halves
    the distance to the reference (tests/reference/eval_preprocess.npz: 0.8 instead of 1.5 levels)."""
    region: Region = "window"
    """Decode the crop window alone, or the full image and cut the window out of it: the pixels are the same. On a GPU
    that fails to decode windows alone (see `windows`), full images are decoded."""
    fancy_upsampling: bool = False
    """On a GPU, interpolate chroma as libjpeg-turbo does, instead of repeating it. Only with `region` full: with nvJPEG
    below 13.2, which gets the edges of windows wrong, nvImageCodec decodes no windows this way."""
    hw_decoder_load: float = 0.65
    """Share of the baseline JPEGs given to the hardware decoder, where there is one."""
    preallocate_width_hint: int = 0
    """Width of the largest image in pixels, for the hardware decoder's buffers; 0 grows them as needed."""
    preallocate_height_hint: int = 0
    """Height of the largest image in pixels, likewise."""
    hybrid_huffman_threshold: int = 1_000_000
    """Pixels of an image from which on nvJPEG shares Huffman decoding between CPU and GPU."""


def _options(decoder: Decoder, device: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "device": "mixed" if device == "gpu" else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,  # the reference ignores EXIF
        "use_fast_idct": decoder.fast_idct,
    }
    if device == "gpu":
        options |= {
            # Else each thread asks NVML for the cores near the GPU, and where NVML does not know, as in some containers
            # and virtual machines, no pipeline can be made.
            "affine": False,
            "jpeg_fancy_upsampling": decoder.fancy_upsampling,
            "hw_decoder_load": decoder.hw_decoder_load,
            "preallocate_width_hint": decoder.preallocate_width_hint,
            "preallocate_height_hint": decoder.preallocate_height_hint,
            "hybrid_huffman_threshold": decoder.hybrid_huffman_threshold,
        }
    return options


def image_size(encoded: DataNode) -> DataNode:
    """Height and width of encoded images, float32 [2] on the CPU, whole numbers."""
    return fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.FLOAT)[0:2]


def refuse_too_large(encoded: DataNode, size: DataNode, device: str) -> DataNode:
    """The encoded image, unchanged; one of more than MAX_PIXELS makes the pipeline fail before it is decoded."""
    too_large = size[0] * size[1] > MAX_PIXELS
    if device == "cpu":
        # Reshaping copies nothing, and fails where the shape does not match the number of bytes. Cost: 1 us an image.
        return fn.reshape(encoded, rel_shape=fn.stack(too_large + 1.0))
    # An output that shares memory with its input, as reshape's does, belongs to no stream: after decoding, DALI's
    # thread would wait until the GPU is done with that memory, instead of parsing the next batch.
    length = fn.cast(encoded.shape() * (too_large + 1), dtype=types.INT32)
    return fn.slice(encoded, start=[0], shape=length, axes=[0], out_of_bounds_policy="error")


def decode(encoded: DataNode, size: DataNode, *, device: str, decoder: Decoder) -> DataNode:
    """Whole images, uint8 [H, W, 3] RGB on the device; size is what `image_size` returns.

    The pipeline fails at an image of more than MAX_PIXELS.
    """
    # On a GPU the images may have one consumer alone, on the GPU: DALI then returns their memory on the stream that
    # reads it. The hardware engine writes when it is called, and waits for nothing queued before (torchcodec's #1634).
    return fn.decoders.image(refuse_too_large(encoded, size, device), **_options(decoder, device))


def start_unless_too_large(start: DataNode, size: DataNode) -> DataNode:
    """The start of a window, float32 [2], unchanged; an image of more than MAX_PIXELS makes the pipeline fail here.

    A start outside of the image would do, too, but where DALI 2.4's decoder refuses a window the process often crashes
    as the pipeline is shut down.
    """
    too_large = size[0] * size[1] > MAX_PIXELS
    return fn.slice(start, start=[0], shape=fn.stack(2 * (too_large + 1)), axes=[0], out_of_bounds_policy="error")


def width_to_resize_to(mirror: DataNode | None, size: int) -> DataNode | int:
    """The width for DALI's resize, negative where it is to flip; flipping so rounds 1 pixel in 1,000 the other way."""
    return size if mirror is None else size - mirror * (2.0 * size)


def cut_window(
    encoded: DataNode, full_size: DataNode, start: DataNode, window: DataNode, *, device: str, decoder: Decoder
) -> DataNode:
    """Windows of images, uint8 [h, w, 3] RGB on the device, decoded as `decoder.region` says, not resized.

    The arguments are as in `decode_window`.
    """
    cut: dict[str, Any] = {"normalized_anchor": False, "normalized_shape": False, "axis_names": "HW"}
    if decoder.region == "full":
        return fn.slice(decode(encoded, full_size, device=device, decoder=decoder), start, window, **cut)
    return fn.decoders.image_slice(
        encoded, start_unless_too_large(start, full_size), window, **cut, **_options(decoder, device)
    )


def decode_window(
    encoded: DataNode,
    full_size: DataNode,
    start: DataNode,
    window: DataNode,
    mirror: DataNode | None,
    *,
    size: int,
    antialias: bool,
    device: str,
    decoder: Decoder,
    compiled: bool | None = None,
) -> DataNode:
    """Windows of images, resized bilinearly to uint8 [size, size, 3] RGB on the device.

    full_size is the (height, width) of the whole image, start the (top, left) and window the (height, width) of the
    window, each float32 [2] on the CPU. The pipeline fails at an image of more than MAX_PIXELS before decoding it.
    Where mirror (a boolean scalar on the CPU) is true the window is flipped horizontally, which costs nothing as the
    resize does it.
    On the CPU the resize is compiled (`pipelines.compiled`) if `compiled` is true, or is None and Numba can be used.
    """
    if device == "gpu" and decoder.region == "window" and windows.fault():
        decoder = replace(decoder, region="full")
    images = cut_window(encoded, full_size, start, window, device=device, decoder=decoder)
    if device == "cpu" and (loops.available() if compiled is None else compiled):
        return loops.resize(images, mirror, size=size, antialias=antialias)
    width = width_to_resize_to(mirror, size)
    return fn.resize(images, resize_y=size, resize_x=width, interp_type=types.INTERP_LINEAR, antialias=antialias)


def _round(x: DataNode) -> DataNode:
    return dali_math.floor(x + 0.5)


def _any_valid(
    height: DataNode, width: DataNode, valid: DataNode, attempts: int, otherwise: DataNode
) -> tuple[DataNode, DataNode]:
    """(height, width) [2] of a valid attempt and its number; `otherwise` [2] and 0 if there is none.

    Attempts are exchangeable, so the last valid one is distributed as the first, which rejection sampling would take.
    """
    numbers = types.Constant(np.arange(1, attempts + 1, dtype=np.int32), device="cpu")
    number = fn.reductions.max(valid * numbers)
    windows = fn.cat(fn.stack(otherwise), fn.stack(height, width, axis=1))  # [1 + attempts, 2]
    return windows[number], number


def sample_window_tensorflow(
    size: DataNode,
    uniforms: Uniforms,
    *,
    area_range: tuple[float, float] = (0.05, 1.0),
    ratio_range: tuple[float, float] = (0.75, 1.33),
) -> tuple[DataNode, DataNode]:
    """Inception crop as tf.image.sample_distorted_bounding_box draws it, in float32.

    size is (height, width), float32 [2]; uniforms hold [attempts] for the aspect ratio (width / height, drawn
    linearly), [attempts] for the height and [2] for the position. Returns (top, left) and (height, width),
    float32 [2], whole numbers. Where all attempts fail the whole image is taken. Everything is on the CPU.
    Tested against tests/reference/crop_windows.npz.
    """
    if loops.available():
        return loops.sample_window("tensorflow", size, uniforms, area_range, ratio_range)
    ratio_uniform, height_uniform, position_uniform = uniforms
    height, width = size[0], size[1]
    area = height * width
    smallest = area * area_range[0]

    ratio = ratio_uniform * (ratio_range[1] - ratio_range[0]) + ratio_range[0]
    h_max = dali_math.min((width + 0.5) / ratio, height)  # so that round(h * ratio) <= width
    if area_range[1] < 1.0:  # at 1 no bound is needed: no window is larger than the image
        largest = area * area_range[1]
        h_max = dali_math.min(h_max, dali_math.sqrt(largest / ratio) + 0.5)
    h_max = dali_math.floor(h_max)
    h_min = dali_math.min(_round(dali_math.sqrt(smallest / ratio)), h_max)
    h = h_min + dali_math.floor(height_uniform * (h_max - h_min + 1.0))
    # With the width rounded, the area may be out of its range by one row.
    w = _round(h * ratio)
    h = h + (h * w < smallest)
    w = _round(h * ratio)
    if area_range[1] < 1.0:
        h = h - (h * w > largest)
        w = _round(h * ratio)
    valid = (h * w >= smallest) & (h <= height) & (w <= width)
    if area_range[1] < 1.0:
        valid = valid & (h * w <= largest)

    window, _ = _any_valid(h, w, valid, NUM_UNIFORMS["tensorflow"][0], otherwise=size)
    return dali_math.floor((size - window) * position_uniform), window


def sample_window_torchvision(
    size: DataNode,
    uniforms: Uniforms,
    *,
    area_range: tuple[float, float] = (0.05, 1.0),
    ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[DataNode, DataNode]:
    """Crop as torchvision's RandomResizedCrop draws it: area uniform, aspect ratio log-uniform.

    size is (height, width), float32 [2]; uniforms hold [attempts] for the area, [attempts] for the ratio and
    [2] for the position. Returns (top, left) and (height, width), float32 [2], whole numbers. Where all attempts
    fail the largest central window of an allowed ratio is taken. Everything is on the CPU.
    """
    if loops.available():
        return loops.sample_window("torchvision", size, uniforms, area_range, ratio_range)
    area_uniform, ratio_uniform, position_uniform = uniforms
    height, width = size[0], size[1]

    area = (area_uniform * (area_range[1] - area_range[0]) + area_range[0]) * (height * width)
    log_low, log_high = math.log(ratio_range[0]), math.log(ratio_range[1])
    ratio = dali_math.exp(ratio_uniform * (log_high - log_low) + log_low)
    h, w = _round(dali_math.sqrt(area / ratio)), _round(dali_math.sqrt(area * ratio))
    valid = (h > 0) & (w > 0) & (h <= height) & (w <= width)

    largest = fn.stack(
        dali_math.min(height, _round(width / ratio_range[0])),
        dali_math.min(width, _round(height * ratio_range[1])),
    )
    window, number = _any_valid(h, w, valid, NUM_UNIFORMS["torchvision"][0], otherwise=largest)
    free = size - window
    centre = 0.5 - 2.0**-20  # floor(centre * (free + 1)) is free // 2
    position = (number > 0) * (position_uniform - centre) + centre
    return dali_math.min(dali_math.floor(position * (free + 1.0)), free), window


SAMPLERS = {"tensorflow": sample_window_tensorflow, "torchvision": sample_window_torchvision}
