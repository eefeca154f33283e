"""A graph as an iterator of torch batches on the training device, with its exact position.

Batches may be kept, dropped and used like other tensors (see `handover`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline

from pipelines import probe
from pipelines.bad_samples import BadSamples, DecodeError
from pipelines.crop import Decoder
from pipelines.eval import eval_pipeline
from pipelines.handover import Runner
from pipelines.open_files import TooManyFiles
from pipelines.order import EvalOrder, TrainOrder
from pipelines.probe import LackOfMemory
from pipelines.randaugment import behind_graph
from pipelines.readers import Samples, allow_open_files, check_samples
from pipelines.train import Augment, train_pipeline
from pipelines.words import one_line

__all__ = ["DecodeError", "EvalLoader", "LackOfMemory", "TooManyFiles", "TrainLoader"]

Batch = tuple[torch.Tensor, torch.Tensor]

log = logging.getLogger("dali_vit.data")  # among the training's own messages

# After a failure so many samples of the next steps are tried with those in flight, which takes about as long as
# making the training pipeline anew: where many are bad, many are found at once.
_LOOK_AHEAD = 1024

# Each lane takes time to be made, and memory for batches and buffers of its own.
_MAX_LANES = 2


def _device_id(device: torch.device | str) -> int | None:
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return torch.cuda.current_device() if device.index is None else device.index
    raise ValueError(f"device is {str(device)!r}: images are loaded to cpu or cuda")


def _on_cpu(decoding: dict[str, Any]) -> probe.MakePipeline | None:
    """Makes pipelines that decode on the CPU what others decode on a GPU; None where they do on the CPU."""
    if decoding["device_id"] is None:
        return None
    return functools.partial(probe.decode_pipeline, **(decoding | {"device_id": None}))


def _check_at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} is {value}: it must be a whole number of at least {least}")


def _num_lanes(num_threads: int) -> int:
    """Into how many pipelines the CPU's threads part, which take the steps in turn.

    Between two operators of a pipeline its threads wait for the slowest of them and for the executor, a single
    thread, which is a tenth of the time for 2 threads and more for many: other pipelines work meanwhile.
    """
    return min(num_threads, _MAX_LANES)


class TrainLoader:
    """The endless training stream of one rank: (images uint8 [b, S, S, 3], labels int64 [b]) on the device.

    batch_size is that of all ranks together, b = batch_size / world_size. What step s gives depends on the samples,
    batch_size, seed and s alone, augmentation included, so a loader made with start_step = k continues another
    one bit for bit; its rows depend on rank and world_size only in who gets them, but for what a GPU's decoders
    make of them: which of these decodes an image depends on the others in the batch. On the CPU the threads part into
    pipelines that take the steps in turn.

    A sample that cannot be read or decoded is named in a warning and left out from then on: in its place comes a grey
    image of label -1, so that all others stay where they were, on every rank. It is found when its turn comes: to give
    `bad_samples`, those known from before, spares time, but what was mended meanwhile stays left out. Raises
    DecodeError when more are bad than the share max_bad_share of all samples (1 sample is allowed in any case, unless
    the share is 0); DALI's RuntimeError when it fails for another reason, again and at whole images, as when nothing
    can be read any more, LackOfMemory where that is a GPU's memory; TooManyFiles where a batch has more files than may
    be open at once; and ValueError for arguments that do not fit together. After an error, Ctrl-C included, the loader
    is closed; `step` is the one to go on from.
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
        _check_at_least(1, batch_size=batch_size, image_size=image_size, num_threads=num_threads, prefetch=prefetch)
        _check_at_least(0, start_step=start_step)
        check_samples(samples)
        self._samples = samples
        self._order = TrainOrder(len(samples), batch_size, rank, world_size, seed)
        allow_open_files(samples, self._order.local_batch_size)
        self._step = start_step
        self._prefetch = prefetch
        device_id = _device_id(device)
        self._decoder = decoder or Decoder()
        decoding: dict[str, Any] = {"decoder": self._decoder, "device_id": device_id, "num_threads": num_threads}
        self._probing = functools.partial(probe.decode_pipeline, **decoding)
        self._bad = BadSamples(samples, self._probing, bad_samples, max_bad_share, _on_cpu(decoding))
        augment = Augment() if augment is None else augment
        if not isinstance(augment, Augment):
            raise ValueError(f"augment is {augment!r}: give an Augment, or None for the paper's augmentation")
        self._rand_augment = behind_graph(
            device_id,
            image_size=image_size,
            layers=augment.randaug_layers,
            magnitude=augment.randaug_magnitude,
            contrast=augment.randaug_contrast,
        )
        self._make_pipeline = functools.partial(
            train_pipeline,
            samples,
            self._order,
            image_size=image_size,
            augment=augment,
            randaug_in_graph=self._rand_augment is None,
            bad=self._bad.mask,
            prefetch_queue_depth=prefetch,
            device_id=device_id,
        )
        self._runner = Runner(device_id)
        self._lanes = _num_lanes(num_threads) if device_id is None else 1
        self._threads = num_threads
        self._pipelines: list[Pipeline] = []
        self._failed_at: int | None = None  # the last step that failed through no sample
        self._open()

    def _open(self) -> None:
        self.close()
        self._first_step = self._step
        for lane in range(self._lanes):
            threads = (self._threads + lane) // self._lanes
            self._pipelines.append(
                self._make_pipeline(
                    decoder=self._decoder, start_step=self._step + lane, stride=self._lanes, num_threads=threads
                )
            )
        # Not `for pipeline in`: an import within build() leaves a cycle with this frame, which would keep the pipeline.
        for lane in range(self._lanes):
            self._pipelines[lane].build()

    @property
    def step(self) -> int:
        """The step that the next batch belongs to."""
        return self._step

    @property
    def bad_samples(self) -> tuple[int, ...]:
        """Indices of the samples that are known to be undecodable, rising."""
        return self._bad.indices

    def state_dict(self) -> dict[str, Any]:
        """The bad samples, which a loader that goes on is to be given, and the number of all, by which to check it."""
        return {"num_samples": self._order.num_samples, "bad_samples": list(self.bad_samples)}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._pipelines:
            raise ValueError("the loader is closed: make a new one at the step to continue from")
        try:
            return self._next()
        except BaseException:  # Ctrl-C among them, or what a handler of signals raises: the pipelines may be ahead
            self.close()
            raise

    def _next(self) -> Batch:
        while True:
            pipeline = self._pipelines[(self._step - self._first_step) % self._lanes]
            try:
                images, labels, last_bytes = self._runner(pipeline, self._rand_augment)
            except RuntimeError as error:
                self.close()
                probe.check_memory(error)
                if not self._bad.find(self._next_samples(), failed=True) and not self._try_again(error):
                    raise
                log.debug("the pipeline is made anew after: %s", error)
            else:
                cut_short = self._bad.cut_short(self._order.indices(self._step), last_bytes.numpy())
                if not self._bad.find(cut_short, failed=False):
                    self._step += 1
                    return images, labels
                # As the pipeline has to be made anew, for what is bad in the batches it had begun, too.
                self._bad.find(self._next_samples(), failed=False)
            self._open()

    def _next_samples(self) -> np.ndarray:
        """Indices of the samples from this step on, in order, at least those that the pipeline had begun."""
        steps = max(self._lanes * (self._prefetch + 1), -(-_LOOK_AHEAD // self._order.local_batch_size))
        indices = np.concatenate([self._order.indices(self._step + i) for i in range(steps)])
        _, first = np.unique(indices, return_index=True)
        return indices[np.sort(first)]

    def _try_again(self, error: RuntimeError) -> bool:
        """Whether a step that failed through no sample is to be loaded again.

        The first time as it was, as what failed may pass; the second time of whole images, as all steps from then on,
        because a decoder may fail at windows alone: the pixels are the same. No third time, nor where not even a single
        image decodes: then the disk or the device is lost.
        """
        again = self._failed_at == self._step
        if again and self._decoder.region == "full":
            return False
        indices = self._order.indices(self._step)
        tried = probe.try_samples(self._samples.subset(indices[~self._bad.mask[indices]][:1]), self._probing)
        if not any(decodes for _, decodes in tried):
            return False
        self._failed_at = self._step
        if again:
            self._decoder = replace(self._decoder, region="full")
            log.warning("step %d fails again: whole images are decoded from here on, which is slower", self._step)
        else:
            said = one_line(error)[:300]
            log.warning("step %d is loaded again, as DALI failed at no image that is bad: %s", self._step, said)
        return True

    def close(self) -> None:
        """Stop the threads and free the buffers; batches handed out stay valid."""
        if self._pipelines:
            self._runner.shut_down(self._pipelines)
            self._pipelines = []


class EvalLoader:
    """One rank's share of a set, over and over: (images uint8 [b, S, S, 3], labels int64 [b]) on the device.

    batch_size is that of this rank. Over all ranks every image comes exactly once per pass; all ranks have
    the same number of batches (len), and label -1 marks rows that only pad.

    Up to the share max_bad_share of all samples, in any case 1 unless the share is 0, may be images that cannot be
    read or decoded: they are named in a warning, and in their place comes a grey image of label -1. Raises
    DecodeError where there are more, DALI's RuntimeError when it fails for another reason, TooManyFiles where a batch
    has more files than may be open at once, and ValueError for arguments that do not fit together.
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
        max_bad_share: float = 0.0,
    ) -> None:
        _check_at_least(1, batch_size=batch_size, image_size=image_size, num_threads=num_threads)
        check_samples(samples)
        self._order = EvalOrder(len(samples), batch_size, rank, world_size)
        allow_open_files(samples, batch_size)
        device_id = _device_id(device)
        self._runner = Runner(device_id)
        decoding: dict[str, Any] = {
            "decoder": decoder or Decoder(fancy_upsampling=True),
            "device_id": device_id,
            "num_threads": num_threads,
        }
        make = functools.partial(eval_pipeline, **decoding)
        # At the same size, as an image may be too long and thin for one and not for another.
        failing = functools.partial(make, image_size=image_size)
        self._bad = BadSamples(samples, failing, (), max_bad_share, _on_cpu(decoding))
        self._make_pipeline = functools.partial(make, samples, self._order, image_size=image_size, bad=self._bad.mask)
        self._idle: Pipeline | None = None

    def __len__(self) -> int:
        return self._order.num_batches

    @property
    def bad_samples(self) -> tuple[int, ...]:
        """Indices of the samples that are known to be undecodable, rising."""
        return self._bad.indices

    def __iter__(self) -> Iterator[Batch]:
        # A pass owns its pipeline: one that is given up half-way leaves nothing behind for the next.
        pipeline, self._idle = self._idle, None
        if pipeline is None:
            pipeline = self._make_pipeline()
        batch = start = 0
        try:
            while batch < len(self):
                try:
                    images, labels, last_bytes = self._runner(pipeline)
                except RuntimeError as error:
                    self._runner.shut_down([pipeline])
                    probe.check_memory(error)
                    self._leave_out(batch, error)
                else:
                    cut_short = self._bad.cut_short(self._order.indices(batch), last_bytes.numpy())
                    if not self._bad.find(cut_short, failed=False):
                        yield images, labels
                        batch += 1
                        continue
                    self._runner.shut_down([pipeline])
                pipeline, start = self._make_pipeline(start_batch=batch), batch
            if start == 0:
                pipeline.reset()
                self._idle = pipeline
        finally:
            self._runner.release()
            if pipeline is not self._idle:
                self._runner.shut_down([pipeline])

    def _leave_out(self, batch: int, error: RuntimeError) -> None:
        """Leaves out what made the pipeline fail at a batch; raises the error if it was not a sample."""
        # A failure surfaces with its own batch, or earlier where it takes down a device that works ahead.
        indices = np.concatenate([self._order.indices(i) for i in range(batch, min(batch + 3, len(self)))])
        try:
            found = self._bad.find(np.unique(indices[indices >= 0]), failed=True)
        except DecodeError as decode_error:
            raise decode_error from error
        if not found:
            raise error

    def close(self) -> None:
        """Stop the threads and free the buffers; batches handed out stay valid, and another pass may follow."""
        if self._idle is not None:
            self._runner.shut_down([self._idle])
            self._idle = None
