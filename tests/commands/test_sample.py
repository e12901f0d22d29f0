"""`dar sample` on a small random pipeline: the files, and that each image is a function of (seed, class, number)."""

import hashlib
import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CLASSES, GROUPS, SIZE, TOKENS, make_pipeline, picture

from dar_lightning.cli import main
from dar_lightning.commands.sample import preview_numbers, sample
from dar_lightning.data.transforms import to_float, to_tensor, to_uint8
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import image_seed
from dar_lightning.generation.editing import prefix_lengths
from dar_lightning.generation.grids import image_grid
from dar_lightning.generation.pipeline import DARPipeline


def arrays(folder) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        assert set(file.files) == {"arr_0", "labels"}
        return file["arr_0"], file["labels"]


def test_what_it_writes(pipeline, tmp_path):
    sample(str(tmp_path / "out"), pipeline, per_class=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "samples.png",
        "previews.png",
        "samples.npz",
        "samples.json",
        "stream.webp",
        "images",
    }
    images, labels = arrays(tmp_path / "out")
    assert (images.dtype, images.shape) == (np.uint8, (8, SIZE, SIZE, 3))
    assert (labels.dtype, labels.tolist()) == (np.int64, [0, 0, 1, 1, 2, 2, 3, 3])
    assert len({image.tobytes() for image in images}) == 8
    rows = torch.from_numpy(images).permute(0, 3, 1, 2).unflatten(0, (4, 2))
    grid = np.asarray(image_grid(rows, CLASSES))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "samples.png")), grid)
    # the film strip ends with the first image of each class
    strip = np.asarray(Image.open(tmp_path / "out" / "previews.png"))
    blank = torch.zeros(4, GROUPS, 3, SIZE, SIZE, dtype=torch.uint8)
    assert strip.shape == np.asarray(image_grid(blank, CLASSES, ["group 1"] * GROUPS)).shape
    side = 3 * SIZE  # enlarged to 96
    assert np.array_equal(strip[-side - 4 : -4, -side - 4 : -4][::3, ::3], images[6])


def test_an_image_depends_on_seed_class_and_number_alone(pipeline, tmp_path):
    def draw(name: str, **options) -> dict[tuple[int, int], np.ndarray]:
        sample(str(tmp_path / name), pipeline, **options)
        images, labels = arrays(tmp_path / name)
        per_class = len(images) // len(set(labels))
        return {(int(label), i % per_class): image for i, (image, label) in enumerate(zip(images, labels, strict=True))}

    whole = draw("whole", per_class=3)
    split = draw("split", per_class=3, batch_size=5)
    other = draw("other", per_class=2, classes="blue, red")
    again = draw("again", per_class=3, seed=1)
    # 8-bit values may differ by one where the order of additions in a batch moves a value over a half
    assert all(np.abs(split[key].astype(int) - whole[key]).max() <= 1 for key in whole)
    assert all(np.abs(other[key].astype(int) - whole[key]).max() <= 1 for key in other)
    assert other.keys() == {(2, 0), (2, 1), (0, 0), (0, 1)}
    assert not any(np.array_equal(again[key], whole[key]) for key in whole)


def drawn_codes(folder) -> dict[str, list[int]]:
    """The tokens of each PNG, which carries them."""
    return {path.name: json.loads(Image.open(path).text["dar"])["codes"] for path in (folder / "images").iterdir()}


def test_several_prefixes_of_one_layout(pipeline, tmp_path):
    picture(3).save(tmp_path / "photo.png")
    options = {"layout": str(tmp_path / "photo.png"), "prefix": "2,6", "classes": "0,2", "per_class": 2}
    sample(str(tmp_path / "out"), pipeline, **options)
    tokens = make_pipeline().tokenizer.tokenize(to_float(to_tensor(picture(3))[None]))[0].tolist()
    codes = drawn_codes(tmp_path / "out")
    assert set(codes) == {f"{label:03d}-{number}-{m}.png" for label in (0, 2) for number in (0, 1) for m in (2, 6)}
    for name, drawn in codes.items():
        kept = int(name[-5])
        assert drawn[:kept] == tokens[:kept]
    # a row per class: the photo, two images that keep 2 tokens, two that keep 6
    images, labels = arrays(tmp_path / "out")
    assert labels.tolist() == [0, 0, 2, 2] * 2
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    reference = to_tensor(picture(3))
    rows = torch.stack([torch.stack([reference, *images[[i, i + 1, i + 4, i + 5]]]) for i in (0, 2)])
    columns = ["reference", *(f"{m} kept, 0.{number}" for m in (2, 6) for number in (0, 1))]
    grid = np.asarray(image_grid(rows, ["red", "blue"], columns))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/layout.png")), grid)


def test_variations_keep_the_first_tokens_of_the_first_image(pipeline, tmp_path):
    sample(str(tmp_path / "whole"), pipeline, classes="0,2", per_class=3)
    sample(str(tmp_path / "out"), pipeline, classes="0,2", per_class=2, variations=True, prefix=5)
    whole, varied = drawn_codes(tmp_path / "whole"), drawn_codes(tmp_path / "out")
    assert set(varied) == {"000-1.png", "000-2.png", "002-1.png", "002-2.png"}
    for name, codes in varied.items():
        assert codes[:5] == whole[f"{name[:3]}-0.png"][:5] != whole[name][:5]
        assert codes != whole[f"{name[:3]}-0.png"]
    grid = np.asarray(Image.open(tmp_path / "out/variations.png"))
    original = np.asarray(Image.open(tmp_path / "whole/images/002-0.png"))
    side, left = 3 * SIZE, grid.shape[1] - 3 * (3 * SIZE + 4)
    assert np.array_equal(grid[-side - 4 : -4, left : left + side][::3, ::3], original)


def test_the_record_and_each_png_say_how_to_draw_it_again(pipeline, tmp_path):
    sample(str(tmp_path / "out"), pipeline, classes="blue,1", per_class=2, guidance=(1.0, 3.0), top_k=9, seed=4)
    path = tmp_path / "out/images/001-1.png"
    with Image.open(path) as image:
        about, pixels = json.loads(image.text["dar"]), np.asarray(image)
    assert (about["class"], about["label"], about["seed"], about["number"]) == ("green", 1, 4, 1)
    assert np.array_equal(arrays(tmp_path / "out")[0][3], pixels)
    record = json.loads((tmp_path / "out/samples.json").read_text())
    pipe = DARPipeline.from_pretrained(pipeline)
    assert record["weights"] == {"tokenizer": model_sha256(pipe.tokenizer), "ar": model_sha256(pipe.ar)}
    assert about["weights"] == record["weights"]
    assert record["classes"] == ["blue", "green"]
    assert (record["guidance"], record["top_k"], record["seed"], record["prefix"]) == ([1.0, 3.0], 9, 4, None)
    words = shlex.split(record["command"])
    assert words[:2] == ["dar", "sample"]
    main([*words[1:-1], str(tmp_path / "again")])
    for file in (tmp_path / "out").rglob("*.*"):
        if file.suffix not in (".npz", ".json"):  # a zip file holds the time, and the record where it is
            assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "out")).read_bytes()
    # and from what the file says alone
    guidance = tuple(about["guidance"])
    noise_and_tokens = torch.Generator().manual_seed(image_seed(about["seed"], about["label"], about["number"]))
    drawn = pipe.generate(torch.tensor([about["label"]]), guidance=guidance, top_k=9, generator=[noise_and_tokens])
    difference = to_uint8(drawn)[0].permute(1, 2, 0).numpy().astype(int) - pixels
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("kind", ["layout", "variations"])
def test_images_that_keep_tokens_are_drawn_again(pipeline, tmp_path, kind):
    photo = tmp_path / "photo.png"
    picture(3).save(photo)
    options = {"layout": str(photo)} if kind == "layout" else {"variations": True}
    options |= {"prefix": "2,6", "classes": "2,0", "per_class": 2, "guidance": (1.0, 3.0), "seed": 4}
    sample(str(tmp_path / "out"), pipeline, **options)
    record = json.loads((tmp_path / "out/samples.json").read_text())
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    drawn = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png"))
    assert len(drawn) == 8 + 2, "images, film strip and grid"
    for name in drawn:  # pixels, and what the files say
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    # the photo is known again
    sha256 = hashlib.sha256(photo.read_bytes()).hexdigest() if kind == "layout" else None
    assert record["layout_sha256"] == sha256
    # a PNG needs none: it holds the tokens that it kept
    with Image.open(tmp_path / "out/images/002-1-6.png") as image:
        about, pixels = json.loads(image.text["dar"]), np.asarray(image).astype(int)
    prefix = torch.tensor([about["codes"][: about["kept_tokens"]]])
    generator = [torch.Generator().manual_seed(image_seed(4, 2, 1))]
    again = DARPipeline.from_pretrained(pipeline).generate(
        torch.tensor([2]), guidance=(1.0, 3.0), prefix=prefix, generator=generator
    )
    assert np.abs(to_uint8(again)[0].permute(1, 2, 0).numpy() - pixels).max() <= 1


def test_the_animation_shows_every_preview_and_fades_in_between(pipeline, tmp_path):
    sample(str(tmp_path), pipeline, classes="0", per_class=1, frames=2, num_previews=2)
    with Image.open(tmp_path / "stream.webp") as animation:
        assert animation.n_frames == 2 * (GROUPS - 1) + 1
        animation.seek(animation.n_frames - 1)
        last = np.asarray(animation.convert("RGB")).astype(int)
    image_grid(torch.from_numpy(arrays(tmp_path)[0]).permute(0, 3, 1, 2)[None]).save(tmp_path / "x.webp", quality=85)
    still = np.asarray(Image.open(tmp_path / "x.webp").convert("RGB")).astype(int)  # as lossy
    assert np.abs(last - still).mean() < 6 < np.abs(np.roll(last, 9, axis=1) - still).mean()
    blank = torch.zeros(1, 2, 3, SIZE, SIZE, dtype=torch.uint8)
    strip = np.asarray(Image.open(tmp_path / "previews.png"))
    assert strip.shape == np.asarray(image_grid(blank, ["red"], ["group 2", "group 4"])).shape


def test_guidance_is_typed_as_two_numbers(pipeline, tmp_path):
    main(["sample", "--pipeline", pipeline, "--classes=0", "--per_class=1", "--guidance=1.1,8", f"--output={tmp_path}"])
    assert json.loads((tmp_path / "samples.json").read_text())["guidance"] == [1.1, 8.0]


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
        ({"per_class": 0}, "per_class 0"),
        ({"prefix": 3}, "prefix is set without layout or variations"),
        ({"layout": "REFERENCE", "variations": True}, "layout and variations are both set"),
        ({"layout": "REFERENCE", "prefix": "2,x"}, "prefix is x: keep from 1 to 7"),
        ({"layout": "REFERENCE", "prefix": "2,2"}, "prefix is 2,2: give each number once"),
        ({"num_previews": 5}, "num_previews is 5: this tokenizer has from 1 to 4"),
        ({"frames": 0}, "frames 0 must be at least 1"),
        ({"tokenizer": "fruit64", "ar": "fruit64"}, "give pipeline .* or else tokenizer and ar"),
        ({"pipeline": None, "ar": "fruit64"}, "give pipeline .* or else tokenizer and ar"),
        ({"layout": "no.png"}, "layout: no.png cannot be read: No such file"),
        ({"layout": "REFERENCE", "prefix": 8}, "prefix is 8: keep from 1 to 7 tokens"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"solver": "magic"}, "solver"),
        ({"num_steps": 0}, "num_steps is 0"),
    ],
)
def test_mistakes_write_nothing(pipeline, tmp_path, options, message):
    picture(0).save(tmp_path / "reference.png")
    if options.get("layout") == "REFERENCE":
        options = options | {"layout": str(tmp_path / "reference.png")}
    with pytest.raises(UserError, match=message):
        sample(str(tmp_path / "out"), **{"pipeline": pipeline} | options)
    assert not any((tmp_path / "out").glob("*"))


def test_the_progress_bar_counts_the_tokens_that_are_drawn(pipeline, tmp_path, capsys):
    sample(str(tmp_path / "free"), pipeline, classes="0,1", per_class=2, batch_size=3)
    assert f"{4 * TOKENS}/{4 * TOKENS} [" in (bar := capsys.readouterr().err)
    assert "tokens/s]" in bar
    picture(0).save(tmp_path / "photo.png")
    layout = {"layout": str(tmp_path / "photo.png"), "prefix": "3,7"}
    sample(str(tmp_path / "layout"), pipeline, classes="0,1", per_class=1, **layout)
    drawn = 2 * (TOKENS - 3) + 2 * (TOKENS - 7)
    assert f"{drawn}/{drawn} [" in capsys.readouterr().err
