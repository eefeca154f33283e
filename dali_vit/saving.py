"""Saves and restores a run: model, optimiser, random and loader states of all ranks, written in the background."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

import torch

from dali_vit import checkpoint as checkpoints
from dali_vit.background import BackgroundWriter
from dali_vit.config import Config, UserError
from dali_vit.distributed import Group, gather_objects, together
from dali_vit.loaders import TrainLoader
from dali_vit.metric_log import MetricLog
from dali_vit.plan import Plan
from dali_vit.runfolder import flush_logs
from dali_vit.runlock import current, following
from dali_vit.step_folders import prune, remove_unfinished

__all__ = ["Saver", "restore", "tidy_up"]


class Saver:
    """Writes a run's checkpoints on rank 0, one at a time, while the training goes on.

    All ranks make one and call the same of its methods. Whatever was logged to `writer`, rank 0's, before a call is on
    the disk before that call's checkpoint: the steps before a checkpoint do not run again. As a context it waits for
    the write under way, whatever ends its body.
    """

    def __init__(
        self,
        config: Config,
        group: Group,
        planned: Plan,
        optimizer: torch.optim.Optimizer,
        loader: TrainLoader,
        writer: MetricLog | None,
    ) -> None:
        self._config, self._group, self._planned = config, group, planned
        self._optimizer, self._loader, self._writer = optimizer, loader, writer
        self._background = BackgroundWriter()

    def save(self, step: int, *, evaluation_due: bool) -> None:
        """Writes the checkpoint of the state as it is now, after `step` steps; waits for the write before, not for
        this one. evaluation_due: whether a run that goes on from here has to evaluate these weights first. Collective.
        """
        random_states = gather_objects(_random_state(self._group))
        loader_states = gather_objects(self._loader.state_dict())
        if self._group.is_main:
            planned = self._planned
            self._submit(
                checkpoints.save,
                {
                    "model_state": planned.model.state_dict(),
                    "trainer_state": {"optimizer": self._optimizer.state_dict(), "rng": random_states},
                },
                step=step,
                config=self._config,
                classes=planned.dataset.classes,
                loader_state={
                    "world_size": self._group.world_size,
                    "train_names": planned.train_fingerprint,
                    "val_names": planned.val_fingerprint,
                    "resized": planned.dataset.resized,
                    "ranks": loader_states,
                    "evaluation_due": evaluation_due,
                },
            )

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the evaluation of its weights to the checkpoint of a step, after which none is due."""
        if self._group.is_main:
            keep = self._config.run.keep_checkpoints
            self._submit(checkpoints.add_metrics, step=step, metrics=metrics, keep=keep)

    def _submit(self, write: Callable[..., Any], state: Mapping[str, Any] | None = None, **arguments: Any) -> None:
        """Has the background thread call write(run_dir=..., **state, **arguments) once the logs are on the disk."""
        if self._writer is not None:
            self._writer.flush()

        def after_logs(**given: Any) -> None:
            # Each in the folder as it is called then, and again where it is moved meanwhile.
            following(self._config, flush_logs)()
            following(self._config, write)(**given)

        self._background.submit(after_logs, state, **arguments)

    def newest(self) -> checkpoints.Checkpoint | None:
        """The newest checkpoint, once the write under way is done."""
        self._background.wait()
        return checkpoints.newest(current(self._config))

    def close(self) -> None:
        """Waits on every rank for the last write; UserError, on every rank alike, where it failed. Collective."""
        together(lambda: _close(self._background))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._background.__exit__(*error)


def tidy_up(checkpoint: checkpoints.Checkpoint) -> None:
    """Does for a finished run, whose last checkpoint this is, what a process that was killed at its end did not: it
    points the link `best` to the best checkpoint and removes those that this process was not to keep."""
    folder = checkpoint.path.parent
    with suppress(OSError):  # where the run may only be read
        remove_unfinished(folder)
        prune(folder, checkpoint.config.run.keep_checkpoints, checkpoint.path)


def restore(
    checkpoint: checkpoints.Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer, group: Group
) -> None:
    """Puts a model, its optimiser and this rank's random state back as they were when the checkpoint was saved."""
    state = checkpoint.trainer_state()
    model.load_state_dict(checkpoint.model_state())
    optimizer.load_state_dict(state["optimizer"])
    if len(state["rng"]) == group.world_size:  # another number of ranks draws anew, from seed and rank
        torch.set_rng_state(state["rng"][group.rank]["cpu"])
        if group.device.type == "cuda" and "cuda" in state["rng"][group.rank]:
            torch.cuda.set_rng_state(state["rng"][group.rank]["cuda"], group.device)


def _random_state(group: Group) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if group.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(group.device)
    return states


def _close(background: BackgroundWriter) -> None:
    try:
        background.close()
    except OSError as error:
        full = "no space left" in str(error) or getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room" if full else "mend that"
        raise UserError(
            f"the last checkpoint could not be written in full ({error}); {remedy} and start again"
        ) from error
