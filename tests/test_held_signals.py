"""Signals while torch waits in C++, and while images are moved."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from dali_vit.process import ended_by_ctrl_c


@pytest.mark.usefixtures("ctrl_c_is_minded")
def test_libraries_that_wait_leave_the_handler_as_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    with ended_by_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="of the block"), ended_by_ctrl_c():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is before
    in_thread = []

    def wait() -> None:  # where no handler can be set
        with ended_by_ctrl_c():
            in_thread.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(10)
    assert in_thread == [before]


HELD = """
import os, signal, sys
from dali_vit.process import held_signals
if {ignored}:
    signal.signal(signal.{number}, signal.SIG_IGN)
with held_signals() as came:
    before = came()
    os.kill(os.getpid(), signal.{number})
    print(before, came(), flush=True)
print("went on")
"""


@pytest.mark.usefixtures("ctrl_c_is_minded", "hang_up_is_minded")
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_held_signals_take_effect_after_the_block(number: str, ignored: bool) -> None:
    program = HELD.format(number=number, ignored=ignored)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    if ignored:
        assert (ended.returncode, ended.stdout) == (0, "False False\nwent on\n")
    else:
        assert (ended.returncode, ended.stdout) == (-getattr(signal, number), "False True\n")
