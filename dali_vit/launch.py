"""How --gpus starts one process a GPU, and starts all of them again when one has died."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

__all__ = ["REQUEUE", "hang_up_is_ignored", "launch", "launch_once"]

log = logging.getLogger(__name__)

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: stopped in order, to be started again


def hang_up_is_ignored() -> bool:
    """Whether this process ignores the closing of its terminal (SIGHUP), as under `nohup`."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def launch(num_processes: int, argv: Sequence[str], *, max_restarts: int) -> int:
    """Runs `dali-vit ARGV` in worker processes under torch's elastic launcher; returns the exit code.

    When a worker dies (killed, out of memory, an exception), all workers are started again, up to `max_restarts`
    times, and go on from the last checkpoint. A mistake of the user (exit code 2) and a stop that was asked for (75)
    are not tried again.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    for attempt in range(max_restarts + 1):
        if attempt:
            log.error("restart %d of %d, from the last checkpoint", attempt, max_restarts)
        try:
            # Workers are restarted here and not by torch, which would also repeat a mistake of the user.
            # After a failure, --no-resume would refuse what this very run wrote; --resume comes later, so it counts.
            code = _start(num_processes, ["-m", "dali_vit", *argv, *(["--resume"] if attempt else [])])
        except SignalException:
            return REQUEUE
        if code in (0, 2, REQUEUE):
            return code
    log.error("given up after %d restarts (--max-restarts)", max_restarts)
    return 1


def launch_once(num_processes: int, program: Sequence[str]) -> int:
    """Runs a program that keeps no checkpoints (a script or `-m MODULE`, with arguments) in worker processes, once.

    Returns 0, or the exit code of the first worker to fail (1 if a signal killed it), or 128 + the signal that told
    this process to stop.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        code = _start(num_processes, program)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return max(1, code) if code else 0


def _start(num_processes: int, program: Sequence[str]) -> int:
    """Runs a program in worker processes; returns the exit code of the first worker to fail, or 0.

    Logs which worker that was, unless it ended by a mistake of the user (2) or a stop that was asked for (75).
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    # Seconds that workers have to write a checkpoint. torch 2.15 reads it (default: 30); older versions always give 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the failure is reported below
    signals = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", *([] if hang_up_is_ignored() else ["SIGHUP"])]
    # By its address: no name server need know this machine.
    launcher = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={num_processes}"]
    try:
        main([*launcher, f"--signals-to-handle={','.join(signals)}", *program])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in (2, REQUEUE):
            cause = f"signal {failure.signal_name()}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            log.error("rank %d (process %d) failed first, with %s", rank, failure.pid, cause)
        return failure.exitcode
    return 0
