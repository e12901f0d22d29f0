"""Does a long run leak? Tokenizer and AR training at tiny size, with all that a run has, watched for 10,000 steps.

Each case is a `dar fit` from a quickstart config, so with its callbacks, its logger, validation and a checkpoint every
500 steps. README.md says what is called flat.

    python benchmarks/soak.py [--steps 10000] [--cases tokenizer-0 ...] [--output benchmarks/results/soak.json]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning
import numpy as np
from lightning.pytorch import Callback

from benchmarks.machine import RESULTS, ROOT, child_environment, options, record
from benchmarks.tiny import AR, TOKENIZER, callback, make_tokenizer, option_words, write_tokens

EVERY = 50  # steps between two notes
CLASSES = [f"class {number}" for number in range(14)]
CASES = ["tokenizer-0", "ar-0", "tokenizer-2", "ar-2"]  # what is trained, and the number of workers


class Resources(Callback):
    """Writes what the run and its workers hold, a line of JSON every 50 steps."""

    def __init__(self, file: str):
        self.file = file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % EVERY == 0:
            with open(self.file, "a") as file:
                print(json.dumps({"step": trainer.global_step} | held(os.getpid())), file=file)


def held(pid: int) -> dict[str, float]:
    """Memory in MB, file descriptors, threads and processes of a process and its children."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    total = {
        "memory_mb": int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "file_descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(tasks),
        "processes": 1,
    }
    for child in [child for task in tasks for child in (task / "children").read_text().split()]:
        for name, value in held(int(child)).items():
            total[name] += value
    return total


def command(case: str, steps: int, folder: Path) -> list[str]:
    """`dar fit` of a case."""
    kind, workers = case.split("-")
    model, words = TOKENIZER, [f"--data.init_args.image_size={TOKENIZER['image_size']}"]
    if kind == "ar":
        model, tokens = AR | {"num_classes": len(CLASSES)}, write_tokens(folder / "tokens", 500, CLASSES)
        make_tokenizer().save_pretrained(folder / "tokenizer")
        words = [*option_words("data.init_args", {"train": tokens, "val": tokens})]
        words += callback("Samples", "dar_lightning.training.callbacks", tokenizer=folder / "tokenizer")
    trainer = {"max_steps": steps, "val_check_interval": 500, "default_root_dir": folder / "run", "accelerator": "cpu"}
    words += option_words("trainer", trainer | {"enable_progress_bar": "false"})
    words += option_words("data.init_args", {"num_workers": workers, "batch_size": 4})
    words += [f"--model.init_args.config={json.dumps(model)}"]
    words += callback("Resources", "benchmarks.soak", file=folder / "notes")
    return [sys.executable, "-m", "dar_lightning", "fit", "--config", f"experiments/quickstart/{kind}.yaml", *words]


def verdict(notes: list[dict]) -> dict:
    """Of a run's notes: what grew in the second half, and whether all is flat: memory by less than 1%."""
    half = len(notes) // 2
    series = {name: np.array([note[name] for note in notes]) for name in notes[0]}
    steps, memory = series.pop("step")[half:], series.pop("memory_mb")[half:]
    slope = np.polyfit(steps, memory, 1)[0]
    rise = slope * (steps[-1] - steps[0]) / memory.mean()
    most = {name: [int(values[:half].max()), int(values[half:].max())] for name, values in series.items()}
    return {
        "memory_mb": [round(float(memory.min()), 1), round(float(memory.max()), 1)],
        "memory_bytes_per_step": round(float(slope * 1e6), 1),
        "memory_rise": round(float(rise), 5),
        **most,
        "flat": bool(rise < 0.01) and all(late <= early for early, late in most.values()),
    }


def soak(case: str, steps: int) -> dict:
    """Run a case: verdict and every tenth note."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(command(case, steps, Path(folder)), cwd=ROOT, env=child_environment(), check=True)
        minutes = (time.perf_counter() - start) / 60
        notes = [json.loads(line) for line in (Path(folder) / "notes").read_text().splitlines()]
    return {"case": case, "minutes": round(minutes, 1)} | verdict(notes) | {"notes": notes[9::10]}


if __name__ == "__main__":  # exits with status 1 if something grows
    given = options(__doc__, steps=10_000, cases=CASES, output=RESULTS / "soak.json")
    what = f"memory, file descriptors, threads and processes over {given.steps} steps, second half"
    rows = (soak(case, given.steps) for case in given.cases)
    rows = record(given.output, what, rows, lightning=lightning.__version__)
    sys.exit(not all(row["flat"] for row in rows))
