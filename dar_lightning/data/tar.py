"""The samples of a tar file and the offsets of their members, also of a tar that is cut or damaged.

`tarfile` reads the headers; this adds where one is damaged, and how to go on behind it. Nothing is extracted, so no
name can lead anywhere.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dar_lightning.errors import UserError

REPEATED = "its key is in the shard twice"
LONGEST_NAME = 4096  # bytes, as in a path of Linux
BLOCK = tarfile.BLOCKSIZE
LOOK = 2**20  # bytes that must hold a header at the start, and be zero behind the last member
MAX_EXTENDED = 2**20  # bytes of a header that is not of a file; names take a few dozen
MAGIC = b"ustar"  # in the headers of every tar since 1988


class Sample(NamedTuple):
    """One sample of a tar."""

    key: str  # what its members' names share
    members: dict[str, tuple[int, int]]  # lower-case extension -> offset and size
    flaw: str = ""  # why it cannot be used


class Contents(NamedTuple):
    """What a tar holds."""

    samples: list[Sample]  # in order of appearance, repeated keys last
    damage: str = ""  # what is wrong with the file; samples may be lost then

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
    """List the samples of an uncompressed tar, which may be missing or anything else.

    Of two samples with one key, the first counts: a member whose name was there already begins another one, which is
    bad. If the tar cannot be read now, that is a UserError and no damage: samples would be lost.
    """
    if not path.is_file():
        return Contents([], "it is not a file" if path.exists() else "the file is missing")
    samples: list[Sample] = []
    latest: dict[str, int] = {}  # key -> position of its last sample
    try:
        with path.open("rb") as file:
            walk, size = Walk(file), path.stat().st_size
            for member in walk:
                # as webdataset has them: cut at the first dot of the file's name; no key, no sample
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                key, flaw = folder + slash + stem if stem and dot else "", _flaw(member, size)
                if member.isdir() or not (key or flaw):
                    continue
                key, extension = (key or member.name)[:LONGEST_NAME], extension.lower()
                position = latest.get(key)
                if position is None or extension in samples[position].members:
                    flaw = flaw or ("" if position is None else REPEATED)
                    position = latest[key] = len(samples)
                    samples.append(Sample(key, {}))
                samples[position].members[extension] = (member.offset_data, member.size)
                if flaw and not samples[position].flaw:
                    samples[position] = samples[position]._replace(flaw=flaw)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    # an index may count the repeated ones or not: the others keep their numbers
    samples.sort(key=lambda sample: sample.flaw == REPEATED)
    return Contents(samples, walk.damage)


def _flaw(member: tarfile.TarInfo, size: int) -> str:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the shard"
    if len(member.name) > LONGEST_NAME:
        return "its name is too long"
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        return "it is a link, a device or a sparse file, not a plain one"
    return "the tar file ends inside of it" if member.offset_data + member.size > size else ""


class Walk:
    """The members of a tar open for reading, in order; behind a damaged header, it goes on at the next one."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.damage = ""  # what is wrong with the tar, once the walk is over

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        start = self.file.read(LOOK)
        if MAGIC not in start and (start.strip(b"\0") or not start):  # do not search the whole of something else
            self.damage = "not an uncompressed tar file"
            return
        self.file.seek(0)
        tar, end = _Tar(fileobj=self.file, mode="r", ignore_zeros=True), 0
        for member in tar:
            yield member
            end = tar.offset
        self.file.seek(end)
        rest = self.file.read(LOOK)
        if tar.damaged is not None:
            self.damage = f"a header is damaged at byte {tar.damaged}"
        elif len(rest) < BLOCK or rest.strip(b"\0"):  # all tars end with zeros
            self.damage = "the tar file breaks off"


class _Header(tarfile.TarInfo):
    """A header of a sane size; where one is damaged, the tar takes note."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.size > MAX_EXTENDED and not header.isreg()):
            raise tarfile.InvalidHeaderError("impossible size")
        return header

    @classmethod
    def fromtarfile(cls, tar: "_Tar") -> "_Header":
        place = tar.fileobj.tell()
        try:
            return super().fromtarfile(tar)
        except tarfile.InvalidHeaderError:
            tar.damaged = place if tar.damaged is None else tar.damaged
            raise


class _Tar(tarfile.TarFile):
    """`tarfile` goes on behind a damaged header, but gives up behind one that follows an extended header."""

    tarinfo = _Header
    damaged: int | None = None  # byte at which the first damaged header begins

    def next(self) -> tarfile.TarInfo | None:
        while True:
            try:
                member = super().next()
                if member is None or self.offset > member.offset:
                    return member
            except (tarfile.ReadError, ValueError) as error:  # the latter of a number in an extended header
                if "end of data" in str(error):
                    return None
            self.damaged = self.offset if self.damaged is None else self.damaged
            self.offset += BLOCK
