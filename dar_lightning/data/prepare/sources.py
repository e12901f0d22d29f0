"""Sources of `dar shard`: lists of labelled images, and how to read one; folders and shards are two of them.

An image in a folder, in a tar or in a tar inside a tar is the same thing: a span of a file.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dar_lightning.data import tar
from dar_lightning.data.captions import TABLES, read_captions, read_table
from dar_lightning.data.decode import BadSample
from dar_lightning.data.image_dataset import read_label
from dar_lightning.data.image_files import is_hidden, list_images
from dar_lightning.data.shards import IMAGE_TYPES, ShardIndex
from dar_lightning.errors import UserError, naming

SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
MAX_KEY = 80  # a tar header has room for 100 bytes, extension included; longer names take a header of their own
Span = tuple[str, tuple[tuple[str, int, int], ...]]  # file, ((extension, offset, size), ...): the image comes first


class Sample(NamedTuple):
    """An image that has not been read yet."""

    key: str  # in a shard
    name: str  # in the source, for people
    label: int  # -1: none
    size: int  # bytes of the encoded image; 0 where that is not known before it is read
    place: Any  # where the source's `read` finds it
    flaw: str = ""  # why it cannot be used, where the listing shows that
    captions: tuple[str, ...] = ()


def read_span(span: Span) -> tuple[bytes, dict[str, bytes]]:
    """Read an encoded image, and the sample's other members by extension; BadSample if the file has changed."""
    path, members = span
    try:
        with open(path, "rb", buffering=0) as file:
            contents = [os.pread(file.fileno(), size, offset) for _, offset, size in members]
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror}") from error
    if any(len(content) < size for content, (_, _, size) in zip(contents, members, strict=True)):
        raise BadSample("the file has become shorter")
    return contents[0], {members[i][0]: contents[i] for i in range(1, len(members))}


@dataclass(frozen=True)
class Source:
    """The images of one origin."""

    kind: str  # for people
    classes: tuple[str, ...]  # names in the order of the labels; empty where nobody knows them
    samples: list[Sample]
    read: Callable[[Any], tuple[bytes, dict[str, bytes]]] = read_span  # of a sample's place; runs in other processes
    ignored: tuple[str, ...] = ()  # files that are not named like images
    hidden: tuple[str, ...] = ()  # hidden and system files and folders, which are left out


def image_folder(path: Path, unlabelled: bool = False, field: str | None = None) -> Source:
    """A folder with a folder of images for each class, as torchvision's ImageFolder: sorted names give the labels.

    Hidden and system folders (`__MACOSX`, ...) are no classes. One that has no images stays one: see `check_classes`.
    Images of a folder without folders, and all if `unlabelled`, have no labels. Captions come from `.txt` and `.json`
    files of an image's name, and from the folder's metadata.csv or metadata.jsonl; `field` as in `data.captions`.
    """
    with naming("input", OSError):
        there = sorted(each.name for each in path.iterdir() if each.is_dir())
    table = read_table(path, field)
    classes = () if unlabelled else tuple(name for name in there if not is_hidden(name))
    splits = [name for name in classes if name.lower() in SPLIT_NAMES]
    # one among others may be a class: there are trains on photos, but hardly trains and tests
    if len(splits) > 1 or (splits and len(classes) == 1):
        raise UserError(f"input: {path} holds {', '.join(splits)}, which are no classes; give one of these folders")
    samples, ignored, hidden = [], [], [name for name in there if classes and is_hidden(name)]
    for label, name in enumerate(classes) if classes else [(-1, None)]:
        found, others, more = _list_samples(path, name, label, table, field)
        samples += found
        ignored += others
        hidden += more
    if not classes and not samples:
        raise UserError(f"input: {path} holds neither images or folders of them nor .tar files")
    if missing := sorted(table.keys() - {sample.name for sample in samples}):
        raise UserError(f"input: the metadata of {path} names {missing[0]!a}, which is no image there ({len(missing)})")
    return Source("image folder", classes, samples, ignored=tuple(ignored), hidden=tuple(hidden))


def _list_samples(
    root: Path, name: str | None, label: int, table: Mapping[str, list[str]], field: str | None
) -> tuple[list[Sample], list[str], list[str]]:
    """The images below the folder of a class, or the root; files that are neither images nor captions; hidden ones."""
    files = list_images(root / (name or ""))
    samples, beside = [], {file.relative_to(root).as_posix(): file for file in files.others}
    used = {*TABLES}
    for file in files.images:
        relative = file.relative_to(root)
        # n01440764/n01440764_10026.JPEG says its class already, orange/0001.jpg does not
        key = file.stem if name and file.stem.startswith(name) else "-".join(relative.with_suffix("").parts)
        captions, stem = table.get(relative.as_posix(), []), relative.with_suffix("").as_posix()
        try:
            status = file.stat()
            size, flaw = status.st_size, "" if stat.S_ISREG(status.st_mode) else "not a file"
            near = {end: f"{stem}.{end}" for end in ("json", "txt") if f"{stem}.{end}" in beside}
            members = {end: beside[other].read_bytes() for end, other in near.items()}
        except OSError as error:  # a link to nowhere
            size, flaw, near, members = 0, f"cannot be read: {error.strerror}", {}, {}
        if beside_it := read_captions(members, field):
            used |= {*near.values()}
        captions = captions or beside_it
        place = (str(file), (("", 0, size),))
        samples.append(Sample(key, relative.as_posix(), label, size, place, flaw, tuple(captions)))
    hidden = [file.relative_to(root).as_posix() for file in files.hidden]
    return samples, [other for other in beside if other not in used], hidden


def check_classes(source: Source) -> None:
    """Refuse a source with a class that has no images, which labels would count all the same."""
    used = {sample.label for sample in source.samples}
    empty = [name for label, name in enumerate(source.classes) if label not in used]
    if source.kind != "image folder" or not empty:
        return
    others = [name for name in source.ignored if name.startswith(f"{empty[0]}/")]
    holds = f"only files such as {others[0]!a}" if others else "nothing"
    more = f" ({len(empty)} such folders)" if len(empty) > 1 else ""
    raise UserError(
        f"input: {empty[0]} holds no images, {holds}{more}; remove it, convert its files, or name the classes that "
        "you want with classes"
    )


def shards(path: str) -> Source:
    """WebDataset shards, to be packed anew with all their members; what a damaged one has lost is listed as flawed."""
    index = ShardIndex.load(path, "input")
    samples, count = [], (len(index.classes) or None) if index.labelled else 0
    for shard in index.shards:
        contents = tar.read_headers(index.root / shard.name)
        for position in range(max(len(contents.samples), shard.samples)):
            label, size, place, flaw = -1, 0, None, contents.flaw(position)
            try:
                if not flaw:
                    file, members = str(index.root / shard.name), contents.samples[position].members
                    label, size, place = _locate(file, members, count)
            except BadSample as bad:
                flaw = str(bad)
            key = contents.name(position)
            samples.append(Sample(key, f"{shard.name}/{key}", label, size, place, flaw))
    return Source("shards", index.classes, samples)


def _locate(file: str, members: dict[str, tuple[int, int]], num_classes: int | None) -> tuple[int, int, Span]:
    """The label of a sample in a tar, its image's bytes, and its place; BadSample if it lacks one of them."""
    text = {"cls": read_span((file, (("cls", *members["cls"]),)))[0]} if "cls" in members else {}
    label = read_label(text, num_classes)
    image = next((extension for extension in IMAGE_TYPES if extension in members), None)
    if image is None:
        raise BadSample("no image")
    names = [image, *sorted(set(members) - {image, "cls", ""})]
    return label, members[image][1], (file, tuple((extension, *members[extension]) for extension in names))


def choose_classes(source: Source, wanted: str) -> Source:
    """Keep some classes, in a given order, which is that of the labels.

    `wanted` has their names separated by commas, or is a text file with a name per line.
    """
    is_file = os.path.isfile(wanted)  # Path.is_file raises on a list longer than a file name may be
    try:
        names = Path(wanted).read_text(encoding="utf-8").splitlines() if is_file else wanted.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"classes: {wanted} is no text file in UTF-8 ({error})") from error
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f"classes: {wanted!r} names no class")
    known = f"{', '.join(source.classes[:3])}, ... ({len(source.classes)})" if source.classes else "not named anywhere"
    if unknown := next((name for name in names if name not in source.classes), None):
        raise UserError(f"classes: {unknown!r} is neither a file nor one of the classes, which are {known}")
    if len(set(names)) < len(names):
        raise UserError(f"classes: {max(names, key=names.count)!r} is there twice")
    labels = {source.classes.index(name): new for new, name in enumerate(names)}
    # a sample without a usable label could be of any class: it stays, to be reported
    chosen = (sample for sample in source.samples if sample.flaw or sample.label in labels)
    samples = [sample if sample.flaw else sample._replace(label=labels[sample.label]) for sample in chosen]
    return replace(source, classes=tuple(names), samples=samples)


def with_safe_keys(samples: Iterable[Sample]) -> list[Sample]:
    """Give every sample a unique key of letters, digits, `_` and `-`; repeated ones get a number.

    webdataset ends a key at its first dot, and slashes would make folders when the tar is unpacked.
    """
    taken: set[str] = set()
    repeats: dict[str, int] = {}
    safe = []
    for sample in samples:
        key = word = re.sub(r"[^A-Za-z0-9_-]+", "_", sample.key)[:MAX_KEY]
        while key in taken:
            repeats[word] = repeats.get(word, 1) + 1
            key = f"{word}-{repeats[word]}"
        taken.add(key)
        safe.append(sample._replace(key=key))
    return safe
