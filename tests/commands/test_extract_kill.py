"""`dar extract` dies, in processes of its own, and is started again: its files are those of an unbroken run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killable import run, signal_before
from tiny_models import make_tokenizer

from dar_lightning import SequentialDiffusionTokenizer
from dar_lightning.cli import main
from dar_lightning.data.token_dataset import CodesIndex
from dar_lightning.records.provenance import FILE

CROPS = 3


def command(tokenizer: Path, shards: Path, output: Path, devices: int) -> list[str]:
    words = ["extract", "--tokenizer", tokenizer, "--shards", shards, "--output", output, "--devices", devices]
    words += ["--crops", "random", "--random_crops", CROPS, "--batch_size", 4 * CROPS]  # 3, 3 and 2 batches per shard
    return [str(word) for word in [*words, "--accelerator", "cpu", "--num_workers", 0]]


def extract(words: list[str], rank: int, function: str, calls: int, number: int) -> None:
    """`dar extract`, sending a signal to itself before the n-th call of a function, if it is that rank."""
    owner = {"replace": os, "tokenize": SequentialDiffusionTokenizer}[function]
    signal_before(owner, function, rank, calls, number)
    main(words)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(root)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """But for what tells the commands apart."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != FILE}


@pytest.fixture(scope="module")
def whole(tokenizer, shards, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "codes"
    main(command(tokenizer, shards, output, 1))
    assert CodesIndex.load(output).num_samples == 26
    return contents(output)


FILES = [f"{number:06d}.safetensors" for number in range(3)]
pytestmark = pytest.mark.slow


def test_one_process(tokenizer, shards, whole, tmp_path):
    """It dies three times: before the first shard has its name (provenance.json has), in the second batch of the second
    shard, asked to end, and when the index has no name yet."""
    output = tmp_path / "codes"
    words = command(tokenizer, shards, output, 1)
    for function, calls, number, left in (
        ("replace", 2, signal.SIGKILL, []),
        ("tokenize", 5, signal.SIGTERM, FILES[:1]),
        ("replace", 3, signal.SIGKILL, FILES),
    ):
        code = -number if number == signal.SIGKILL else 128 + number
        assert run(extract, words, 0, function, calls, number) == [code]
        assert sorted(path.name for path in output.glob("[!.]*")) == [*left, FILE]
    assert list(output.glob(".*.part"))
    main(words)
    assert contents(output) == whole


def test_two_processes(tokenizer, shards, whole, tmp_path):
    """Shards 0 and 2 are rank 0's, shard 1 is rank 1's, which dies; then one shard is missing for two ranks."""
    output = tmp_path / "codes"
    words = command(tokenizer, shards, output, 2)
    assert run(extract, words, 1, "replace", 1, signal.SIGKILL, world=2)[1] == -signal.SIGKILL
    assert not {FILES[1], "index.json"} & contents(output).keys()
    for name in FILES[::2]:  # rank 0 may not have come so far
        (output / name).write_bytes(whole[name])
    assert run(main, words, world=2) == [0, 0]
    assert contents(output) == whole


def test_too_many_bad_samples_on_one_device(tokenizer, shards, tmp_path):
    """Started as a user does. The rank that meets them stops the other one, and the command ends with one line."""
    path = shutil.copytree(shards, tmp_path / "shards") / "000001.tar"  # rank 1 reads it, and rank 0 the others
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 1000
    content[middle : middle + 100] = bytes(100)
    path.write_bytes(content)
    words = [sys.executable, "-m", "dar_lightning", *command(tokenizer, path.parent, tmp_path / "codes", 2)]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("dar extract: shards: ") == 1
    assert "1 of 26 samples cannot be used" in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "codes" / "index.json").exists()
