"""Files given as a model that are none, or not whole: named with their fault, and no code of theirs is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dali_vit import checkpoint, weights
from dali_vit.config import UserError
from dali_vit.files import file_sha256
from tests.test_checkpoint import save


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    folder = save(tmp_path, 1)
    target = tmp_path / "exploded"
    with (folder / "trainer.pt").open("wb") as file:
        torch.save({"optimizer": Bomb(target), "rng": []}, file)
    record = json.loads((folder / "checkpoint.json").read_text())
    record["sha256"]["trainer.pt"] = file_sha256(folder / "trainer.pt")
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"trainer\.pt: refused"):
        checkpoint.read(folder).trainer_state()
    assert not target.exists()
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb(target)))
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.open_model(tmp_path / "bomb.pt")
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not a readable"), (b"\x00" * 64, "not a readable"), (None, "no description of the model")],
)
def test_foreign_safetensors_are_named(tmp_path, content, message):
    path = tmp_path / "foreign.safetensors"
    if content is None:
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"foreign.safetensors: .*{message}"):
        checkpoint.open_model(path)


@pytest.mark.parametrize(
    "change",
    [
        *({name: ...} for name in ("format", "model", "resolution", "classes", "step")),
        *({"resolution": value} for value in (None, "x", 0.5)),
        *({"classes": value} for value in ([1, 2, 3, 4], 4, {"a": 1})),
        *({"model": value} for value in ("S/16", None, {"model": 3}, {"width": "wide"}, {"new": 1})),
        *({"format": value} for value in (99, None)),
        *({"": value} for value in ([], 3, None)),
    ],
)
def test_a_description_of_the_model_that_cannot_be_understood_is_named(change, tmp_path):
    folder = save(tmp_path, 1)
    tensors, metadata = weights.read(folder / "model.safetensors")
    described = json.loads(metadata["dali_vit"])
    ((name, value),) = change.items()
    if value is ...:
        del described[name]
    elif name:
        described[name] = value
    weights.write(tmp_path / "m.safetensors", tensors, {"dali_vit": json.dumps(described if name else value)})
    with pytest.raises(UserError, match=rf"^{tmp_path}/m\.safetensors: "):
        checkpoint.open_model(tmp_path / "m.safetensors")


def test_a_folder_made_for_timm_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=f"--checkpoint {path}: a model for timm, as `export` makes them; give"):
            checkpoint.open_model(path)


def test_missing_and_empty_paths_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        checkpoint.open_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.open_model(tmp_path)
