"""Two ranks of one process group that live as long as the tests do: a case costs a call, not two starts."""

import itertools
import logging
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from killable import context

SECONDS = 240  # a call that hangs fails after that


class Failure(str):
    """What a function raised on a rank: "Type: message", and its traceback."""

    trace: str


class Pair:
    """Calls functions on both ranks. They start with the first call, and anew after one that hung.

    What ranks print goes to files and is shown with an error.
    """

    def __init__(self) -> None:
        self.ranks: dict[Connection, Any] = {}  # pipe -> process

    def __call__(self, function: Callable, *args: Any) -> list:
        """What an importable function returns on each rank; in the place of an exception a Failure."""
        if not self.ranks:
            self.folder = tempfile.TemporaryDirectory()
            self.ranks = dict(_start(rank, self.folder.name) for rank in range(2))
        for pipe in self.ranks:
            pipe.send((function, args))
        answers: dict[Connection, Any] = {}
        while left := [pipe for pipe in self.ranks if pipe not in answers]:
            # after an error the other rank may wait for this one for ever
            failed = any(isinstance(answer, Failure) for answer in answers.values())
            if not (ready := wait(left, 20 if failed else SECONDS)):
                answers |= dict.fromkeys(left, Failure("no answer"))
            for pipe in ready:
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    answers[pipe] = Failure("a rank has died")
        found = [answers[pipe] for pipe in self.ranks]
        if {"no answer", "a rank has died"} & {answer for answer in found if isinstance(answer, Failure)}:
            self.stop()
        return found

    def without_failure(self, function: Callable, *args: Any) -> list:
        """The same; a Failure fails the test."""
        found = self(function, *args)
        traces = [getattr(answer, "trace", answer) for answer in found if isinstance(answer, Failure)]
        if traces:
            printed = [path.read_text()[-2000:] for path in sorted(Path(self.folder.name).glob("rank*"))]
            raise AssertionError("\n".join([*printed, *traces]))
        return found

    def stop(self) -> None:
        for process in self.ranks.values():
            process.kill()
            process.join()
        self.ranks = {}


def _start(rank: int, folder: str) -> tuple[Connection, Any]:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, rank, folder))
    process.start()
    there.close()  # so that a rank that dies is noticed
    return here, process


def _serve(pipe: Connection, rank: int, folder: str) -> None:
    with open(f"{folder}/rank{rank}", "w") as printed:
        for number in (1, 2):
            os.dup2(printed.fileno(), number)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "NODE_RANK": 0, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in names.items()}  # as a cluster's launcher would say it
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for call in itertools.count():
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        if not dist.is_initialized():  # the first call, or `dar` has left the group
            store = dist.FileStore(f"{folder}/store{call}", 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        try:
            answer = function(*args)
        except BaseException as error:
            answer = Failure(f"{type(error).__name__}: {error}")
            answer.trace = traceback.format_exc()
        pipe.send(answer)
