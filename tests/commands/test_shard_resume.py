"""`dar shard`, killed, damaged and repeated: the bytes are those of a run that nothing befell."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from image_folders import COUNTS, files, process, read, write_tree

from dar_lightning.commands.shard import shard


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree") / "x")


def test_packing_shards_anew_keeps_everything(tree, tmp_path):
    shard(str(tree), str(tmp_path / "one"), max_per_shard=4, workers=1)
    shard(str(tmp_path / "one"), str(tmp_path / "two"), max_per_shard=9, seed=3, workers=1)
    shard(str(tmp_path / "two"), str(tmp_path / "back"), max_per_shard=4, workers=1)
    assert len(list((tmp_path / "two").glob("*.tar"))) == 3
    one, back = files(tmp_path / "one"), files(tmp_path / "back")
    del one["plan.json"], back["plan.json"]
    assert one == back


@pytest.mark.slow
def test_killed_and_resumed_with_other_workers(tmp_path):
    """SIGKILL in the middle; then the bytes are those of an unbroken run, and finished shards were not made again."""
    tree = write_tree(tmp_path / "in", (40, 40, 40), size=(1000, 750))
    options = {"size": 64, "max_per_shard": 3, "val_fraction": 0.1}
    (tree / "fig" / "0007.jpg").write_bytes(b"no picture")
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run = process("--input", tree, "--output", tmp_path / "out", *words, "--workers", 2, start_new_session=True)
    made = []
    while len(made) < 6 and run.poll() is None:
        made = list((tmp_path / "out").rglob("0*.tar"))
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0*.tar")}
    assert 6 <= len(kept) < 40
    assert not list((tmp_path / "out").rglob("index.json"))
    deadline = time.monotonic() + 60
    while alive := _group(run.pid):
        assert time.monotonic() < deadline, f"its workers live on: {alive}"
        time.sleep(0.1)
    kept |= {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("0*.tar")}
    (tmp_path / "out" / "train" / ".000001.tar.1.part").write_bytes(b"left by a kill")

    shard(str(tree), str(tmp_path / "out"), **options, workers=1)
    shard(str(tree), str(tmp_path / "unbroken"), **options, workers=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    out, unbroken = files(tmp_path / "out"), files(tmp_path / "unbroken")
    assert out.keys() == unbroken.keys()
    assert out == unbroken
    assert sum(name.endswith(".tar") for name in out) == 40
    assert any(name.endswith("skipped.json") for name in out)


def _group(leader: int) -> list[int]:
    """Living processes of a group; empty where there is no /proc to look at."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended just now
            continue
        if int(group) == leader and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def test_damaged_shards_are_made_again(tree, tmp_path):
    command = dict(input=str(tree), output=str(tmp_path / "out"), max_per_shard=5, workers=1)
    shard(**command)
    before = files(tmp_path / "out")
    paths = sorted((tmp_path / "out").glob("*.tar"))
    paths[0].write_bytes(paths[0].read_bytes()[:4096])
    paths[1].unlink()
    paths[2].write_bytes(paths[3].read_bytes())
    paths[3].write_bytes(b"")
    whole = paths[4].stat().st_mtime_ns
    shard(**command)
    assert files(tmp_path / "out") == before
    assert paths[4].stat().st_mtime_ns == whole


def test_a_byte_that_changed_is_noticed_by_the_index(tree, tmp_path):
    shard(str(tree), str(tmp_path / "out"), max_per_shard=8, workers=1)
    whole, path = files(tmp_path / "out"), tmp_path / "out" / "000001.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1  # inside of a member: names, sizes and the end mark stay
    path.write_bytes(content)
    shard(str(tree), str(tmp_path / "out"), max_per_shard=8, workers=1)
    assert files(tmp_path / "out") == whole


def test_a_shard_without_a_good_sample_is_made_again(tree, tmp_path):
    """An image that could not be read the first time and can be read now is not forgotten."""
    copy = shutil.copytree(tree, tmp_path / "in")
    content = (copy / "fig" / "0002.jpg").read_bytes()
    (copy / "fig" / "0002.jpg").write_bytes(bytes(len(content)))
    command = dict(input=str(copy), output=str(tmp_path / "out"), workers=1, max_bad_share=0.1)
    shard(**command)
    assert len(read(tmp_path / "out")) == sum(COUNTS) - 1
    assert (tmp_path / "out" / "skipped.json").exists()
    (copy / "fig" / "0002.jpg").write_bytes(content)
    shard(**command)
    assert len(read(tmp_path / "out")) == sum(COUNTS)
    assert not (tmp_path / "out" / "skipped.json").exists()


@pytest.mark.slow
def test_two_runs_of_one_output(tmp_path):
    """The second is refused, and the first is not disturbed."""
    tree = write_tree(tmp_path / "in", (40, 40, 40), size=(1000, 750))
    words = ["--input", tree, "--output", tmp_path / "out", "--max_per_shard", 3, "--workers", 2]
    first = process(*words)
    while not list((tmp_path / "out").glob("0*.tar")) and first.poll() is None:
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    second = process(*words)
    assert "is writing to" in second.communicate()[1].splitlines()[-1]
    assert second.returncode == 2
    first.send_signal(signal.SIGCONT)
    assert "120 images in 40 shards" in first.communicate()[0]
    assert first.returncode == 0
    shard(str(tree), str(tmp_path / "alone"), max_per_shard=3, workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "alone")


@pytest.mark.slow
def test_interrupted_while_its_workers_start(tmp_path):
    """Ctrl-C reaches the whole process group, the forkserver too; it says one line."""
    words = ["--input", write_tree(tmp_path / "in"), "--output", tmp_path / "out", "--workers", 2, "--max_per_shard", 9]
    run = process(*words, start_new_session=True)
    while len(_group(run.pid)) < 3 and run.poll() is None:  # itself, the resource tracker and the forkserver
        time.sleep(0.001)
    time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate()
    assert run.returncode == 130
    assert "Traceback" not in err
