"""A graph as an iterator of torch batches on the training device, without a copy, and with its exact position.

Batches share DALI's buffers. DALI hands no buffer out again while a tensor lives that was made from it, and on a
GPU not before the work queued until the tensor's end is done: its DLPack deleter waits for the device, in a
thread of its own. So batches may be kept, dropped and used on any stream like other tensors.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from nvidia.dali import Pipeline

from pipelines import probe
from pipelines.crop import Decoder
from pipelines.eval import eval_pipeline
from pipelines.order import EvalOrder, TrainOrder
from pipelines.readers import Samples
from pipelines.train import Augment, train_pipeline

__all__ = ["DecodeError", "EvalLoader", "TrainLoader"]

Batch = tuple[torch.Tensor, torch.Tensor]

log = logging.getLogger("dali_vit.data")  # among the training's own messages

# Where this many samples are tried and all fail, it is not the samples: a disk is gone, or the device's memory full.
_NOT_THE_SAMPLES = 16

# After a failure so many samples of the next steps are tried with those in flight, which takes about as long as
# making the training pipeline anew: where many are bad, many are found at once.
_LOOK_AHEAD = 1024


class DecodeError(ValueError):
    """Samples that cannot be read or decoded, where that cannot be passed over."""

    def __init__(self, message: str, paths: Sequence[str]) -> None:
        super().__init__(message)
        self.paths = list(paths)
        """Names of the samples."""


def _device_id(device: torch.device | str) -> int | None:
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return torch.cuda.current_device() if device.index is None else device.index
    raise ValueError(f"device is {str(device)!r}: images are loaded to cpu or cuda")


def _run(pipeline: Pipeline) -> list[torch.Tensor]:
    # Without a stream run() returns when the batch is finished, so that the time in it is the time spent waiting.
    return [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _undecodable(samples: Samples, make: probe.MakePipeline, at_most: int) -> tuple[list[int], int]:
    """Places of the samples that fail when tried alone, and how many were tried.

    It is given up at the first failure beyond at_most, or when the first _NOT_THE_SAMPLES all fail.
    """
    bad: list[int] = []
    tried = 0
    for tried, (place, decodes) in enumerate(probe.try_samples(samples, make), start=1):
        if not decodes:
            bad.append(place)
        if tried == _NOT_THE_SAMPLES if len(bad) == tried else len(bad) > at_most:
            break
    return bad, tried


def _has_end_of_jpeg(last_bytes: np.ndarray) -> np.ndarray:
    """Whether an end-of-image marker is among the last bytes of files, [N, bytes] -> bool [N]."""
    return ((last_bytes[:, :-1] == 0xFF) & (last_bytes[:, 1:] == 0xD9)).any(axis=1)


class TrainLoader:
    """The endless training stream of one rank: (images uint8 [b, S, S, 3], labels int64 [b]) on the device.

    batch_size is that of all ranks together, b = batch_size / world_size. What step s gives depends on the samples,
    batch_size, seed and s alone, augmentation included, so a loader made with start_step = k continues another
    one bit for bit; its rows depend on rank and world_size only in who gets them.

    A sample that cannot be read or decoded is named in a warning and left out for good: in its place comes a grey
    image of label -1, so that all others stay where they were, on every rank. It is found when its turn comes, so
    that `bad_samples`, those known from before, spares time but changes nothing. Raises DecodeError when more are
    bad than the share max_bad_share of all samples (1 sample is allowed in any case, unless the share is 0);
    DALI's RuntimeError when it fails for another reason, as when nothing can be read any more; and ValueError
    for arguments that do not fit together. After an error the loader is closed.
    """

    def __init__(
        self,
        samples: Samples,
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
        bad_samples: Sequence[int] = (),
        max_bad_share: float = 0.01,
    ) -> None:
        self._samples = samples
        self._order = TrainOrder(len(samples), batch_size, rank, world_size, seed)
        self._step = start_step
        self._prefetch = prefetch
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {max_bad_share}: it must be within [0, 1]")
        self._max_bad = max(int(max_bad_share * len(samples) + 1e-6), int(max_bad_share > 0))
        if not all(0 <= index < len(samples) for index in bad_samples):
            raise ValueError(f"bad_samples holds other indices than those of the {len(samples)} samples")
        self._bad = np.zeros(len(samples), bool)
        self._bad[list(bad_samples)] = True
        self._tried = self._bad.copy()
        decoding: dict[str, Any] = {
            "decoder": decoder or Decoder(),
            "device_id": _device_id(device),
            "num_threads": num_threads,
        }
        self._make_probe = functools.partial(probe.decode_pipeline, **decoding)
        self._make_pipeline = functools.partial(
            train_pipeline,
            samples,
            self._order,
            image_size=image_size,
            augment=augment or Augment(),
            bad=self._bad,
            prefetch_queue_depth=prefetch,
            **decoding,
        )
        self._pipeline: Pipeline | None = None
        self._check_share()
        self._open()

    def _open(self) -> None:
        self.close()
        self._pipeline = self._make_pipeline(start_step=self._step)
        self._pipeline.build()

    @property
    def step(self) -> int:
        """The step that the next batch belongs to."""
        return self._step

    @property
    def bad_samples(self) -> tuple[int, ...]:
        """Indices of the samples that are known to be undecodable, rising."""
        return tuple(np.flatnonzero(self._bad).tolist())

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, what else the stream depends on besides the samples, and the bad ones."""
        return {
            "step": self._step,
            "seed": self._order.seed,
            "batch_size": self._order.batch_size,
            "num_samples": self._order.num_samples,
            "bad_samples": list(self.bad_samples),
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pipeline is None:
            raise ValueError("the loader is closed: make a new one at the step to continue from")
        while True:
            try:
                images, labels, last_bytes = _run(self._pipeline)
            except RuntimeError as error:
                self.close()
                if not self._leave_out(self._next_samples(), failed=True):
                    raise
                log.debug("the pipeline is made anew after: %s", error)
            else:
                # Of a JPEG that was cut short the first rows still decode: whether this one fails must not depend
                # on the windows that were drawn of it.
                if not self._leave_out(self._cut_short(last_bytes.numpy()), failed=False):
                    self._step += 1
                    return images, labels
                self._leave_out(self._next_samples(), failed=False)
            self._open()

    def _next_samples(self) -> np.ndarray:
        """Indices of the samples from this step on, in order, at least those that the pipeline had begun."""
        steps = max(self._prefetch + 1, -(-_LOOK_AHEAD // self._order.local_batch_size))
        indices = np.concatenate([self._order.indices(self._step + i) for i in range(steps)])
        _, first = np.unique(indices, return_index=True)
        return indices[np.sort(first)]

    def _cut_short(self, last_bytes: np.ndarray) -> np.ndarray:
        """Indices of this step's JPEGs whose end is missing, or does not come last, and that were never tried."""
        suspects = np.flatnonzero(~_has_end_of_jpeg(last_bytes))
        if len(suspects) == 0:  # nearly always
            return suspects
        indices = np.unique(self._order.indices(self._step)[suspects])
        indices = indices[~self._tried[indices]]
        # Other formats are always decoded whole.
        return indices[[self._samples.path(i).lower().endswith((".jpg", ".jpeg")) for i in indices.tolist()]]

    def _leave_out(self, indices: np.ndarray, *, failed: bool) -> bool:
        """Try samples and leave the bad ones out from now on; whether there are any.

        failed: one of them is thought to have made the pipeline fail; if all fail, it is not them.
        """
        # After a failure those tried before are tried again: a file may have been removed since.
        indices = indices[~(self._bad[indices] if failed else self._tried[indices])]
        if len(indices) == 0:
            return False
        at_most = self._max_bad - int(self._bad.sum())
        places, tried = _undecodable(self._samples.subset(indices), self._make_probe, at_most)
        if failed and len(places) == tried > min(at_most, _NOT_THE_SAMPLES - 1):
            return False
        bad = indices[places]
        self._tried[indices[:tried]] = True
        self._bad[bad] = True
        for index in bad.tolist():
            log.warning("%s cannot be read or decoded: left out for the rest of the run", self._samples.path(index))
        self._check_share()
        return len(bad) > 0

    def _check_share(self) -> None:
        bad = self.bad_samples
        if len(bad) > self._max_bad:
            self.close()
            names = [self._samples.path(i) for i in bad]
            raise DecodeError(
                f"{len(bad)} of {len(self._samples)} samples cannot be read or decoded, more than the {self._max_bad}"
                f" that are passed over: {_some(names)}; find and remove them with `dali-vit verify PATH`",
                names,
            )

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
        samples: Samples,
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
                # A failure surfaces with its own batch, or earlier where it takes down a device that works ahead.
                batches = range(batch, min(batch + 3, len(self)))
                self._raise(error, np.concatenate([self._order.indices(i) for i in batches]))
            yield images, labels
        pipeline.reset()
        self._idle = pipeline

    def _raise(self, error: RuntimeError, indices: np.ndarray) -> NoReturn:
        """Raise what is known of a pipeline's failure, the indices of the suspects given."""
        suspects = self._samples.subset(np.unique(indices[indices >= 0]))
        make = functools.partial(eval_pipeline, image_size=8, **self._decoding)
        places, tried = _undecodable(suspects, make, at_most=len(suspects))
        if not places or len(places) == tried == _NOT_THE_SAMPLES:
            raise error
        paths = [suspects.path(i) for i in places]
        raise DecodeError(f"cannot read or decode {_some(paths)}: replace or remove the file", paths) from error

    def close(self) -> None:
        """Stop the threads and free the buffers; batches handed out stay valid."""
        self._idle = None
