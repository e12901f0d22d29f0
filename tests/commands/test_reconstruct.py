"""`dar reconstruct` against encoding, decoding and measuring by hand."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CODES, GROUPS, SIZE, TOKENS, make_tokenizer, picture, write_images

from dar_lightning.commands.compare import compare
from dar_lightning.commands.reconstruct import reconstruct
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import image_generator
from dar_lightning.generation.grids import image_grid

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


def read(folder) -> dict:
    return json.loads((folder / "reconstruction.json").read_text())


def to_pixels(images: torch.Tensor) -> np.ndarray:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().numpy()


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Of identical images as if a single value differed by 1."""
    return 10 * np.log10(255**2 / max(np.square(one - two.astype(float)).mean(), 1 / one.size))


@pytest.fixture(scope="module")
def by_hand() -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Originals (7, 3, 32, 32), previews (7, 4, 3, 32, 32), and codes."""
    tokenizer = make_tokenizer()
    originals = np.stack([np.array(picture(number)).transpose(2, 0, 1) for number in range(COUNT)])
    codes = tokenizer.tokenize(torch.from_numpy(originals) / 127.5 - 1)
    noise = torch.stack([torch.randn(3, SIZE, SIZE, generator=image_generator(2, i)) for i in range(COUNT)])
    previews = [tokenizer.detokenize(codes, noise, groups=m) for m in range(1, GROUPS + 1)]
    return originals, to_pixels(torch.stack(previews, dim=1)), codes


def test_metrics_and_their_protocol(written, paths, by_hand):
    metrics, protocol = (read(written)[name] for name in ("metrics", "protocol"))
    originals, previews, codes = by_hand
    expected = np.mean([psnr(one, two) for one, two in zip(previews[:, -1], originals, strict=True)])
    assert metrics["psnr"] == pytest.approx(expected, abs=1e-3)
    shares = torch.bincount(codes.flatten(), minlength=CODES).double() / codes.numel()
    assert metrics["codebook_use"] == pytest.approx(float((shares > 0).double().mean()))
    perplexity = float(torch.exp(-(shares[shares > 0] * shares[shares > 0].log()).sum()))
    assert metrics["codebook_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    samples = {"tokenizer_sha256": model_sha256(make_tokenizer()), "ema": {"tokenizer": None}, "n": COUNT}
    assert (samples | {"seed": 2, "solver": "adams2", "steps": GROUPS}).items() <= protocol["samples"].items()
    digests = b"".join(hashlib.sha256(np.array(picture(i)).tobytes()).digest() for i in range(COUNT))
    crop = {"shards": paths[1], "crop": f"ADM centre crop to {SIZE}"}
    assert protocol["reference"] == crop | {"n": COUNT, "sha256": hashlib.sha256(digests).hexdigest()}


def tokens_decide(chosen: list[int], originals: np.ndarray, codes: torch.Tensor) -> dict[str, float]:
    """Image by image: PSNRs between decodings of own and of exchanged tokens, from one noise and from another."""
    tokenizer, found = make_tokenizer(), {}
    for number, following in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        generator = image_generator(2, number)
        noise, other_noise = (torch.randn(1, 3, SIZE, SIZE, generator=generator) for _ in range(2))

        def decoded(group: int, noise: torch.Tensor, number=number, following=following) -> np.ndarray:
            first = TOKENS // GROUPS * (group - 1)
            mixed = [*codes[number].tolist()[:first], *codes[following].tolist()[first:]]
            return to_pixels(tokenizer.detokenize(torch.tensor([mixed]), noise)[0])

        photo, own = originals[number], decoded(GROUPS + 1, noise)
        pairs = {"own_tokens": (own, photo), "other_tokens": (decoded(1, noise), photo)}
        pairs["same_tokens"] = (own, decoded(GROUPS + 1, other_noise))
        pairs |= {f"exchanged_from_group_{m}": (own, decoded(m, noise)) for m in (1, 2, 3)}
        for name, pair in pairs.items():
            found.setdefault(f"psnr_{name}", []).append(psnr(*pair))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_how_much_the_tokens_decide(written, paths, by_hand, tmp_path, capsys):
    reconstruct(*paths, str(tmp_path / "three"), num_exchanged=3, num_shown=3, seed=2, batch_size=2)  # 0, 3 and 6
    shown = capsys.readouterr().out
    for folder, chosen in ((written, list(range(COUNT))), (tmp_path / "three", [0, 3, 6])):
        expected = tokens_decide(chosen, by_hand[0], by_hand[2])
        for name, value in expected.items():
            assert read(folder)["metrics"][name] == pytest.approx(value, abs=0.01), name
        digests = b"".join(hashlib.sha256(np.array(picture(number)).tobytes()).digest() for number in chosen)
        images = {"n": len(chosen), "sha256": hashlib.sha256(digests).hexdigest()}
        assert read(folder)["protocol"]["token_influence"]["images"] == images
    own, other, same = (expected[f"psnr_{name}_tokens"] for name in ("own", "other", "same"))
    assert f"({own:.2f} with own, {other:.2f} with other tokens; {same:.2f} between two noises)" in shown
    # the batch size changes nothing
    one, three = (read(folder) for folder in (written, tmp_path / "three"))
    for name in ("psnr", "ssim", "codebook_use", "codebook_perplexity"):
        assert one["metrics"][name] == pytest.approx(three["metrics"][name], rel=1e-4)

    capsys.readouterr()
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
    originals, previews, _ = by_hand
    rows = np.concatenate([originals[:, None], previews], axis=1)[[0, 3, 6]]  # spread over the shards
    columns = ["original", *(f"group {m}" for m in range(1, 5))]
    expected = np.asarray(image_grid(torch.from_numpy(rows.astype(np.uint8)), column_labels=columns))
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
        ({"num_steps": 0}, "num_steps is 0"),
    ],
)
def test_mistakes_write_nothing(paths, tmp_path, options, message):
    arguments = {"tokenizer": paths[0], "shards": paths[1], "output": str(tmp_path / "out")} | options
    with pytest.raises(UserError, match=message):
        reconstruct(**arguments)
    assert not any((tmp_path / "out").glob("*"))
