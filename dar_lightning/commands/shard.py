"""`dar shard`: turn images that people have into WebDataset shards."""

import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import PIL
from tqdm import tqdm

from dar_lightning.data.prepare import ilsvrc
from dar_lightning.data.prepare.hf_dataset import hf_dataset, is_saved
from dar_lightning.data.prepare.packing import Packed, Packer, Skipped, make_shard
from dar_lightning.data.prepare.sources import Sample, Source, choose_classes, image_folder, shards, with_safe_keys
from dar_lightning.data.remote import is_remote
from dar_lightning.data.shards import INDEX, ShardIndex, read_index
from dar_lightning.errors import UserError
from dar_lightning.files import find_shipped, locked, write_text

PLAN, SKIPPED = "plan.json", "skipped.json"
HUB = "hf://"
SHOWN = 10  # skipped images that are named on the screen; the file has all

Job = tuple[Path, list[Sample], str | None]  # a shard, what goes into it, and its SHA-256 in an earlier run's index


def shard(
    input: str,
    output: str,
    size: int | None = None,
    quality: int = 95,
    max_per_shard: int = 1000,
    val_fraction: float = 0.0,
    classes: str | None = None,
    labels: str | None = None,
    split: str | None = None,
    seed: int | None = 0,
    workers: int | None = None,
    max_bad_share: float = 0.01,
) -> None:
    """Make WebDataset shards for ImageNetDataModule.

    Every shard is written whole or not at all, and the index last: repeat the command after an interruption, and it
    keeps the shards that are there and makes what is missing. The same input and options give the same bytes, with
    any number of workers. Images that cannot be decoded are left out, counted and named in `skipped.json`.

    Args:
        input: A folder with a folder of images per class; ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar as
            distributed; a folder or brace pattern of shards to pack anew; a Hugging Face data set: hf://NAME or a
            folder that `save_to_disk` wrote.
        output: Folder for the shards and their index.json.
        size: Short side in pixels: larger images are scaled as in ADM and stored as JPEG. Left out, and for images
            that are not larger, the bytes stay as they are.
        quality: Of those JPEGs, 1 to 100; their colours are kept at full resolution.
        max_per_shard: Images per shard.
        val_fraction: Share of each class that goes to OUTPUT/val; the rest goes to OUTPUT/train. With 0, all shards
            go to OUTPUT itself.
        classes: Class names separated by commas, or a file with one per line: only these, labelled in this order.
        labels: Of ILSVRC2012_img_val.tar: the devkit (its .tar.gz or its folder), or a text file with a WordNet ID
            per image. Left out, ILSVRC2012_devkit_t12.tar.gz beside the images' archive.
        split: Of a Hugging Face data set that has several.
        seed: Of the order of the images, and of the choice for OUTPUT/val; null keeps the order of the source.
        workers: Processes that work at the same time; one per core when left out.
        max_bad_share: Stop when more than this share of the images cannot be used.

    Raises:
        UserError: The input is not as described, or `output` holds something else.
    """
    _check(size, quality, max_per_shard, val_fraction, workers, max_bad_share)
    folder = Path(input).resolve()
    if folder.is_dir() and Path(output).resolve().is_relative_to(folder):  # it would be a part of its own input
        raise UserError(f"output: {output} is input or lies in it; choose a folder elsewhere")
    source = open_source(input, labels, split)
    if classes is not None:
        source = choose_classes(source, classes)
    samples = with_safe_keys(source.samples)
    if not samples:
        raise UserError(f"input: {input} holds no images")
    print(f"{input}: {source.kind}, {len(samples)} images of {len(source.classes) or 'unnamed'} classes")
    if source.ignored:
        print(f"{len(source.ignored)} files are not named like images and left out: {source.ignored[0]!a}, ...")

    root = Path(output)
    parts = arrange(samples, seed, val_fraction)
    plan = {
        "version": 1,
        "input": _listing(samples, source.classes),
        "size": size,
        "quality": None if size is None else quality,
        "max_per_shard": max_per_shard,
        "val_fraction": val_fraction,
        "seed": seed,
        "pillow": PIL.__version__,  # another encoder gives other bytes
    }
    make = functools.partial(make_shard, pack=Packer(source.read, source.classes, size, quality))
    with locked(root, "output"):
        _claim(root, [root / part for part in parts], plan)
        known = {path: sha for part in parts for path, sha in _known(root / part).items()}
        jobs = [
            (path := root / part / f"{number:06d}.tar", members[start : start + max_per_shard], known.get(path))
            for part, members in parts.items()
            for number, start in enumerate(range(0, len(members), max_per_shard))
        ]
        done = _run(make, jobs, min(workers or os.cpu_count() or 1, len(jobs)), len(samples), max_bad_share)
        skipped = []
        for part in parts:
            mine = [done[path] for path, *_ in jobs if path.parent == root / part]
            skipped += _finish(root / part, mine, source.classes)
    total = sum(packed.entry.bytes for packed in done.values())
    print(f"{output}: {len(samples) - len(skipped)} images in {len(done)} shards, {total / 1e6:.1f} MB")
    for each in skipped[:SHOWN]:
        print(f"  skipped {each.shard}/{each.key}: {each.reason}")
    if skipped:
        print(f"{len(skipped)} of {len(samples)} images skipped; {SKIPPED} beside the index names all")


def _check(
    size: int | None, quality: int, max_per_shard: int, val_fraction: float, workers: int | None, max_bad_share: float
) -> None:
    for name, value in {"size": size, "max_per_shard": max_per_shard, "workers": workers}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: must be at least 1")
    if not 1 <= quality <= 100:
        raise UserError(f"quality is {quality}: must be from 1 to 100")
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}: must be from 0 to less than 1")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"max_bad_share is {max_bad_share}: must be from 0 to 1")


def open_source(input: str, labels: str | None = None, split: str | None = None) -> Source:
    """Tell what `input` is, and list its images.

    Raises:
        UserError: It is nothing that `dar shard` reads, or options are given that it has no use for.
    """
    if is_remote(input) and not input.startswith(HUB):
        raise UserError(f"input: {input} is an address; copy it to this machine first, or give hf://NAME")
    path = Path(find_shipped(input))
    is_archive = path.is_file() and path.suffix == ".tar"
    first = ilsvrc.first_names(path) if is_archive else []
    is_val = any(ilsvrc.VAL_NAME.search(name) for name in first) and not any(name.endswith(".cls") for name in first)
    is_hf = input.startswith(HUB) or (path.is_dir() and is_saved(path))
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


def arrange(samples: list[Sample], seed: int | None, val_fraction: float) -> dict[str, list[Sample]]:
    """The samples of each folder of the output, in the order in which they shall be written.

    Args:
        samples: All of them, in the order of the source.
        seed: Of the shuffle; None keeps the order. It is a hash of the key, so that it depends on nothing else.
        val_fraction: Share of each class for "val", rounded to the nearest number of images; 0 makes one part, "".
    """
    shuffled = sorted(samples, key=lambda sample: hashlib.sha256(f"{seed}/{sample.key}".encode()).digest())
    order = samples if seed is None else shuffled
    if not val_fraction:
        return {"": order}
    sizes = Counter(sample.label for sample in samples)
    room = {label: math.floor(val_fraction * count + 0.5) for label, count in sizes.items()}
    val = set()
    for sample in shuffled:
        if room[sample.label]:
            room[sample.label] -= 1
            val.add(sample.key)
    parts = {
        "train": [sample for sample in order if sample.key not in val],
        "val": [sample for sample in order if sample.key in val],
    }
    for part, members in parts.items():
        if not members:
            raise UserError(f"val_fraction is {val_fraction}: {part} gets none of the {len(samples)} images")
    return parts


def _listing(samples: list[Sample], classes: tuple[str, ...]) -> str:
    """A hash of what the source lists: names, labels and sizes, but not where it lies."""
    listing = hashlib.sha256(json.dumps(classes).encode())
    for sample in samples:
        listing.update(json.dumps((sample.key, sample.name, sample.label, sample.size)).encode())
    return listing.hexdigest()


def _claim(root: Path, folders: list[Path], plan: dict[str, Any]) -> None:
    """Write down what is being made, or compare it with what an earlier run wrote."""
    path = root / PLAN
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"output: {path} is not readable ({error}); choose another folder or delete it") from error
        for name, value in plan.items():
            if found.get(name) != value:
                was = f"was made with {name} {found.get(name)}, now it is {value}"
                was = "was made from another input or other classes" if name == "input" else was
                raise UserError(f"output: {root} {was}; choose another folder or delete this one")
        return
    for folder in folders:
        if (folder / INDEX).exists() or any(folder.glob("*.tar")):
            raise UserError(f"output: {folder} holds shards from elsewhere; choose another folder")
    write_text(path, json.dumps(plan, indent=1) + "\n")


def _known(folder: Path) -> dict[Path, str | None]:
    """SHA-256 of the shards that a finished run has written down; an index that cannot be read says nothing."""
    if not (folder / INDEX).is_file():
        return {}
    try:
        return {folder / shard.name: shard.sha256 for shard in read_index(folder, "output", ())[1]}
    except UserError:  # it is written anew at the end
        return {}


def _run(
    make: Callable[..., Packed], jobs: list[Job], workers: int, total: int, max_bad_share: float
) -> dict[Path, Packed]:
    """Make all shards, under one progress bar."""
    done: dict[Path, Packed] = {}
    bad: list[Skipped] = []
    results = _in_turn(make, jobs) if workers == 1 else _in_processes(make, jobs, workers)
    with contextlib.closing(results), tqdm(total=total, desc="shard", unit="img") as bar:
        for path, packed in results:
            done[path] = packed
            bad += packed.skipped
            seen = packed.entry.samples + len(packed.skipped)
            if packed.kept:
                bar.initial += seen  # it does not count for the speed
            bar.update(seen)
            if len(bad) > max_bad_share * total:
                raise UserError(
                    f"max_bad_share is {max_bad_share}, but {len(bad)} of {total} images cannot be used, as far as "
                    f"they were read: {bad[0].name!a}: {bad[0].reason}, ..."
                )
    return done


def _in_turn(make: Callable[..., Packed], jobs: list[Job]) -> Iterator[tuple[Path, Packed]]:
    for job in jobs:
        yield job[0], make(*job)


def _in_processes(make: Callable[..., Packed], jobs: list[Job], workers: int) -> Iterator[tuple[Path, Packed]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by each worker
    pool = ProcessPoolExecutor(workers, context, initializer=_follow_parent)
    try:
        with _interrupts_later():
            futures = {pool.submit(make, *job): job[0] for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"workers is {workers}: one of them was killed, for lack of memory perhaps; repeat the command with fewer"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # shards in progress are finished


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Let processes start undisturbed: an interrupt in their imports would print a traceback for each."""
    waiting = []
    before = signal.signal(signal.SIGINT, lambda *_: waiting.append(True))  # masked here, it reaches other threads
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes that start inherit this
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


def _follow_parent() -> None:
    """In a worker: leave interrupts to the parent, and end when it ends, be it killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _finish(folder: Path, made: list[Packed], classes: tuple[str, ...]) -> list[Skipped]:
    """Sweep up what killed runs left, then write the index; returns what was skipped."""
    for part in folder.glob(".*.tar.*.part"):
        part.unlink(missing_ok=True)
    skipped = [each for packed in made for each in packed.skipped]
    (folder / SKIPPED).unlink(missing_ok=True)
    if skipped:
        write_text(folder / SKIPPED, json.dumps([each._asdict() for each in skipped], indent=1) + "\n")
    ShardIndex(folder, tuple(packed.entry for packed in made), classes).save()
    return skipped
