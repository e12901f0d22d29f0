"""The trainings of benchmarks/faults.py: the same command again and again, and whether it ended with the same bits."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path

from benchmarks.machine import child_environment
from benchmarks.tiny import fit_ar, fit_tokenizer, write_images, write_tokens
from dar_lightning.cli import main as dar

SAVE_EVERY, VALIDATE_EVERY = 3, 2  # optimizer steps of two batches; each validation saves, too
LIMIT = 400  # seconds after which a run counts as hanging
STATES = ("global_step", "state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
context = multiprocessing.get_context("forkserver")
modules = ["benchmarks.fault_callbacks", "benchmarks.fault_runs", "dar_lightning.commands.fit"]
context.set_forkserver_preload(modules)


def callback(name: str, /, **options) -> list[str]:
    """Words that add a callback; without a dot in its name, one of fault_callbacks."""
    name = name if "." in name else f"benchmarks.fault_callbacks.{name}"
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={options[key]}" for key in options)]


class Run:
    """A training of the smallest model, with EMA, validation and gradient accumulation.

    Args:
        model: "tokenizer" or "ar".
        home: its diaries and logs.
        folder: its checkpoints.
        steps: of the optimizer.
        trainer: other options of the Trainer.
    """

    def __init__(self, model: str, home: Path, folder: Path, steps: int, **trainer) -> None:
        self.model, self.home, self.folder, self.steps = model, home, folder, steps
        self.diaries: list[Path] = []
        home.mkdir(parents=True, exist_ok=True)
        data = home.parent / "data" / model
        if not data.exists():  # 5 and a half batches to train on
            write = write_images if model == "tokenizer" else write_tokens
            write(data / "train", 22)
            write(data / "val", 7)
        fit = fit_tokenizer if model == "tokenizer" else fit_ar
        options = {"max_steps": steps, "accumulate_grad_batches": 2, "val_check_interval": 2 * VALIDATE_EVERY}
        options |= {"check_val_every_n_epoch": "null", "gradient_clip_val": 1.0} | trainer
        words = [*fit(str(data / "train"), str(data / "val"), folder, **options), "--ckpt_path=last"]
        words += [f"--data.init_args.num_workers={int(model == 'tokenizer' or 'devices' in trainer)}"]
        words += ["--model.init_args.optimizer.lr=0.01", "--model.init_args.optimizer.warmup_steps=5"]
        ours = "dar_lightning.training.callbacks"
        words += callback(f"{ours}.LastStepCheckpoint", every_n_train_steps=SAVE_EVERY, save_top_k=0)
        words += callback(f"{ours}.EMA", decay=0.9) + callback(f"{ours}.SkipBadSteps", max_in_a_row=3)
        if model == "tokenizer":
            warmup = dict(warmup_steps=6, collect_steps=4, revive_every=4, revive_until=20)
            words += callback(f"{ours}.CodebookWarmup", **warmup)
        self.words = [str(word) for word in words]

    def start(self, accident: list[str] = (), temp: Path | None = None) -> multiprocessing.Process:
        """`dar fit` in a process forked from one that has done the imports."""
        self.diaries.append(self.home / f"diary{len(self.diaries)}")
        words = [*self.words, *callback("Diary", path=self.diaries[-1]), *accident]
        process = context.Process(target=_dar, args=(words, f"{self.diaries[-1]}.log", temp and str(temp)))
        process.start()
        return process

    def live(self, accident: list[str] = (), code: int = 0, **options) -> str:
        """Run it until it ends with this exit code, negative for a signal; what it said."""
        return self.end(self.start(accident, **options), code)

    def end(self, process: multiprocessing.Process, code: int) -> str:
        """Wait for it."""
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == code, f"exit code {process.exitcode}, not {code}: {self.said()[-600:]}"
        return self.said()

    def two_ranks(self, launcher: str, accident: list[str], rank: int) -> tuple[int, float]:
        """Two real ranks, one with an accident: exit code, and seconds that anything lived on after it."""
        diary = self.home / "diary"
        words = [*self.words, *callback("Diary", path=diary), *accident, "--data.init_args.batch_size=2"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] * (launcher == "torchrun")
        command = [sys.executable, *torchrun, "-m", "dar_lightning", *words]
        with open(f"{diary}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=child_environment())
        self.diaries.append(diary)
        seen, silent, until = 0, time.monotonic(), time.monotonic() + LIMIT
        while process.poll() is None or alive(self.folder):
            if time.monotonic() > until:
                left = alive(self.folder)
                for pid in left:
                    os.kill(pid, 9)
                raise AssertionError(f"{len(left)} processes left after {LIMIT} seconds")
            if len(lines(diary, rank)) > seen:  # the rank with the accident has written another line
                seen, silent = len(lines(diary, rank)), time.monotonic()
            time.sleep(0.1)
        return process.returncode, time.monotonic() - silent

    def said(self) -> str:
        """Its last life."""
        return Path(f"{self.diaries[-1]}.log").read_text()

    @property
    def checkpoint(self) -> Path:
        """The newest one; there is none but complete ones."""
        return self.folder / "checkpoints" / "last.ckpt"

    def saved(self) -> dict:
        """What is in it."""
        return torch.load(self.checkpoint, weights_only=True)

    def step(self) -> int:
        """Optimizer steps that are saved."""
        return self.saved()["global_step"] if self.checkpoint.exists() else 0

    def skipped(self) -> int:
        """Bad steps that were counted; everything else in the checkpoint is finite."""
        end = self.saved()
        tensors = [leaf for leaf in tree_leaves(end) if isinstance(leaf, torch.Tensor)]
        assert all(bool(tensor.isfinite().all()) for tensor in tensors), "not finite"
        return int(next(state for name, state in end["callbacks"].items() if "SkipBadSteps" in name)["counts"][0])

    def check_same(self, whole: "Run") -> None:
        """It ended with the bits of the unbroken run; its lives saw that one's batches, together all of them."""
        batches = {line[0]: line for line in lines(whole.diaries[0])}
        seen = [line for diary in self.diaries for line in lines(diary)]
        wrong = [line[0] for line in seen if line != batches[line[0]]]
        assert not wrong, f"other losses or samples in batches {wrong}"
        assert {line[0] for line in seen} == set(batches), "batches are missing"
        end, expected = self.saved(), whole.saved()
        assert end["global_step"] == self.steps
        places = different(*({key: checkpoint[key] for key in STATES} for checkpoint in (expected, end)))
        assert not places, f"other than the unbroken run: {places}"
        names = [path.name for path in self.checkpoint.parent.iterdir()]
        assert names == [self.checkpoint.name], f"left behind: {names}"


def _dar(words: list[str], log: str, temp: str | None) -> None:
    tempfile.tempdir = temp
    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    dar(words)


def alive(folder: Path) -> list[int]:
    """Processes whose command line names the folder of a run: ranks, and their loaders' workers. Zombies have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            found += [int(path.parent.name)] if str(folder).encode() in path.read_bytes() else []
    return found


def lines(diary: Path, rank: int = 0) -> list[list]:
    """Of a diary; the last one may have been cut by the kill."""
    path = Path(f"{diary}.{rank}")
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def different(one, other) -> list[str]:
    """Places where two nested structures are not the same, tensors bit by bit."""
    leaves = [dict(tree_leaves_with_path(value)) for value in (one, other)]
    places = [path for path in leaves[0].keys() | leaves[1].keys() if not _same(*(each.get(path) for each in leaves))]
    return sorted(map(keystr, places))


def _same(one, other) -> bool:
    tensors = isinstance(one, torch.Tensor), isinstance(other, torch.Tensor)
    return torch.equal(one, other) if all(tensors) else not any(tensors) and one == other
