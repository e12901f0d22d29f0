"""Does a long run leak? Tokenizer and AR training at tiny size, with all that a run has, watched for 10,000 steps.

Each case is a `dar fit` of its own from a quickstart config, so with its callbacks, its logger, validation and a
checkpoint every 500 steps: tokenizer and AR, without worker processes and with two. Every 50 steps the resident memory,
file descriptors, threads and processes of the run and its workers are noted. They are flat where

- memory: the least-squares line through the second half rises by less than 1% of its mean from end to end,
- the others: their largest number in the second half is not above the largest in the first.

    python benchmarks/soak.py [--steps 10000] [--cases tokenizer-0 ...] [--output benchmarks/results/soak.json]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback

from dar_lightning import SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.data.token_dataset import CodesIndex, describe, write_codes
from dar_lightning.files import write_text

ROOT = Path(__file__).parents[1]
SIZE, TOKENS, CODES, CLASSES = 32, 8, 64, 14
EVERY = 50  # steps between two notes
TOKENIZER = {
    **{"image_size": SIZE, "encoder_patch_size": 16, "decoder_patch_size": 16, "head_dim": 16, "repa_layer": None},
    **{"encoder_dim": 16, "conditioner_dim": 16, "decoder_dim": 16},
    **{"encoder_depth": 1, "conditioner_depth": 1, "decoder_depth": 1},
    **{"codebook_size": CODES, "codebook_dim": 4, "num_tokens": TOKENS, "num_groups": 4},
}
AR = {
    **{"vocab_size": CODES, "num_tokens": TOKENS, "num_classes": CLASSES},
    **{"dim": 16, "depth": 2, "num_heads": 2, "multiple_of": 16},
}
CASES = ("tokenizer-0", "ar-0", "tokenizer-2", "ar-2")  # what is trained, and the number of workers


class Resources(Callback):
    """Writes what the run and its workers hold, a line of JSON every 50 steps.

    Args:
        file: where to.
    """

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


def write_tokens(folder: Path) -> None:
    """Token shards of random codes."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, CODES, (500, 1, TOKENS)).astype(np.uint16)
    path, labels = folder / "000000.safetensors", np.arange(500) % CLASSES
    folder.mkdir()
    write_codes(path, codes, labels, [f"{number:04d}" for number in range(500)], {})
    shards = (describe(path, 500),)
    names = tuple(f"class {number}" for number in range(CLASSES))
    CodesIndex(folder, "0" * 64, {}, "center", 1, SIZE, TOKENS, CODES, names, shards).save()


def command(case: str, steps: int, folder: Path) -> list[str]:
    """`dar fit` of a case."""
    kind, workers = case.split("-")
    model, options = (TOKENIZER, ["--data.init_args.image_size", SIZE]) if kind == "tokenizer" else (AR, [])
    if kind == "ar":
        write_tokens(folder / "tokens")
        SequentialDiffusionTokenizer(TokenizerConfig(**TOKENIZER)).save_pretrained(folder / "tokenizer")
        options += ["--data.init_args.train", folder / "tokens", "--data.init_args.val", folder / "tokens"]
        options += ["--trainer.callbacks+=dar_lightning.training.callbacks.Samples"]
        options += ["--trainer.callbacks.tokenizer", folder / "tokenizer"]
    words = [sys.executable, "-m", "dar_lightning", "fit", "--config", f"experiments/quickstart/{kind}.yaml"]
    words += [*options, "--model.init_args.config", json.dumps(model), "--data.init_args.num_workers", workers]
    words += ["--data.init_args.batch_size", 4, "--trainer.max_steps", steps, "--trainer.val_check_interval", 500]
    words += ["--trainer.default_root_dir", folder / "run", "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false"]
    words += ["--trainer.callbacks+=soak.Resources", "--trainer.callbacks.file", folder / "notes"]
    return [str(word) for word in words]


def verdict(notes: list[dict]) -> dict:
    """Of a run's notes: what grew, and whether all is flat."""
    half = len(notes) // 2
    series = {name: np.array([note[name] for note in notes]) for name in notes[0]}
    steps, memory = series.pop("step")[half:], series.pop("memory_mb")
    slope = np.polyfit(steps, memory[half:], 1)[0]
    rise = slope * (steps[-1] - steps[0]) / memory[half:].mean()
    result = {
        "memory_mb": [round(float(memory[half:].min()), 1), round(float(memory[half:].max()), 1)],
        "memory_bytes_per_step": round(float(slope * 1e6), 1),
        "memory_rise": round(float(rise), 5),
    }
    flat = rise < 0.01
    for name, values in series.items():
        result[name] = [int(values[:half].max()), int(values[half:].max())]
        flat &= values[half:].max() <= values[:half].max()
    return result | {"flat": bool(flat)}


def soak(case: str, steps: int) -> dict:
    """Run a case: verdict and every tenth note."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        subprocess.run(command(case, steps, Path(folder)), cwd=ROOT, env=environment, check=True)
        minutes = (time.perf_counter() - start) / 60
        notes = [json.loads(line) for line in (Path(folder) / "notes").read_text().splitlines()]
    return {"case": case, "minutes": round(minutes, 1)} | verdict(notes) | {"notes": notes[9::10]}


def processor() -> str:
    """Its name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores"


def main() -> None:
    """Read the command line, run, print, write. Exits with status 1 if something grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/soak.json")
    arguments = parser.parse_args()
    result = {
        "what": f"memory, file descriptors, threads and processes over {arguments.steps} steps, second half",
        "processor": processor(),
        "platform": platform.platform(terse=True),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "cases": [],
    }
    for case in arguments.cases:
        row = soak(case, arguments.steps)
        result["cases"].append(row)
        print(json.dumps({name: value for name, value in row.items() if name != "notes"}), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    sys.exit(not all(row["flat"] for row in result["cases"]))


if __name__ == "__main__":
    main()
