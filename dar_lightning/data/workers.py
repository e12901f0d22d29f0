"""Worker processes of the loaders: how they start, what they obey, and when they end."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

# a process that was forked from a run can make no use of the run's server, and starts its own with its next loader
os.register_at_fork(after_in_child=lambda: setattr(forkserver._forkserver, "_forkserver_pid", None))


def options(num_workers: int, persistent: bool = False) -> dict[str, Any]:
    """What a loader needs to know of its workers."""
    return {
        "num_workers": num_workers,
        "persistent_workers": persistent and num_workers > 0,
        "multiprocessing_context": context() if num_workers else None,
        # the server has the environment of its start, with which it may be asked for workers much later
        "worker_init_fn": functools.partial(belong_to_the_run, dict(os.environ)),
        "pin_memory": torch.cuda.is_available(),
    }


def context() -> BaseContext:
    """How workers start: on Linux, as forks of a server that has done their imports, and nothing else.

    A run has threads, of its process group for one. A fork of the run itself copies the locks that they hold at that
    moment, and nobody ever lets go of the copies: some runs would hang. On Linux, this is Python's own choice from 3.14
    on; elsewhere, forks are not to be had or not safe at all.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    forked = multiprocessing.get_context("forkserver")
    # workers also import the module that was started, and Lightning with it, unless it is ours
    is_ours = Path(getattr(sys.modules["__main__"], "__file__", "dar")).name in ("dar", "__main__.py")
    forked.set_forkserver_preload([f"{__package__}.worker_server", *([] if is_ours else ["lightning"])])
    _start_helpers()
    return forked


def _start_helpers() -> None:
    """Start the server, and what looks after semaphores, unless they run."""
    stops = {signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    unsafe = os.environ.setdefault("PYTHONSAFEPATH", "dar") == "dar"  # so that the current folder hides no module
    try:
        for helper in (resource_tracker, forkserver):
            signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # they inherit it; starting the first one unblocks some
            helper.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if unsafe:
            os.environ.pop("PYTHONSAFEPATH", None)


def belong_to_the_run(environment: Mapping[str, str], worker: int) -> None:
    """Workers have the run's environment, and go on until it has done its last step, whoever signals them.

    What the run itself sends ends a worker at once, and so does the run's death.

    Args:
        environment: The run's variables, which become the worker's.
        worker: Its number.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_run_says_so, daemon=True).start()
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)


def _end_with_the_run() -> None:
    multiprocessing.parent_process().join()
    os._exit(0)


def _end_when_the_run_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)
