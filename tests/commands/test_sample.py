"""`dar sample` on a small random pipeline: the files, and that each image is a function of (seed, class, number)."""

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refusal, refused
from tiny_models import CLASSES, GROUPS, SIZE, TOKENS, fit_ar, make_pipeline, picture, write_tokens

from dar_lightning.cli import main
from dar_lightning.commands.sample import preview_numbers, sample
from dar_lightning.data.transforms import to_float, to_tensor, to_uint8
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import image_seed
from dar_lightning.generation.editing import prefix_lengths
from dar_lightning.generation.grids import LINE, image_grid
from dar_lightning.generation.pipeline import DARPipeline
from dar_lightning.generation.predict import GenerationModule


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        assert set(file.files) == {"arr_0", "labels"}
        return file["arr_0"], file["labels"]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def png_facts(path: Path) -> dict:
    """What a PNG of images/ tells of itself."""
    return json.loads(Image.open(path).text["dar"])


def generators(seed: int, label: int, number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(image_seed(seed, label, number))]


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory) -> Path:
    """Three images of each class, seed 0."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    sample(str(folder), pipeline, per_class=3)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    picture(3).save(path)
    return str(path)


def test_what_it_writes(whole):
    names = {"samples.png", "previews.png", "samples.npz", "samples.json", "stream.webp", "images"}
    assert {path.name for path in whole.iterdir()} == names
    images, labels = arrays(whole)
    assert (images.dtype, images.shape) == (np.uint8, (12, SIZE, SIZE, 3))
    assert (labels.dtype, labels.tolist()) == (np.int64, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    assert len({image.tobytes() for image in images}) == 12
    rows = torch.from_numpy(images).permute(0, 3, 1, 2).unflatten(0, (4, 3))
    assert np.array_equal(pixels_of(whole / "samples.png"), image_grid(rows, CLASSES))
    # the film strip ends with the first image of each class
    strip = pixels_of(whole / "previews.png")
    blank = torch.zeros(4, GROUPS, 3, SIZE, SIZE, dtype=torch.uint8)
    assert strip.shape == np.asarray(image_grid(blank, CLASSES, captions=["8 tokens"] * GROUPS)).shape
    side, end = 3 * SIZE, len(strip) - LINE - 4  # enlarged to 96; the numbers of tokens stand below
    assert np.array_equal(strip[end - side : end, -side - 4 : -4][::3, ::3], images[9])


def test_an_image_depends_on_seed_class_and_number_alone(pipeline, whole, tmp_path):
    def read(folder: Path) -> dict[str, np.ndarray]:
        return {path.name: pixels_of(path) for path in (folder / "images").iterdir()}

    def draw(name: str, **options) -> dict[str, np.ndarray]:
        sample(str(tmp_path / name), pipeline, **options)
        return read(tmp_path / name)

    expected = read(whole)
    split, other = draw("split", per_class=3, batch_size=5), draw("other", per_class=2, classes="blue, red")
    assert split.keys() == expected.keys()
    assert set(other) == {"002-0.png", "002-1.png", "000-0.png", "000-1.png"}
    # 8-bit values may differ by one where the order of additions in a batch moves a value over a half
    assert all(np.abs(images[key] - expected[key]).max() <= 1 for images in (split, other) for key in images)
    again = draw("again", per_class=1, seed=1)
    assert not any(np.array_equal(again[key], expected[key]) for key in again)


def test_several_prefixes_of_one_layout(pipeline, photo, tmp_path):
    sample(str(tmp_path), pipeline, layout=photo, prefix="2,6", classes="0,2", per_class=2)
    tokens = make_pipeline().tokenizer.tokenize(to_float(to_tensor(picture(3))[None]))[0].tolist()
    codes = {path.name: png_facts(path)["codes"] for path in (tmp_path / "images").iterdir()}
    assert set(codes) == {f"{label:03d}-{number}-{m}.png" for label in (0, 2) for number in (0, 1) for m in (2, 6)}
    assert all(drawn[: int(name[-5])] == tokens[: int(name[-5])] for name, drawn in codes.items())
    # a row per class: the photo, two images that keep 2 tokens, two that keep 6
    images, labels = arrays(tmp_path)
    assert labels.tolist() == [0, 0, 2, 2] * 2
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    rows = torch.stack([torch.stack([to_tensor(picture(3)), *images[[i, i + 1, i + 4, i + 5]]]) for i in (0, 2)])
    columns = ["reference", *(f"{m} kept, 0.{number}" for m in (2, 6) for number in (0, 1))]
    assert np.array_equal(pixels_of(tmp_path / "layout.png"), image_grid(rows, ["red", "blue"], columns))


def test_variations_keep_the_first_tokens_of_the_first_image(pipeline, whole, tmp_path):
    sample(str(tmp_path), pipeline, classes="0,2", per_class=2, variations=True, prefix=5)
    varied = {path.name: png_facts(path)["codes"] for path in (tmp_path / "images").iterdir()}
    assert set(varied) == {"000-1.png", "000-2.png", "002-1.png", "002-2.png"}
    for name, codes in varied.items():
        first, same = (png_facts(whole / "images" / path)["codes"] for path in (f"{name[:3]}-0.png", name))
        assert codes[:5] == first[:5] != same[:5]
        assert codes != first
    grid, side = pixels_of(tmp_path / "variations.png"), 3 * SIZE
    left = grid.shape[1] - 3 * (side + 4)
    original = pixels_of(whole / "images/002-0.png")
    assert np.array_equal(grid[-side - 4 : -4, left : left + side][::3, ::3], original)


@pytest.mark.parametrize("kind", ["free", "layout", "variations"])
def test_the_record_and_each_png_say_how_to_draw_it_again(pipeline, photo, tmp_path, kind):
    out, again = tmp_path / "out", tmp_path / "again"
    options = {"free": {}, "layout": {"layout": photo, "prefix": "2,6"}, "variations": {"variations": True}}[kind]
    sample(str(out), pipeline, classes="blue,1", per_class=2, guidance=(1.0, 3.0), top_k=9, seed=4, **options)
    record, pipe = record_of(out), DARPipeline.from_pretrained(pipeline)
    expected = {"weights": {"tokenizer": model_sha256(pipe.tokenizer), "ar": model_sha256(pipe.ar)}}
    expected |= {"classes": ["blue", "green"], "guidance": [1.0, 3.0], "top_k": 9, "seed": 4}
    expected |= {"layout_sha256": hashlib.sha256(Path(photo).read_bytes()).hexdigest() if kind == "layout" else None}
    expected |= {"prefix": {"free": None, "layout": "2,6", "variations": str(TOKENS // GROUPS)}[kind]}
    assert expected.items() <= record.items()
    # the command draws the same files, bit by bit, and what they say
    words = shlex.split(record["command"])
    assert words[:2] == ["dar", "sample"]
    main([*words[1:-1], str(again)])
    for file in out.rglob("*.*"):
        if file.name != "samples.json":  # which says where it is
            assert file.read_bytes() == (again / file.relative_to(out)).read_bytes()
    # a PNG alone says enough; it holds the tokens that it kept
    path = out / "images" / ("001-1-6.png" if kind == "layout" else "001-1.png")
    about = png_facts(path)
    facts = {"class": "green", "label": 1, "seed": 4, "number": 1, "weights": record["weights"]}
    assert facts.items() <= about.items()
    prefix = torch.tensor([about["codes"][: about["kept_tokens"]]], dtype=torch.long)
    drawn = {"guidance": tuple(about["guidance"]), "top_k": about["top_k"], "prefix": prefix}
    image = pipe.generate(torch.tensor([1]), generator=generators(4, 1, 1), **drawn)
    assert np.abs(to_uint8(image)[0].permute(1, 2, 0).numpy() - pixels_of(path)).max() <= 1


def test_the_animation_shows_every_preview_and_fades_in_between(pipeline, tmp_path):
    sample(str(tmp_path), pipeline, classes="0", per_class=1, frames=2, num_previews=2)
    with Image.open(tmp_path / "stream.webp") as animation:
        assert animation.n_frames == 2 * (GROUPS - 1) + 1
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("RGB")).astype(int)
    image_grid(torch.from_numpy(arrays(tmp_path)[0]).permute(0, 3, 1, 2)[None]).save(tmp_path / "x.webp", quality=85)
    last = last[: 3 * SIZE + 8]  # without what is written below
    still = np.asarray(Image.open(tmp_path / "x.webp").convert("RGB")).astype(int)  # as lossy
    assert np.abs(last - still).mean() < 6 < np.abs(np.roll(last, 9, axis=1) - still).mean()
    blank = torch.zeros(1, 2, 3, SIZE, SIZE, dtype=torch.uint8)
    strip = np.asarray(image_grid(blank, ["red"], captions=[f"{TOKENS // 2} tokens", f"{TOKENS} tokens"]))
    drawn = pixels_of(tmp_path / "previews.png")
    assert np.array_equal(drawn[-LINE:], strip[-LINE:])


def test_numbers_of_previews_and_of_kept_tokens():
    assert preview_numbers(None, 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert preview_numbers(1, 8) == [8]
    assert preview_numbers(3, 8) == [3, 6, 8]
    assert prefix_lengths(None, TOKENS, GROUPS) == [TOKENS // GROUPS]
    assert prefix_lengths("2, 6", TOKENS, GROUPS) == [2, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "violet"}, "class 'violet' is unknown: give 0 to 3 or one of red, green"),
        ({"classes": "red,0"}, "classes is red,0: name each class once"),
        ({"guidance": "strong"}, "guidance is 'strong': give a number, or a,b"),
        ({"per_class": 0}, "per_class is 0"),
        ({"prefix": 3}, "prefix is set without layout, variations or image"),
        ({"layout": "PHOTO", "variations": True}, "layout and variations are both set"),
        ({"layout": "PHOTO", "prefix": "2,x"}, "prefix is x: keep from 1 to 7"),
        ({"layout": "PHOTO", "prefix": "2,2"}, "prefix is 2,2: give each number once"),
        ({"layout": "PHOTO", "prefix": 8}, "prefix is 8: keep from 1 to 7 tokens"),
        ({"layout": "no.png"}, "layout: no.png cannot be read: No such file"),
        ({"num_previews": 5}, "num_previews is 5: this tokenizer has from 1 to 4"),
        ({"frames": 0}, "frames is 0: must be at least 1"),
        ({"tokenizer": "fruit64", "ar": "fruit64"}, "give pipeline .* or else tokenizer and ar"),
        ({"pipeline": None, "ar": "fruit64"}, "give pipeline .* or else tokenizer and ar"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"solver": "magic"}, "solver"),
    ],
)
def test_mistakes_write_nothing(pipeline, photo, tmp_path, options, message):
    options = {name: photo if value == "PHOTO" else value for name, value in options.items()}
    refused(message, sample, str(tmp_path / "out"), **{"pipeline": pipeline} | options)
    assert not any((tmp_path / "out").glob("*"))


def test_the_progress_bar_counts_the_tokens_that_are_drawn(pipeline, photo, tmp_path, capsys):
    """Of guidance that is typed as two numbers, too."""
    words = ["--classes=0,1", "--per_class=1", "--guidance=1.1,8", f"--layout={photo}", "--prefix=3,7"]
    main(["sample", f"--pipeline={pipeline}", *words, f"--output={tmp_path}"])
    drawn = 2 * (TOKENS - 3) + 2 * (TOKENS - 7)
    assert f"{drawn}/{drawn} [" in (bar := capsys.readouterr().err)
    assert "tokens/s]" in bar
    assert record_of(tmp_path)["guidance"] == [1.1, 8.0]


def test_a_checkpoint_draws_as_the_folder_exported_of_it(pipeline, whole, tmp_path):
    """Its average, where it has one. Two folders draw as the pipeline that they make up."""
    tokens, tokenizer = write_tokens(tmp_path / "tokens", 8), f"{pipeline}/tokenizer"
    command = fit_ar(tokens, tokens, tmp_path / "ar", max_steps=3, limit_val_batches=0)
    command += [f"--model.init_args.init_from={pipeline}/ar", "--model.init_args.optimizer.lr=0.05"]
    command += ["--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint"]
    command += ["--trainer.callbacks.save_last=true", "--trainer.callbacks+=dar_lightning.training.callbacks.EMA"]
    main([*map(str, command), "--trainer.callbacks.decay=0.5"])
    checkpoint = str(tmp_path / "ar/checkpoints/last.ckpt")
    for weights in ("auto", "raw"):
        main(["export", "--ckpt", checkpoint, "--output", str(tmp_path / weights), "--weights", weights])
    records = {}
    for ar in (checkpoint, str(tmp_path / "auto"), str(tmp_path / "raw"), f"{pipeline}/ar"):
        out = tmp_path / "drawn" / Path(ar).name
        sample(str(out), tokenizer=tokenizer, ar=ar, per_class=3)
        records[out.name] = record_of(out)
    record = records["last.ckpt"]
    assert record["classes"] == [str(label) for label in range(len(CLASSES))], "checkpoints know no names"
    assert record["ema"]["ar"] is True
    for facts in ("pixels_sha256", "weights"):
        assert record[facts] == records["auto"][facts] != records["raw"][facts]
        assert records["ar"][facts] == record_of(whole)[facts]
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    assert record_of(tmp_path / "again")["pixels_sha256"] == record["pixels_sha256"]
    with pytest.raises(UserError, match=r"config\.json"):
        sample(str(tmp_path / "mixed"), tokenizer=f"{pipeline}/tokenizer/config.json", ar=f"{pipeline}/ar")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(path)
    return str(path)


def test_dar_sample(folder, tmp_path, capsys):
    words = ["--pipeline", folder, "--classes", "red,grey", "--per_class", "1", "--frames", "1", "--guidance", "2"]
    drawn = []
    for window in (0, 5):
        main(["sample", *words, "--jacobi", str(window), "--output", str(tmp_path / f"{window}")])
        with np.load(tmp_path / f"{window}" / "samples.npz") as file:
            drawn.append(file["arr_0"].astype(int))
    assert abs(drawn[0] - drawn[1]).max() <= 1
    plain, record = (json.loads((tmp_path / f"{window}" / "samples.json").read_text()) for window in (0, 5))
    assert (record["jacobi"], record["decoding"]) == (5, "Jacobi")
    assert "jacobi" not in plain
    assert "--jacobi 5" in record["command"]
    said = refusal(capsys, ["sample", *words, "--jacobi", 9, "--output", tmp_path / "refused"])
    assert "jacobi is 9: it must be 0 (off) or a window of up to 8 tokens" in said


def test_generation_module(folder):
    batch = {"index": torch.arange(2), "label": torch.tensor([0, 3])}
    one, other = (GenerationModule(folder, rows=2, **more).predict_step(batch, 0).int() for more in ({}, {"jacobi": 8}))
    assert (one - other).abs().max() <= 1
    assert GenerationModule(folder, rows=2, jacobi=8).protocol["jacobi"] == 8
