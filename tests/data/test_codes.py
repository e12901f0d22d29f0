"""`dar extract` against tokenizing by hand, and the tokens' way into batches."""

import json
import os
import shutil
import tarfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recorder import fit
from refusals import refused
from safetensors.numpy import load_file
from tiny_models import make_tokenizer
from tiny_shards import CLASSES, SIZES, picture, sample, write_set

from dar_lightning import SequentialDiffusionTokenizer, TokenizerConfig
from dar_lightning.commands.extract import extract
from dar_lightning.data import extraction, transforms
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.data.token_dataset import CodesIndex, read_header
from dar_lightning.errors import UserError
from dar_lightning.files import locked
from dar_lightning.formats.model_sha256 import model_sha256

SIZE, TOKENS, CODEBOOK = 32, 8, 300
FILES = [f"00000{i}.safetensors" for i in range(3)]


@cache
def tokenizer(seed: int = 0) -> SequentialDiffusionTokenizer:
    return make_tokenizer(seed, codebook_size=CODEBOOK)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> Path:
    """Two tokenizers on disk."""
    root = tmp_path_factory.mktemp("tokenizers")
    for seed in (0, 1):
        tokenizer(seed).save_pretrained(root / str(seed))
    return root


def run(tokenizers: Path, shards, output, which: str = "0", **options) -> None:
    extract(str(tokenizers / which), str(shards), str(output), accelerator="cpu", devices=1, **options)


@pytest.fixture(scope="module")
def ten(tokenizers, shards, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("codes") / "ten"
    run(tokenizers, shards, output, crops="ten_crop", batch_size=40)
    return output


@pytest.fixture
def copy(ten, tmp_path) -> Path:
    return shutil.copytree(ten, tmp_path / "copy")


def by_hand(images: list[Image.Image]) -> np.ndarray:
    pixels = torch.stack([transforms.to_tensor(image) for image in images]).float() / 127.5 - 1
    return tokenizer().tokenize(pixels).numpy()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def codes_of(folder: Path) -> np.ndarray:
    """(26, crops, N)"""
    return np.concatenate([load_file(folder / name)["codes"] for name in FILES])


def seen(data: CodesDataModule) -> list:
    data.setup("fit")
    return list(data.train_dataloader())


def test_ten_crop_is_what_the_tokenizer_says(ten):
    assert sorted(contents(ten)) == [*FILES, "index.json", "provenance.json"]
    index, print_ = CodesIndex.load(ten), model_sha256(tokenizer())
    assert (index.num_samples, index.num_crops, index.classes, index.tokenizer) == (26, 10, CLASSES, print_)
    assert index.crop_names[:2] == ("top left", "top right")
    assert index.crop_names[5:7] == ("top left of the mirrored image", "top right of the mirrored image")
    crops = [[transforms.ten_crop(picture(number), SIZE, crop) for crop in range(10)] for number in range(26)]
    assert np.array_equal(codes_of(ten), [by_hand(images) for images in crops])
    assert len(np.unique(codes_of(ten))) > 20  # the comparison above is not of constants
    for name, size, first in zip(FILES, SIZES, np.cumsum([0, *SIZES]), strict=False):
        tensors, header = load_file(ten / name), read_header(ten / name)
        assert tensors["labels"].tolist() == [number % len(CLASSES) for number in range(first, first + size)]
        made_by = header.pop("made_by")
        keys = [f"photo-{number:03d}" for number in range(first, first + size)]
        assert header == {"samples": size, "keys": keys, "skipped": []}
        assert (made_by["tokenizer"], tuple(made_by["crop_names"])) == (print_, index.crop_names)
        assert TokenizerConfig(**made_by["tokenizer_config"]) == tokenizer().config
        assert made_by["source"]["name"] == name.replace("safetensors", "tar")
        # 2 bytes per token and 8 per label: ImageNet's 1,281,167 images x 10 crops x 256 tokens are 6.57 GB
        before = 8 + int.from_bytes((ten / name).read_bytes()[:8], "little")
        assert (ten / name).stat().st_size - before == size * (10 * TOKENS * 2 + 8)


def test_batches_and_memory_have_a_limit(tokenizers, shards, ten, tmp_path, monkeypatch):
    """No forward pass has more crops than asked, although an image has ten; and no more than a shard is held."""
    passes, tokenize, write = [], SequentialDiffusionTokenizer.tokenize, extraction.write_codes

    def counted(self, images):
        passes.append(len(images))
        return tokenize(self, images)

    def watched(path, *arguments):
        passes.append(path.name)
        write(path, *arguments)

    monkeypatch.setattr(SequentialDiffusionTokenizer, "tokenize", counted)
    monkeypatch.setattr(extraction, "write_codes", watched)
    run(tokenizers, shards, tmp_path, batch_size=4)
    assert passes == [each for name, size in zip(FILES, SIZES, strict=True) for each in [*size * [4, 4, 2], name]]
    assert np.array_equal(codes_of(tmp_path), codes_of(ten))


def test_other_crops(tokenizers, shards, tmp_path):
    run(tokenizers, shards, tmp_path / "flip", crops="center_flip", batch_size=7, num_workers=1)
    center = transforms.center_crop(picture(12), SIZE)
    both = by_hand([center, Image.fromarray(np.array(center)[:, ::-1])])
    assert np.array_equal(codes_of(tmp_path / "flip")[12], both)
    for name, seed, batch_size in (("a", 0, 3), ("b", 0, 30), ("c", 1, 30)):
        run(tokenizers, shards, tmp_path / name, crops="random", random_crops=3, seed=seed, batch_size=batch_size)
    a, b, c = (codes_of(tmp_path / name) for name in "abc")
    assert a.shape == (26, 3, TOKENS)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_large_codebooks_take_32_bits(shards, tmp_path):
    make_tokenizer(0, codebook_size=70_000).save_pretrained(tmp_path / "0")
    run(tmp_path, f"{shards}/000002.tar", tmp_path / "codes", crops="center")
    codes = load_file(tmp_path / "codes" / "000002.safetensors")["codes"]
    assert codes.dtype == np.uint32
    assert codes.max() > 2**16


def test_interrupted_extraction_goes_on(tokenizers, shards, ten, copy, capsys):
    """Not while another process writes there, whose unfinished files stay."""
    part = copy / ".000001.safetensors.7.part"
    part.touch()
    (copy / "index.json").unlink()
    (copy / "000001.safetensors").unlink()
    kept = (copy / "000000.safetensors").stat().st_mtime_ns
    with (
        locked(copy, "output"),
        pytest.raises(UserError, match=r"^output: another process is writing to .*/copy; wait for it or choose anoth"),
    ):
        run(tokenizers, shards, copy)
    assert part.exists()
    run(tokenizers, shards, copy)
    assert not part.exists()
    assert contents(copy) == contents(ten)
    assert (copy / "000000.safetensors").stat().st_mtime_ns == kept
    capsys.readouterr()
    run(tokenizers, shards, copy)
    assert "is complete: 26 images x 10 crops x 8 tokens" in capsys.readouterr().out


def test_output_of_something_else_is_refused(tokenizers, shards, ten, tmp_path):
    (tmp_path / "file").touch()
    for source, output, options, message in (
        (shards, ten, {"which": "1"}, "was made with tokenizer"),
        (shards, ten, {"crops": "center"}, "was made with crops ten_crop, now it is center"),
        (f"{shards}/000000.tar", ten, {}, "holds tokens of other shards"),
        (shards, shards, {}, "another kind of index"),
        (shards, tmp_path / "file" / "codes", {}, r"output: .*codes.*Not a directory"),
        (shards, tmp_path / "out", {"num_workers": -1}, "^num_workers.* -1"),
        (shards, tmp_path / "out", {"image_size": 0}, "^image_size.* 0"),
    ):
        refused(message, run, tokenizers, source, output, **options)
    assert not (tmp_path / "out").exists()


def test_finished_shards_of_other_images_are_noticed(tokenizers, shards, copy, tmp_path):
    """Another image shard of the same name, number of samples and size."""
    source = shutil.copytree(shards, tmp_path / "source")
    (copy / "index.json").unlink()
    (copy / "000002.safetensors").unlink()
    samples = [sample(number) for number in range(10, 19)]
    samples[0][1]["cls"] = b"3"
    changed, index = write_shard(source / "000001.tar", samples), ShardIndex.load(shards)
    assert changed.bytes == index.shards[1].bytes
    ShardIndex(source, (index.shards[0], changed, index.shards[2]), CLASSES).save()
    for _ in ("with an index", "without"):
        refused(r"000001\.safetensors was made with source .*; choose another folder or", run, tokenizers, source, copy)
        (source / "index.json").unlink(missing_ok=True)
    assert not (copy / "000002.safetensors").exists()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """12 samples in three image shards; 1, 5, 8 and all of the last shard are bad."""
    folder = tmp_path_factory.mktemp("damaged")
    write_set(folder, (6, 4, 2), bad={1, 8, 10, 11})
    samples = [sample(number) for number in range(6)]
    samples[1][1]["png"] = samples[1][1]["png"][:-500]
    samples[5][1]["cls"] = b"abc"
    index = ShardIndex.load(folder)
    ShardIndex(folder, (write_shard(folder / "000000.tar", samples), *index.shards[1:]), CLASSES).save()
    return folder


def test_bad_samples_are_left_out(tokenizers, damaged, tmp_path, caplog):
    """Also of a shard that breaks off and of one that is missing; once they are whole, their tokens are outdated."""
    folder, codes = shutil.copytree(damaged, tmp_path / "images"), tmp_path / "codes"
    whole = (folder / "000001.tar").read_bytes()
    with tarfile.open(folder / "000001.tar") as tar:
        os.truncate(folder / "000001.tar", tar.getmember("photo-009.cls").offset)
    (folder / "000002.tar").unlink()
    options = {"crops": "center", "max_bad_share": 0.6, "num_workers": 1}
    run(tokenizers, folder, codes, **options)
    index, good = CodesIndex.load(codes), [0, 2, 3, 4, 6, 7]
    assert [shard.samples for shard in index.shards] == [4, 2, 0]
    bad = ["0.tar/photo-001", "0.tar/photo-005", "1.tar/photo-008", "1.tar/#3", "2.tar/#0", "2.tar/#1"]
    assert [line.split(": ")[0] for line in index.skipped] == [f"00000{name}" for name in bad]
    assert ["'abc'" in index.skipped[1], "breaks off" in index.skipped[3], "missing" in index.skipped[4]] == [True] * 3
    assert [line for name in FILES for line in read_header(codes / name)["skipped"]] == [*index.skipped]
    assert all(line in caplog.text for line in index.skipped if "#1" not in line)
    expected = by_hand([transforms.center_crop(picture(number), SIZE) for number in good])
    assert np.array_equal(codes_of(codes)[:, 0], expected)
    (batch,) = CodesDataModule(val=str(codes), batch_size=6).val_dataloader()
    assert batch["key"] == [f"photo-{number:03d}" for number in good]
    assert batch["label"].tolist() == [number % len(CLASSES) for number in good]
    (folder / "000001.tar").write_bytes(whole)
    refused(r"000001\.safetensors was made with source .* delete this one", run, tokenizers, folder, codes, **options)


def test_too_many_bad_samples_stop_the_run(tokenizers, damaged, tmp_path):
    def names() -> list[str]:
        return sorted(contents(tmp_path).keys() - {"provenance.json"})

    options = dict(crops="center", batch_size=2)
    with pytest.raises(UserError, match=r"^shards: 1 of 12 samples .* is 1\.00%\), the first is 000000\.t"):
        run(tokenizers, damaged, tmp_path, **options)
    assert names() == []
    for _ in range(2):  # the second counts what the first has skipped
        with pytest.raises(UserError, match=r"3 of 12 samples .* is 20\.00%\), the first is 000000\.tar/photo-001: "):
            run(tokenizers, damaged, tmp_path, max_bad_share=0.2, **options)
        assert names() == FILES[:1]
    run(tokenizers, damaged, tmp_path, max_bad_share=0.5, **options)
    assert names() == [*FILES, "index.json"]


def test_batches_hold_one_crop_of_each_image(ten):
    data, stored, chosen = CodesDataModule(str(ten), str(ten), batch_size=13, seed=1), codes_of(ten), []
    loader = data.train_dataloader()
    for _ in range(30):  # epochs
        indices = []
        for batch in loader:
            assert batch["codes"].dtype == batch["label"].dtype == torch.int64
            index = batch["index"].numpy()
            matches = (stored[index] == batch["codes"].numpy()[:, None]).all(-1)  # (B, 10)
            assert matches.any(1).all()
            chosen += matches.argmax(1).tolist()
            assert batch["label"].tolist() == (index % len(CLASSES)).tolist()
            assert batch["key"] == [f"photo-{number:03d}" for number in index]
            indices += index.tolist()
        assert sorted(indices) == list(range(26))
    counts = np.bincount(chosen, minlength=10)  # 78 expected of each
    assert counts.min() > 45
    assert counts.max() < 115
    first = torch.cat([batch["codes"] for batch in data.val_dataloader()])
    assert np.array_equal(first.numpy(), stored[:, 0])
    assert (data.num_classes, data.num_tokens, data.codebook_size) == (4, TOKENS, CODEBOOK)


def on_a_rank(folder: Path, batch_size: int = 2, **options) -> list:
    return fit(CodesDataModule(str(folder), batch_size=batch_size), max_steps=15, **options).seen


def test_two_ranks_see_what_one_sees(pair, ten):
    first, second = pair(partial(on_a_rank, devices=2, strategy="ddp"), ten)
    whole = on_a_rank(ten, batch_size=4)
    assert [[*one, *other] for one, other in zip(first, second, strict=True)] == whole
    assert len({crc for batch in whole for _, _, crc in batch}) > 45, "another crop in each epoch"


def test_damaged_token_shards_get_one_line(copy, monkeypatch):
    """A token that is none; headers that are damaged somewhere; a file that must not be read."""
    path = copy / "000001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-500] + b"\xff" * 500)  # the codes lie behind the labels
    with pytest.raises(UserError, match=r"000001\.safetensors is damaged: it has token \d+, the codebook \d+"):
        seen(CodesDataModule(str(copy), batch_size=13))
    length = 8 + int.from_bytes(whole[:8], "little")
    found = 0
    for place in range(0, length, 26):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            seen(CodesDataModule(str(copy), batch_size=13))
        except UserError:
            found += 1
    assert found > length / 26 / 4, "the rest is in keys and names, which nothing depends on"

    def forbidden(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", forbidden)  # not to be deleted for that
    refused(r"000001\.safetensors cannot be read \(Permission denied\)$", read_header, path)


def test_mistakes_get_one_line(ten, shards, tokenizers, copy, tmp_path):
    content = json.loads((copy / "index.json").read_text())
    other = json.dumps(content | {"tokenizer": "0" * 64})
    for index, options, message in (
        (None, {}, "^data.train: not set; give a folder that `dar extract` wrote"),
        (None, {"val": ten, "train": tmp_path}, r"data\.train: .*index\.json does not exist; the end of `dar"),
        (None, {"train": shards}, r"data\.train: .* is another kind of index, it has no codebook_size, crops, .*token"),
        (None, {"train": ten, "tokenizer": tokenizers / "1"}, r"data\.train .* tokenizer \w{12}, data\.tokenizer"),
        (json.dumps(content | {"num_crops": 9}), {"train": copy}, r"holds codes of shape \[\d+, 10, 8\], .* \[\d+, 9,"),
        (other, {"train": copy}, r"00000\d\.safetensors is of tokenizer \w{12}, index\.json of 000000000000"),
        (other, {"train": ten, "val": copy}, r"data\.val holds tokens of tokenizer 0{12}, data\.train is of"),
    ):
        (copy / "index.json").write_text(index or json.dumps(content))
        data = CodesDataModule(batch_size=2, **{name: str(value) for name, value in options.items()})
        refused(message, seen, data)
    CodesDataModule(str(ten), str(ten), tokenizer=str(tokenizers / "0")).setup("fit")
    line = rf"^cannot resume: data\.tokenizer_sha256 was {content['tokenizer']} .* and is 0{{64}} now; use the same"
    refused(line, lambda: CodesDataModule(str(copy)).load_state_dict(CodesDataModule(str(ten)).state_dict()))
    (copy / "000001.safetensors").unlink()
    refused(r"data\.train: .*000001\.safetensors has no bytes", lambda: seen(CodesDataModule(str(copy))))
