"""`--config FILE`: takes settings that a run or --print-config wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from dali_vit import recipes
from dali_vit.config import LocalUserError, UserError, from_dict, to_yaml
from dali_vit.config_file import expand
from dali_vit.parsing import naming_file, parse_train
from tests.conftest import run


def parsed(*arguments: str | Path) -> Any:
    return parse_train(list(map(str, arguments)))[0]


@pytest.mark.parametrize("recipe", ["demo", "s16-300ep-original", "resnet50-90ep"])
def test_what_was_printed_is_taken_again(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["--data", "a b=c", "--no-antialias", "--grad-clip-norm", "None", "--max-hours", "2.5", "--name", "x"]
    config = parsed("--recipe", recipe, *changes, "--steps", "70000", "--seed", str(2**63 - 1))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parsed("--config", file) == config
    assert parsed(f"--config={file}") == config
    assert parsed("--config", tmp_path) == config  # the run's folder
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert parsed("--config", f"~/{tmp_path.name}") == config
    assert config != recipes.get(recipe)


def test_flags_override_the_file_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(recipes.get("demo")))
    changed = parsed("--lr", "0.5", "--config", file, "--no-antialias")
    assert (changed.optim.lr, changed.data.antialias, changed.model.width) == (0.5, False, 96)
    stepped = parsed("--config", file, "--steps", "100")
    assert (stepped.optim.steps, stepped.optim.epochs) == (100, None)
    file.write_text(to_yaml(stepped))
    assert parsed("--config", file, "--epochs", "2").optim.steps is None
    # A model that is named has the sizes of its own name.
    assert parsed("--config", file, "--model", "B/16").model.width is None


def test_what_a_file_leaves_out_is_its_recipes(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optim:\n  lr: 3e-4\nrun:\n  recipe: b32-90ep\n")  # to YAML 3e-4 is a text
    expected = from_dict(yaml.safe_load(to_yaml(recipes.get("b32-90ep"))))
    assert expected.model.model == "B/32"
    config = parsed("--config", file)
    assert config.optim.lr == 3e-4
    assert parsed("--config", file, "--lr", "0.001") == expected


def test_mappings_may_be_merged(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    merged = "  <<: {batch_size: 8, lr: 1}\n  <<: {warmup_steps: 7}\n  lr: 100000000000000000000000\n"
    file.write_text(f"optim:\n{merged}run: {{recipe: s16-90ep}}\n")
    optim = parsed("--config", file).optim
    assert (optim.batch_size, optim.warmup_steps, optim.lr) == (8, 7, 1e23)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("data: {", "is not YAML"),
        ("\x00", "is not YAML"),
        ("run: {name: 2026-02-30}", "is not YAML (day is out of range for month); give a run's folder or config.yaml"),
        ("run: {seed: 0x_}", "is not YAML (invalid literal for int"),
        (f"run: {{seed: {'9' * 5000}}}", "is not YAML (Exceeds the limit"),
        (f"run: {{seed: 0x{'f' * 5000}}}", "seed is a number of more than 64 bits; give it a smaller one"),
        ("run: {seed: !!bool foo}", "is not YAML ('foo')"),
        ("run: {seed: !!int ''}", "is not YAML ("),
        ("run: {seed: !!timestamp foo}", "is not YAML ("),
        ("[" * 5000, "is not YAML (maximum recursion depth exceeded"),
        ("run: {seed: 1, seed: 1}", "seed is given twice; give it once"),
        ("run: {seed: 1}\ndata: {}\nrun: {name: x}", "run is given twice; give it once"),
        ("", "must hold the groups data, model, optim, run"),
        ("data: 3", "must hold the groups data, model, optim, run"),
        ("lr: {}", "lr is none of the groups data, model, optim, run"),
        ("optim: {lrr: 1}", "optim has no setting lrr"),
        ("optim: {lr: [1, 2]}", "lr has more than one value; give it one"),
        ("data: {antialias: maybe}", "antialias must be true or false"),
        ("optim: {lr: true}", "lr must be neither true nor false"),
        ("optim: {lr: }", "lr has no value; give it one, or leave it out"),
        ("run: {name: ''}", "name has no value; give it one, or leave it out"),
        ("run: {runs_dir: null}", "runs_dir has no value; give it one, or leave it out"),
        ("run: {name: 007}", "name 7 is no text to YAML, which may write it otherwise; quote it"),
        ("run: {name: 2026-11-29}", "name 2026-11-29 is no text to YAML"),
        ("run: {runs_dir: 1.50}", "runs_dir 1.5 is no text to YAML"),
    ],
)
def test_another_file_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError) as raised:
        expand(["--config", str(file)])
    assert str(raised.value).startswith(f"--config {file}: {message}")
    if text is None:
        with pytest.raises(UserError, match=f"^--config {file}: {message}"):  # of a run's folder that lacks it
            expand(["--config", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config"], "--config: names no file"),
        (
            ["--config", "a.yaml", "--config=b.yaml"],
            "--config a.yaml: is one file too many; give one",
        ),
        (["--config="], "--config: names no file"),
        (["--config", "--lr", "1"], "--config: names no file"),
        (["--config", "x.yaml", "--recipe=demo"], "--recipe and --config: give one of them, not both"),
    ],
)
def test_a_flag_that_makes_no_sense_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        expand(arguments)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("command", ["train", "preview"])
def test_a_value_out_of_range_is_laid_to_where_it_stands(command: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"optim: {{batch_size: -3}}\nrun: {{name: r, runs_dir: {tmp_path}}}\n")
    out = ["--out", str(tmp_path / "x.png")] if command == "preview" else []
    given = [command, "--config", str(file), "--data", "/nowhere", *out]
    wrong = "must be from 1 to 1,048,576\n"
    for flags, told in (
        ([], f"dali-vit: --config {file}: --batch-size -3: {wrong}"),
        (["--batch-size", "-4"], f"dali-vit: --batch-size -4: {wrong}"),
    ):
        assert run(*given, *flags, capsys=capsys)[::2] == (2, told)
    file.write_text("optim: {lr: fast}\n")
    *_, err = run(*given, capsys=capsys)
    assert err.startswith(f"dali-vit: --config {file}: Error parsing --lr: ")
    assert err.count("--config") == 1


@pytest.mark.parametrize("kind", [UserError, LocalUserError])
def test_a_flag_that_is_a_remedy_is_not_what_is_wrong(kind: type[UserError], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("run: {name: r}\n")
    for said, told in (
        ("runs/r: exists; choose another --name", "runs/r: exists; choose another --name"),
        ("--name r: is no name", f"--config {file}: --name r: is no name"),
        ("--lr 0: is none", "--lr 0: is none"),  # which the file does not have
        ("3 of 10 are bad (--name r); see (`dali-vit verify x` lists all)",) * 2,
        ("bad --name (`dali-vit train --help` lists the options)",) * 2,
    ):
        told = f"--config {file}: {told}" if told.endswith("options)") else told
        with pytest.raises(UserError) as caught, naming_file(["--config", str(file)]):
            raise kind(said)
        assert (type(caught.value), str(caught.value)) == (kind, told)


def test_a_file_has_no_part_in_what_flags_beside_it_replace_or_it_leaves_open(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {width: 400, depth: null}\n")
    said = UserError("--width 400: not divisible by 5 heads")
    for flags, told in (
        ([], f"--config {file}: {said}"),
        (["--model", "Ti/16"], str(said)),
        (["--width", "400"], str(said)),
    ):
        with pytest.raises(UserError) as caught, naming_file(["--config", str(file), *flags]):
            raise said
        assert str(caught.value) == told
    with pytest.raises(UserError, match=r"^--depth 12: odd$"), naming_file(["--config", str(file)]):
        raise UserError("--depth 12: odd")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("now", ["gone", "another", "a pipe", "of too long a name"])
def test_a_mistake_is_told_even_if_the_file_cannot_be_read_again(now: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    if now == "another":
        file.write_text("{")
    elif now == "a pipe":
        os.mkfifo(file)
    elif now == "of too long a name":
        file = tmp_path / ("c" * 300)
    with pytest.raises(UserError, match=r"^--lr 0: is none$"), naming_file(["--config", str(file)]):
        raise UserError("--lr 0: is none")


def test_a_value_that_cannot_be_read_is_laid_to_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim:\n  lr: fast\n  eps: 1e-6\n")
    with pytest.raises(UserError) as caught:
        parsed("--config", file)
    assert str(caught.value).startswith(f"--config {file}: Error parsing --lr: ")
    with pytest.raises(UserError) as caught:
        parsed("--config", file, "--lr=slow")
    assert str(caught.value).startswith("Error parsing --lr: ")
    file.write_text("optim:\n  eps: 1e-6\n")
    for mistaken in (
        ["stray"],
        ["--optim.eps", "3"],
        ["---eps", "3"],
        ["x=--eps=2"],
        ["--max_hours", "x"],
        ["--eps=x"],
    ):
        with pytest.raises(UserError) as caught:
            parsed("--config", file, *mistaken)
        assert not str(caught.value).startswith("--config"), mistaken


def test_without_it_the_flags_are_as_they_were() -> None:
    assert expand(["--lr", "1", "--name", "--x"]) == ["--lr", "1", "--name", "--x"]
