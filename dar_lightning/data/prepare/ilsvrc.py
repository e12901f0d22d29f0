"""The ILSVRC2012 archives as they are distributed, read in place: nothing is unpacked.

Labels are positions in the sorted WordNet IDs (n01440764 is 0), as in every published checkpoint. The numbers in the
devkit's ground truth are others: ILSVRC2012_IDs, 1 to 1000, which its `meta.mat` translates to WordNet IDs.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from dar_lightning.data.prepare.sources import Sample, Source
from dar_lightning.data.tar import Walk
from dar_lightning.errors import UserError, naming, require

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
VAL_NAME = re.compile(r"ILSVRC2012_val_\d+\.")


def first_names(path: Path, count: int = 10) -> list[str]:
    """Names of the first files in a tar, damaged or not, to tell what it is."""
    with naming("input", OSError), path.open("rb") as file:
        members = Walk(file)
        return [member.name for member in islice((each for each in members if each.isreg()), count)]


def train_archive(path: Path) -> Source:
    """ILSVRC2012_img_train.tar: a tar of one tar of images per class, named by its WordNet ID."""
    tars = {Path(member.name).stem: member for member in _members(path)}
    samples = []
    for label, (wnid, outer) in enumerate(sorted(tars.items())):
        if not outer.name.endswith(".tar"):
            raise UserError(f"input: {path} holds {outer.name} among its class tars; give the archive as distributed")
        for image in _members(path, outer.offset_data, outer.offset_data + outer.size):
            samples.append(_sample(path, image, f"{wnid}/{Path(image.name).name}", label))
    return Source("ILSVRC training archive", tuple(sorted(tars)), samples)


def val_archive(path: Path, labels: str | None) -> Source:
    """ILSVRC2012_img_val.tar: images numbered from 1, whose classes are in the devkit (its .tar.gz or its folder).

    `labels` may also be its ground truth beside a `meta.mat`, or a text file with a WordNet ID per image. Left out, the
    devkit's archive is looked for beside the images'.
    """
    truth_file = Path(labels) if labels is not None else path.with_name(DEVKIT)
    require(truth_file.exists(), f"labels: {truth_file} does not exist; the validation images need {DEVKIT}")
    truth, classes = read_truth(truth_file)
    position = {wnid: label for label, wnid in enumerate(classes)}
    images = list(_members(path))
    if len(images) != len(truth):
        raise UserError(f"labels: {truth_file} has {len(truth)} labels, {path} holds {len(images)} images")
    samples = []
    for image in images:
        number = re.search(r"_(\d+)\.", Path(image.name).name)
        if number is None or not 1 <= int(number[1]) <= len(truth):
            raise UserError(f"input: {path} holds {image.name}, which is no ILSVRC2012_val_00000001.JPEG or the like")
        samples.append(_sample(path, image, Path(image.name).name, position[truth[int(number[1]) - 1]]))
    return Source("ILSVRC validation archive", classes, samples)


def read_truth(path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Read the labels that `val_archive` takes: the WordNet ID of each validation image, and all of them, sorted."""
    try:
        if path.name.endswith((".tar.gz", ".tgz")):
            with tarfile.open(path, "r:gz") as tar:
                files = [member for member in tar if member.isreg() and Path(member.name).name in (TRUTH, META)]
                contents = {Path(file.name).name: tar.extractfile(file).read() for file in files}
        elif path.is_dir():
            contents = {file.name: file.read_bytes() for file in path.rglob("*") if file.name in (TRUTH, META)}
        else:
            meta = path.with_name(META)
            contents = {TRUTH: path.read_bytes()} | ({META: meta.read_bytes()} if meta.is_file() else {})
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"labels: {path} is not the devkit's archive, or cannot be read ({error})") from error
    require(TRUTH in contents, f"labels: {path} has no {TRUTH}")
    words = contents[TRUTH].decode(errors="replace").split()
    if words and all(re.fullmatch(r"n\d{8}", word) for word in words):
        return words, tuple(sorted(set(words)))
    if META not in contents:
        raise UserError(f"labels: {path} has no WordNet IDs, and {META} of the devkit, which has them, is not with it")
    wnids = read_meta(contents[META], path)
    unknown = [word for word in words if word not in wnids]
    if unknown or not words:
        raise UserError(f"labels: {path} has label {(unknown or [''])[0]!r}, {META} knows 1 to {len(wnids)}")
    return [wnids[word] for word in words], tuple(sorted(wnids.values()))


def read_meta(content: bytes, path: Path) -> dict[str, str]:
    """The devkit's `meta.mat`: ILSVRC2012_ID, as it stands in the ground truth -> WordNet ID, of the 1,000 classes."""
    try:
        from scipy.io.matlab import MatReadError, loadmat
    except ImportError as error:
        raise UserError(f"labels: reading {META} needs scipy: pip install 'dar-lightning[imagenet]'") from error
    try:
        synsets = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        rows = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"], strict=True)
        return {str(int(number)): str(wnid) for number, wnid, children in rows if children == 0}  # no inner nodes
    except (MatReadError, zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"labels: the {META} of {path} is not the devkit's") from error


def _members(path: Path, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The files of the tar that lies at `start` of a file; their `offset_data` counts from the file's beginning."""
    end = path.stat().st_size if end is None else end
    try:
        # unbuffered: only headers are read, and they lie far apart
        with naming("input", OSError), path.open("rb", buffering=0) as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset_data + member.size > end:
                        raise UserError(f"input: {path} is cut short in {member.name}; download it again")
                    if member.isreg():
                        yield member
            # tarfile takes a header that is missing or broken for the end, which really is a block of zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"input: {path} is cut short at byte {tar.offset}; download it again")
    except tarfile.TarError as error:
        raise UserError(f"input: {path} is not a readable tar file ({error}); download it again") from error


def _sample(path: Path, image: tarfile.TarInfo, name: str, label: int) -> Sample:
    return Sample(Path(name).stem, name, label, image.size, (str(path), (("", image.offset_data, image.size),)))
