"""`dar shard` and `dar evaluate` on folders as people have them: system folders, splits, every format Pillow reads."""

import errno
import json
import os
from pathlib import Path

import pytest
from image_folders import encoded, read, write_images
from image_sets import NETWORK, folder, pixels
from PIL import features
from refusals import refused

from dar_lightning.commands.evaluate import evaluate
from dar_lightning.commands.shard import shard
from dar_lightning.errors import UserError
from dar_lightning.metrics.images import open_images

PICTURES = {f"{name}/{i}.jpg": encoded(10 * number + i) for number, name in enumerate(("cat", "dog")) for i in range(3)}
SYSTEM = {
    "__MACOSX/cat/._0.jpg": b"not a picture",
    ".ipynb_checkpoints/x.jpg": b"",
    "@eaDir/x.jpg": b"",
    "$RECYCLE.BIN/x.jpg": b"",
    "cat/._0.jpg": b"AppleDouble",
    "cat/Thumbs.db": b"",
    "dog/@eaDir/0.jpg": b"",
}


def classes(out: Path) -> list[str]:
    return json.loads((out / "index.json").read_text())["classes"]


def test_system_folders_are_left_out_and_counted(tmp_path, capsys):
    shard(str(write_images(tmp_path / "in", PICTURES | SYSTEM)), str(tmp_path / "out"), workers=1)
    assert classes(tmp_path / "out") == ["cat", "dog"]
    assert sorted({sample["cls"] for sample in read(tmp_path / "out")}) == [b"0", b"1"]
    assert f"{len(SYSTEM)} hidden or system files and folders are left out" in capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    source, listed = write_images(tmp_path / "in", PICTURES), os.scandir

    def scandir(path):
        if Path(path).name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(r"in/dog: cannot be listed \(Permission denied\)", shard, str(source), str(tmp_path / "out"), workers=1)


def test_system_folders_of_samples(tmp_path, capsys):
    source = folder(tmp_path / "in", pixels(8, 0))
    write_images(tmp_path / "in", SYSTEM)
    assert len(open_images(source, "--samples", None)) == 8
    assert f"--samples: {len(SYSTEM)} files and folders of {source} are no images" in capsys.readouterr().out
    evaluate(source, source, NETWORK, str(tmp_path / "o.json"))


@pytest.mark.parametrize("names", [("Train", "Validation"), ("train", "test", "other"), ("TRAINING", "Val"), ("Test",)])
def test_splits_are_no_classes_whatever_their_case(names, tmp_path):
    source = write_images(tmp_path / "in", {f"{name}/0.jpg": encoded(0) for name in names})
    with pytest.raises(UserError, match=rf"^input: .* holds {names[0] if names[0] != 'train' else 'test'}.*no classes"):
        shard(str(source), str(tmp_path / "out"), workers=1)
    assert not (tmp_path / "out").exists()


def test_a_train_may_be_a_class(tmp_path):
    source = write_images(tmp_path / "in", {f"{name}/0.jpg": encoded(0) for name in ("car", "train")})
    shard(str(source), str(tmp_path / "out"), workers=1)
    assert classes(tmp_path / "out") == ["car", "train"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"eel/a.txt": b"x"}, "eel holds no images, only files such as 'eel/a.txt'"),
        ({"eel/a.heic": b"x", "fox/b.heic": b"x"}, r"eel holds no images, only files such as 'eel/a.heic' \(2 such"),
        ({"eel/.a.jpg": b"x"}, "eel holds no images, nothing"),
    ],
)
def test_a_class_without_images(more, says, tmp_path):
    source = str(write_images(tmp_path / "in", PICTURES | more))
    refused(f"^input: {says}", shard, source, str(tmp_path / "out"), workers=1)
    assert not (tmp_path / "out").exists()
    shard(source, str(tmp_path / "out"), classes="cat,dog", workers=1)
    assert classes(tmp_path / "out") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("jfif", "JPEG"), ("jpe", "JPEG"), ("JFIF", "JPEG"), ("avif", "AVIF"), ("jp2", "JPEG2000"), ("apng", "PNG")],
)
def test_extensions_that_pillow_knows(suffix, kind, tmp_path):
    if not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind, "jpg")):
        pytest.skip(f"this Pillow was built without {kind}")
    contents = {f"eel/{i}.{suffix}": encoded(i, kind) for i in range(3)}
    shard(str(write_images(tmp_path / "in", PICTURES | contents)), str(tmp_path / "out"), workers=1)
    assert classes(tmp_path / "out") == ["cat", "dog", "eel"]
    assert len(read(tmp_path / "out")) == len(PICTURES) + 3


def test_a_class_of_bad_images_is_named(tmp_path, capsys):
    contents = PICTURES | {"eel/0.jpg": b"none"}
    shard(str(write_images(tmp_path / "in", contents)), str(tmp_path / "out"), max_bad_share=0.5, workers=1)
    assert "WARNING: none of the images of class eel can be used" in capsys.readouterr().out
