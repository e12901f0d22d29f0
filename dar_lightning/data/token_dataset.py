"""Token shards: the file format of `dar extract`, and the dataset that reads it.

A folder holds one safetensors file per image shard: `codes` (n, crops, N) uint16, or uint32 for codebooks above
65,536, `labels` (n,) int64, -1 where there are none, and in the header the samples' keys, their captions, if there are
any, the samples that could not be used, and what the tokens were made from. Features of captions (`dar extract
--encoder`) lie beside: `features` (T, d) float16, the tokens of all captions in turn, and `ends` (captions,) int64,
where each one ends. Its `index.json` names the tokenizer by its SHA-256, and says which crop lies at each position.
Tokens are read by memory mapping: ImageNet with ten crops of 256 tokens is 6.6 GB and need not fit in memory.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import Dataset

from dar_lightning.data.sampler import Ticket, sample_generator
from dar_lightning.data.shards import INDEX, VERSION, Shard, data_sha256, read_index
from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path, file_sha256, write_json

OPTIONAL = {"crop_names", "skipped", "labelled", "captioned", "encoder"}  # of an index
HEADER = "dar_codes"  # one entry only: safetensors does not keep the order of several


@dataclass(frozen=True)
class CodesIndex:
    """What a folder of token shards holds."""

    root: Path
    tokenizer: str  # its SHA-256 (`dar_lightning.formats.model_sha256.model_sha256`)
    tokenizer_config: dict[str, Any]
    crops: str  # the views of each image that were tokenized (`center`, `center_flip`, `ten_crop`, `random`)
    num_crops: int  # their number
    image_size: int  # their side, in pixels
    num_tokens: int  # per crop, N
    codebook_size: int  # tokens are below it
    classes: tuple[str, ...]  # names in the order of the labels, as in the image shards' index
    shards: tuple[Shard, ...]
    crop_names: tuple[str, ...] = ()  # what each position of the crops' axis is
    skipped: tuple[str, ...] = ()  # samples of the image shards that are in no token shard: `SHARD/KEY: reason`
    labelled: bool = True  # False: labels are -1
    captioned: bool = False  # every image has one caption or more
    encoder: dict[str, Any] | None = None  # of the captions' features: name, sha256, channels, length (tokens, at most)

    @property
    def num_samples(self) -> int:
        """Images in all token shards."""
        return sum(shard.samples for shard in self.shards)

    def save(self) -> None:
        """Write `index.json` into the folder, atomically."""
        content = {"version": VERSION, "samples": self.num_samples, **asdict(self)}
        del content["root"]
        for name, usual in (("labelled", True), ("captioned", False), ("encoder", None)):
            if content[name] == usual:  # as versions write it that know no captions
                del content[name]
        write_json(self.root / INDEX, content, indent=1)

    @classmethod
    def load(cls, folder: str | Path, option: str = "codes", complete: bool = True) -> "CodesIndex":
        """Read a folder of token shards, the value of `option`; a UserError if it is none, or not `complete`."""
        root = Path(folder)
        if not (root / INDEX).is_file():
            raise UserError(f"{option}: {root / INDEX} does not exist; the end of `dar extract` writes it")
        names = {field.name for field in fields(cls)} - {"root", "shards"}
        content, shards = read_index(root, option, tuple(names - OPTIONAL))
        for shard in shards if complete else ():
            path = root / shard.name
            size = path.stat().st_size if path.is_file() else "no"
            if size != shard.bytes:
                raise UserError(f"{option}: {path} has {size} bytes, {INDEX} says {shard.bytes}; copy it again")
        content = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        return cls(root=root, shards=shards, **{name: content[name] for name in names & content.keys()})

    def check_labels(self, num_classes: int) -> None:
        """A UserError for a label that is no class of a model: the one after the last would mean "no class"."""
        for path in (self.root / shard.name for shard in self.shards):
            _, _, labels, _ = _open_shard(path)
            wrong = labels[(labels < 0) | (labels >= num_classes)]
            if len(wrong):
                raise UserError(f"{path} has label {wrong[0]}: the model's num_classes is {num_classes}")


def write_codes(
    path: Path,
    codes: np.ndarray,
    labels: np.ndarray,
    keys: list[str],
    made_by: dict,
    skipped: Sequence[str] = (),
    captions: list[list[str]] | None = None,
    features: list[np.ndarray] | None = None,
) -> None:
    """Write one token shard, atomically: codes (n, crops, N) uint16 or uint32, labels (n,) int64, n keys.

    By `made_by`, what the tokens depend on, a later run knows its own files; `skipped` are lines of bad samples;
    `captions` are those of each image, `features` (tokens, d) float16 of each caption in turn.
    """
    header = {"made_by": made_by, "samples": len(keys), "keys": keys, "skipped": list(skipped)}
    header |= {} if captions is None else {"captions": captions}
    tensors = {"codes": np.ascontiguousarray(codes), "labels": labels}
    if features:
        tensors["features"] = np.concatenate(features)
        tensors["ends"] = np.cumsum([len(each) for each in features])
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={HEADER: json.dumps(header)})


def read_header(path: Path) -> dict[str, Any]:
    """What `write_codes` put in a token shard's header: `made_by`, `samples`, `keys`, `skipped`, perhaps `captions`."""
    return _open_shard(path)[0]


def _open_shard(path: Path) -> tuple[dict[str, Any], Any, np.ndarray, Any]:
    """Header, codes (n, crops, N), which are read when they are indexed, labels (n,), and the open file of a shard."""
    try:
        path.open("rb").close()  # safe_open calls any file missing that it cannot open
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    try:
        file = safe_open(path, framework="numpy")
        header = json.loads(file.metadata()[HEADER])
        optional = {"captions": header["captions"]} if "captions" in header else {}
        header = {name: header[name] for name in ("made_by", "samples", "keys", "skipped")} | optional
        return header, file.get_slice("codes"), file.get_tensor("labels"), file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or not a token shard ({error}); delete it and extract it again") from error


def describe(path: Path, samples: int) -> Shard:
    """The index entry of a token shard."""
    return Shard(path.name, samples, path.stat().st_size, file_sha256(path))


class CodesDataset(Dataset):
    """One crop of each image, as tokens, and one caption; which is a function of (seed, epoch, sample), or the first.

    Items of token shards with captions have `caption`, and with features of them `features` (length, d) float16, padded
    at the left with zeros.
    """

    def __init__(self, index: CodesIndex, seed: int, random_crop: bool) -> None:
        self.index, self.seed, self.random_crop = index, seed, random_crop
        self.data_sha256 = data_sha256(index.shards)
        self.sizes = [shard.samples for shard in index.shards]
        self.ends = np.cumsum(self.sizes)  # (shards,)
        self._open: dict[int, tuple[Any, np.ndarray, list[str], Captions | None]] = {}

    def __len__(self) -> int:
        return self.index.num_samples

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # a worker maps its own files

    def __getitem__(self, ticket: Ticket | int) -> dict:
        ticket = Ticket(ticket) if isinstance(ticket, int) else ticket
        which = int(np.searchsorted(self.ends, ticket.index, side="right"))
        if which not in self._open:
            self._open[which] = self._checked(self.index.shards[which])
        codes, labels, keys, captions = self._open[which]
        row = ticket.index - int(self.ends[which]) + len(keys)
        crop, generator = 0, None
        if self.random_crop:
            generator = sample_generator(self.seed, ticket.epoch, ticket.index)
            crop = int(generator.integers(self.index.num_crops))
        tokens = codes[row, crop].astype(np.int64)  # (N,)
        if tokens.max() >= self.index.codebook_size:
            path, size = self.index.root / self.index.shards[which].name, self.index.codebook_size
            raise UserError(f"{path} is damaged: it has token {tokens.max()}, the codebook {size}; extract it again")
        return {
            "codes": torch.from_numpy(tokens),
            "label": int(labels[row]),
            "crop": crop,
            "key": keys[row],
            "index": ticket.index,
            "valid": ticket.valid,
        } | ({} if captions is None else captions.item(row, generator))

    def _checked(self, shard: Shard) -> tuple[Any, np.ndarray, list[str], "Captions | None"]:
        """Codes, labels, keys and captions of a shard that is what the index says."""
        path = self.index.root / shard.name
        header, codes, labels, file = _open_shard(path)
        keys, tokenizer = header["keys"], header["made_by"].get("tokenizer", self.index.tokenizer)
        if tokenizer != self.index.tokenizer:
            raise UserError(f"{path} is of tokenizer {tokenizer[:12]}, {INDEX} of {self.index.tokenizer[:12]}")
        wanted = [shard.samples, self.index.num_crops, self.index.num_tokens]
        if codes.get_shape() != wanted or len(keys) != shard.samples:
            raise UserError(f"{path} holds codes of shape {codes.get_shape()}, its {INDEX} says {wanted}")
        captions = Captions(header, file, path, self.index.encoder) if self.index.captioned else None
        return codes, labels, keys, captions


class Captions:
    """The captions of a token shard, and their features, of which one caption's are read at a time."""

    def __init__(self, header: dict[str, Any], file: Any, path: Path, encoder: dict[str, Any] | None) -> None:
        self.texts, self.encoder = header.get("captions", []), encoder
        counts = [len(texts) for texts in self.texts]
        if len(counts) != header["samples"] or 0 in counts:
            raise UserError(f"{path} has not a caption for each image, as its {INDEX} says; extract it again")
        self.first = np.cumsum([0, *counts])  # of each image, among all captions of the shard
        if encoder is not None:
            found = header["made_by"].get("encoder") or {}
            if found.get("sha256") != encoder["sha256"]:
                raise UserError(f"{path} holds features of another encoder than its {INDEX} says; extract it again")
            self.features, self.ends = file.get_slice("features"), file.get_tensor("ends")

    def item(self, row: int, generator: np.random.Generator | None) -> dict[str, Any]:
        """A caption of an image, drawn, or the first; with its features."""
        texts = self.texts[row]
        number = 0 if generator is None else int(generator.integers(len(texts)))
        item = {"caption": texts[number]}
        if self.encoder is not None:
            place = int(self.first[row]) + number
            start, end = int(self.ends[place - 1]) if place else 0, int(self.ends[place])
            features = torch.from_numpy(self.features[start:end])
            item["features"] = F.pad(features, (0, 0, self.encoder["length"] - len(features), 0))
        return item
