"""What the decoders' libraries print is held back, and dropped where a message of ours names the image."""

from __future__ import annotations

import os

import pytest

from dali_vit.config import UserError
from dali_vit.inspection import no_messages_beside_ours


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
