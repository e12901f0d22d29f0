"""Two ranks of one process group that live as long as the tests do: a case costs a call, not two starts."""

import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from killable import context

SECONDS = 120  # a call that hangs fails after that


class Pair:
    """Calls functions on both ranks. They start with the first call, and anew after one that hung."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable, *args) -> list:
        """What it returns on each rank; in the place of an exception its text, "Type: message"."""
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send((function, args))
        try:
            for _, pipe in self._ranks:
                assert pipe.poll(SECONDS), f"no end after {SECONDS} seconds"
            return [pipe.recv() for _, pipe in self._ranks]
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, port))
            process.start()
            there.close()  # so that a rank that dies is noticed
            self._ranks.append((process, here))

    def stop(self) -> None:
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks = []


def _serve(pipe: Connection, rank: int, port: int) -> None:
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in names.items()}  # as a cluster's launcher would say it
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    while True:
        function, args = pipe.recv()
        try:
            result = function(*args)
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        pipe.send(result)
