"""The runs of benchmarks/faults.py: data, commands, processes, and whether two ended with the same bits."""

import io
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dar_lightning.cli import main as dar
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.data.token_dataset import CodesIndex, describe, write_codes

SIZE, TOKENS, CODES, BATCH = 32, 8, 32, 4
SAVE_EVERY, VALIDATE_EVERY = 3, 2  # optimizer steps; each validation saves, too
LIMIT = 400  # seconds after which a run counts as hanging
TOKENIZER = {
    **dict(image_size=SIZE, encoder_patch_size=8, encoder_dim=32, encoder_depth=1, conditioner_dim=32),
    **dict(conditioner_depth=1, codebook_size=CODES, codebook_dim=4, num_tokens=TOKENS, num_groups=4, head_dim=16),
    **dict(decoder_dim=32, decoder_depth=1, decoder_patch_size=8, repa_layer=None),
}
AR = dict(vocab_size=CODES, num_tokens=TOKENS, num_classes=4, dim=32, depth=2, num_heads=2, multiple_of=32)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["fault_callbacks", "dar_lightning.commands.fit", "dar_lightning.training.callbacks"])


def write_data(root: Path) -> None:
    """22 random samples to train on, 5 and a half batches, and 7 to validate on."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 22), ("val", 7)):
        samples = []
        for number in range(count):
            png = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(png, "PNG")
            samples.append((f"{number:04d}", {"png": png.getvalue(), "cls": str(number % 4).encode()}))
        images, tokens = root / "images" / split, root / "tokens" / split
        ShardIndex(images, (write_shard(images / "000000.tar", samples),), tuple("abcd")).save()
        path = tokens / "000000.safetensors"
        path.parent.mkdir(parents=True)
        codes = generator.integers(0, CODES, (count, 1, TOKENS)).astype(np.uint16)
        write_codes(path, codes, np.arange(count) % 4, [key for key, _ in samples], {})
        index = (describe(path, count),)
        CodesIndex(tokens, "0" * 64, {}, "center", 1, SIZE, TOKENS, CODES, tuple("abcd"), index).save()


def callback(name: str, /, **options) -> list[str]:
    """Words that add a callback."""
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={options[key]}" for key in options)]


def command(model: str, data: Path, run: Path, steps: int, workers: int = 0, **trainer) -> list[str]:
    """What a user types, and types again."""
    if model == "tokenizer":
        words = ["--model=dar_lightning.training.TokenizerModule", f"--model.init_args.config={json.dumps(TOKENIZER)}"]
        words += ["--data=dar_lightning.data.imagenet.ImageNetDataModule", f"--data.init_args.image_size={SIZE}"]
        splits = data / "images"
    else:
        words = ["--model=dar_lightning.training.ARModule", f"--model.init_args.config={json.dumps(AR)}"]
        words += ["--data=dar_lightning.data.codes.CodesDataModule"]
        splits = data / "tokens"
    options = dict(accelerator="cpu", devices=1, max_steps=steps, accumulate_grad_batches=2)
    options["val_check_interval"] = options["accumulate_grad_batches"] * VALIDATE_EVERY
    options |= dict(num_sanity_val_steps=0, gradient_clip_val=1.0, log_every_n_steps=1, default_root_dir=run)
    options |= dict(enable_progress_bar="false", enable_model_summary="false", check_val_every_n_epoch="null") | trainer
    words += [f"--trainer.{name}={value}" for name, value in options.items()]
    words += [f"--data.init_args.{split}={splits / split}" for split in ("train", "val")]
    words += [f"--data.init_args.batch_size={BATCH}", f"--data.init_args.num_workers={workers}"]
    words += ["--model.init_args.optimizer.lr=0.01", "--model.init_args.optimizer.warmup_steps=5"]
    words += callback(
        "dar_lightning.training.callbacks.LastStepCheckpoint", every_n_train_steps=SAVE_EVERY, save_top_k=0
    )
    words += callback("dar_lightning.training.callbacks.EMA", decay=0.9)
    words += callback("dar_lightning.training.callbacks.SkipBadSteps", max_in_a_row=3)
    if model == "tokenizer":
        options = dict(warmup_steps=6, collect_steps=4, revive_every=4, revive_until=20)
        words += callback("dar_lightning.training.callbacks.CodebookWarmup", **options)
    return ["fit", "--seed_everything=1", "--ckpt_path=last", *words]


def start(words: list[str], diary: Path, accidents: list[str] = (), log: Path | None = None, temp: str | None = None):
    """Run `dar` in a process forked from one that has done the imports."""
    words = [*words, *callback("fault_callbacks.Diary", path=diary), *accidents]
    process = context.Process(target=_dar, args=([str(word) for word in words], log or f"{diary}.log", temp))
    process.start()
    return process


def _dar(words: list[str], log: Path, temp: str | None) -> None:
    tempfile.tempdir = temp
    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    dar(words)


def finish(process) -> int:
    """Its exit code, negative for a signal."""
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"no end after {LIMIT} seconds")
    return process.exitcode


def last(run: Path) -> dict:
    """The newest checkpoint; there is none but complete ones."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def lines(diary: Path, rank: int = 0) -> list[list]:
    """Of a diary; the last one may have been cut by the kill."""
    path = Path(f"{diary}.{rank}")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def differences(one, other, where: str = "") -> list[str]:
    """Places where two nested structures are not the same, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(one, other) else [where]
    if isinstance(one, dict | list | tuple):
        if type(one) is not type(other) or len(one) != len(other):
            return [where]
        keys = one if isinstance(one, dict) else range(len(one))
        return [place for key in keys for place in differences(one[key], other[key], f"{where}/{key}")]
    return [] if one == other else [where]


WHAT = ("global_step", "state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
