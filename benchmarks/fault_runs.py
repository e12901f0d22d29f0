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
from benchmarks.tiny import callback, fit_ar, fit_tokenizer, write_images, write_tokens
from dar_lightning.cli import main as dar

SAVE_EVERY, VALIDATE_EVERY = 3, 2  # optimizer steps of two batches; each validation saves, too
LIMIT = 400  # seconds after which a run counts as hanging
STATES = ("global_step", "state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
OURS = "dar_lightning.training.callbacks"
context = multiprocessing.get_context("forkserver")


def accident(name: str, **options) -> list[str]:
    """Words that add a callback of fault_callbacks."""
    return callback(name, "benchmarks.fault_callbacks", **options)


class Run:
    """A training of the smallest tokenizer or ar, with EMA, validation and gradient accumulation.

    Its diaries and logs are in `home`, its checkpoints in `folder`.
    """

    def __init__(self, model: str, home: Path, folder: Path, steps: int, **trainer) -> None:
        self.home, self.folder, self.steps = home, folder, steps
        self.checkpoint = folder / "checkpoints" / "last.ckpt"
        self.diaries: list[Path] = []
        home.mkdir(parents=True, exist_ok=True)
        data, is_tokenizer = home.parent / "data" / model, model == "tokenizer"
        if not data.exists():  # 5 and a half batches to train on
            write = write_images if is_tokenizer else write_tokens
            write(data / "train", 22)
            write(data / "val", 7)
        options = {"max_steps": steps, "accumulate_grad_batches": 2, "val_check_interval": 2 * VALIDATE_EVERY}
        options |= {"check_val_every_n_epoch": "null", "gradient_clip_val": 1.0} | trainer
        fit = fit_tokenizer if is_tokenizer else fit_ar
        words = [*fit(str(data / "train"), str(data / "val"), folder, **options), "--ckpt_path=last"]
        words += [f"--data.init_args.num_workers={int(is_tokenizer or 'devices' in trainer)}"]
        words += ["--model.init_args.optimizer.lr=0.01", "--model.init_args.optimizer.warmup_steps=5"]
        words += callback("LastStepCheckpoint", OURS, every_n_train_steps=SAVE_EVERY, save_top_k=0)
        words += callback("EMA", OURS, decay=0.9) + callback("SkipBadSteps", OURS, max_in_a_row=3)
        if is_tokenizer:
            warmup = dict(warmup_steps=6, collect_steps=4, revive_every=4, revive_until=20)
            words += callback("CodebookWarmup", OURS, **warmup)
        self.words = words

    def start(self, accidents: list[str] = (), temp: Path | None = None) -> multiprocessing.Process:
        """`dar fit` in a process forked from one that has done the imports."""
        self.diaries.append(self.home / f"diary{len(self.diaries)}")
        words = [*self.words, *accident("Diary", path=self.diaries[-1]), *accidents]
        process = context.Process(target=_dar, args=(words, f"{self.diaries[-1]}.log", temp and str(temp)))
        process.start()
        return process

    def live(self, accidents: list[str] = (), code: int = 0, **options) -> str:
        """Run it until it ends with this exit code, negative for a signal; what it said."""
        return self.end(self.start(accidents, **options), code)

    def end(self, process: multiprocessing.Process, code: int) -> str:
        """Wait for it."""
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == code, f"exit code {process.exitcode}, not {code}: {self.said()[-600:]}"
        return self.said()

    def two_ranks(self, launcher: str, accidents: list[str], rank: int) -> tuple[int, float]:
        """Two real ranks, one with an accident: exit code, and seconds that anything lived on after it."""
        diary = self.home / "diary"
        self.diaries.append(diary)
        words = [*self.words, *accident("Diary", path=diary), *accidents, "--data.init_args.batch_size=2"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] * (launcher == "torchrun")
        command = [sys.executable, *torchrun, "-m", "dar_lightning", *words]
        with open(f"{diary}.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=child_environment())
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

    def saved(self) -> dict:
        """What is in the newest checkpoint; there is none but complete ones."""
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
        ends = [{key: run.saved()[key] for key in STATES} for run in (whole, self)]
        assert ends[1]["global_step"] == self.steps
        one, other = (dict(tree_leaves_with_path(end)) for end in ends)
        places = [keystr(path) for path in one.keys() | other.keys() if not _same(one.get(path), other.get(path))]
        assert not places, f"other than the unbroken run: {sorted(places)}"
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


def _same(one, other) -> bool:
    tensors = isinstance(one, torch.Tensor), isinstance(other, torch.Tensor)
    return torch.equal(one, other) if all(tensors) else not any(tensors) and one == other
