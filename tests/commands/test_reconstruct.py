"""`dar reconstruct` against encoding, decoding and measuring by hand."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from tiny_models import CODES, GROUPS, SIZE, TOKENS, make_tokenizer, picture, write_images

from dar_lightning.commands.compare import compare
from dar_lightning.commands.reconstruct import reconstruct
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import image_generator
from dar_lightning.generation.grids import image_grid
from dar_lightning.metrics.reconstruction import token_influence, token_influence_names

COUNT = 7
ORIGINALS = np.stack([np.array(picture(number)).transpose(2, 0, 1) for number in range(COUNT)])  # (7, 3, 32, 32)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("reconstruct")
    make_tokenizer().save_pretrained(root / "tokenizer")
    return str(root / "tokenizer"), write_images(root / "shards", COUNT)


@pytest.fixture(scope="module")
def written(paths, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    reconstruct(*paths, str(folder), num_shown=3, seed=2)
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "reconstruction.json").read_text())


def to_pixels(images: torch.Tensor) -> np.ndarray:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().numpy()


def sha256_of(numbers) -> str:
    digests = (hashlib.sha256(np.array(picture(number)).tobytes()).digest() for number in numbers)
    return hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.fixture(scope="module")
def by_hand() -> tuple[np.ndarray, torch.Tensor]:
    """Previews (7, 4, 3, 32, 32), and codes."""
    tokenizer = make_tokenizer()
    codes = tokenizer.tokenize(torch.from_numpy(ORIGINALS) / 127.5 - 1)
    noise = torch.stack([torch.randn(3, SIZE, SIZE, generator=image_generator(2, i)) for i in range(COUNT)])
    previews = [tokenizer.detokenize(codes, noise, groups=m) for m in range(1, GROUPS + 1)]
    return to_pixels(torch.stack(previews, dim=1)), codes


def test_metrics_and_their_protocol(written, paths, by_hand):
    metrics, protocol = (read(written)[name] for name in ("metrics", "protocol"))
    previews, codes = by_hand
    errors = np.square(previews[:, -1] - ORIGINALS.astype(float)).mean(axis=(1, 2, 3))
    assert metrics["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-3)
    shares = torch.bincount(codes.flatten(), minlength=CODES).double() / codes.numel()
    assert metrics["codebook_use"] == pytest.approx(float((shares > 0).double().mean()))
    perplexity = float(torch.exp(-(shares[shares > 0] * shares[shares > 0].log()).sum()))
    assert metrics["codebook_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    samples = {"tokenizer_sha256": model_sha256(make_tokenizer()), "ema": {"tokenizer": None}, "n": COUNT}
    assert (samples | {"seed": 2, "solver": "adams2", "steps": GROUPS}).items() <= protocol["samples"].items()
    reference = {"shards": paths[1], "crop": f"ADM centre crop to {SIZE}", "n": COUNT}
    assert protocol["reference"] == reference | {"sha256": sha256_of(range(COUNT))}


def tokens_decide(chosen: list[int], codes: torch.Tensor) -> dict[str, float]:
    """Means over these images; tests/metrics compares token_influence with closed forms."""
    images, own, others = torch.from_numpy(ORIGINALS)[chosen], codes[chosen], codes[chosen].roll(-1, dims=0)
    found = token_influence(make_tokenizer(), images, own, others, [image_generator(2, number) for number in chosen])
    return dict(zip(token_influence_names(GROUPS), found.mean(dim=0).tolist(), strict=True))


def test_how_much_the_tokens_decide(written, paths, by_hand, tmp_path, capsys):
    reconstruct(*paths, str(tmp_path / "three"), num_exchanged=3, num_shown=3, seed=2, batch_size=2)  # 0, 3 and 6
    shown = capsys.readouterr().out
    for folder, chosen in ((written, list(range(COUNT))), (tmp_path / "three", [0, 3, 6])):
        expected = tokens_decide(chosen, by_hand[1])
        for name, value in expected.items():
            assert read(folder)["metrics"][name] == pytest.approx(value, abs=0.01), name
        images = {"n": len(chosen), "sha256": sha256_of(chosen)}
        assert read(folder)["protocol"]["token_influence"]["images"] == images
    own, other, same = (expected[f"psnr_{name}_tokens"] for name in ("own", "other", "same"))
    assert f"({own:.2f} with own, {other:.2f} with other tokens; {same:.2f} between two noises)" in shown
    # the batch size changes nothing
    one, three = (read(folder) for folder in (written, tmp_path / "three"))
    for name in ("psnr", "ssim", "codebook_use", "codebook_perplexity"):
        assert one["metrics"][name] == pytest.approx(three["metrics"][name], rel=1e-4)

    compare(f"{written}/reconstruction.json,{tmp_path}/three/reconstruction.json")
    out = capsys.readouterr().out
    assert out.split()[:2] == ["psnr", "ssim"]
    assert "psnr_own_tokens is left out" in out
    assert "token_influence.images.n: 7, 3; token_influence.images.sha256: " in out


def test_images_alone_suffice(written, paths, tmp_path):
    """No index, and no labels but a broken one; no images to exchange."""
    reader = ShardReader(ShardIndex.load(paths[1]))
    samples = [(key, {"png": members["png"]}) for _, key, members in (reader[number] for number in range(COUNT))]
    samples[0][1]["cls"] = b"red"
    write_shard(tmp_path / "plain" / "x.tar", samples)
    reconstruct(paths[0], str(tmp_path / "plain"), str(tmp_path / "out"), num_shown=3, num_exchanged=0, seed=2)
    found = read(tmp_path / "out")
    assert "token_influence" not in found["protocol"]
    assert found["metrics"].keys() == {"psnr", "ssim", "codebook_use", "codebook_perplexity"}
    assert found["metrics"].items() <= read(written)["metrics"].items()


def test_picture(written, by_hand):
    rows = np.concatenate([ORIGINALS[:, None], by_hand[0]], axis=1)[[0, 3, 6]]  # spread over the shards
    columns = ["original", *(f"{TOKENS // GROUPS * m} tokens" for m in range(1, GROUPS + 1))]
    expected = np.asarray(image_grid(torch.from_numpy(rows.astype(np.uint8)), captions=columns))
    drawn = np.asarray(Image.open(written / "reconstructions.png"))
    assert drawn.shape == expected.shape
    assert np.abs(drawn.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "no/such/folder"}, "no/such/folder is not a folder"),
        ({"shards": "no/such/shards"}, "^shards: no/such/shards does not exist"),
        ({"num_shown": 0}, "num_shown is 0"),
        ({"num_exchanged": 1}, "^num_exchanged is 1: another image's tokens need 2 images or more; 0 for none"),
        ({"num_exchanged": -1}, "^num_exchanged is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"device": "tpu9"}, "device: tpu9"),
        ({"solver": "magic"}, "solver"),
    ],
)
def test_mistakes_write_nothing(paths, tmp_path, options, message):
    arguments = {"tokenizer": paths[0], "shards": paths[1], "output": str(tmp_path / "out")} | options
    refused(message, reconstruct, **arguments)
    assert not any((tmp_path / "out").glob("*"))
