"""Checkpoints on disk. A run's folder holds

    checkpoints/step_000001234/
        model.safetensors   parameters and buffers, float32, named as in timm; its metadata says how to build it
        trainer.pt          optimiser state and random states; loaded with weights_only
        checkpoint.json     format, step, config, class names, loader state, metrics, SHA-256 of the other files
    checkpoints/best        link to the best of them by minival top-1, or by val top-1 where there is no minival

A checkpoint is written under a temporary name, flushed to the disk and renamed, so that a folder named step_*
is complete. An evaluation's metrics are added to checkpoint.json afterwards. Loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dali_vit import big_vision, weights
from dali_vit.config import Config, ModelConfig, UserError, from_dict, to_dict
from dali_vit.files import at_home, file_sha256, flush, replacing
from dali_vit.model import create_model, set_timm_resolution
from dali_vit.step_folders import prune, remove_unfinished, step_folder, step_folders, warn_once
from dali_vit.validation import MAX_RESOLUTION, check_local, check_range
from dali_vit.variants import TIMM_PREFIX

FORMAT = 1
FILES = ("model.safetensors", "trainer.pt")
"""The files of a checkpoint beside checkpoint.json; the first is enough for inference."""
_REMEDY = "; use an older checkpoint"


class OtherVersion(UserError):
    """A complete checkpoint that was written by a version of dali-vit that this version cannot resume from."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been found complete."""

    path: Path
    step: int
    config: Config
    classes: tuple[str, ...]
    loader: dict[str, Any]
    """What else a run resumes from (`Saver.save`): the ranks' loader states, fingerprints of the data, and so on."""
    metrics: dict[str, float]
    """From the evaluation of these weights; empty where they were not evaluated."""

    def model_state(self) -> dict[str, torch.Tensor]:
        return weights.read(self.path / "model.safetensors")[0]

    def trainer_state(self) -> dict[str, Any]:
        """`optimizer` and `rng` as they were saved; UserError for a file that holds anything but plain data."""
        try:
            return torch.load(self.path / "trainer.pt", map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{self.path / 'trainer.pt'}: refused ({str(error).splitlines()[0]})") from error


@dataclass(frozen=True)
class OpenedModel:
    """A model ready for inference and what its file says about it."""

    model: torch.nn.Module
    config: ModelConfig
    resolution: int
    classes: tuple[str, ...] | None
    step: int | None
    minival: float | None = None
    """Share of the training images that was held out; None for a file of weights, which does not record it."""


def save(
    run_dir: Path,
    *,
    step: int,
    config: Config,
    classes: tuple[str, ...],
    model_state: Mapping[str, torch.Tensor],
    trainer_state: Mapping[str, Any],
    loader_state: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint of a step and removes checkpoints no longer to be kept; returns the new one's folder.

    OSError where the disk refuses; nothing half-written is left behind then, and older checkpoints are untouched.
    """
    final = step_folder(run_dir, step)
    folder = final.parent
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        flush(run_dir)
    temporary, before = folder / f".tmp-{final.name}-{os.getpid()}", folder / f".tmp-old-{final.name}"
    remove_unfinished(folder)
    try:
        temporary.mkdir()
        save_model(temporary / "model.safetensors", model_state, config.model, config.data.resolution, classes, step)
        torch.save(dict(trainer_state), temporary / "trainer.pt")
        record = {
            "format": FORMAT,
            "step": step,
            "config": to_dict(config),
            "classes": list(classes),
            "loader": dict(loader_state),
            "metrics": {},
            "sha256": {name: file_sha256(temporary / name) for name in FILES},
        }
        (temporary / "checkpoint.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        if final.exists():  # the same step, written before an interruption: replace it by a whole one
            os.replace(final, before)
        os.replace(temporary, final)
        flush(folder)
        shutil.rmtree(before, ignore_errors=True)
        prune(folder, config.run.keep_checkpoints, final)
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _refusal(error, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final}: {reason}") from error
    return final


def _refusal(error: Exception, folder: Path) -> str:
    """Why a checkpoint could not be written, in clearer words than those of torch and safetensors."""
    if os.strerror(errno.EFBIG) in str(error):
        return "larger than a file may be here; raise that limit (ulimit -f)"
    if isinstance(error, OSError):
        return str(error)
    if shutil.disk_usage(folder).free < 2**16:
        return "no space left on the disk"
    if os.strerror(errno.ENOSPC) in str(error) or "unexpected pos" in str(error):  # torch counts what was written
        return "no space left on the disk, or a quota or limit is reached"
    return str(error).splitlines()[0]


def add_metrics(run_dir: Path, *, step: int, metrics: Mapping[str, float], keep: int) -> None:
    """Adds the metrics of its weights to the checkpoint of a step and notes that their evaluation is no longer due.

    Then removes checkpoints no longer to be kept. Does nothing where the checkpoint could not be written.
    """
    folder = step_folder(run_dir, step)
    file = folder / "checkpoint.json"
    if not file.exists():
        return
    record = json.loads(file.read_text(encoding="utf-8"))
    record["metrics"] = dict(metrics)
    record["loader"]["evaluation_due"] = False
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    flush(folder)
    prune(folder.parent, keep, folder)


def save_model(
    path: Path,
    state: Mapping[str, torch.Tensor],
    config: ModelConfig,
    resolution: int,
    classes: tuple[str, ...] | None,
    step: int | None,
) -> None:
    """Writes weights as one .safetensors file that `open_model` can build the model from."""
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    description = {
        "format": FORMAT,
        "model": to_dict(Config(model=config))["model"],
        "resolution": resolution,
        "classes": list(classes) if classes is not None else None,
        "step": step,
    }
    weights.write(path, tensors, {"dali_vit": json.dumps(description)})


def newest(run_dir: Path, files: Sequence[str] = FILES) -> Checkpoint | None:
    """The newest complete checkpoint of a run; damaged ones are named in the log and passed over. files: as for `read`.

    None where the run has no checkpoint; UserError where all are damaged. PermissionError for one that may not be read
    and OtherVersion for one of another version: resuming from an older checkpoint instead would lose it.
    """
    while True:
        folders = step_folders(run_dir / "checkpoints")
        for folder in reversed(folders):
            try:
                return read(folder, files)
            except OtherVersion:
                raise
            except UserError as error:
                if not os.path.lexists(folder):
                    break  # the run is in progress: it has removed this one and written newer ones
                fault = str(error).removesuffix(_REMEDY)
                warn_once(f"{fault}{'' if folder == folders[0] else '; trying the one before'}")
        else:
            if folders:
                raise UserError(
                    f"{run_dir / 'checkpoints'}: every checkpoint is damaged; where this folder is moved away, the run"
                    " begins anew"
                )
            return None


def read(folder: Path, files: Sequence[str] = FILES) -> Checkpoint:
    """The checkpoint in a step_* folder; UserError where it is damaged, OtherVersion where another version wrote it.

    files: those of FILES that are to be whole. PermissionError where it may not be read.
    """
    try:
        record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise OtherVersion(f"{folder}: checkpoint format {record['format']}, this version reads {FORMAT}")
        for name in files:
            if file_sha256(folder / name) != record["sha256"][name]:
                raise UserError(f"{folder / name}: damaged (its checksum differs){_REMEDY}")
        try:
            config = from_dict(record["config"])
        except UserError as error:
            raise OtherVersion(f"{folder}: {error}") from error
        return Checkpoint(
            path=folder,
            step=record["step"],
            config=config,
            classes=tuple(record["classes"]),
            loader=record["loader"],
            metrics=record["metrics"],
        )
    except (PermissionError, UserError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint ({error}){_REMEDY}") from error


def open_model(path: str | Path, resolution: int | None = None) -> OpenedModel:
    """The model of a run folder (its newest checkpoint), a checkpoint, a .safetensors or a big_vision .npz.

    The model is in eval mode, float32, and maps [N, 3, H, W] in [-1, 1] to logits. With `resolution` it is
    built for images of that size, its position embeddings resampled. UserError for a file that cannot be read as a
    model, PermissionError for one that may not be read.
    """
    check_local(path, "--checkpoint")
    path = at_home(path)
    if not path.exists():
        raise UserError(f"--checkpoint {path}: no such file or folder")
    if resolution is not None:
        check_range("--resolution", resolution, 1, MAX_RESOLUTION)
    if path.suffix == ".npz":
        return OpenedModel(*big_vision.open_npz(path, resolution), classes=None, step=None)
    file, made_by, state, metadata = _read_model_file(path)
    try:
        description = json.loads(metadata["dali_vit"])
    except (KeyError, json.JSONDecodeError) as error:
        if (file.parent / "config.json").exists():
            raise UserError(_exported(file)) from error
        raise UserError(
            f"{file}: not written by dali-vit (no description of the model inside); give a run folder, a step_* folder"
            " or a file that `convert` made"
        ) from error
    try:
        if description["format"] != FORMAT:
            raise UserError(f"format {description['format']}, this version reads {FORMAT}")
        config = from_dict({"model": description["model"]}).model
        classes = description["classes"] and tuple(description["classes"])
        native, step = int(description["resolution"]), description["step"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: this version cannot read its description of the model ({error})") from error
    num_classes = len(classes) if classes else big_vision.num_classes(state)
    try:
        of_timm = config.model.startswith(TIMM_PREFIX)
        side = native if of_timm else resolution or native
        model = create_model(config, num_classes=num_classes, resolution=side)
        if side != native:
            state = big_vision.resample_positions(state, model)
        model.load_state_dict(state)
        if of_timm and resolution not in (None, native):
            set_timm_resolution(config, model, resolution)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError) and resolution is not None:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: its weights do not fit the model it describes: {reason}") from error
    return OpenedModel(
        model.eval(),
        config,
        resolution or native,
        classes or None,
        step,
        made_by.config.data.minival if made_by else None,
    )


def load_model(path: str | Path, resolution: int | None = None) -> torch.nn.Module:
    """The model alone, as `open_model` gives it: eval mode, float32, [N, 3, H, W] in [-1, 1] to logits."""
    return open_model(path, resolution).model


def _read_model_file(path: Path) -> tuple[Path, Checkpoint | None, dict[str, torch.Tensor], dict[str, str]]:
    """The file and the checkpoint that `_model_file` finds for a path, and the weights and metadata in that file."""
    while True:
        file, made_by = _model_file(path)
        try:
            return file, made_by, *weights.read(file)
        except PermissionError:
            raise
        except (SafetensorError, OSError, RuntimeError) as error:
            if made_by is not None and not os.path.lexists(file):
                continue  # the run is in progress: it has removed this one and written a newer one
            raise UserError(f"{file}: not a readable .safetensors file ({error}); it may be cut short") from error


def _exported(path: Path) -> str:
    return f"--checkpoint {path}: a model for timm, as `export` makes them; give the run or checkpoint it was made of"


def _model_file(path: Path) -> tuple[Path, Checkpoint | None]:
    """The .safetensors file that a path given by the user means, and the checkpoint that it belongs to, if any."""
    if path.is_file():
        if path.suffix != ".safetensors":
            meant = "a run folder, a step_* folder, a .safetensors file or a big_vision .npz"
            raise UserError(f"--checkpoint {path}: not a checkpoint; give {meant}")
        return path, None
    if path.is_symlink():  # such as `best`, which may be redirected at any moment
        path = path.parent / os.readlink(path)
    if (path / "config.json").exists() and not (path / "checkpoint.json").exists():
        raise UserError(_exported(path))
    whole = (path / "checkpoint.json").exists() or (path / "model.safetensors").exists()
    in_run = path.name == "checkpoints" and not (path / "checkpoints").is_dir()
    checkpoint = read(path, FILES[:1]) if whole else newest(path.parent if in_run else path, FILES[:1])
    if checkpoint is None:
        raise UserError(f"--checkpoint {path}: holds no checkpoint; give a run folder or a step_* folder")
    return checkpoint.path / "model.safetensors", checkpoint
