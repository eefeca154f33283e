"""A graph as an iterator of torch batches on the training device, without a copy, and with its exact position.

Batches share DALI's buffers. DALI hands no buffer out again while a tensor lives that was made from it, and on a
GPU not before the work queued until the tensor's end is done: its DLPack deleter waits for the device, in a
thread of its own. So batches may be kept, dropped and used on any stream like other tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from nvidia.dali import Pipeline

from pipelines.crop import Decoder
from pipelines.eval import eval_pipeline
from pipelines.order import EvalOrder, TrainOrder
from pipelines.readers import FileList
from pipelines.train import Augment, train_pipeline

__all__ = ["DecodeError", "EvalLoader", "TrainLoader"]

Batch = tuple[torch.Tensor, torch.Tensor]

# Beyond this many failures in a batch it is not the files: a disk is gone, or the device is out of memory.
_MAX_UNDECODABLE = 16


class DecodeError(ValueError):
    """Files of a batch that cannot be read or decoded; DALI's own error is the cause."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(f"cannot read or decode {', '.join(paths)}: replace or remove the file")
        self.paths = paths


def _device_id(device: torch.device | str) -> int | None:
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return torch.cuda.current_device() if device.index is None else device.index
    raise ValueError(f"device is {str(device)!r}: images are loaded to cpu or cuda")


def _run(pipeline: Pipeline) -> Batch:
    # Without a stream run() returns when the batch is finished, so that the time in it is the time spent waiting.
    images, labels = (torch.from_dlpack(output.as_tensor()) for output in pipeline.run())
    return images, labels


def _undecodable(samples: FileList, decoding: dict[str, Any]) -> list[str]:
    """Those of the files that fail when tried alone, as DALI's message does not always say; [] if too many do."""
    paths: list[str] = []
    start = 0
    while start < len(samples) and len(paths) <= _MAX_UNDECODABLE:
        rest = samples.subset(np.arange(start, len(samples)))
        pipeline = eval_pipeline(rest, EvalOrder(len(rest), 1, 0, 1), image_size=8, **decoding)
        for i in range(len(rest)):
            start += 1
            try:
                pipeline.run()
            except RuntimeError:  # a pipeline is of no use after that
                paths.append(rest.path(i))
                break
    return paths if len(paths) <= _MAX_UNDECODABLE else []


def _raise(error: RuntimeError, samples: FileList, batches: Iterable[np.ndarray], decoding: dict[str, Any]) -> NoReturn:
    """Raise what is known of a pipeline's failure, the indices of the suspected batches given."""
    for indices in batches:
        suspects = samples.subset(np.unique(np.maximum(indices, 0)))
        if paths := _undecodable(suspects, decoding):
            raise DecodeError(paths) from error
    raise error


class TrainLoader:
    """The endless training stream of one rank: (images uint8 [b, S, S, 3], labels int64 [b]) on the device.

    batch_size is that of all ranks together, b = batch_size / world_size. What step s gives depends on the files,
    batch_size, seed and s alone, augmentation included, so a loader made with start_step = k continues another
    one bit for bit; its rows depend on rank and world_size only in who gets them. Raises ValueError for
    arguments that do not fit together, and DecodeError where an image cannot be read or decoded: the loader is
    then closed, and a new one without that image is to be made.
    """

    def __init__(
        self,
        samples: FileList,
        *,
        batch_size: int,
        image_size: int,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        num_threads: int,
        start_step: int = 0,
        augment: Augment | None = None,
        decoder: Decoder | None = None,
        prefetch: int = 2,
    ) -> None:
        self._samples = samples
        self._order = TrainOrder(len(samples), batch_size, rank, world_size, seed)
        self._step = start_step
        self._prefetch = prefetch
        self._decoding: dict[str, Any] = {
            "decoder": decoder or Decoder(),
            "device_id": _device_id(device),
            "num_threads": num_threads,
        }
        self._pipeline: Pipeline | None = train_pipeline(
            samples,
            self._order,
            image_size=image_size,
            augment=augment or Augment(),
            start_step=start_step,
            prefetch_queue_depth=prefetch,
            **self._decoding,
        )
        self._pipeline.build()

    @property
    def step(self) -> int:
        """The step that the next batch belongs to."""
        return self._step

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, and what else the stream depends on besides the files."""
        return {
            "step": self._step,
            "seed": self._order.seed,
            "batch_size": self._order.batch_size,
            "num_samples": self._order.num_samples,
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pipeline is None:
            raise ValueError("the loader is closed: make a new one at the step to continue from")
        try:
            batch = _run(self._pipeline)
        except RuntimeError as error:
            self.close()
            # A failure surfaces with its own batch, or earlier where it takes down a device that works ahead.
            steps = range(self._step, self._step + self._prefetch + 1)
            _raise(error, self._samples, map(self._order.indices, steps), self._decoding)
        self._step += 1
        return batch

    def close(self) -> None:
        """Stop the threads and free the buffers; batches handed out stay valid."""
        self._pipeline = None


class EvalLoader:
    """One rank's share of a set, over and over: (images uint8 [b, S, S, 3], labels int64 [b]) on the device.

    batch_size is that of this rank. Over all ranks every image comes exactly once per pass; all ranks have
    the same number of batches (len), and label -1 marks rows that only pad. Raises ValueError for arguments
    that do not fit together, and DecodeError where an image cannot be read or decoded.
    """

    def __init__(
        self,
        samples: FileList,
        *,
        batch_size: int,
        image_size: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        num_threads: int,
        decoder: Decoder | None = None,
    ) -> None:
        self._samples = samples
        self._order = EvalOrder(len(samples), batch_size, rank, world_size)
        self._image_size = image_size
        self._decoding: dict[str, Any] = {
            "decoder": decoder or Decoder(),
            "device_id": _device_id(device),
            "num_threads": num_threads,
        }
        self._idle: Pipeline | None = None

    def __len__(self) -> int:
        return self._order.num_batches

    def __iter__(self) -> Iterator[Batch]:
        # A pass owns its pipeline: one that is given up half-way leaves nothing behind for the next.
        pipeline, self._idle = self._idle, None
        if pipeline is None:
            pipeline = eval_pipeline(self._samples, self._order, image_size=self._image_size, **self._decoding)
        for batch in range(len(self)):
            try:
                images, labels = _run(pipeline)
            except RuntimeError as error:
                del pipeline
                batches = range(batch, min(batch + 3, len(self)))
                _raise(error, self._samples, map(self._order.indices, batches), self._decoding)
            yield images, labels
        pipeline.reset()
        self._idle = pipeline

    def close(self) -> None:
        """Stop the threads and free the buffers; batches handed out stay valid."""
        self._idle = None
