"""`dar extract` against tokenizing by hand, and the tokens' way into batches."""

import json
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tiny_shards import CLASSES, SIZES, picture, sample

from dar_lightning.commands.extract import extract
from dar_lightning.data import transforms
from dar_lightning.data.codes import CodesDataModule
from dar_lightning.data.extraction import ShardWriter
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.sampler import Ticket
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.data.token_dataset import CodesIndex, read_header
from dar_lightning.errors import UserError
from dar_lightning.files import locked
from dar_lightning.formats.fingerprint import fingerprint
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.init import TokenizerInit
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer

SIZE, TOKENS, CODEBOOK = 32, 8, 300


def make_tokenizer(seed: int, codebook_size: int = CODEBOOK) -> SequentialDiffusionTokenizer:
    torch.manual_seed(seed)
    config = TokenizerConfig(
        image_size=SIZE,
        encoder_patch_size=8,
        encoder_dim=16,
        encoder_depth=1,
        conditioner_dim=16,
        conditioner_depth=1,
        codebook_size=codebook_size,
        codebook_dim=4,
        num_tokens=TOKENS,
        num_groups=4,
        decoder_dim=16,
        decoder_depth=1,
        decoder_patch_size=8,
        repa_layer=None,
        head_dim=16,
    )
    tokenizer = SequentialDiffusionTokenizer(config, TokenizerInit(gate=1.0)).eval()
    for parameter in tokenizer.parameters():  # as if trained: a new encoder tells no images apart
        parameter.data += 0.2 * torch.randn_like(parameter)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two tokenizers on disk."""
    root = tmp_path_factory.mktemp("tokenizers")
    for seed in (0, 1):
        make_tokenizer(seed).save_pretrained(root / str(seed))
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
    return make_tokenizer(0).tokenize(pixels).numpy()


def test_ten_crop_is_what_the_tokenizer_says(ten):
    assert sorted(path.name for path in ten.glob("[!.]*")) == [
        *(f"00000{i}.safetensors" for i in range(3)),
        "index.json",
        "provenance.json",
    ]
    number = 0
    for i, size in enumerate(SIZES):
        tensors = load_file(ten / f"00000{i}.safetensors")
        assert tensors["codes"].dtype == np.uint16
        assert tensors["codes"].shape == (size, 10, TOKENS)
        for row in range(size):
            assert tensors["labels"][row] == number % len(CLASSES)
            crops = [transforms.ten_crop(picture(number), SIZE, crop) for crop in range(10)]
            assert np.array_equal(tensors["codes"][row], by_hand(crops))
            number += 1
    index = CodesIndex.load(ten)
    assert (index.num_samples, index.num_crops, index.classes) == (26, 10, CLASSES)
    assert index.tokenizer == fingerprint(make_tokenizer(0))
    assert len(np.unique(tensors["codes"])) > 20  # the comparison above is not of constants


def test_a_token_shard_says_what_it_holds(ten):
    names = CodesIndex.load(ten).crop_names
    assert names[:2] == ("top left", "top right")
    assert names[5:7] == ("top left of the mirrored image", "top right of the mirrored image")
    for i, size in enumerate(SIZES):
        path = ten / f"00000{i}.safetensors"
        header = read_header(path)
        assert header["samples"] == len(header["keys"]) == size
        assert header["skipped"] == []
        made_by = header["made_by"]
        assert made_by["tokenizer"] == fingerprint(make_tokenizer(0))
        assert TokenizerConfig(**made_by["tokenizer_config"]) == make_tokenizer(0).config
        assert tuple(made_by["crop_names"]) == names
        assert made_by["source"]["name"] == f"00000{i}.tar"
        with path.open("rb") as file:
            before = 8 + int.from_bytes(file.read(8), "little")
        # 2 bytes per token and 8 per label: ImageNet's 1,281,167 images x 10 crops x 256 tokens are 6.57 GB
        assert path.stat().st_size - before == size * (10 * TOKENS * 2 + 8)


def test_batches_and_memory_have_a_limit(tokenizers, shards, ten, tmp_path, monkeypatch):
    """No forward pass has more crops than asked, although an image has ten; and no more than a shard is held."""
    passes, held = [], []
    tokenize, write = SequentialDiffusionTokenizer.tokenize, ShardWriter.on_predict_batch_end

    def counted(self, images):
        passes.append(len(images))
        return tokenize(self, images)

    def watched(self, *arguments):
        write(self, *arguments)
        held.append(len(self.codes))

    monkeypatch.setattr(SequentialDiffusionTokenizer, "tokenize", counted)
    monkeypatch.setattr(ShardWriter, "on_predict_batch_end", watched)
    run(tokenizers, shards, tmp_path, batch_size=4)
    assert max(passes) == 4
    assert held == [number % size for size in SIZES for number in range(1, size + 1)]
    for i in range(3):
        name = f"00000{i}.safetensors"
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


def test_interrupted_extraction_goes_on(tokenizers, shards, ten, tmp_path, capsys):
    output = shutil.copytree(ten, tmp_path / "codes")
    whole = {path.name: path.read_bytes() for path in ten.iterdir()}
    (output / "index.json").unlink()
    (output / "000001.safetensors").unlink()
    kept = (output / "000000.safetensors").stat().st_mtime_ns
    run(tokenizers, shards, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
    assert (output / "000000.safetensors").stat().st_mtime_ns == kept
    (output / "index.json").unlink()  # killed just before the end
    run(tokenizers, shards, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
    capsys.readouterr()
    run(tokenizers, shards, output)
    assert "is complete: 26 images x 10 crops x 8 tokens" in capsys.readouterr().out


def test_output_of_something_else_is_refused(tokenizers, shards, ten, tmp_path):
    with pytest.raises(UserError, match="was made with tokenizer"):
        extract(str(tokenizers / "1"), str(shards), str(ten), accelerator="cpu")
    with pytest.raises(UserError, match="was made with crops ten_crop, now it is center"):
        run(tokenizers, shards, ten, crops="center")
    with pytest.raises(UserError, match="holds tokens of other shards"):
        run(tokenizers, f"{shards}/000000.tar", ten)
    with pytest.raises(UserError, match="another kind of index"):
        run(tokenizers, shards, shards)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output: .*codes: Not a directory"):
        run(tokenizers, shards, tmp_path / "file" / "codes")


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


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """12 samples in three image shards; 1, 5, 8 and all of the last shard are bad."""
    folder = tmp_path_factory.mktemp("damaged")
    samples = [sample(number) for number in range(12)]
    samples[1][1]["png"] = samples[1][1]["png"][:-500]
    samples[5][1]["cls"] = b"abc"
    del samples[8][1]["cls"]
    samples[10][1]["png"] = samples[11][1]["png"] = b""
    parts = [samples[:6], samples[6:10], samples[10:]]
    entries = [write_shard(folder / f"{i}.tar", part) for i, part in enumerate(parts)]
    ShardIndex(folder, tuple(entries), CLASSES).save()
    return folder


def test_bad_samples_are_left_out(tokenizers, damaged, tmp_path, caplog):
    run(tokenizers, damaged, tmp_path, crops="center", max_bad_share=0.5, num_workers=1)
    index = CodesIndex.load(tmp_path)
    assert [shard.samples for shard in index.shards] == [4, 3, 0]
    bad = ("0.tar/photo-001", "0.tar/photo-005", "1.tar/photo-008", "2.tar/photo-010", "2.tar/photo-011")
    assert [line.split(": ")[0] for line in index.skipped] == [*bad]
    assert "'abc'" in index.skipped[1]
    assert [line for i in range(3) for line in read_header(tmp_path / f"{i}.safetensors")["skipped"]] == [
        *index.skipped
    ]
    assert all(line in caplog.text for line in index.skipped)
    good = [0, 2, 3, 4, 6, 7, 9]
    codes = np.concatenate([load_file(tmp_path / f"{i}.safetensors")["codes"] for i in range(3)])
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
        return sorted(path.name for path in tmp_path.glob("[!.]*") if path.name != "provenance.json")

    options = dict(crops="center", batch_size=2)
    with pytest.raises(UserError, match=r"^shards: 1 of 12 samples .* max_bad_share is 1\.00%\), the first is 0\.t"):
        run(tokenizers, damaged, tmp_path, **options)
    assert names() == []
    for attempt in range(2):  # the second counts what the first has skipped
        with pytest.raises(UserError, match=r"3 of 12 samples .* is 20\.00%\), the first is 0\.tar/photo-001: "):
            run(tokenizers, damaged, tmp_path, max_bad_share=0.2, num_workers=attempt, **options)
        assert names() == ["0.safetensors"]
    run(tokenizers, damaged, tmp_path, max_bad_share=0.5, **options)
    assert names() == [*(f"{i}.safetensors" for i in range(3)), "index.json"]


def test_a_shard_that_lost_its_end_and_one_that_is_missing(tokenizers, damaged, tmp_path):
    """What is left of them is tokenized; once they are whole again, their tokens are not taken for complete."""
    folder = tmp_path / "images"
    shutil.copytree(damaged, folder)
    whole = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512])
    (folder / "1.tar").unlink()
    run(tokenizers, folder, tmp_path / "tokens", crops="center", max_bad_share=0.9)
    index = CodesIndex.load(tmp_path / "tokens")
    left = index.shards[0].samples
    assert 0 < left < 4
    assert [shard.samples for shard in index.shards] == [left, 0, 0]
    assert len(index.skipped) == 12 - left
    assert any(line == "1.tar/#3: the file is missing" for line in index.skipped)
    (folder / "0.tar").write_bytes(whole)
    with pytest.raises(UserError, match=r"0\.safetensors was made with source .* delete this one"):
        run(tokenizers, folder, tmp_path / "tokens", crops="center", max_bad_share=0.9)


def test_damaged_token_shards_get_one_line(ten, tmp_path):
    """A token that is none, headers that are damaged somewhere."""
    for name in ("token", "header"):
        shutil.copytree(ten, tmp_path / name)
    path = tmp_path / "token" / "000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-500:] = b"\xff" * 500  # the codes lie behind the labels
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"000001\.safetensors is damaged: it has token \d+, the codebook \d+"):
        list(CodesDataModule(str(tmp_path / "token"), batch_size=13).train_dataloader())
    path = tmp_path / "header" / "000001.safetensors"
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in range(0, length, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            list(CodesDataModule(str(tmp_path / "header"), batch_size=13).train_dataloader())
        except UserError:
            refused += 1
    assert refused > length / 7 / 4, "the rest is in keys and names, which nothing depends on"


def test_batches_hold_one_crop_of_each_image(ten):
    module = CodesDataModule(str(ten), str(ten), batch_size=13, seed=1)
    stored = np.concatenate([load_file(ten / f"00000{i}.safetensors")["codes"] for i in range(3)])
    loader = module.train_dataloader()
    chosen = []
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
    first = torch.cat([batch["codes"] for batch in module.val_dataloader()])
    assert np.array_equal(first.numpy(), stored[:, 0])
    assert (module.num_classes, module.num_tokens, module.codebook_size) == (4, TOKENS, CODEBOOK)


def test_workers_and_resuming_change_nothing(ten):
    modules = [CodesDataModule(str(ten), batch_size=4, num_workers=workers) for workers in (0, 2, 0)]
    whole = [(batch["key"], batch["codes"].tolist()) for _ in range(2) for batch in modules[0].train_dataloader()]
    loader = modules[1].train_dataloader()
    assert [(batch["key"], batch["codes"].tolist()) for batch in loader] == whole[: len(loader)]
    modules[2].load_state_dict({"stream": modules[1].state_dict()["stream"] | {"position": 3}})
    resumed = next(iter(modules[2].train_dataloader()))
    assert (resumed["key"], resumed["codes"].tolist()) == whole[3]


def test_large_codebooks_take_32_bits(shards, tmp_path):
    make_tokenizer(0, 70_000).save_pretrained(tmp_path / "0")
    run(tmp_path, shards, tmp_path / "codes", crops="center")
    codes = load_file(tmp_path / "codes" / "000000.safetensors")["codes"]
    assert codes.dtype == np.uint32
    assert codes.max() > 2**16


def test_mistakes_get_one_line(ten, shards, tokenizers, tmp_path):
    with pytest.raises(UserError, match=r"data\.train: not set"):
        CodesDataModule().train_dataloader()
    with pytest.raises(UserError, match=r"data\.train: .*index\.json does not exist; `dar extract` makes"):
        CodesDataModule(str(tmp_path)).train_dataloader()
    with pytest.raises(UserError, match=r"data\.train: .* is another kind of index, it has no tokenizer"):
        CodesDataModule(str(shards)).train_dataloader()
    with pytest.raises(UserError, match=r"data\.train holds tokens of tokenizer \w{12}, data\.tokenizer is of \w{12}"):
        CodesDataModule(str(ten), tokenizer=str(tokenizers / "1")).setup("fit")
    CodesDataModule(str(ten), str(ten), tokenizer=str(tokenizers / "0")).setup("fit")
    copy = shutil.copytree(ten, tmp_path / "copy")
    content = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(content | {"num_crops": 9}))
    with pytest.raises(UserError, match=r"holds codes of shape \[\d+, 10, 8\], its index\.json says \[\d+, 9, 8\]"):
        next(iter(CodesDataModule(str(copy), batch_size=2).train_dataloader()))
    (copy / "index.json").write_text(json.dumps(content | {"tokenizer": "0" * 64}))
    with pytest.raises(UserError, match=r"data\.val holds tokens of tokenizer 000000000000, data\.train is of"):
        CodesDataModule(str(ten), str(copy)).setup("fit")
    (copy / "000001.safetensors").unlink()
    with pytest.raises(UserError, match=r"data\.train: .*000001\.safetensors is missing"):
        CodesDataModule(str(copy)).train_dataloader()


def hold(folder, events) -> None:
    with locked(folder, "output"):
        events[0].set()
        events[1].wait()


def test_an_output_that_another_process_writes_to(tokenizers, shards, ten, tmp_path):
    """Its unfinished files stay."""
    context = multiprocessing.get_context("spawn")
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
    assert (copy / "index.json").read_bytes() == (ten / "index.json").read_bytes()


@pytest.mark.parametrize("option", [{"num_workers": -1}, {"image_size": 0}], ids=str)
def test_options_that_cannot_be(tokenizers, shards, tmp_path, option):
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=rf"^{name}: {value} is "):
        extract(str(tokenizers / "0"), str(shards), str(tmp_path / "out"), **option)
    assert not (tmp_path / "out").exists()


def test_datasets_travel_to_spawned_workers(ten, shards):
    """A worker gets a pickled copy, of a dataset that has been read from already."""
    for module in (
        CodesDataModule(str(ten), batch_size=2),
        ImageNetDataModule(str(shards), image_size=16, batch_size=2),
    ):
        dataset = module.train_dataloader().dataset
        item = dataset[Ticket(12, 3)]
        clone = pickle.loads(pickle.dumps(dataset))[Ticket(12, 3)]
        for name, value in item.items():
            assert np.array_equal(value, clone[name])


def test_without_any_split_there_is_one_line():
    with pytest.raises(UserError, match=r"^data.train and data.val: neither is set; give folders that `dar extract`"):
        CodesDataModule().setup("validate")
