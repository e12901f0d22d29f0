"""A run of `dar shard`: what the input is, which sample goes where, worker processes, going on after a kill."""

import contextlib
import hashlib
import json
import math
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import PIL
from torch.utils.data import DataLoader
from tqdm import tqdm

from dar_lightning.data import workers as processes
from dar_lightning.data.prepare import ilsvrc
from dar_lightning.data.prepare.hf_dataset import hf_dataset, is_saved
from dar_lightning.data.prepare.packing import Packer
from dar_lightning.data.prepare.sources import Sample, Source, image_folder, shards
from dar_lightning.data.remote import is_remote
from dar_lightning.data.shards import INDEX, Shard, ShardIndex, read_index
from dar_lightning.errors import UserError
from dar_lightning.files import find_shipped, locked, read_json, write_text

PLAN, SKIPPED = "plan.json", "skipped.json"
HUB = "hf://"


def open_source(input: str, labels: str | None = None, split: str | None = None) -> Source:
    """Recognize an input of `dar shard` and list its images; options of other inputs are refused."""
    if is_remote(input) and not input.startswith(HUB):
        raise UserError(f"input: {input} is an address; copy it to this machine first, or give hf://NAME")
    path = Path(find_shipped(input))
    first = ilsvrc.first_names(path) if path.is_file() and path.suffix == ".tar" else []
    is_val = any(ilsvrc.VAL_NAME.search(name) for name in first) and not any(name.endswith(".cls") for name in first)
    is_hf = input.startswith(HUB) or is_saved(path)
    if labels is not None and not is_val:
        raise UserError(f"labels is {labels}: only ILSVRC2012_img_val.tar needs them, input is {input}")
    if split is not None and not is_hf:
        raise UserError(f"split is {split}: only Hugging Face data sets have splits, input is {input}")
    if is_hf:
        return hf_dataset(input.removeprefix(HUB), split)
    if is_val:
        return ilsvrc.val_archive(path, labels)
    if any(name.endswith(".tar") for name in first):
        return ilsvrc.train_archive(path)
    if input.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar"))):
        return shards(input)
    if path.is_dir():
        return image_folder(path)
    what = "is a file of another kind" if path.exists() else "does not exist"
    raise UserError(f"input: {input} {what}; give a folder, an ILSVRC2012 archive, shards or hf://NAME")


def make_shards(
    source: Source, root: Path, options: dict[str, Any], workers: int | None, max_bad_share: float
) -> list[tuple[Shard, list[dict[str, str]]]]:
    """Write all shards under a folder and their indices, keeping what an earlier run of the same plan has made.

    `options` are the others of `dar shard`; keys in the source are safe and unique.
    """
    parts = arrange(source.samples, options["seed"], options["val_fraction"])
    with locked(root, "output"):
        _claim(root, parts, source, options)
        jobs, step = [], options["max_per_shard"]
        for part, samples in parts.items():
            known = {}
            with contextlib.suppress(UserError):  # no run has finished, or its index is damaged
                known = {shard.name: shard.sha256 for shard in read_index(root / part, "output", ())[1]}
            for start in range(0, len(samples), step):
                path = root / part / f"{start // step:06d}.tar"
                jobs.append((path, samples[start : start + step], known.get(path.name)))
        packer = Packer(source.read, source.classes, options["size"], options["quality"])
        workers = min(workers or os.cpu_count() or 1, len(jobs))
        made = _run(packer, jobs, workers, len(source.samples), max_bad_share)
        for folder in (root / part for part in parts):
            mine = [result for (path, *_), result in zip(jobs, made, strict=True) if path.parent == folder]
            for path in (folder / SKIPPED, *folder.glob(".*.tar.*.part")):  # of killed runs
                path.unlink(missing_ok=True)
            if bad := [each for _, skipped in mine for each in skipped]:
                write_text(folder / SKIPPED, json.dumps(bad, indent=1) + "\n")
            ShardIndex(folder, tuple(entry for entry, _ in mine), source.classes).save()
    return made


def arrange(samples: list[Sample], seed: int | None, val_fraction: float) -> dict[str, list[Sample]]:
    """Shuffle by a hash of seed and key (None keeps the order), and take a share of each class for "val".

    Returns subfolder of the output -> its samples in the order of writing; without a share, "" is the only one.
    """
    shuffled = sorted(samples, key=lambda sample: hashlib.sha256(f"{seed}/{sample.key}".encode()).digest())
    order = samples if seed is None else shuffled
    if not val_fraction:
        return {"": order}
    keys = defaultdict(list)
    for sample in shuffled:
        keys[sample.label].append(sample.key)
    val = {key for each in keys.values() for key in each[: math.floor(val_fraction * len(each) + 0.5)]}
    parts = {"train": [sample for sample in order if sample.key not in val]}
    parts["val"] = [sample for sample in order if sample.key in val]
    for part, members in parts.items():
        if not members:
            raise UserError(f"val_fraction is {val_fraction}: {part} gets none of the {len(samples)} images")
    return parts


def _claim(root: Path, parts: dict[str, list[Sample]], source: Source, options: dict[str, Any]) -> None:
    """Write the plan, all that the shards depend on, or compare it with an earlier run's."""
    listing = hashlib.sha256(json.dumps(source.classes).encode())  # of what there is, not of where it lies
    for sample in source.samples:
        listing.update(json.dumps((sample.key, sample.name, sample.label, sample.size)).encode())
    # another encoder gives other bytes
    plan = {"version": 1, "input": listing.hexdigest()} | options | {"pillow": PIL.__version__}
    if (root / PLAN).is_file():
        found = read_json(root / PLAN)
        for name, value in plan.items():
            if found.get(name) != value:
                was = f"was made with {name} {found.get(name)}, now it is {value}"
                was = "was made from another input or other classes" if name == "input" else was
                raise UserError(f"output: {root} {was}; choose another folder or delete this one")
        return
    for folder in (root / part for part in parts):
        if (folder / INDEX).exists() or any(folder.glob("*.tar")):
            raise UserError(f"output: {folder} holds shards from elsewhere; choose another folder")
    write_text(root / PLAN, json.dumps(plan, indent=1) + "\n")


def _run(packer: Packer, jobs: list[tuple], workers: int, total: int, max_bad_share: float) -> list[tuple]:
    """What the packer makes of all jobs, under a progress bar; too many bad images end it."""
    options = processes.options(workers if workers > 1 else 0) | {"pin_memory": False}
    made, bad, interrupts = [], [], []
    try:
        # held back while workers start: those that Ctrl-C leaves half-started would print a traceback each
        before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
        results = iter(DataLoader(packer, batch_size=None, sampler=jobs, **options))
        signal.signal(signal.SIGINT, before)
        if interrupts:
            raise KeyboardInterrupt
        with tqdm(total=total, desc="shard", unit="img") as bar:
            for entry, skipped in results:
                made.append((entry, skipped))
                bad += skipped
                bar.update(entry.samples + len(skipped))
                if len(bad) > max_bad_share * total:
                    raise UserError(
                        f"max_bad_share is {max_bad_share}, but {len(bad)} of {total} images cannot be used, as far "
                        f"as they were read: {bad[0]['name']!a}: {bad[0]['reason']}, ..."
                    )
    except UserError as error:  # a worker's comes with its traceback
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(f"workers is {workers}: one was killed, for lack of memory perhaps; give fewer") from error
    return made
