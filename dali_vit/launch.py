"""How --gpus starts one process a GPU, and starts them again when one has died."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

__all__ = ["REQUEUE", "hang_up_is_ignored", "launch", "launch_once"]

log = logging.getLogger(__name__)

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: stopped in order, to be started again


def hang_up_is_ignored() -> bool:
    """Whether this process was told not to mind when its terminal is closed, as by `nohup`."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def launch(num_processes: int, argv: Sequence[str], *, max_restarts: int) -> int:
    """Runs `dali-vit ARGV` in worker processes under torch's elastic launcher; returns the exit code.

    When a worker dies (killed, out of memory, an exception) all are started again, up to `max_restarts` times:
    they go on from the last checkpoint. A mistake of the user (exit code 2) or a stop that was asked for (75) is
    not tried again.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    for attempt in range(max_restarts + 1):
        try:
            # Restarts are ours, because torch's would also repeat a mistake of the user.
            # After a failure --no-resume would refuse what this very run has written; the last of the flags counts.
            code = _start(num_processes, ["-m", "dali_vit", *argv, *(["--resume"] if attempt else [])])
        except SignalException:
            return REQUEUE
        if code in (0, 2, REQUEUE):
            return code
        if attempt == max_restarts:
            log.error("given up after %d restarts (--max-restarts)", max_restarts)
            return 1
        log.error("restart %d of %d, from the last checkpoint", attempt + 1, max_restarts)
    raise AssertionError


def launch_once(num_processes: int, program: Sequence[str]) -> int:
    """Runs what keeps no checkpoints to go on from, a script or `-m MODULE` with arguments, in worker processes.

    Returns its exit code: that of the first worker to fail, 1 where a signal killed it; 128 + the signal that this
    process was told to stop by.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        code = _start(num_processes, program)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return max(1, code) if code else 0


def _start(num_processes: int, program: Sequence[str]) -> int:
    """Exit code of the first worker to fail, which is named unless the mistake is the user's; 0 where all are done."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    # Seconds that workers have to write a checkpoint, of torch 2.15; 30 by default, and in older versions always.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is told here
    signals = ["SIGTERM", "SIGINT", "SIGQUIT", *([] if hang_up_is_ignored() else ["SIGHUP"])]
    launcher = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={num_processes}"]  # no server need know us
    try:
        main([*launcher, f"--signals-to-handle={','.join(signals)}", *program])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (2, REQUEUE):
            cause = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            log.error("rank %d (process %d) failed first, with %s", rank, failure.pid, cause)
        return failure.exitcode
    return 0
