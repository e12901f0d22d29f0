"""`dar sample` with an image to edit, with drafts of which some are finished, and with images that are alike."""

import hashlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from tiny_models import GROUPS, SIZE, TOKENS, make_pipeline, picture

from dar_lightning.cli import main
from dar_lightning.commands.sample import image_numbers, sample
from dar_lightning.data.transforms import to_float, to_tensor, to_uint8
from dar_lightning.generation.drawing import generators
from dar_lightning.generation.editing import read_mask
from dar_lightning.generation.grids import image_grid


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    picture(3).save(folder / "photo.png")
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (8, 4, 24, 20))
    mask.save(folder / "mask.png")
    Image.new("RGB", (SIZE, SIZE)).save(folder / "black.png")
    Image.new("RGB", (SIZE, SIZE), "white").save(folder / "white.png")
    Image.new("L", (SIZE, 40), "white").save(folder / "tall.png")
    return {path.stem: str(path) for path in folder.iterdir()}


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def drawn(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: pixels_of(path) for path in (folder / "images").iterdir()}


def test_a_mask_is_cropped_as_its_photo():
    pipe, photo = make_pipeline(), Image.new("RGB", (3 * SIZE, 2 * SIZE))
    mask = Image.new("RGB", photo.size)
    mask.paste("white", (SIZE // 2, 0, SIZE + SIZE // 2, 2 * SIZE))  # of the middle square, the left half
    anew = read_mask(pipe, mask, photo.size)
    assert torch.equal(anew, (torch.arange(SIZE) < SIZE // 2).expand(1, 1, SIZE, -1))


def test_an_edit_keeps_what_is_black_and_says_how_to_draw_it_again(pipeline, files, tmp_path):
    options = {"classes": "red,2", "per_class": 2, "guidance": 2.0, "image": files["photo"], "mask": files["mask"]}
    sample(str(tmp_path / "out"), pipeline, **options, start=1, evidence=4, static=True)
    images, photo = drawn(tmp_path / "out"), np.asarray(picture(3)).astype(int)
    anew = pixels_of(Path(files["mask"])) > 0
    assert len(images) == 4
    for image in images.values():
        assert np.array_equal(image[~anew], photo[~anew])
        assert np.abs(image[anew] - photo[anew]).mean() > 1
    # the grid begins with the photo, and with what of it is given
    to_draw = np.where(anew[..., None], 128, photo)
    columns = [photo, to_draw, images["000-0.png"], images["000-1.png"]]
    rows = [columns, [photo, to_draw, images["002-0.png"], images["002-1.png"]]]
    grid = torch.from_numpy(np.array(rows).astype(np.uint8)).permute(0, 1, 4, 2, 3)
    expected = image_grid(grid, ["red", "blue"], ["original", "to draw", "0.0", "0.1"])
    assert np.array_equal(pixels_of(tmp_path / "out/edited.png"), expected)
    strip = torch.zeros(2, GROUPS - 1, 3, SIZE, SIZE, dtype=torch.uint8)  # previews begin after the start
    captions = [f"{TOKENS // GROUPS * m} tokens" for m in range(2, GROUPS + 1)]
    strip = image_grid(strip, ["red", "blue"], captions=captions)
    assert Image.open(tmp_path / "out/previews.png").size == strip.size

    record = json.loads((tmp_path / "out/samples.json").read_text())
    assert (record["static"], record["decoding"]) == (True, "eager"), "a bias is added to what the model says"
    for name, which in (("image_sha256", "photo"), ("mask_sha256", "mask")):
        assert record[name] == hashlib.sha256(Path(files[which]).read_bytes()).hexdigest()
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    assert all(np.array_equal(image, images[name]) for name, image in drawn(tmp_path / "again").items())

    pipe, known = make_pipeline(), torch.from_numpy(~anew)[None, None]
    options = {"image": to_float(to_tensor(picture(3))[None]), "known": known, "start": 1, "evidence": 4.0}
    image = pipe.generate(torch.tensor([2]), guidance=2.0, generator=generators(0, [(2, 1)]), **options)
    assert np.abs(to_uint8(image)[0].permute(1, 2, 0).numpy() - images["002-1.png"]).max() <= 1


def test_an_image_may_also_give_the_first_tokens(pipeline, files, tmp_path):
    options = {"classes": "1", "per_class": 1, "image": files["photo"], "prefix": "2,6"}
    sample(str(tmp_path), pipeline, **options, evidence=0, static=True)
    about = json.loads(Image.open(tmp_path / "images/001-0-6.png").text["dar"])
    tokens = make_pipeline().tokenizer.tokenize(to_float(to_tensor(picture(3))[None]))[0].tolist()
    assert (about["codes"][:6], about["evidence"], about["image"]) == (tokens[:6], 0, files["photo"])
    assert about["decoding"] == "graph"


def test_a_draft_that_is_finished_is_the_image_of_its_number(pipeline, tmp_path):
    common = {"classes": "3", "guidance": 2.0}
    sample(str(tmp_path / "whole"), pipeline, **common, per_class=4)
    sample(str(tmp_path / "drafts"), pipeline, **common, per_class=4, groups=2)
    sample(str(tmp_path / "finished"), pipeline, **common, numbers="3,1")
    whole, finished = drawn(tmp_path / "whole"), drawn(tmp_path / "finished")
    assert set(finished) == {"003-1.png", "003-3.png"}
    assert all(np.abs(image - whole[name]).max() <= 1 for name, image in finished.items())
    about = json.loads(Image.open(tmp_path / "drafts/images/003-2.png").text["dar"])
    assert (len(about["codes"]), about["groups"]) == (2 * TOKENS // GROUPS, 2)
    draft = make_pipeline().generate(torch.tensor([3]), groups=2, guidance=2.0, generator=generators(0, [(3, 2)]))
    draft = to_uint8(draft)[0].permute(1, 2, 0).numpy()
    assert np.abs(draft - pixels_of(tmp_path / "drafts/images/003-2.png")).max() <= 1
    with Image.open(tmp_path / "drafts/stream.webp") as animation:
        assert animation.n_frames == 4 * (2 - 1) + 1


def test_images_that_are_like_one_of_them(pipeline, tmp_path):
    common = {"classes": "3", "guidance": 2.0}
    sample(str(tmp_path / "picked"), pipeline, **common, numbers=1)
    options = {"numbers": 1, "per_class": 2, "variations": True}
    for strength in (0.0, 0.5):
        folder = tmp_path / str(strength)
        sample(str(folder), pipeline, **common, **options, variation_strength=strength)
    original, same, alike = (drawn(tmp_path / name) for name in ("picked", "0.0", "0.5"))
    assert set(same) == set(alike) == {"003-2.png", "003-3.png"}
    assert all(np.abs(image - original["003-1.png"]).max() <= 1 for image in same.values())
    assert not np.array_equal(alike["003-2.png"], alike["003-3.png"])
    codes = [
        json.loads(Image.open(tmp_path / name).text["dar"])["codes"]
        for name in ("picked/images/003-1.png", "0.5/images/003-2.png")
    ]
    assert codes[0] == codes[1]
    record = json.loads((tmp_path / "0.5/samples.json").read_text())
    main([*shlex.split(record["command"])[1:-1], str(tmp_path / "again")])
    assert all(np.array_equal(image, alike[name]) for name, image in drawn(tmp_path / "again").items())


def test_numbers_of_images():
    assert image_numbers(None, 3) == [0, 1, 2]
    assert image_numbers("7, 2", 3) == [7, 2]
    assert image_numbers(0, 3) == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "MASK"}, "mask set without image: give the image that is to be edited"),
        ({"start": 2, "evidence": 3}, "start, evidence set without image"),
        ({"image": "PHOTO", "mask": "TALL"}, "mask: .*tall.png is 32x40 pixels: need the image's 32x32"),
        ({"image": "PHOTO", "mask": "BLACK"}, "mask: .*black.png has nothing white in its middle square: white is"),
        ({"image": "PHOTO", "mask": "WHITE"}, "mask: .*white.png is white all over its middle square: nothing of the"),
        ({"image": "no.png"}, "image: no.png cannot be read: No such file"),
        ({"image": "PHOTO", "mask": "no.png"}, "mask: no.png cannot be read: No such file"),
        ({"image": "PHOTO", "start": 4}, "start is 4: it must be from 0 to 3 groups"),
        ({"image": "PHOTO", "start": 2, "groups": 2}, "groups is 2: .* those after start 2 from 3"),
        ({"image": "PHOTO", "evidence": -1}, "evidence is -1"),
        ({"image": "PHOTO", "layout": "PHOTO"}, "layout and image are both set"),
        ({"groups": 5}, "groups is 5: this pipeline decodes from 1 to 4"),
        ({"numbers": "1,x"}, "numbers is 1,x: give numbers from 0, each once"),
        ({"numbers": "1,1"}, "numbers is 1,1: give numbers from 0, each once"),
        ({"numbers": "1,2", "variations": True}, "numbers is 1,2: variations are of one image"),
        ({"variation_strength": 0.5}, "variation_strength is for variations without prefix and groups"),
        ({"variations": True, "variation_strength": 2}, "variation_strength is 2: must be at least 0, at most 1"),
    ],
)
def test_mistakes_write_nothing(pipeline, files, tmp_path, options, message):
    options = {name: files.get(str(value).lower(), value) for name, value in options.items()}
    refused(f"^{message}", sample, str(tmp_path / "out"), pipeline, **options)
    assert not any((tmp_path / "out").glob("*"))
