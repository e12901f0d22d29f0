"""CLIP score of `dar evaluate` against the cosine by hand, on a tiny random CLIP of transformers; what is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import NETWORK, npz, pixels
from PIL import Image
from tiny_encoder import write_encoder
from tiny_models import make_ar, make_tokenizer

from dar_lightning import DARPipeline
from dar_lightning.cli import main
from dar_lightning.commands.compare import compare
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256
from dar_lightning.metrics.clip import captions_sha256
from dar_lightning.metrics.images import open_images
from dar_lightning.records.drawn import write_drawn
from dar_lightning.records.pixels import image_digests, set_sha256

LETTERS = "adelpr"
PROMPTS = ["a red apple", "apple", "a " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP of 8 pixels and 12 tokens, with the kind of tokenizer and image processor that CLIPs have."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokenizer = transformers.CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    torch.manual_seed(2)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    text = sizes | dict(vocab_size=len(words), max_position_embeddings=12, bos_token_id=0, eos_token_id=1)
    vision = sizes | dict(image_size=8, patch_size=4)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def by_hand(folder: Path, images: np.ndarray, captions: list[str]) -> float:
    """100 times the mean cosine of projected features, one pair after another."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    prepare = transformers.CLIPImageProcessor.from_pretrained(folder)
    cosines = []
    for image, caption in zip(images, captions, strict=True):
        ids = [0]
        for word in caption.split():
            ids += [*(2 + LETTERS.index(letter) for letter in word[:-1]), 8 + LETTERS.index(word[-1])]
        ids = [*ids[:11], 1]  # an end in any case
        text = model.text_projection(model.text_model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1])
        read = prepare(torch.from_numpy(image).permute(2, 0, 1), return_tensors="pt")["pixel_values"]
        seen = model.visual_projection(model.vision_model(pixel_values=read).pooler_output)
        cosines.append(torch.cosine_similarity(text, seen).item())
    return 100 * float(np.mean(cosines))


def drawn(path: Path, images: np.ndarray, captions: list[str]) -> str:
    """An npz as `dar sample --prompt` leaves it."""
    write_drawn(path, {"captions": captions}, set_sha256(image_digests(images)))
    return npz(path, images)


def captioned(path: Path, images: np.ndarray, captions: list[str | None]) -> str:
    """Shards with captions beside the pictures, where there is one."""
    samples = []
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        Image.fromarray(image).save(file := io.BytesIO(), "PNG")
        text = {} if caption is None else {"txt": f"{caption}\nanother one".encode()}
        samples.append((f"{number:05d}", {"png": file.getvalue()} | text))
    ShardIndex(path, (write_shard(path / "000000.tar", samples),), ()).save()
    return str(path)


def test_the_score_is_the_cosine_by_hand(folder, tmp_path, capsys):
    images, real = pixels(9, 0), pixels(8, 1)
    captions, other = [PROMPTS[i % 3] for i in range(9)], [PROMPTS[i % 2] for i in range(8)]
    samples = drawn(tmp_path / "s.npz", images, captions)
    reference = captioned(tmp_path / "real", real, other)
    output = str(tmp_path / "o.json")
    result = evaluate(samples, reference, NETWORK, output, clip=str(folder), batch_size=4, device="cpu")
    expected = {"samples": by_hand(folder, images, captions), "reference": by_hand(folder, real, other)}
    assert min(expected.values()) > 1, "this seed tells"
    for name, score in expected.items():
        assert result["metrics"][f"clip_score_{name}"] == pytest.approx(score, abs=1e-3)
    sha256 = file_sha256(folder / "model.safetensors")
    assert result["protocol"]["clip"] == {"model": str(folder), "sha256": sha256}
    assert "captions" not in result["protocol"]["samples"]
    told = result["protocol"]["clip_captions_sha256"]
    assert told == {"samples": captions_sha256(captions), "reference": captions_sha256(other)}
    assert "clip_score_samples" in capsys.readouterr().out

    same = drawn(tmp_path / "t.npz", pixels(9, 2), captions[::-1])
    evaluate(same, reference, NETWORK, str(tmp_path / "p.json"), clip=str(folder), device="cpu")
    less = drawn(tmp_path / "u.npz", pixels(9, 3), ["apple"] * 9)
    evaluate(less, reference, NETWORK, str(tmp_path / "q.json"), clip=str(folder), device="cpu")
    capsys.readouterr()
    compare(f"{output},{tmp_path}/p.json")
    assert "clip_score_samples" in capsys.readouterr().out.split("not compar")[0]
    compare(f"{output},{tmp_path}/q.json")
    assert "clip_captions_sha256" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_pictures_of_prompts(folder, tmp_path):
    """What `dar sample --prompt` draws knows its prompts, picture by picture."""
    options = {"vocabulary": "[PAD] [UNK] a red apple", "length": 3}
    ar = make_ar(condition="caption_tokens", condition_options=options)
    DARPipeline(make_tokenizer(), ar).save_pretrained(tmp_path / "pipeline")
    words = ["sample", f"--pipeline={tmp_path}/pipeline", f"--prompt={json.dumps(PROMPTS[:2])}", "--per_class=3"]
    main([*words, f"--output={tmp_path}/drawn", "--frames=1", "--device=cpu"])
    samples = f"{tmp_path}/drawn/samples.npz"
    output = str(tmp_path / "o.json")
    result = evaluate(samples, npz(tmp_path / "r.npz", pixels(4, 0, 32)), NETWORK, output, clip=str(folder))
    expected = by_hand(folder, np.load(samples)["arr_0"], [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3)
    assert result["metrics"]["clip_score_samples"] == pytest.approx(max(expected, 0), abs=1e-3)
    assert "clip_score_reference" not in result["metrics"], "it has no captions"


def test_what_is_refused(folder, tmp_path, pipeline):
    images = pixels(6, 0)
    plain, output = npz(tmp_path / "plain.npz", images), str(tmp_path / "o.json")
    some = captioned(tmp_path / "some", images, ["apple", None, "apple", None, "apple", "apple"])
    opened = open_images(some, "--samples", None)
    assert opened.captions is opened.captions, "shards are read once"
    for samples, missing in ((plain, 6), (some, 2)):
        with pytest.raises(UserError, match=f"^--samples: {missing} of 6 images have no caption, which the CLIP score"):
            evaluate(samples, plain, NETWORK, output, clip=str(folder))
    with pytest.raises(UserError, match=r"^--clip: .* is a pipeline, drawn without prompts; give dar sample"):
        evaluate(pipeline, plain, NETWORK, output, clip=str(folder))
    told = drawn(tmp_path / "told.npz", images, ["apple"] * 6)
    write_encoder(tmp_path / "bert", "bert")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/pytorch_model.bin").touch()
    for clip, said in (
        ("no/such", "--clip: no/such is not a folder"),
        (str(tmp_path / "pickled"), r"--clip: .*pickled has no \.safetensors"),
        (str(tmp_path / "bert"), "--clip: .*bert has a model of type bert; give a CLIP$"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            evaluate(told, plain, NETWORK, output, clip=clip)
        assert "\n" not in str(raised.value)
    assert not Path(output).exists()


WITHOUT = """
import sys
from importlib import metadata

def version(name, known=metadata.version):
    if name == "transformers":
        raise metadata.PackageNotFoundError(name)
    return known(name)

metadata.version = version  # which torchmetrics asks
sys.modules["transformers"] = None
from dar_lightning.commands import evaluate
try:
    evaluate.CLIP(sys.argv[1], "--clip")
except evaluate.UserError as error:
    print(error)
"""


def test_without_transformers(tmp_path):
    """`dar evaluate` needs it for the CLIP score alone, which says what to install."""
    (tmp_path / "model.safetensors").touch()
    child = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True)
    said = f"--clip: {tmp_path} needs transformers: pip install 'dar-lightning[text]'\n"
    assert (child.stdout, child.returncode) == (said, 0), child.stderr
