"""The samples of one tar file, found by its headers alone, in whatever state the file is.

Members are only ever read at their offsets: nothing is extracted, so no name can lead anywhere.
"""

import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

REPEATED = "its key is in the shard twice"
LONGEST_NAME = 4096  # bytes, as in a path of Linux
LOOK = 2**20  # bytes behind the last member that must be zero; tar programs write up to 10 KB


class Sample(NamedTuple):
    """One sample of a tar.

    Args:
        key: What its members' names share.
        members: Where they lie: {lower-case extension: (offset, size)}.
        flaw: Why it cannot be used, or "".
    """

    key: str
    members: dict[str, tuple[int, int]]
    flaw: str = ""


class Contents(NamedTuple):
    """What a tar holds: its samples in order of appearance, repeated keys last; and what is wrong with it, or "".

    Of a file with damage, samples may be lost.
    """

    samples: list[Sample]
    damage: str = ""

    def name(self, position: int) -> str:
        """What to call a sample in a log; one that is lost has no key, only a number."""
        key = self.samples[position].key if position < len(self.samples) else f"#{position}"
        return key if key.isprintable() else ascii(key)

    def flaw(self, position: int) -> str:
        """Why a sample cannot be used, or "" where the headers are in order."""
        if position < len(self.samples):
            return self.samples[position].flaw
        return self.damage or f"the tar holds {len(self.samples)} samples only"


def read_headers(path: Path) -> Contents:
    """List the samples of an uncompressed tar.

    Of two samples with one key, the first counts: a member whose name was there already begins another one, which is
    bad. Behind a damaged header, the search goes on at the next one.

    Args:
        path: The file, which may be missing or anything else.
    """
    samples: list[Sample] = []
    latest: dict[str, int] = {}  # key -> position of its last sample
    damage = ""
    if not path.is_file():
        return Contents([], "it is not a file" if path.exists() else "the file is missing")
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:", ignore_zeros=True) as tar:
            end = 0  # of the members so far: the place of the next header
            for member in tar:
                if tar.offset < member.offset_data:
                    raise tarfile.ReadError("a member of negative size")  # and tarfile would go round in circles
                if member.offset > end and not _is_header(tar.fileobj, end):
                    damage = f"a header is damaged at byte {end}"
                end = tar.offset
                key, extension = _split(member.name)
                flaw = _flaw(member, size)
                if member.isdir() or (key == "" and not flaw):
                    continue
                key = key or member.name[:LONGEST_NAME]
                position = latest.get(key)
                if position is None or extension in samples[position].members:
                    flaw = flaw or ("" if position is None else REPEATED)
                    position = latest[key] = len(samples)
                    samples.append(Sample(key, {}, flaw))
                samples[position].members[extension] = (member.offset_data, member.size)
                if flaw and not samples[position].flaw:
                    samples[position] = samples[position]._replace(flaw=flaw)
            if not _has_end(tar.fileobj, end):
                damage = "the tar file breaks off" if end else "not an uncompressed tar file"
    except OSError as error:
        damage = f"the file cannot be read ({error.strerror})"
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        damage = f"the tar file breaks off ({error})" if samples else f"not an uncompressed tar file ({error})"
    # an index may count the repeated ones or not: the others keep their numbers
    samples.sort(key=lambda sample: sample.flaw == REPEATED)
    return Contents(samples, damage)


def _split(name: str) -> tuple[str, str]:
    """Key and extension, as webdataset has them: cut at the first dot of the file's name; no key, no sample."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem if stem and dot else "", extension.lower())


def _flaw(member: tarfile.TarInfo, size: int) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the shard"
    if len(member.name) > LONGEST_NAME:
        return "its name is too long"
    if not member.isreg():
        return "it is a link or a device, not a file"
    if member.offset_data + member.size > size:
        return "the tar file ends inside of it"
    return ""


def _is_header(file: BinaryIO, offset: int) -> bool:
    """Whether there is a block that tarfile rightly skips: a header of all files, or one of zeros."""
    file.seek(offset)
    try:
        tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as error:
        return isinstance(error, tarfile.EOFHeaderError)
    return True


def _has_end(file: BinaryIO, offset: int) -> bool:
    """Whether a tar ends there, with zeros, as all do."""
    file.seek(offset)
    content = file.read(LOOK)
    return len(content) >= tarfile.BLOCKSIZE and content.count(0) == len(content)
