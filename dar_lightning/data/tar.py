"""The samples of one tar file, found by its headers alone, in whatever state the file is.

Members are only ever read at their offsets: nothing is extracted, so no name can lead anywhere.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

REPEATED = "its key is in the shard twice"
LONGEST_NAME = 4096  # bytes, as in a path of Linux
BLOCK = tarfile.BLOCKSIZE
LOOK = 2**20  # bytes behind the last member that must be zero; tar programs write up to 10 KB
MAX_EXTENDED = 2**20  # bytes; names take a few dozen
MAGIC, MAGIC_AT = b"ustar", 257  # in the headers of every tar since 1988
EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


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

    Raises:
        OSError: It is there and cannot be read.
    """
    if not path.is_file():
        return Contents([], "it is not a file" if path.exists() else "the file is missing")
    samples: list[Sample] = []
    latest: dict[str, int] = {}  # key -> position of its last sample
    with path.open("rb") as file:
        walk = Walk(file, path.stat().st_size)
        for member in walk:
            key, extension = _split(member.name)
            flaw = _flaw(member, walk.size)
            if member.isdir() or (key == "" and not flaw):
                continue
            key = (key or member.name)[:LONGEST_NAME]
            position = latest.get(key)
            if position is None or extension in samples[position].members:
                flaw = flaw or ("" if position is None else REPEATED)
                position = latest[key] = len(samples)
                samples.append(Sample(key, {}, flaw))
            samples[position].members[extension] = (member.offset_data, member.size)
            if flaw and not samples[position].flaw:
                samples[position] = samples[position]._replace(flaw=flaw)
    # an index may count the repeated ones or not: the others keep their numbers
    samples.sort(key=lambda sample: sample.flaw == REPEATED)
    return Contents(samples, walk.damage)


class Walk:
    """The members of a tar, one header after the other.

    `tarfile` does the same, but gives up where one of the two headers of a member is damaged that webdataset writes.

    Args:
        file: The tar, open for reading.
        size: Its bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.damage = ""  # what is wrong with the tar, once the walk is over

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        place, end = 0, 0  # of the next header; behind the last member
        said: dict[str, str] = {}  # by extended headers, of the next member
        while place + BLOCK <= self.size:
            block = self._read(place, BLOCK)
            try:
                member = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
                member.offset, member.offset_data = place, place + BLOCK
                if member.type in EXTENDED:
                    said |= self._extended(member)
                    place = end = member.offset_data + _padded(member.size)
                    continue
                member.name = said.get("path", member.name)
                member.size = int(said.get("size", member.size))
                if member.size < 0:
                    raise tarfile.InvalidHeaderError("negative size")
            except tarfile.EOFHeaderError:  # zeros: the end, or the seam of two tars that were joined
                place, said = place + BLOCK, {}
                continue
            except (tarfile.HeaderError, ValueError):
                self.damage = f"a header is damaged at byte {place}"
                place, said = self._next_header(place + BLOCK), {}
                continue
            yield member
            said = {}
            has_content = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
            end = member.offset_data + (_padded(member.size) if has_content else 0)
            place = end
            if end > self.size and (place := self._next_header(member.offset_data)) < self.size:
                self.damage = f"a header is damaged at byte {member.offset}"  # or else the file breaks off
        if not self._ends_with_zeros(end):
            self.damage = (self.damage or "the tar file breaks off") if end else "not an uncompressed tar file"

    def _read(self, place: int, length: int) -> bytes:
        self.file.seek(place)
        return self.file.read(length)

    def _extended(self, member: tarfile.TarInfo) -> dict[str, str]:
        """What an extended header says of the member behind it: its `path` or `size`."""
        if not 0 <= member.size <= MAX_EXTENDED or member.offset_data + member.size > self.size:
            raise tarfile.InvalidHeaderError("an extended header of impossible size")
        content = self._read(member.offset_data, member.size)
        if member.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": _decode(content.partition(b"\0")[0])}
        if member.type not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            return {}  # of all members, or of a link's target
        said, place = {}, 0
        while place < len(content):  # "LENGTH NAME=VALUE\n"
            digits, _, _ = content[place : place + 20].partition(b" ")
            length = int(digits)  # a ValueError is a damaged header, too
            name, equals, value = content[place + len(digits) + 1 : place + length - 1].partition(b"=")
            if length <= len(digits) or not equals:
                raise tarfile.InvalidHeaderError("an extended header with a damaged record")
            if name in (b"path", b"size"):
                said[name.decode()] = _decode(value)
            place += length
        return said

    def _next_header(self, place: int) -> int:
        """Where the next block is that says of itself that it is a header; the end of the file if none does."""
        while chunk := self._read(place, LOOK):
            for start in range(0, len(chunk), BLOCK):
                if chunk[start + MAGIC_AT : start + MAGIC_AT + len(MAGIC)] == MAGIC:
                    return place + start
            place += len(chunk)
        return self.size

    def _ends_with_zeros(self, place: int) -> bool:
        """As all tars do."""
        content = self._read(place, LOOK) if place < self.size else b""
        return len(content) >= BLOCK and content.count(0) == len(content)


def _padded(size: int) -> int:
    """What a member of this size takes, in whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _decode(name: bytes) -> str:
    return name.decode(tarfile.ENCODING, "surrogateescape")


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
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        return "it is a link, a device or a sparse file, not a plain one"
    if member.offset_data + member.size > size:
        return "the tar file ends inside of it"
    return ""
