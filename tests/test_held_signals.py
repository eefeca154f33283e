"""Signals while torch waits in C++, and while images are moved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from dali_vit.process import ended_by_ctrl_c, held_signals


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


@pytest.mark.parametrize("in_thread", [False, True])
def test_the_first_of_held_signals_reaches_the_handler_that_was_there(in_thread: bool) -> None:
    """In a thread no signal is held, as Python runs handlers in the main one alone."""
    reached: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, lambda received, _: reached.append(received))
    handlers = {number: signal.getsignal(number) for number in before}
    within: list[list[int]] = []

    def work() -> None:
        with held_signals():
            if not in_thread:
                os.kill(os.getpid(), signal.SIGHUP)
                os.kill(os.getpid(), signal.SIGTERM)
            within.append(reached.copy())

    try:
        if in_thread:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(10)
        else:
            work()
        assert within == [[]]
        assert reached == ([] if in_thread else [signal.SIGHUP])
        assert {number: signal.getsignal(number) for number in before} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
