"""`dar shard`, killed, damaged and repeated: the bytes are those of a run that nothing befell."""

import os
import signal
import time
from pathlib import Path

import pytest
from image_folders import COUNTS, files, process, read, write_tree

from dar_lightning.commands.shard import shard
from dar_lightning.errors import UserError
from dar_lightning.files import locked


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_tree(tmp_path / "in")


@pytest.mark.slow
def test_killed_and_resumed_with_other_workers(tmp_path):
    """SIGKILL in the middle; then the bytes are those of an unbroken run, and finished shards were not made again."""
    tree = write_tree(tmp_path / "in", (40, 40, 40), size=(1000, 750))
    options = {"size": 64, "max_per_shard": 3, "val_fraction": 0.1}
    (tree / "fig" / "0007.jpg").write_bytes(b"no picture")
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run = process("--input", tree, "--output", tmp_path / "out", *words, "--workers", 2, start_new_session=True)

    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0*.tar")}

    while len(made()) < 6 and run.poll() is None:
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while alive := group(run.pid):
        assert time.monotonic() < deadline, f"its workers live on: {alive}"
        time.sleep(0.05)
    kept = made()
    assert 6 <= len(kept) < 40
    assert not list((tmp_path / "out").rglob("index.json"))
    (tmp_path / "out" / "train" / ".000001.tar.1.part").write_bytes(b"left by a kill")

    shard(str(tree), str(tmp_path / "out"), **options, workers=1)
    shard(str(tree), str(tmp_path / "unbroken"), **options, workers=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    out, unbroken = files(tmp_path / "out"), files(tmp_path / "unbroken")
    assert out == unbroken
    assert sum(name.endswith(".tar") for name in out) == 40
    assert any(name.endswith("skipped.json") for name in out)


def group(leader: int) -> list[int]:
    """Living processes of a group; empty where there is no /proc to look at."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended just now
            continue
        if int(number) == leader and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def test_damaged_shards_are_made_again(tree, tmp_path):
    command = dict(input=str(tree), output=str(tmp_path / "out"), max_per_shard=4, workers=1)
    shard(**command)
    before = files(tmp_path / "out")
    cut, gone, other, empty, changed, whole = sorted((tmp_path / "out").glob("*.tar"))
    cut.write_bytes(cut.read_bytes()[:4096])
    gone.unlink()
    other.write_bytes(empty.read_bytes())
    empty.write_bytes(b"")
    content = bytearray(changed.read_bytes())
    content[2000] ^= 1  # inside of a member: names, sizes and the end mark stay, the index knows the hash
    changed.write_bytes(content)
    time_before = whole.stat().st_mtime_ns
    shard(**command)
    assert files(tmp_path / "out") == before
    assert whole.stat().st_mtime_ns == time_before


def test_a_shard_without_a_good_sample_is_made_again(tree, tmp_path):
    """An image that could not be read the first time and can be read now is not forgotten."""
    content = (tree / "fig" / "0002.jpg").read_bytes()
    (tree / "fig" / "0002.jpg").write_bytes(bytes(len(content)))
    command = dict(input=str(tree), output=str(tmp_path / "out"), workers=1, max_bad_share=0.1)
    shard(**command)
    assert len(read(tmp_path / "out")) == sum(COUNTS) - 1
    assert (tmp_path / "out" / "skipped.json").exists()
    (tree / "fig" / "0002.jpg").write_bytes(content)
    shard(**command)
    assert len(read(tmp_path / "out")) == sum(COUNTS)
    assert not (tmp_path / "out" / "skipped.json").exists()


def test_another_run_of_the_same_output_is_refused(tree, tmp_path):
    with locked(tmp_path / "out", "output"), pytest.raises(UserError, match="another process is writing to"):
        shard(str(tree), str(tmp_path / "out"), workers=1)
    assert files(tmp_path / "out").keys() <= {".lock"}


@pytest.mark.slow
def test_interrupted_while_its_workers_start(tree, tmp_path):
    """Ctrl-C reaches the whole process group, the forkserver too; it says one line."""
    words = ["--input", tree, "--output", tmp_path / "out", "--workers", 2, "--max_per_shard", 9]
    run = process(*words, start_new_session=True)
    while len(group(run.pid)) < 3 and run.poll() is None:  # itself, the resource tracker and the forkserver
        time.sleep(0.001)
    time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate()
    assert run.returncode == 130
    assert "Traceback" not in err
