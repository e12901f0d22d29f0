"""DataLoader worker processes: start method, signals, and their end with the run.

On Linux, workers are forks of a server (`multiprocessing`'s forkserver) that has done their imports and has no threads.
A fork of the run itself would copy the locks that the run's threads hold at that moment; nobody ever lets go of the
copies, and some runs would hang. With Python's server alone, a signal to the whole job would end server and workers,
modules of the current folder would hide others, and workers would outlive a run that was killed: hence the rest.
"""

import functools
import importlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from dar_lightning.errors import MachineFault, UserError

MOST = 1024  # worker processes, of one loader
KILLED = re.compile(r"DataLoader worker .*(killed|exited unexpectedly)")
SERVER = "DAR_WORKER_SERVER"  # an environment variable that only the server starts with
STOPS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}  # of clusters and Ctrl+C, to all processes of a job

# a process that was forked from a run can make no use of the run's server, and starts its own with its next loader
os.register_at_fork(after_in_child=lambda: setattr(forkserver._forkserver, "_forkserver_pid", None))


def options(num_workers: int, persistent: bool = False) -> dict[str, Any]:
    """What a loader needs to know of its workers."""
    return {
        "num_workers": num_workers,
        "persistent_workers": persistent and num_workers > 0,
        "multiprocessing_context": _context() if num_workers else None,
        # the server has the environment of its start, with which it may be asked for workers much later
        "worker_init_fn": functools.partial(_belong_to_the_run, dict(os.environ)),
        "pin_memory": torch.cuda.is_available(),
    }


def user_error(error: Exception, option: str, none: int) -> UserError | None:
    """The UserError that a loader's error stands for: a worker's own, or the option if one was killed; None for others.

    A worker's arrives with its traceback in its message. `none` is the option's value that does without processes.
    """
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return type(error)(message.rpartition(f"{type(error).__name__}: ")[2])
    if isinstance(error, RuntimeError) and KILLED.search(message):
        return MachineFault(f"{option}: {message}; {option}={none} may show why, fewer workers need less memory")
    return None


def _context() -> BaseContext:
    """How processes are started; their server, and `multiprocessing`'s tracker of semaphores, run already."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # workers also import the module that was started, and Lightning with it, unless it is ours
    is_ours = Path(getattr(sys.modules["__main__"], "__file__", "dar")).name in ("dar", "__main__.py")
    context.set_forkserver_preload([__name__, *([] if is_ours else ["lightning"])])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    variables = {"PYTHONSAFEPATH", SERVER} - os.environ.keys()  # the first hides modules of the current folder
    os.environ |= dict.fromkeys(variables, "1")
    try:
        for helper in (resource_tracker, forkserver):
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # they inherit it; starting the first one unblocks some
            helper.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for name in variables:
            os.environ.pop(name, None)
    return context


def _belong_to_the_run(environment: Mapping[str, str], worker: int) -> None:
    """In a worker: take the run's environment; of all signals, obey only the run's own; and end when the run does."""
    run = multiprocessing.parent_process()

    def end_when_it_says_so() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
            pass
        os._exit(0)

    def end_with_it() -> None:
        run.join()
        os._exit(0)

    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_when_it_says_so, daemon=True).start()
    threading.Thread(target=end_with_it, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)


if os.environ.pop(SERVER, None):  # in the server: import what workers run, and outlive the job's signals
    for name in ("image_dataset", "token_dataset", "views"):
        importlib.import_module(f"dar_lightning.data.{name}")
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    # other programs of the run may have processes of this server, too, and may want to end them
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
