"""`dar predict` that draws dies, in processes of its own, and is started again: the npz is that of an unbroken run."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killable import run, signal_before
from tiny_models import SIZE

from dar_lightning.cli import main
from dar_lightning.generation.predict import GenerationModule

CONFIG = Path(__file__).parents[2] / "experiments" / "evaluate" / "sample50k.yaml"
COUNT, PIECE = 18, 4
FILES = [f"{start:07d}.npy" for start in range(0, COUNT, PIECE)]


def command(pipeline: str, output: Path, devices: int = 1, *more: str) -> list[str]:
    words = ["predict", f"--config={CONFIG}", f"--trainer.callbacks.output={output}", "--trainer.accelerator=cpu"]
    words += [f"--trainer.devices={devices}", "--trainer.enable_progress_bar=false"]
    words += [f"--model.init_args.pipeline={pipeline}", "--model.init_args.rows=2"]
    sizes = {"num_images": COUNT, "batch_size": 2, "piece_size": PIECE}
    return [*words, *(f"--data.init_args.{name}={value}" for name, value in sizes.items()), *more]


def predict(words: list[str], rank: int, function: str, calls: int, number: int) -> None:
    """`dar predict`, sending a signal to itself before the n-th call of a function, if it is that rank."""
    owner = {"replace": os, "predict_step": GenerationModule}[function]
    signal_before(owner, function, rank, calls, number)
    main(words)


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory) -> Path:
    """An npz that nothing befell."""
    output = tmp_path_factory.mktemp("whole") / "x.npz"
    assert run(main, command(pipeline, output)) == [0]
    return output


def left(output: Path) -> list[str]:
    return sorted(path.name for path in output.with_suffix(".parts").glob("[!.]*.npy"))


@pytest.mark.slow
def test_one_process(pipeline, whole, tmp_path):
    """Settings, then what drew, then each piece get their names; in the end npz and protocol."""
    output = tmp_path / "x.npz"
    words = command(pipeline, output)
    for function, calls, number, pieces in (
        ("replace", 1, signal.SIGKILL, 0),  # before the settings
        ("replace", 4, signal.SIGKILL, 1),  # before the second piece
        ("predict_step", 4, signal.SIGTERM, 3),  # asked to end, as by a batch system: after the batch
        ("replace", 3, signal.SIGKILL, 5),  # before the npz
        ("replace", 2, signal.SIGKILL, 5),  # before the protocol
    ):
        code = -number if number == signal.SIGKILL else 128 + number
        assert run(predict, words, 0, function, calls, number) == [code]
        assert left(output) == FILES[:pieces]
    assert run(main, words) == [0]
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz"]


@pytest.mark.slow
def test_two_processes(pipeline, whole, tmp_path):
    """Pieces 0, 2 and 4 are rank 0's, 1 and 3 rank 1's; a damaged piece is drawn again."""
    output = tmp_path / "x.npz"
    words = command(pipeline, output, 2)
    assert run(predict, words, 1, "predict_step", 4, signal.SIGKILL, world=2)[1] == -signal.SIGKILL
    assert FILES[1] in left(output)
    assert FILES[3] not in left(output)
    assert not output.exists()
    damaged = output.with_suffix(".parts") / FILES[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run(main, words, world=2) == [0, 0]
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_two_processes_of_a_user(pipeline, whole):
    """Lightning starts the second one. Other settings end both, with one line."""
    before = whole.read_bytes()
    words = [sys.executable, "-m", "dar_lightning", *command(pipeline, whole, 2, "--model.init_args.seed=1")]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("dar predict: output: ") == 1
    assert "Traceback" not in process.stderr
    assert whole.read_bytes() == before


def predict_and_measure(words: list[str], output: Path) -> None:
    """Grey images instead of drawn ones; the peak of this process's resident memory, in kilobytes, beside the npz."""
    GenerationModule.predict_step = lambda self, batch, _: torch.full((len(batch["index"]), 3, SIZE, SIZE), 7).byte()
    main(words)
    output.with_suffix(".peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


@pytest.mark.slow
def test_memory_is_flat_in_n(pipeline, tmp_path):
    peaks, output = {}, tmp_path / "x.npz"
    sizes = ["--data.init_args.batch_size=500", "--data.init_args.piece_size=500"]
    for count in (1000, 31_000):  # 3 and 95 MB
        words = command(pipeline, output, 1, *sizes, f"--data.init_args.num_images={count}")
        output.unlink(missing_ok=True)
        assert run(predict_and_measure, words, output) == [0]
        peaks[count] = int(output.with_suffix(".peak").read_text()) / 1024
    assert output.stat().st_size > 31_000 * SIZE * SIZE * 3
    assert peaks[31_000] < peaks[1000] + 30, f"MB at each n: {peaks}"
