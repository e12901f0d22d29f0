"""`dar reconstruct` against encoding, decoding and measuring by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CODES, GROUPS, SIZE, make_tokenizer, picture, write_images

from dar_lightning.commands.reconstruct import reconstruct
from dar_lightning.data.shards import ShardIndex, ShardReader, write_shard
from dar_lightning.errors import UserError
from dar_lightning.figures import image_grid
from dar_lightning.seeding import image_generator
from dar_lightning.weights import fingerprint

COUNT = 7


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("reconstruct")
    make_tokenizer().save_pretrained(root / "tokenizer")
    return str(root / "tokenizer"), write_images(root / "shards", COUNT)


@pytest.fixture(scope="module")
def written(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    reconstruct(*paths, str(folder), num_shown=3, seed=2)
    return folder


def by_hand() -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Originals (7, 32, 32, 3), previews (7, 4, 32, 32, 3), and codes."""
    tokenizer = make_tokenizer()
    originals = np.stack([np.array(picture(number)) for number in range(COUNT)])
    images = torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1
    codes = tokenizer.tokenize(images)
    noise = torch.stack([torch.randn(3, SIZE, SIZE, generator=image_generator(2, i)) for i in range(COUNT)])
    previews = [tokenizer.detokenize(codes, noise, groups=m) for m in range(1, GROUPS + 1)]
    pixels = ((torch.stack(previews, dim=1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return originals, pixels.permute(0, 1, 3, 4, 2).numpy(), codes


def test_figures(written, paths):
    result = json.loads((written / "reconstruction.json").read_text())
    originals, previews, codes = by_hand()
    errors = np.square(previews[:, -1].astype(float) - originals).mean(axis=(1, 2, 3))
    assert result["metrics"]["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-3)
    shares = torch.bincount(codes.flatten(), minlength=CODES).double() / codes.numel()
    assert result["metrics"]["codebook_use"] == pytest.approx(float((shares > 0).double().mean()))
    perplexity = float(torch.exp(-(shares[shares > 0] * shares[shares > 0].log()).sum()))
    assert result["metrics"]["codebook_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    protocol = result["protocol"]
    assert protocol["tokenizer"] == fingerprint(make_tokenizer())
    assert protocol["ema"] == {"tokenizer": None}, "saved by hand, nobody noted it"
    assert (protocol["num_images"], protocol["shards"], protocol["num_steps"], protocol["seed"]) == (7, paths[1], 4, 2)


def test_picture(written):
    originals, previews, _ = by_hand()
    rows = np.concatenate([originals[:, None], previews], axis=1)[[0, 3, 6]]  # spread over the shards
    tiles = torch.from_numpy(rows).permute(0, 1, 4, 2, 3)
    expected = np.asarray(image_grid(tiles, column_labels=["original", *(f"group {m}" for m in range(1, 5))]))
    drawn = np.asarray(Image.open(written / "reconstructions.png"))
    assert drawn.shape == expected.shape
    assert np.abs(drawn.astype(int) - expected).max() <= 1


def test_the_batch_size_changes_nothing(written, paths, tmp_path):
    reconstruct(*paths, str(tmp_path), num_shown=3, seed=2, batch_size=3)
    one, two = (json.loads((folder / "reconstruction.json").read_text()) for folder in (written, tmp_path))
    assert one["protocol"] == two["protocol"]
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-4)


def test_images_alone_suffice(written, paths, tmp_path):
    """No index, and no labels but a broken one."""
    index = ShardIndex.load(paths[1])
    reader = ShardReader(index)
    samples = [(key, {"png": members["png"]}) for _, key, members in (reader[number] for number in range(COUNT))]
    samples[0][1]["cls"] = b"red"
    write_shard(tmp_path / "plain" / "x.tar", samples)
    reconstruct(paths[0], str(tmp_path / "plain"), str(tmp_path / "out"), num_shown=3, seed=2)
    one, two = (json.loads((folder / "reconstruction.json").read_text()) for folder in (written, tmp_path / "out"))
    assert one["metrics"] == two["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "no/such/folder"}, "no/such/folder is not a folder"),
        ({"shards": "no/such/shards"}, "^shards: no/such/shards does not exist"),
        ({"num_shown": 0}, "num_shown is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "tpu9"}, "device: tpu9"),
        ({"solver": "magic"}, "solver"),
        ({"num_steps": 0}, "num_steps is 0"),
    ],
)
def test_mistakes_write_nothing(paths, tmp_path, options, message):
    arguments = {"tokenizer": paths[0], "shards": paths[1], "output": str(tmp_path / "out")} | options
    with pytest.raises(UserError, match=message):
        reconstruct(**arguments)
    assert not any((tmp_path / "out").glob("*"))
