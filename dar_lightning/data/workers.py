"""Worker processes of the loaders: how they start, what they obey, and when they end."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

import torch

# what workers run: plain torch, since Lightning takes three times as long to load
IMPORTS = [f"{__package__}.{name}" for name in ("shard_dataset", "token_shards", "views")]
STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # what a cluster or a terminal sends to all processes of a run


def options(num_workers: int, persistent: bool = False) -> dict[str, Any]:
    """What a loader needs to know of its workers."""
    return {
        "num_workers": num_workers,
        "persistent_workers": persistent and num_workers > 0,
        "multiprocessing_context": context() if num_workers else None,
        "worker_init_fn": obey_only_the_run,
        "pin_memory": torch.cuda.is_available(),
    }


def context() -> BaseContext:
    """How workers start: as forks of a server that has done their imports and has no other threads.

    A run has threads, of its process group for one. A fork of the run itself copies the locks that they hold at that
    moment, and nobody ever lets go of the copies: some runs would hang. This is also the default from Python 3.14 on.
    """
    forked = multiprocessing.get_context("forkserver")
    main = sys.modules["__main__"]
    # workers import a script of the user's again, and such scripts import Lightning
    is_script = main.__spec__ is None and getattr(main, "__file__", "").endswith(".py")
    forked.set_forkserver_preload([*IMPORTS, "lightning"] if is_script else IMPORTS)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for helper in (resource_tracker, forkserver):
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # they inherit it; starting the first one unblocks some
            helper.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return forked


def obey_only_the_run(worker: int) -> None:
    """Workers go on until the run has done its last step, whoever signals them.

    What the run itself sends ends a worker at once, and so does the run's death.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_run_says_so, daemon=True).start()
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    multiprocessing.parent_process().join()
    os._exit(0)


def _end_when_the_run_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)
