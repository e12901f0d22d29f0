"""Two ranks of a process group, started once, that call functions for tests one after the other."""

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
from killable import SECONDS, context


class TwoRanks:
    """Calls an importable function on both ranks; after an error or a hang, the next call starts new ones.

    What ranks print goes to files and is shown with an error.
    """

    def __init__(self) -> None:
        self.processes: list = []
        self.pipes: list[Connection] = []

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """Results of both ranks; what is not to be pickled, functions write to files."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        answers: dict[Connection, tuple] = {}
        while left := [pipe for pipe in self.pipes if pipe not in answers]:
            # after an error the other rank may wait for this one for ever
            ready = wait(left, 10 if any(problem for problem, _ in answers.values()) else SECONDS)
            answers |= {pipe: _answer(pipe) for pipe in ready} or dict.fromkeys(left, ("no answer", None))
        problems = [problem for problem, _ in answers.values() if problem]
        if problems:
            self.stop()
            printed = [path.read_text()[-3000:] for path in sorted(Path(self.folder.name).glob("rank*"))]
            raise AssertionError("\n".join([*printed, *problems]))
        return [answers[pipe][1] for pipe in self.pipes]

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(2):
            mine, theirs = context.Pipe()
            arguments = (rank, self.folder.name, theirs)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.pipes.append(mine)
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _answer(pipe: Connection) -> tuple[str | None, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return "a rank has died", None


def _serve(rank: int, folder: str, pipe: Connection) -> None:
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
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            if not dist.is_initialized():  # `dar` has left the group
                store = dist.FileStore(f"{folder}/store{call}", 2)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
            answer = (None, function(*args, **kwargs))
        except BaseException:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
