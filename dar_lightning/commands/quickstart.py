"""`dar quickstart`: train, sample and evaluate on the embedded photos, with the verbs of full-size runs."""

import re
import shlex
import shutil
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from dar_lightning.errors import UserError, begin_work, naming, require
from dar_lightning.files import read_json, write_json
from dar_lightning.sweeps.child import call
from dar_lightning.sweeps.curves import last_scalars

CONFIGS, TRAIN, VAL = "experiments/quickstart", "data/fruit64/train", "data/fruit64/val"


# Name, minutes on two cores, the same from scratch (estimates), the file that a complete stage leaves, what it does.
STAGES = [
    ("shipped", 1, 0, "shipped/samples.png", "draw with the weights that come with the package"),
    ("tokenizer", 4, 60, "tokenizer/weights/config.json", "train the sequential diffusion tokenizer {start}"),
    ("reconstruct", 1.3, 1.3, "reconstruction.json", "encode and decode photos, some also with the tokens of others"),
    ("extract", 1, 1, "codes/val/index.json", "turn the photos into tokens"),
    ("ar", 1.3, 15, "pipeline/config.json", "train the Llama {start}"),
    ("sample", 0.8, 0.8, "layout/layout.png", "draw every class, and every class with the first 4 tokens of one photo"),
    (
        "evaluate",
        0.3,
        0.3,
        "evaluation.json",
        "Frechet distance to photos, and a linear probe that knows only real ones",
    ),
]
COMMANDS = """
shipped: sample --config {configs}/sample.yaml --pipeline fruit64 --output {out}/shipped --per_class 5
tokenizer: fit --config {configs}/tokenizer.yaml --config {configs}/finetune_tokenizer.yaml \
    --trainer.default_root_dir {out}/tokenizer
tokenizer: export --ckpt {out}/tokenizer/checkpoints/last.ckpt --output {out}/tokenizer/weights
reconstruct: reconstruct --tokenizer {out}/tokenizer/weights --shards {val} --output {out}
extract: extract --tokenizer {out}/tokenizer/weights --shards {train} --output {out}/codes/train \
    --crops random --random_crops 10
extract: extract --tokenizer {out}/tokenizer/weights --shards {val} --output {out}/codes/val --crops center
ar: fit --config {configs}/ar.yaml --config {configs}/finetune_ar.yaml --trainer.default_root_dir {out}/ar \
    --data.init_args.train {out}/codes/train --data.init_args.val {out}/codes/val
ar: export --ckpt {out}/ar/checkpoints/last.ckpt --tokenizer {out}/tokenizer/weights --shards {train} \
    --output {out}/pipeline
sample: sample --config {configs}/sample.yaml --pipeline {out}/pipeline --output {out}
sample: sample --config {configs}/sample.yaml --pipeline {out}/pipeline --output {out}/layout \
    --layout {configs}/layout.png --prefix 4 --per_class 6
evaluate: evaluate --samples {out}/samples.npz --reference {val} --features color_edges --probe_train {train} \
    --output {out}/evaluation.json
"""


class Stage(NamedTuple):
    """One stage, with all its paths."""

    name: str
    minutes: float
    result: Path
    what: str
    commands: list[list[str]]  # words after `dar`, run one after the other


def quickstart(output: str = "runs/quickstart", fresh: bool = False, from_scratch: bool = False) -> None:
    """Draw fruit with the shipped weights, train the tokenizer and the AR model on, draw again, and measure.

    A stage whose result is there is skipped; an interrupted one resumes from its last checkpoint. SIGTERM and Ctrl+C
    are passed on to the running command, which ends first, a training with a checkpoint.

    Args:
        output: folder for everything.
        fresh: delete that folder first.
        from_scratch: train both models from nothing, by tokenizer.yaml and ar.yaml alone: about an hour and a quarter
            on two cores, by estimate. The shipped tokenizer was trained on after that, with LPIPS, then with a decoder
            of 4x4 pixel patches instead of 8x8, and the shipped Llama for 6,000 more steps; this does none of it.
    """
    out = Path(output).resolve()
    claim(out, fresh, from_scratch)
    stages = make_stages(out, from_scratch)
    print(f"{len(stages)} stages, about {sum(stage.minutes for stage in stages):.0f} minutes on two CPU cores.")
    begin_work()
    stale = False  # a stage that runs makes the results of the later ones old
    for number, stage in enumerate(stages, start=1):
        print(f"\n[{number}/{len(stages)}] {stage.name}: {stage.what}")
        if stage.result.exists() and not stale:
            print(f"  done already: {stage.result}", flush=True)
            continue
        print(f"  takes about {stage.minutes:g} min", flush=True)
        run_stage(stage, out)
        stale = True
    finish(out)


def claim(out: Path, fresh: bool, from_scratch: bool) -> None:
    """Make the output folder, or go on in one of the same kind; only what quickstart made is ever deleted."""
    mark, start = out / "quickstart.json", {"from_scratch": from_scratch}
    with naming("output", OSError):
        if out.exists() and any(out.iterdir()):
            require(mark.exists(), f"output {out} holds other files: give a new folder")
            if fresh:
                shutil.rmtree(out)
            elif read_json(mark) != start:
                other = "the shipped weights" if from_scratch else "nothing"
                raise UserError(f"output {out} holds a run that started from {other}: give another folder, or --fresh")
    write_json(mark, start, indent=None)


def make_stages(out: Path, from_scratch: bool) -> list[Stage]:
    """The stages, in order, with all results under `out`."""
    places = {"out": out, "configs": CONFIGS, "train": TRAIN, "val": VAL}
    start = "from nothing" if from_scratch else "on, from the shipped weights"
    lines = re.sub(r"--config \S+/finetune_\S+", "", COMMANDS) if from_scratch else COMMANDS
    commands = defaultdict(list)
    for line in lines.strip().splitlines():
        name, *words = line.split()
        commands[name.rstrip(":")].append([word.format(**places) for word in words])  # a path may have spaces
    stages = [
        Stage(name, scratch if from_scratch else minutes, out / result, what.format(start=start), commands[name])
        for name, minutes, scratch, result, what in STAGES
    ]
    return stages[1:] if from_scratch else stages


def run_stage(stage: Stage, out: Path) -> None:
    """Run a stage's commands and add its seconds to seconds.json, over all attempts."""
    times, start = out / "seconds.json", time.monotonic()
    try:
        for command in stage.commands:
            print(f"  $ dar {shlex.join(command)}", flush=True)
            status, stopped = call([sys.executable, "-m", "dar_lightning", *command])
            if stopped:
                print(f"{signal.Signals(stopped).name}: stage {stage.name} stopped; start again to go on", flush=True)
                sys.exit(128 + stopped)
            if status:
                raise UserError(f"stage {stage.name} stopped with status {status}: the same command goes on from here")
    finally:
        seconds = read_json(times) if times.exists() else {}
        seconds[stage.name] = round(seconds.get(stage.name, 0) + time.monotonic() - start, 1)
        write_json(times, seconds)


def finish(out: Path) -> None:
    """Write metrics.json, what all stages measured and how long they took; say what to look at, and what to try."""
    measured = {"reconstruction": out / "reconstruction.json", "generation": out / "evaluation.json"}
    measured = {name: read_json(path) for name, path in measured.items()}
    metrics = {name: result["metrics"] for name, result in measured.items()}
    metrics["losses"] = {part: last_scalars(out / part / "logs", ("train/", "val/")) for part in ("tokenizer", "ar")}
    metrics["seconds"] = read_json(out / "seconds.json")
    metrics["protocol"] = {name: result["protocol"] for name, result in measured.items()}
    write_json(out / "metrics.json", metrics)
    shutil.copyfile(out / "layout/layout.png", out / "layout.png")

    generation, reconstruction = metrics["generation"], metrics["reconstruction"]
    distance = next(name for name in generation if name.startswith("FD-"))
    files = ("reconstructions.png", "samples.png", "previews.png", "layout.png", "metrics.json")
    look = "\n".join(f"  {out / name}" for name in files)
    print(f"""
Done in {sum(metrics["seconds"].values()) / 60:.1f} minutes of work.
  reconstruction  {reconstruction["psnr"]:.2f} dB PSNR, {reconstruction["codebook_use"]:.0%} of codes in use
  generation      {distance} {generation[distance]:.3f} to the validation photos
  linear probe    {generation["probe_accuracy_samples"]:.0%} of the generated images are taken for their class, \
{generation["probe_accuracy_reference"]:.0%} of real validation photos (chance: 7%)

Look at:
{look}

Try next, after `source .venv/bin/activate`:
  dar sample --pipeline {shlex.quote(str(out / "pipeline"))} --classes Orange,Watermelon --seed 1 \
--output {shlex.quote(str(out / "more"))}
  tensorboard --logdir {shlex.quote(str(out))}
  dar quickstart --from-scratch --output runs/from_scratch  # both models from nothing""")
