"""`dar quickstart`: train, sample and evaluate on the embedded photos, with the verbs of full-size runs."""

import json
import shlex
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dar_lightning.errors import UserError
from dar_lightning.files import read_json, users_path, write_text
from dar_lightning.sweeps.child import call
from dar_lightning.sweeps.curves import last_scalars

CONFIGS, TRAIN, VAL = "experiments/quickstart", "data/fruit64/train", "data/fruit64/val"


@dataclass(frozen=True)
class Stage:
    """One step of the road."""

    name: str  # for the user, and in metrics.json
    what: str  # one sentence for the user
    minutes: float  # what it took on two cores; from scratch, an estimate
    result: Path  # the file that exists when the stage is complete
    commands: tuple[tuple[str, ...], ...]  # options of `dar`, run one after the other


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
    stages = road(out, from_scratch)
    print(f"{len(stages)} stages, about {sum(stage.minutes for stage in stages):.0f} minutes on two CPU cores.")
    stale = False  # a stage that runs makes the results of the later ones old
    for number, stage in enumerate(stages, start=1):
        print(f"\n[{number}/{len(stages)}] {stage.name}: {stage.what}")
        if stage.result.exists() and not stale:
            print(f"  done already: {stage.result}", flush=True)
            continue
        print(f"  takes about {stage.minutes:g} min", flush=True)
        run_stage(stage, out)
        stale = True
    metrics = collect(out)
    print(summary(out, metrics))


def claim(out: Path, fresh: bool, from_scratch: bool) -> None:
    """Make the output folder, or go on in one of the same kind; only what quickstart made is ever deleted."""
    mark, start = out / "quickstart.json", {"from_scratch": from_scratch}
    with users_path("output"):
        used = out.exists() and any(out.iterdir())
    if used:
        if not mark.exists():
            raise UserError(f"output {out} holds other files: give a new folder")
        if fresh:
            with users_path("output"):
                shutil.rmtree(out)
        elif read_json(mark) != start:
            other = "the shipped weights" if from_scratch else "nothing"
            raise UserError(f"output {out} holds a run that started from {other}: give another folder, or --fresh")
    write_text(mark, json.dumps(start) + "\n")


def road(out: Path, from_scratch: bool) -> list[Stage]:
    """The stages, in order, with all results under `out`."""
    pipeline, tokenizer = out / "pipeline", out / "tokenizer/weights"
    codes = [
        ("extract", "--tokenizer", str(tokenizer), "--shards", shards, "--output", f"{out}/codes/{split}", *crops)
        for split, shards, crops in (
            ("train", TRAIN, ("--crops", "random", "--random_crops", "10")),
            ("val", VAL, ("--crops", "center")),
        )
    ]
    tokens = ("--data.init_args.train", f"{out}/codes/train", "--data.init_args.val", f"{out}/codes/val")
    sample = ("sample", "--config", f"{CONFIGS}/sample.yaml")
    layout = ("--layout", f"{CONFIGS}/layout.png", "--prefix", "4", "--per_class", "6")
    start = "from nothing" if from_scratch else "on, from the shipped weights"
    stages = [
        Stage(
            "shipped",
            "draw with the weights that come with the package",
            1,
            out / "shipped/samples.png",
            ((*sample, "--pipeline", "fruit64", "--output", f"{out}/shipped", "--per_class", "5"),),
        ),
        Stage(
            "tokenizer",
            f"train the sequential diffusion tokenizer {start}",
            60 if from_scratch else 4,
            tokenizer / "config.json",
            (
                (*fit("tokenizer", from_scratch), "--trainer.default_root_dir", f"{out}/tokenizer"),
                ("export", "--ckpt", f"{out}/tokenizer/checkpoints/last.ckpt", "--output", f"{tokenizer}"),
            ),
        ),
        Stage(
            "reconstruct",
            "encode and decode the validation photos, some also with the tokens of others",
            1.3,
            out / "reconstruction.json",
            (("reconstruct", "--tokenizer", f"{tokenizer}", "--shards", VAL, "--output", f"{out}"),),
        ),
        Stage("extract", "turn the photos into tokens", 1, out / "codes/val/index.json", tuple(codes)),
        Stage(
            "ar",
            f"train the Llama {start}",
            15 if from_scratch else 1.3,
            pipeline / "config.json",
            (
                (*fit("ar", from_scratch), "--trainer.default_root_dir", f"{out}/ar", *tokens),
                (
                    *("export", "--ckpt", f"{out}/ar/checkpoints/last.ckpt", "--tokenizer", f"{tokenizer}"),
                    *("--shards", TRAIN, "--output", f"{pipeline}"),
                ),
            ),
        ),
        Stage(
            "sample",
            "draw every class, and every class with the first 4 tokens of one photo",
            0.8,
            out / "layout/layout.png",
            (
                (*sample, "--pipeline", f"{pipeline}", "--output", f"{out}"),
                (*sample, "--pipeline", f"{pipeline}", "--output", f"{out}/layout", *layout),
            ),
        ),
        Stage(
            "evaluate",
            "Frechet distance to the validation photos, and a linear probe that knows only real photos",
            0.3,
            out / "evaluation.json",
            (
                (
                    *("evaluate", "--samples", f"{out}/samples.npz", "--reference", VAL, "--features", "color_edges"),
                    *("--probe_train", TRAIN, "--output", f"{out}/evaluation.json"),
                ),
            ),
        ),
    ]
    return stages[1:] if from_scratch else stages


def fit(part: str, from_scratch: bool) -> tuple[str, ...]:
    """Options of `dar` that train a part; from the shipped weights, a second config goes on top of the first."""
    base = ("fit", "--config", f"{CONFIGS}/{part}.yaml")
    return base if from_scratch else (*base, "--config", f"{CONFIGS}/finetune_{part}.yaml")


def run_stage(stage: Stage, out: Path) -> None:
    """Run a stage's commands and add its seconds to seconds.json, over all attempts."""
    times = out / "seconds.json"
    start = time.monotonic()
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
        write_text(times, json.dumps(seconds, indent=2) + "\n")


def collect(out: Path) -> dict:
    """Write metrics.json: what all stages measured, and how long they took."""
    reconstruction, evaluation = read_json(out / "reconstruction.json"), read_json(out / "evaluation.json")
    metrics = {
        "reconstruction": reconstruction["metrics"],
        "generation": evaluation["metrics"],
        "losses": {part: last_scalars(out / part / "logs", ("train/", "val/")) for part in ("tokenizer", "ar")},
        "seconds": read_json(out / "seconds.json"),
        "protocol": {"reconstruction": reconstruction["protocol"], "generation": evaluation["protocol"]},
    }
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    shutil.copyfile(out / "layout/layout.png", out / "layout.png")
    return metrics


def summary(out: Path, metrics: dict) -> str:
    """What to look at, and what to try next."""
    generation, reconstruction = metrics["generation"], metrics["reconstruction"]
    distance = next(name for name in generation if name.startswith("FD-"))
    pictures = ("reconstructions.png", "samples.png", "previews.png", "layout.png")
    return "\n".join(
        [
            f"\nDone in {sum(metrics['seconds'].values()) / 60:.1f} minutes of work.",
            f"  reconstruction  {reconstruction['psnr']:.2f} dB PSNR, "
            f"{reconstruction['codebook_use']:.0%} of codes in use",
            f"  generation      {distance} {generation[distance]:.3f} to the validation photos",
            f"  linear probe    {generation['probe_accuracy_samples']:.0%} of the generated images are taken for their "
            f"class, {generation['probe_accuracy_reference']:.0%} of real validation photos (chance: 7%)",
            "\nLook at:",
            *(f"  {out / name}" for name in (*pictures, "metrics.json")),
            "\nTry next, after `source .venv/bin/activate`:",
            f"  dar sample --pipeline {out / 'pipeline'} --classes Orange,Watermelon --seed 1 --output {out / 'more'}",
            f"  tensorboard --logdir {out}",
            "  dar quickstart --from-scratch --output runs/from_scratch  # both models from nothing",
        ]
    )
