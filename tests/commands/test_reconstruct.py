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
    assert protocol["tokenizer"] == model_sha256(make_tokenizer())
    assert protocol["ema"] == {"tokenizer": None}, "saved by hand, nobody noted it"
    assert (protocol["num_images"], protocol["shards"], protocol["num_steps"], protocol["seed"]) == (7, paths[1], 4, 2)


def tokens_decide(chosen: list[int]) -> dict[str, float]:
    """Image by image: PSNRs between decodings of own and of exchanged tokens, from one noise and from another."""
    tokenizer, (originals, _, codes) = make_tokenizer(), by_hand()
    found = {}
    for number, following in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        generator = image_generator(2, number)
        noise, other_noise = (torch.randn(1, 3, SIZE, SIZE, generator=generator) for _ in range(2))

        def pixels(group: int, noise: torch.Tensor, number=number, following=following) -> np.ndarray:
            first = TOKENS // GROUPS * (group - 1)
            mixed = [*codes[number].tolist()[:first], *codes[following].tolist()[first:]]
            image = tokenizer.detokenize(torch.tensor([mixed]), noise)[0]
            return ((image.clamp(-1, 1) + 1) * 127.5).round().numpy()

        photo, own = originals[number].transpose(2, 0, 1), pixels(GROUPS + 1, noise)
        pairs = {"own_tokens": (own, photo), "other_tokens": (pixels(1, noise), photo)}
        pairs["same_tokens"] = (own, pixels(GROUPS + 1, other_noise))
        pairs |= {f"exchanged_from_group_{m}": (own, pixels(m, noise)) for m in (1, 2, 3)}
        for name, (one, two) in pairs.items():
            psnr = 10 * np.log10(255**2 / np.square(one - two.astype(float)).mean())
            found.setdefault(f"psnr_{name}", []).append(psnr)
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_how_much_the_tokens_decide(written, paths, tmp_path, capsys):
    reconstruct(*paths, str(tmp_path / "three"), num_exchanged=3, seed=2, batch_size=2)  # images 0, 3 and 6
    shown = capsys.readouterr().out
    for folder, chosen in ((written, list(range(COUNT))), (tmp_path / "three", [0, 3, 6])):
        result = json.loads((folder / "reconstruction.json").read_text())
        expected = tokens_decide(chosen)
        for name, value in expected.items():
            assert result["metrics"][name] == pytest.approx(value, abs=0.01), name
        digests = [hashlib.sha256(np.array(picture(number)).tobytes()).digest() for number in chosen]
        images = {"n": len(chosen), "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}
        assert result["protocol"]["token_influence"]["images"] == images
    own, other, same = (expected[f"psnr_{name}_tokens"] for name in ("own", "other", "same"))
    assert f"({own:.2f} with own, {other:.2f} with other tokens; {same:.2f} between two noises)" in shown


def test_no_images_to_exchange(written, paths, tmp_path):
    reconstruct(*paths, str(tmp_path), num_exchanged=0, num_shown=3, seed=2)
    one, two = (json.loads((folder / "reconstruction.json").read_text()) for folder in (written, tmp_path))
    assert "token_influence" not in two["protocol"]
    assert two["metrics"] == {name: one["metrics"][name] for name in two["metrics"]}
    assert set(two["metrics"]) == {"psnr", "ssim", "codebook_use", "codebook_perplexity"}


def test_compare_takes_how_much_the_tokens_decide_of_the_same_images(written, paths, tmp_path, capsys):
    for name, options in {"euler": {"solver": "euler", "seed": 3}, "three": {"num_exchanged": 3}}.items():
        reconstruct(*paths, str(tmp_path / name), **options)
    one, euler, three = (
        f"{folder}/reconstruction.json" for folder in (written, tmp_path / "euler", tmp_path / "three")
    )
    capsys.readouterr()
    compare(f"{one},{euler}")
    names = ["own_tokens", "other_tokens", "same_tokens", *(f"exchanged_from_group_{m}" for m in (1, 2, 3))]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == [f"psnr_{name}" for name in names]
    values = json.loads((tmp_path / "euler" / "reconstruction.json").read_text())["metrics"]
    assert lines[1].split()[1:] == [f"{values[f'psnr_{name}']:.4f}" for name in names]
    with pytest.raises(UserError, match=r"token_influence\.images\.n: 7, 3; token_influence\.images\.sha256: "):
        compare(f"{one},{three}")


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
