"""`dar extract` against tokenizing by hand, and the tokens' way into batches."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tiny_shards import CLASSES, SIZES, picture

from dar_lightning.commands.extract import extract
from dar_lightning.data import transforms
from dar_lightning.data.codes import CodesDataModule, CodesIndex
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.stream import Ticket
from dar_lightning.errors import UserError
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights import fingerprint

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
        gate_init=1.0,
    )
    return SequentialDiffusionTokenizer(config).eval()


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
    assert sorted(path.name for path in ten.iterdir()) == [*(f"00000{i}.safetensors" for i in range(3)), "index.json"]
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
    with pytest.raises(UserError, match=r"output: .* holds tokens of tokenizer"):
        extract(str(tokenizers / "1"), str(shards), str(ten), accelerator="cpu")
    with pytest.raises(UserError, match="was made with crops ten_crop, now it is center"):
        run(tokenizers, shards, ten, crops="center")
    with pytest.raises(UserError, match="holds tokens of other shards"):
        run(tokenizers, f"{shards}/000000.tar", ten)
    with pytest.raises(UserError, match="another kind of index"):
        run(tokenizers, shards, shards)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output: .* cannot be made"):
        run(tokenizers, shards, tmp_path / "file" / "codes")


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
