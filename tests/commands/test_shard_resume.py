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


@pytest.mark.slow
def test_killed_and_resumed_with_other_workers(tmp_path):
    """SIGKILL in the middle; then the bytes are those of an unbroken run, and finished shards were not made again."""
    tree, out = write_tree(tmp_path / "in", (20, 20, 20), size=(800, 600)), tmp_path / "out"
    options = {"size": 64, "max_per_shard": 3, "val_fraction": 0.1, "max_bad_share": 0.1}
    (tree / "fig" / "0007.jpg").write_bytes(b"no picture")
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run = process("--input", tree, "--output", out, *words, "--workers", 2, start_new_session=True)

    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("0*.tar")}

    while len(made()) < 3 and run.poll() is None:
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while alive := group(run.pid):
        assert time.monotonic() < deadline, f"its workers live on: {alive}"
        time.sleep(0.05)
    kept = made()
    assert 3 <= len(kept) < 20
    assert not list(out.rglob("index.json"))
    (out / "train" / ".000001.tar.1.part").write_bytes(b"left by a kill")

    shard(str(tree), str(out), **options, workers=1)
    shard(str(tree), str(tmp_path / "unbroken"), **options, workers=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files(out) == files(tmp_path / "unbroken")
    assert len(made()) == 20
    assert list(out.rglob("skipped.json"))


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


def test_damaged_shards_are_made_again(tmp_path):
    """And one whose image could not be read the first time and can be read now."""
    tree, out = write_tree(tmp_path / "in"), tmp_path / "out"
    content = (tree / "fig" / "0002.jpg").read_bytes()
    (tree / "fig" / "0002.jpg").write_bytes(bytes(len(content)))
    command = dict(input=str(tree), output=str(out), max_per_shard=4, workers=1, max_bad_share=0.1)
    with locked(out, "output"), pytest.raises(UserError, match="another process is writing to"):
        shard(**command)
    shard(**command)
    before = files(out)
    assert "skipped.json" in before
    cut, gone, other, empty, changed, whole = sorted(out.glob("*.tar"))
    cut.write_bytes(cut.read_bytes()[:4096])
    gone.unlink()
    other.write_bytes(empty.read_bytes())
    empty.write_bytes(b"")
    flipped = bytearray(changed.read_bytes())
    flipped[2000] ^= 1  # inside of a member: names, sizes and the end mark stay, the index knows the hash
    changed.write_bytes(flipped)
    time_before = whole.stat().st_mtime_ns
    shard(**command)
    assert files(out) == before
    assert whole.stat().st_mtime_ns == time_before
    (tree / "fig" / "0002.jpg").write_bytes(content)
    shard(**command)
    assert len(read(out)) == sum(COUNTS)
    assert not (out / "skipped.json").exists()


@pytest.mark.slow
def test_interrupted_while_its_workers_start(tmp_path):
    """Ctrl-C reaches the whole process group, the forkserver too; it says one line."""
    words = ["--input", write_tree(tmp_path / "in"), "--output", tmp_path / "out", "--workers", 2]
    run = process(*words, "--max_per_shard", 9, start_new_session=True)
    while len(group(run.pid)) < 3 and run.poll() is None:  # itself, the resource tracker and the forkserver
        time.sleep(0.001)
    time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate()
    assert run.returncode == 130
    assert "Traceback" not in err
