"""Functions called in processes that may be killed, forked from a server that has done the imports."""

import logging
import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from multiprocessing import forkserver
from multiprocessing.connection import wait

import torch

SECONDS = 240  # a test that hangs fails after that
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["preloaded"])


def start_server() -> None:
    """Start what processes are forked from; it finds modules where this process does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    os.environ |= {} if before is None else {"PYTHONPATH": before}


def run(function: Callable, *args, world: int = 1) -> list[int]:
    """Call a function on every rank of a world of processes. When one dies, the others are killed.

    Returns:
        Every rank's exit code: 0, 1 after an exception, -9 after SIGKILL.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_call, args=(function, args, rank, world, port)) for rank in range(world)]
    for process in ranks:
        process.start()
    alive = {process.sentinel: process for process in ranks}
    while alive:
        ended = [alive.pop(sentinel) for sentinel in wait(list(alive), SECONDS)]
        for process in ended:
            process.join()
        if not ended or any(process.exitcode for process in ended):
            for process in alive.values():
                process.kill()
        assert ended, f"no end after {SECONDS} seconds"
    return [process.exitcode for process in ranks]


def _call(function: Callable, args: tuple, rank: int, world: int, port: int) -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if world > 1:  # as a cluster's launcher would say it
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "LOCAL_RANK": rank}
        os.environ |= {name: str(value) for name, value in (names | {"WORLD_SIZE": world}).items()}
    os.environ["OMP_NUM_THREADS"] = "1"  # for all ranks, however many: another number rounds sums otherwise
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        function(*args)
    if torch.distributed.is_initialized():  # at exit it might abort
        torch.distributed.destroy_process_group()


def signal_before(owner: object, function: str, rank: int, calls: int, number: int) -> None:
    """Have this process, if it is that rank, send a signal to itself before the n-th call of a function."""
    original = getattr(owner, function)

    def deadly(*arguments, **options):
        nonlocal calls
        calls -= 1
        if calls == 0 and os.environ.get("LOCAL_RANK", "0") == str(rank):
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, function, deadly)
