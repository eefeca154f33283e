"""The training graph: file -> window of the image -> flip -> RandAugment, uint8 [S, S, 3].

One definition for both devices. Where Numba is, the window is drawn by an operator that it compiles, and so are, on the
CPU, resize and RandAugment (see `compiled`), as DALI's own took 40 % of the time there. On a GPU RandAugment is
compiled by Triton and comes right behind the graph (`compiled_gpu`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.data_node import DataNode

from pipelines import compiled, crop
from pipelines.crop import Decoder
from pipelines.order import TrainOrder
from pipelines.randaugment import MAX_MAGNITUDE, NUM_UNIFORMS_PER_LAYER, rand_augment
from pipelines.readers import NUM_LAST_BYTES, Samples, TrainSource, read

__all__ = ["Augment", "Decoder", "Drawn", "draw", "numbers_drawn", "train_pipeline"]


@dataclass(frozen=True)
class Augment:
    """What the training graph does to an image. The defaults are the paper's, but for antialiasing."""

    crop: Literal["tensorflow", "torchvision"] = "tensorflow"
    """Whose distribution of random windows: TensorFlow's (the paper's) or torchvision's."""
    area_range: tuple[float, float] = (0.05, 1.0)
    """Smallest and largest area of a window, as shares of the image."""
    ratio_range: tuple[float, float] | None = None
    """Smallest and largest aspect ratio (width / height) of a window; by default the sampler's own,
    (0.75, 1.33) for tensorflow and (3/4, 4/3) for torchvision."""
    antialias: bool = True
    """Low-pass filter where a window is scaled down. The paper did without; it makes no difference to accuracy."""
    flip: bool = True
    """Mirror an image horizontally with probability 1/2."""
    randaug_layers: int = 2
    """RandAugment operations per image; 0 turns it off."""
    randaug_magnitude: float = 10
    """Strength of the RandAugment operations, of at most 10."""
    randaug_contrast: Literal["paper", "mean"] = "paper"
    """What RandAugment's contrast blends towards: a constant grey as in the paper, or the image's mean."""

    def __post_init__(self) -> None:
        if self.crop not in crop.SAMPLERS:
            raise ValueError(f"crop is {self.crop!r}: choose from {', '.join(crop.SAMPLERS)}")
        low, high = self.area_range
        if not 0 < low <= high <= 1:
            raise ValueError(f"area_range is {self.area_range}: it must be rising and within (0, 1]")
        if self.ratio_range and not 0 < self.ratio_range[0] <= self.ratio_range[1]:
            raise ValueError(f"ratio_range is {self.ratio_range}: it must be rising and above 0")
        if self.randaug_layers < 0:
            raise ValueError(f"randaug_layers is {self.randaug_layers}: it must be 0 (off) or more")
        if not 0 <= self.randaug_magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"randaug_magnitude is {self.randaug_magnitude}: it must be within [0, {MAX_MAGNITUDE}]")
        if self.randaug_contrast not in ("paper", "mean"):
            raise ValueError(f"randaug_contrast is {self.randaug_contrast!r}: choose paper or mean")


class Drawn(NamedTuple):
    """What is known of a batch before anything is decoded; all of it is on the CPU."""

    encoded: DataNode
    """Image files, uint8 [n]."""
    labels: DataNode
    size: DataNode
    """(height, width) of the image, float32 [2] in pixels."""
    start: DataNode
    """(top, left) of the window, float32 [2] in pixels."""
    window: DataNode
    """Its (height, width), likewise."""
    mirror: DataNode | None
    """Whether the image is flipped."""
    uniforms: DataNode
    """RandAugment's; without it the last that are drawn, which are of no use any more."""


def draw(source: TrainSource, augment: Augment) -> Drawn:
    """The part of the training graph that the CPU does on either device; within a pipeline definition."""
    encoded, labels, *uniforms = read(source)
    size = crop.image_size(encoded)
    ranges: dict[str, Any] = {"area_range": augment.area_range}
    if augment.ratio_range is not None:
        ranges["ratio_range"] = augment.ratio_range
    start, window = crop.SAMPLERS[augment.crop](size, tuple(uniforms[:3]), **ranges)
    mirror = uniforms[3] < 0.5 if augment.flip else None
    return Drawn(encoded, labels, size, start, window, mirror, uniforms[-1])


@pipeline_def
def _train_graph(
    source: TrainSource, image_size: int, augment: Augment, decoder: Decoder, device: str, randaug_in_graph: bool
) -> Any:
    drawn = draw(source, augment)
    images = crop.decode_window(
        drawn.encoded,
        drawn.size,
        drawn.start,
        drawn.window,
        drawn.mirror,
        size=image_size,
        antialias=augment.antialias,
        device=device,
        decoder=decoder,
    )
    if randaug_in_graph and augment.randaug_layers > 0:
        images = rand_augment(
            images,
            drawn.uniforms,
            image_size=image_size,
            layers=augment.randaug_layers,
            magnitude=augment.randaug_magnitude,
            contrast=augment.randaug_contrast,
        )
    return images, drawn.labels, drawn.encoded[-NUM_LAST_BYTES:], *(() if randaug_in_graph else (drawn.uniforms,))


def numbers_drawn(augment: Augment) -> list[int]:
    """How many uniforms an image takes, in the arrays that `draw` reads."""
    counts = [*crop.NUM_UNIFORMS[augment.crop]]
    if augment.flip:
        counts.append(1)
    if augment.randaug_layers > 0:
        counts.append(augment.randaug_layers * NUM_UNIFORMS_PER_LAYER)
    return counts


def train_pipeline(
    samples: Samples,
    order: TrainOrder,
    *,
    image_size: int,
    augment: Augment,
    decoder: Decoder,
    device_id: int | None,
    num_threads: int,
    start_step: int = 0,
    stride: int = 1,
    bad: np.ndarray | None = None,
    prefetch_queue_depth: int = 2,
    randaug_in_graph: bool = True,
) -> Pipeline:
    """The training pipeline, not built yet: run k gives step start_step + k stride, without end.

    It runs on the GPU device_id, on the CPU if that is None, with num_threads CPU threads either way, and gives
    images uint8 [b, image_size, image_size, 3] and, on the CPU, labels int64 [b] and the last bytes of the encoded
    images uint8 [b, NUM_LAST_BYTES], with b = order.local_batch_size. Without randaug_in_graph RandAugment is left to
    what is behind the graph: its uniforms float32 [b, layers * NUM_UNIFORMS_PER_LAYER] come last. All randomness comes
    from `order`: the pipeline holds no state. The samples marked in bad, bool [N], are replaced by a grey image of
    label -1.
    """
    device = "cpu" if device_id is None else "gpu"
    return _train_graph(
        TrainSource(samples, order, numbers_drawn(augment), start_step, stride, bad),
        image_size,
        augment,
        decoder,
        device,
        randaug_in_graph,
        # For the `if`s on nodes in DALI's own RandAugment: DALI rewrites all functions called, which takes a second.
        enable_conditionals=randaug_in_graph
        and augment.randaug_layers > 0
        and not (device == "cpu" and compiled.available()),
        batch_size=order.local_batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch_queue_depth,
    )
