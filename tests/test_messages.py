"""What libraries print is held back, or dropped where a message of ours names the image; and what ours may hold."""

from __future__ import annotations

import os

import pytest

from dali_vit.config import UserError
from dali_vit.inspection import no_messages_beside_ours
from tests.conftest import run

CONTROL = {chr(code) for code in (*range(32), *range(127, 160))} - {"\n"}


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyboardInterrupt, ""), (RuntimeError, "one of a library\n"), (UserError, "one of a library\n")],
)
def test_what_ends_the_block_decides_on_the_messages_before_it(error, told, capfd):
    """Ctrl-C drops them, as they name no image; another error keeps them, as they may tell why."""

    def fails() -> None:
        with no_messages_beside_ours():
            os.write(2, b"one of a library\n")
            raise error

    with pytest.raises(error):
        fails()
    assert capfd.readouterr().err == told


def test_other_messages_come_late_but_whole(capfd):
    with no_messages_beside_ours():
        os.write(2, b"one of a library\n")
        assert capfd.readouterr().err == ""
        os.write(2, b"another\n")
    assert capfd.readouterr().err == "one of a library\nanother\n"


@pytest.mark.timeout(60)
def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path, capsys):
    """They could clear the screen, or move to a line of ours; in the log and in the line of an error."""
    for split in ("train", "val"):
        folder = tmp_path / split / "d"
        folder.mkdir(parents=True)
        (folder / "z\x1b[2J\x85cls.jpg").touch()
    code, out, _ = run("verify", str(tmp_path), capsys=capsys)
    assert code == 2
    assert f"  {tmp_path}/train/d/z\\x1b[2J\\x85cls.jpg  0 bytes\n" in out
    assert len(out.split("\n")) > 3
    assert not set(out) & CONTROL
    code, _, err = run("eval", "--checkpoint", str(tmp_path / "\x1b[1A"), "--data", str(tmp_path), capsys=capsys)
    assert (code, err) == (2, f"dali-vit: --checkpoint {tmp_path}/\\x1b[1A: no such file or folder\n")
