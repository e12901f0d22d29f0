"""`dar extract` against tokenizing by hand, and the tokens' way into batches."""

import json
import multiprocessing
import pickle
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tiny_models import make_tokenizer
from tiny_shards import CLASSES, SIZES, module, picture, sample, write_set

from dar_lightning.commands.extract import extract
from dar_lightning.data import transforms
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.extraction import Extractor
from dar_lightning.data.sampler import Ticket
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.data.token_dataset import CodesIndex, read_header
from dar_lightning.errors import UserError
from dar_lightning.files import locked
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

SIZE, TOKENS, CODEBOOK = 32, 8, 300
FILES = [f"00000{i}.safetensors" for i in range(3)]


@cache
def tokenizer(seed: int = 0) -> SequentialDiffusionTokenizer:
    return make_tokenizer(seed, codebook_size=CODEBOOK)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two tokenizers on disk."""
    root = tmp_path_factory.mktemp("tokenizers")
    for seed in (0, 1):
        tokenizer(seed).save_pretrained(root / str(seed))
    return root


def run(tokenizers, shards, output, **options) -> None:
    extract(str(tokenizers / "0"), str(shards), str(output), accelerator="cpu", devices=1, **options)


@pytest.fixture(scope="module")
def ten(tokenizers, shards, tmp_path_factory):
    output = tmp_path_factory.mktemp("codes") / "ten"
    run(tokenizers, shards, output, crops="ten_crop", batch_size=40)
    return output


def by_hand(images: list[Image.Image]) -> np.ndarray:
    pixels = torch.stack([transforms.to_tensor(image) for image in images]).float() / 127.5 - 1
    return tokenizer().tokenize(pixels).numpy()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


# ---- extraction


def test_ten_crop_is_what_the_tokenizer_says(ten):
    assert sorted(contents(ten)) == [*FILES, "index.json", "provenance.json"]
    index, print_ = CodesIndex.load(ten), model_sha256(tokenizer())
    assert (index.num_samples, index.num_crops, index.classes, index.tokenizer) == (26, 10, CLASSES, print_)
    assert index.crop_names[:2] == ("top left", "top right")
    assert index.crop_names[5:7] == ("top left of the mirrored image", "top right of the mirrored image")
    numbers = iter(range(26))
    for name, size in zip(FILES, SIZES, strict=True):
        tensors, header = load_file(ten / name), read_header(ten / name)
        assert tensors["codes"].dtype == np.uint16
        assert tensors["codes"].shape == (size, 10, TOKENS)
        for row, number in zip(range(size), numbers, strict=False):
            assert tensors["labels"][row] == number % len(CLASSES)
            crops = [transforms.ten_crop(picture(number), SIZE, crop) for crop in range(10)]
            assert np.array_equal(tensors["codes"][row], by_hand(crops))
        assert header["samples"] == len(header["keys"]) == size
        assert header["skipped"] == []
        made_by = header["made_by"]
        assert (made_by["tokenizer"], tuple(made_by["crop_names"])) == (print_, index.crop_names)
        assert TokenizerConfig(**made_by["tokenizer_config"]) == tokenizer().config
        assert made_by["source"]["name"] == name.replace("safetensors", "tar")
        with (ten / name).open("rb") as file:
            before = 8 + int.from_bytes(file.read(8), "little")
        # 2 bytes per token and 8 per label: ImageNet's 1,281,167 images x 10 crops x 256 tokens are 6.57 GB
        assert (ten / name).stat().st_size - before == size * (10 * TOKENS * 2 + 8)
    assert len(np.unique(tensors["codes"])) > 20  # the comparison above is not of constants


def test_batches_and_memory_have_a_limit(tokenizers, shards, ten, tmp_path, monkeypatch):
    """No forward pass has more crops than asked, although an image has ten; and no more than a shard is held."""
    passes, held = [], []
    tokenize, write = SequentialDiffusionTokenizer.tokenize, Extractor.on_predict_batch_end

    def counted(self, images):
        passes.append(len(images))
        return tokenize(self, images)

    def watched(self, *arguments):
        write(self, *arguments)
        held.append(len(self.codes))

    monkeypatch.setattr(SequentialDiffusionTokenizer, "tokenize", counted)
    monkeypatch.setattr(Extractor, "on_predict_batch_end", watched)
    run(tokenizers, shards, tmp_path, batch_size=4)
    assert max(passes) == 4
    assert held == [number % size for size in SIZES for number in range(1, size + 1)]
    for name in FILES:
        assert np.array_equal(load_file(tmp_path / name)["codes"], load_file(ten / name)["codes"])


def test_center_flip(tokenizers, shards, tmp_path):
    run(tokenizers, shards, tmp_path, crops="center_flip", batch_size=7, num_workers=1)
    codes = load_file(tmp_path / "000001.safetensors")["codes"]
    center = transforms.center_crop(picture(12), SIZE)
    mirrored = Image.fromarray(np.array(center)[:, ::-1])
    assert np.array_equal(codes[2], by_hand([center, mirrored]))


def test_random_crops_are_seeded(tokenizers, shards, tmp_path):
    for name, seed, batch_size in (("a", 0, 3), ("b", 0, 30), ("c", 1, 30)):
        run(tokenizers, shards, tmp_path / name, crops="random", random_crops=3, seed=seed, batch_size=batch_size)
    a, b, c = (load_file(tmp_path / name / "000002.safetensors")["codes"] for name in "abc")
    assert a.shape == (7, 3, TOKENS)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_large_codebooks_take_32_bits(shards, tmp_path):
    make_tokenizer(0, codebook_size=70_000).save_pretrained(tmp_path / "0")
    run(tmp_path, f"{shards}/000002.tar", tmp_path / "codes", crops="center")
    codes = load_file(tmp_path / "codes" / "000002.safetensors")["codes"]
    assert codes.dtype == np.uint32
    assert codes.max() > 2**16


def test_interrupted_extraction_goes_on(tokenizers, shards, ten, tmp_path, capsys):
    output, whole = shutil.copytree(ten, tmp_path / "codes"), contents(ten)
    (output / "index.json").unlink()
    (output / "000001.safetensors").unlink()
    kept = (output / "000000.safetensors").stat().st_mtime_ns
    run(tokenizers, shards, output)
    assert contents(output) == whole
    assert (output / "000000.safetensors").stat().st_mtime_ns == kept
    capsys.readouterr()
    run(tokenizers, shards, output)
    assert "is complete: 26 images x 10 crops x 8 tokens" in capsys.readouterr().out


def test_output_of_something_else_is_refused(tokenizers, shards, ten, tmp_path):
    (tmp_path / "file").touch()
    for name, source, output, options, message in (
        ("1", shards, ten, {}, "was made with tokenizer"),
        ("0", shards, ten, {"crops": "center"}, "was made with crops ten_crop, now it is center"),
        ("0", f"{shards}/000000.tar", ten, {}, "holds tokens of other shards"),
        ("0", shards, shards, {}, "another kind of index"),
        ("0", shards, tmp_path / "file" / "codes", {}, r"output: .*codes: Not a directory"),
        ("0", shards, tmp_path / "out", {"num_workers": -1}, "^num_workers is -1: must be at least 0$"),
        ("0", shards, tmp_path / "out", {"image_size": 0}, "^image_size is 0: must be at least 1$"),
    ):
        with pytest.raises(UserError, match=message):
            extract(str(tokenizers / name), str(source), str(output), accelerator="cpu", devices=1, **options)
    assert not (tmp_path / "out").exists()


def test_finished_shards_of_other_images_are_noticed(tokenizers, shards, ten, tmp_path):
    """Another image shard of the same name, number of samples and size."""
    source = shutil.copytree(shards, tmp_path / "source")
    output = shutil.copytree(ten, tmp_path / "codes")
    (output / "index.json").unlink()
    (output / "000002.safetensors").unlink()
    samples = [sample(number) for number in range(10, 19)]
    samples[0][1]["cls"] = b"3"
    changed = write_shard(source / "000001.tar", samples)
    index = ShardIndex.load(shards)
    assert changed.bytes == index.shards[1].bytes
    ShardIndex(source, (index.shards[0], changed, index.shards[2]), CLASSES).save()
    for _ in ("with an index", "without"):
        with pytest.raises(UserError, match=r"000001\.safetensors was made with source .*; choose another folder or"):
            run(tokenizers, source, output)
        (source / "index.json").unlink(missing_ok=True)
    assert not (output / "000002.safetensors").exists()


# ---- bad samples


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
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
    run(tokenizers, damaged, tmp_path, crops="center", max_bad_share=0.5, num_workers=1)
    index = CodesIndex.load(tmp_path)
    assert [shard.samples for shard in index.shards] == [4, 3, 0]
    bad = (
        "000000.tar/photo-001",
        "000000.tar/photo-005",
        "000001.tar/photo-008",
        *(f"000002.tar/photo-01{i}" for i in (0, 1)),
    )
    assert [line.split(": ")[0] for line in index.skipped] == [*bad]
    assert "'abc'" in index.skipped[1]
    assert [line for name in FILES for line in read_header(tmp_path / name)["skipped"]] == [*index.skipped]
    assert all(line in caplog.text for line in index.skipped)
    good = [0, 2, 3, 4, 6, 7, 9]
    codes = np.concatenate([load_file(tmp_path / name)["codes"] for name in FILES])
    assert np.array_equal(codes[:, 0], by_hand([transforms.center_crop(picture(number), SIZE) for number in good]))
    for loader in (
        CodesDataModule(str(tmp_path), batch_size=7).train_dataloader(),
        CodesDataModule(val=str(tmp_path), batch_size=7).val_dataloader(),
    ):
        (batch,) = loader
        assert sorted(batch["key"]) == [f"photo-{number:03d}" for number in good]
        assert sorted(batch["label"].tolist()) == sorted(number % len(CLASSES) for number in good)


def test_too_many_bad_samples_stop_the_run(tokenizers, damaged, tmp_path):
    def names() -> list[str]:
        return sorted(contents(tmp_path).keys() - {"provenance.json"})

    options = dict(crops="center", batch_size=2)
    with pytest.raises(
        UserError, match=r"^shards: 1 of 12 samples .* max_bad_share is 1\.00%\), the first is 000000\.t"
    ):
        run(tokenizers, damaged, tmp_path, **options)
    assert names() == []
    for attempt in range(2):  # the second counts what the first has skipped
        with pytest.raises(UserError, match=r"3 of 12 samples .* is 20\.00%\), the first is 000000\.tar/photo-001: "):
            run(tokenizers, damaged, tmp_path, max_bad_share=0.2, num_workers=attempt, **options)
        assert names() == FILES[:1]
    run(tokenizers, damaged, tmp_path, max_bad_share=0.5, **options)
    assert names() == [*FILES, "index.json"]


def test_a_shard_that_lost_its_end_and_one_that_is_missing(tokenizers, damaged, tmp_path):
    """What is left of them is tokenized; once they are whole again, their tokens are not taken for complete."""
    folder = shutil.copytree(damaged, tmp_path / "images")
    whole = (folder / "000000.tar").read_bytes()
    (folder / "000000.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512])
    (folder / "000001.tar").unlink()
    run(tokenizers, folder, tmp_path / "tokens", crops="center", max_bad_share=0.9)
    index = CodesIndex.load(tmp_path / "tokens")
    left = index.shards[0].samples
    assert 0 < left < 4
    assert [shard.samples for shard in index.shards] == [left, 0, 0]
    assert len(index.skipped) == 12 - left
    assert "000001.tar/#3: the file is missing" in index.skipped
    (folder / "000000.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"000000\.safetensors was made with source .* delete this one"):
        run(tokenizers, folder, tmp_path / "tokens", crops="center", max_bad_share=0.9)


def hold(folder, events) -> None:
    with locked(folder, "output"):
        events[0].set()
        events[1].wait()


def test_an_output_that_another_process_writes_to(tokenizers, shards, ten, tmp_path):
    """Its unfinished files stay."""
    context = multiprocessing.get_context("fork")
    events = context.Event(), context.Event()
    copy = shutil.copytree(ten, tmp_path / "copy")
    (copy / "index.json").unlink()
    part = copy / ".000001.safetensors.7.part"
    part.touch()
    other = context.Process(target=hold, args=(copy, events))
    other.start()
    events[0].wait()
    with pytest.raises(UserError, match=r"^output: another process is writing to .*/copy; wait for it or choose anoth"):
        run(tokenizers, shards, copy)
    assert part.exists()
    events[1].set()
    other.join()
    run(tokenizers, shards, copy)
    assert not part.exists()
    assert contents(copy) == contents(ten)


# ---- batches


def test_batches_hold_one_crop_of_each_image(ten):
    data = CodesDataModule(str(ten), str(ten), batch_size=13, seed=1)
    stored = np.concatenate([load_file(ten / name)["codes"] for name in FILES])
    loader, chosen = data.train_dataloader(), []
    for _ in range(30):  # epochs
        indices = []
        for batch in loader:
            assert batch["codes"].dtype == batch["label"].dtype == torch.int64
            for codes, label, key, index in zip(
                batch["codes"].numpy(), batch["label"], batch["key"], batch["index"], strict=True
            ):
                matches = (stored[index] == codes).all(-1)  # (10,)
                assert matches.any()
                chosen.append(int(matches.argmax()))
                assert (int(label), key) == (index % len(CLASSES), f"photo-{index:03d}")
                indices.append(int(index))
        assert sorted(indices) == list(range(26))
    counts = np.bincount(chosen, minlength=10)  # 78 expected of each
    assert counts.min() > 45
    assert counts.max() < 115
    first = torch.cat([batch["codes"] for batch in data.val_dataloader()])
    assert np.array_equal(first.numpy(), stored[:, 0])
    assert (data.num_classes, data.num_tokens, data.codebook_size) == (4, TOKENS, CODEBOOK)


def test_workers_and_resuming_change_nothing(ten):
    modules = [CodesDataModule(str(ten), batch_size=4, num_workers=workers) for workers in (0, 2, 0)]
    whole = [(batch["key"], batch["codes"].tolist()) for _ in range(2) for batch in modules[0].train_dataloader()]
    loader = modules[1].train_dataloader()
    assert [(batch["key"], batch["codes"].tolist()) for batch in loader] == whole[: len(loader)]
    modules[2].load_state_dict(
        modules[1].state_dict() | {"stream": modules[1].state_dict()["stream"] | {"position": 3}}
    )
    resumed = next(iter(modules[2].train_dataloader()))
    assert (resumed["key"], resumed["codes"].tolist()) == whole[3]


def test_datasets_travel_to_spawned_workers(ten, shards):
    """A worker gets a pickled copy, of a dataset that has been read from already."""
    for data in (CodesDataModule(str(ten), batch_size=2), module(shards)):
        dataset = data.train_dataloader().dataset
        item = dataset[Ticket(12, 3)]
        clone = pickle.loads(pickle.dumps(dataset))[Ticket(12, 3)]
        for name, value in item.items():
            assert np.array_equal(value, clone[name])


# ---- mistakes


def test_damaged_token_shards_get_one_line(ten, tmp_path):
    """A token that is none; headers that are damaged somewhere; a file that must not be read."""
    copy = shutil.copytree(ten, tmp_path / "copy")
    path = copy / "000001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-500] + b"\xff" * 500)  # the codes lie behind the labels
    with pytest.raises(UserError, match=r"000001\.safetensors is damaged: it has token \d+, the codebook \d+"):
        list(CodesDataModule(str(copy), batch_size=13).train_dataloader())
    length = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in range(0, length, 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            list(CodesDataModule(str(copy), batch_size=13).train_dataloader())
        except UserError:
            refused += 1
    assert refused > length / 13 / 4, "the rest is in keys and names, which nothing depends on"


def test_token_shards_that_must_not_be_read(tmp_path, monkeypatch):
    """Not to be deleted for that."""

    def refused(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", refused)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read \(Permission denied\)$"):
        read_header(tmp_path / "x.safetensors")


def test_mistakes_get_one_line(ten, shards, tokenizers, tmp_path):
    for options, message in (
        ({}, "^data.train and data.val: neither is set; give folders that `dar extract` wrote"),
        ({"val": str(ten), "train": str(tmp_path)}, r"data\.train: .*index\.json does not exist; `dar extract` makes"),
        ({"train": str(shards)}, r"data\.train: .* is another kind of index, it has no tokenizer"),
        (
            {"train": str(ten), "tokenizer": str(tokenizers / "1")},
            r"data\.train holds tokens of tokenizer \w{12}, data\.tokenizer is of \w{12}",
        ),
    ):
        with pytest.raises(UserError, match=message):
            CodesDataModule(**options).setup("fit")
    with pytest.raises(UserError, match=r"data\.train: not set"):
        CodesDataModule().train_dataloader()
    CodesDataModule(str(ten), str(ten), tokenizer=str(tokenizers / "0")).setup("fit")


def test_indices_that_say_something_else(ten, tmp_path):
    copy = shutil.copytree(ten, tmp_path / "copy")
    content = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(content | {"num_crops": 9}))
    with pytest.raises(UserError, match=r"holds codes of shape \[\d+, 10, 8\], its index\.json says \[\d+, 9, 8\]"):
        next(iter(CodesDataModule(str(copy), batch_size=2).train_dataloader()))
    (copy / "index.json").write_text(json.dumps(content | {"tokenizer": "0" * 64}))
    with pytest.raises(UserError, match=r"data\.val holds tokens of tokenizer 000000000000, data\.train is of"):
        CodesDataModule(str(ten), str(copy)).setup("fit")
    with pytest.raises(UserError, match=r"000001?\d*\.safetensors is of tokenizer \w{12}, index\.json of 000000000000"):
        next(iter(CodesDataModule(str(copy), batch_size=2).train_dataloader()))
    mine = content["tokenizer"][:12]
    with pytest.raises(
        UserError, match=rf"the checkpoint saw tokens of tokenizer {mine}, these are of 000000000000; use"
    ):
        CodesDataModule(str(copy)).load_state_dict(CodesDataModule(str(ten)).state_dict())
    (copy / "000001.safetensors").unlink()
    with pytest.raises(UserError, match=r"data\.train: .*000001\.safetensors is missing"):
        CodesDataModule(str(copy)).train_dataloader()
