"""Atomic writes, folder locks, and the files that come with the package, from any folder."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest
from refusals import refused

from dar_lightning.errors import UserError
from dar_lightning.files import atomic_path, find_shipped, locked, read_json, write_text

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_is_cut_leaves_what_was_before(error, tmp_path):
    write_text(tmp_path / "x", "before")

    def write(part: Path) -> None:
        part.write_text("half")
        raise error

    with pytest.raises(error), atomic_path(tmp_path / "x") as part:
        write(part)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_new_file_in_a_new_folder_has_the_mode_of_any_other(tmp_path):
    write_text(tmp_path / "new" / "x", "whole")
    (tmp_path / "y").touch()
    assert (tmp_path / "new" / "x").read_text() == "whole"
    assert (tmp_path / "new" / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*x: No space left on device$"), atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):  # not the disk's: a mistake of the program
        raise FileNotFoundError


def lock(folder: Path) -> None:
    with locked(folder, "output"):
        os._exit(7)


def test_one_process_at_a_time_has_a_folder(tmp_path):
    def exit_code() -> int:
        other = multiprocessing.get_context("fork").Process(target=lock, args=(tmp_path,))
        other.start()
        other.join(60)
        other.kill()
        return other.exitcode

    with locked(tmp_path, "output"):
        assert exit_code() == 1
    assert exit_code() == 7, "it had the folder, and its end gave it back"
    assert exit_code() == 7


@pytest.mark.parametrize(("text", "says"), [("[]", "holds a list"), ("{", "cannot read"), (None, "is missing")])
def test_json_that_is_no_object(text, says, tmp_path):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    refused(says, read_json, tmp_path / "x.json")


def test_what_comes_with_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("experiments/ar/B.yaml", "data/fruit64/val", "dar_lightning/shipped/fruit64/ar"):
        assert Path(find_shipped(name)) == ROOT / name
        (tmp_path / name).mkdir(parents=True)
        assert find_shipped(name) == name, "the user's own comes first"
    for name in ("README.md", "data/README.md", "experiments/none.yaml", str(ROOT / "tests")):
        assert find_shipped(name) == name, "nothing else is"
