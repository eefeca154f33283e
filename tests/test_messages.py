"""What the decoders' libraries print is held back, and dropped where a message of ours names the image."""

from __future__ import annotations

import os

import pytest

from dali_vit.inspection import no_messages_beside_ours


def test_ctrl_c_drops_messages_that_name_no_image(capfd):
    def stopped() -> None:
        with no_messages_beside_ours():
            os.write(2, b"one of a library\n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert capfd.readouterr().err == ""


def test_another_error_keeps_the_messages_before_it(capfd):
    def fails() -> None:
        with no_messages_beside_ours():
            os.write(2, b"one of a library\n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert capfd.readouterr().err == "one of a library\n"


def test_other_messages_come_late_but_whole(capfd):
    with no_messages_beside_ours():
        os.write(2, b"one of a library\n")
        assert capfd.readouterr().err == ""
        os.write(2, b"another\n")
    assert capfd.readouterr().err == "one of a library\nanother\n"
