"""Packing of shards: which sample goes where, worker processes, going on after a kill."""

import contextlib
import hashlib
import io
import json
import math
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dar_lightning.data import workers as processes
from dar_lightning.data.captions import read_captions, read_object
from dar_lightning.data.decode import BadSample, decode_rgb, open_image
from dar_lightning.data.prepare.sources import Sample, Source
from dar_lightning.data.shards import INDEX, Shard, ShardIndex, read_index, write_shard
from dar_lightning.data.tar import read_headers
from dar_lightning.data.transforms import resize_short_side
from dar_lightning.errors import UserError, begin_work, require
from dar_lightning.files import check_same, file_sha256, locked, read_json, write_json

PLAN, SKIPPED = "plan.json", "skipped.json"
KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> extension in a shard


@dataclass(frozen=True)
class Packer(Dataset):
    """Makes shards of a source's samples, in whichever process asks: `packer[path, samples, sha256]` is one.

    That is its index entry, and what was left out of it: "shard", "key", "name" and "reason". A shard of these samples
    that is there already is kept, if it has the SHA-256 that the index of an earlier run names, or none does.
    """

    read: Callable[[Any], tuple[bytes, dict[str, bytes]]]
    classes: tuple[str, ...]
    size: int | None
    quality: int
    field: str | None = None  # of captions, in a sample's own JSON

    def __getitem__(self, job: tuple[Path, list[Sample], str | None]) -> tuple[Shard, list[dict[str, str]]]:
        path, samples, sha256 = job
        skipped: list[dict[str, str]] = []
        try:
            if (entry := self._kept(path, samples, skipped)) and sha256 in (None, entry.sha256):
                return entry, skipped
            skipped.clear()
            return write_shard(path, self._pack(path, samples, skipped)), skipped
        except OSError as error:
            raise UserError(f"output: cannot write {path} ({error.strerror})") from error

    def _pack(self, path: Path, samples: list[Sample], skipped: list) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Keys and members of the good samples; the others are added to `skipped`."""
        for sample in samples:
            try:
                if sample.flaw:
                    raise BadSample(sample.flaw)
                content, members = self.read(sample.place)
                extension, content = encode(content, self.size, self.quality)
            except BadSample as bad:
                skipped.append({"shard": path.name, "key": sample.key, "name": sample.name, "reason": str(bad)})
                continue
            about = {"name": sample.name} | (
                {"class": self.classes[sample.label]} if self.classes and sample.label >= 0 else {}
            )
            image = {extension: content} | ({"cls": str(sample.label).encode()} if sample.label >= 0 else {})
            captions = list(sample.captions)
            if self.field is not None:
                captions = captions or read_captions(members, self.field)
            if captions:
                about |= read_object(members)
                if about.get("captions") != captions:
                    members = members | {"json": json.dumps(about | {"captions": captions}).encode()}
            yield sample.key, {"json": json.dumps(about).encode()} | members | image

    def _kept(self, path: Path, samples: list[Sample], skipped: list) -> Shard | None:
        """The entry of a shard that is there as planned; None if it must be made."""
        contents = read_headers(path)
        if contents.damage or any(sample.flaw for sample in contents.samples):
            return None
        found = [sample.key for sample in contents.samples]
        present = set(found)
        missing = [sample for sample in samples if sample.key not in present]
        if found != [sample.key for sample in samples if sample.key in present]:
            return None
        if any(self._pack(path, missing, skipped)):  # it could be read now
            return None
        return Shard(path.name, len(found), path.stat().st_size, file_sha256(path))


def encode(content: bytes, size: int | None, quality: int) -> tuple[str, bytes]:
    """An image as it shall be stored, extension and content: scaled to a short side of at most `size`, as JPEG.

    It is decoded in any case, so that what lies in the shards is whole; BadSample if it cannot be.
    """
    image, encoded = decode_rgb(content), io.BytesIO()
    if size is not None and min(image.size) > size:
        resize_short_side(image, size).save(encoded, "JPEG", quality=quality, subsampling=0)
        return "jpg", encoded.getvalue()
    if extension := KEPT_FORMATS.get(open_image(content).format):
        return extension, content
    image.save(encoded, "PNG")
    return "png", encoded.getvalue()


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
        packer = Packer(source.read, source.classes, options["size"], options["quality"], options.get("captions"))
        workers = min(workers or os.cpu_count() or 1, len(jobs))
        made = _run(packer, jobs, workers, len(source.samples), max_bad_share)
        for folder in (root / part for part in parts):
            mine = [result for (path, *_), result in zip(jobs, made, strict=True) if path.parent == folder]
            for path in (folder / SKIPPED, *folder.glob(".*.tar.*.part")):  # of killed runs
                path.unlink(missing_ok=True)
            if bad := [each for _, skipped in mine for each in skipped]:
                write_json(folder / SKIPPED, bad, indent=1)
            labelled = any(sample.label >= 0 for sample in source.samples)
            ShardIndex(folder, tuple(entry for entry, _ in mine), source.classes, labelled=labelled).save()
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
        captions = (sample.captions,) if sample.captions else ()
        listing.update(json.dumps((sample.key, sample.name, sample.label, sample.size, *captions)).encode())
    # another encoder gives other bytes
    plan = {"version": 1, "input": listing.hexdigest()} | options | {"pillow": PIL.__version__}
    if (root / PLAN).is_file():
        found, hint = read_json(root / PLAN), "choose another folder or delete this one"
        same = found.get("input") == plan["input"]
        require(same, f"output: {root} was made from another input or other classes; {hint}")
        check_same(f"{root} was made with", found, plan)
        return
    for folder in (root / part for part in parts):
        if (folder / INDEX).exists() or any(folder.glob("*.tar")):
            raise UserError(f"output: {folder} holds shards from elsewhere; choose another folder")
    write_json(root / PLAN, plan, indent=1)


def _run(packer: Packer, jobs: list[tuple], workers: int, total: int, max_bad_share: float) -> list[tuple]:
    """What the packer makes of all jobs, under a progress bar; too many bad images end it."""
    begin_work()
    options = processes.options(workers if workers > 1 else 0) | {"pin_memory": False}
    made, bad, interrupts = [], [], []
    try:
        # held back while workers start: those that Ctrl-C leaves half-started would print a traceback each
        before = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
        try:
            results = iter(DataLoader(packer, batch_size=None, sampler=jobs, **options))
        finally:
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
                        f"as they were read: {bad[0]['name']!a}: {bad[0]['reason']}, ...; remove them or raise it"
                    )
    except (UserError, RuntimeError) as error:
        if (mistake := processes.user_error(error, "workers", 1)) is None:
            raise
        raise mistake from error
    return made
