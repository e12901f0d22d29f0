"""`dar predict` that draws: the same image however it is drawn, killed or not, and one line for each mistake."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from killable import run, signal_before
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from refusals import refusal, refused
from tiny_models import CLASSES, GROUPS, SIZE

from dar_lightning import DARPipeline
from dar_lightning.cli import main
from dar_lightning.data.transforms import to_uint8
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.generation.drawing import image_generator
from dar_lightning.generation.labels import LabelsDataModule
from dar_lightning.generation.predict import GenerationModule
from dar_lightning.generation.writer import SampleWriter
from dar_lightning.records import provenance

CONFIG = Path(__file__).parents[2] / "experiments" / "evaluate" / "sample50k.yaml"
COUNT, PIECE, ROWS = 18, 4, 4
FILES = [f"{start:07d}.npy" for start in range(0, COUNT, PIECE)]
OPTIONS = {"seed": 5, "rows": ROWS, "guidance": (1.1, 8.0)}
NUMBERS = {"num_images": COUNT, "batch_size": 2, "piece_size": PIECE}


def command(pipeline: str, output: Path, *more: str) -> list[str]:
    words = ["predict", f"--config={CONFIG}", f"--trainer.callbacks.output={output}", "--trainer.accelerator=cpu"]
    words += ["--trainer.enable_progress_bar=false", f"--model.init_args.pipeline={pipeline}"]
    words += ["--model.init_args.rows=4", "--model.init_args.seed=5"]
    return [*words, *(f"--data.init_args.{name}={value}" for name, value in NUMBERS.items()), *more]


def draw(pipeline: str, output: Path, model=None, data=None, trainer=None) -> None:
    """The same without the command line, and with some options changed."""
    common = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    runner = L.Trainer(**common, callbacks=[SampleWriter(str(output))], **(trainer or {}))
    runner.predict(GenerationModule(pipeline, **OPTIONS | (model or {})), LabelsDataModule(**NUMBERS | (data or {})))


def read_record(npz: Path) -> dict:
    return json.loads(npz.with_suffix(".json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in processes of their own: another number rounds sums otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory) -> Path:
    """An npz that nothing befell."""
    output = tmp_path_factory.mktemp("whole") / "x.npz"
    main(command(pipeline, output))
    return output


# ---- the images


def test_images_are_those_of_the_pipeline(pipeline, whole):
    """One by one, without Lightning; batches of other sizes round otherwise."""
    pipe = DARPipeline.from_pretrained(pipeline)
    with np.load(whole) as found:
        images, labels = found["arr_0"], found["labels"]
    assert labels.tolist() == [i % len(CLASSES) for i in range(COUNT)]
    for i in (0, 7, COUNT - 1):
        generator = image_generator(5, i)
        alone = to_uint8(pipe.generate(torch.tensor([i % 4]), guidance=(1.1, 8.0), generator=[generator]))
        assert np.abs(alone[0].permute(1, 2, 0).numpy().astype(int) - images[i]).max() <= 1
    assert len({image.tobytes() for image in images}) == COUNT


def test_every_seed_and_number_has_a_generator_of_its_own(pipeline):
    first = [torch.rand(4, generator=image_generator(seed, i)) for seed in (0, 1, 2, 9999) for i in range(500)]
    assert len({tuple(values.tolist()) for values in first}) == 2000
    starts = sorted(image_generator(seed, 0).initial_seed() for seed in range(10_000))
    assert min(b - a for a, b in zip(starts, [*starts[1:], starts[0] + 2**32], strict=True)) == 341_411
    batch = {"index": torch.arange(4), "label": torch.arange(4)}
    drawn = [GenerationModule(pipeline, seed, rows=4).predict_step(batch, 0) for seed in (0, 1)]
    assert all(not torch.equal(*pair) for pair in zip(*drawn, strict=True))


@pytest.mark.parametrize("sizes", [(1, 100), (5, 3)], ids=str)
def test_neither_batches_nor_pieces_change_a_bit(pipeline, whole, sizes, tmp_path):
    draw(pipeline, tmp_path / "y.npz", data={"batch_size": sizes[0], "piece_size": sizes[1]})
    assert (tmp_path / "y.npz").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["y.json", "y.npz"]


def test_bfloat16_would_show_the_batch_size(pipeline):
    """Why passes have a fixed number of rows: this is exact where the last test would have no power."""
    module = GenerationModule(pipeline, rows=4).to(torch.bfloat16)
    batch = {"index": torch.arange(8), "label": torch.arange(8) % 4}
    together = module.predict_step(batch, 0)
    for parts in ([3, 5], [7, 1]):
        split = zip(*(values.split(parts) for values in batch.values()), strict=True)
        drawn = [module.predict_step(dict(zip(batch, values, strict=True)), 0) for values in split]
        assert torch.equal(torch.cat(drawn), together)


def test_fewer_groups_are_a_preview_and_cost_less(pipeline):
    module, pipe = GenerationModule(pipeline, rows=4, groups=2), DARPipeline.from_pretrained(pipeline)
    steps = []
    module.ar.step, step = lambda *a: steps.append(1) or step(*a), module.ar.step
    images = module.predict_step({"index": torch.arange(4), "label": torch.arange(4)}, 0)
    previews = list(pipe.stream(torch.arange(4), generator=[image_generator(0, i) for i in range(4)]))
    assert torch.equal(images, to_uint8(previews[1].images))
    assert len(steps) == 3, "2 tokens per group, the first from the class token"
    assert module.protocol["num_tokens"] == 4


def test_per_class_and_fewer_classes():
    data = LabelsDataModule(per_class=2, classes=[3, 1])
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(num_classes=4), global_rank=0, world_size=1)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["label"].tolist() == [3, 1, 3, 1]
    assert batch["index"].tolist() == [0, 1, 2, 3]


# ---- the record


def test_the_protocol_lies_beside(pipeline, whole):
    expected = {"seed": 5, "guidance": [1.1, 8.0], "solver": "adams2", "num_steps": GROUPS, "n": COUNT, "rows": ROWS}
    expected |= {"groups": GROUPS, "num_tokens": 8, "image_size": SIZE, "dtype": "float32", "device": "cpu"}
    expected |= {"token_draws": "races of lowbias32", "classes": "balanced: image i is of class i mod num_classes"}
    expected |= {"piece_size": PIECE, "precision": "32-true"}
    pipe = DARPipeline.from_pretrained(pipeline)
    expected |= {"tokenizer_sha256": model_sha256(pipe.tokenizer), "ar_sha256": model_sha256(pipe.ar)}
    record = read_record(whole)
    assert expected.items() <= record.items()
    with np.load(whole) as found:
        digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in found["arr_0"])
    assert hashlib.sha256(digests).hexdigest() == record["pixels_sha256"]


@pytest.mark.parametrize(
    ("half", "precision", "dtype", "made"),
    [
        (True, "32-true", {"tokenizer": "float32", "ar": "bfloat16"}, "32-true, weights in bfloat16"),
        (False, "bf16-true", "float32", "bf16-true, weights in bfloat16"),  # cast by the Trainer, after the protocol
    ],
)
def test_the_record_names_the_dtype_of_the_weights(half, precision, dtype, made, pipeline, tmp_path):
    pipe = DARPipeline.from_pretrained(pipeline)
    pipe.ar.to(torch.bfloat16 if half else torch.float32)
    pipe.save_pretrained(tmp_path / "pipe")
    draw(str(tmp_path / "pipe"), tmp_path / "x.npz", data={"num_images": 2}, trainer={"precision": precision})
    record = read_record(tmp_path / "x.npz")
    assert [run["precision"] for run in record["provenance"]] == [made]
    assert (record["precision"], record["dtype"]) == (precision, dtype)


# ---- what is there already


def test_a_finished_one_is_left_alone(pipeline, whole, tmp_path, capsys):
    for suffix in (".npz", ".json"):
        shutil.copy(whole.with_suffix(suffix), tmp_path / f"x{suffix}")
    (tmp_path / "x.parts").mkdir()  # which a kill left behind
    before = (tmp_path / "x.npz").stat().st_mtime_ns
    main(command(pipeline, tmp_path / "x.npz"))
    assert f"{COUNT} images" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz"]
    assert (tmp_path / "x.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("part", "option", "named"),
    [
        ("model", {"guidance": 3.0}, "guidance"),
        ("data", {"num_images": 14}, "n"),
        ("trainer", {"precision": "bf16-mixed"}, "precision"),
    ],
)
def test_other_settings_are_refused(part, option, named, pipeline, whole):
    line = rf"^output: {whole.with_suffix('.json')} tells of images with {named} .*; choose another file or delete"
    refused(f"{line} {whole}$", draw, pipeline, whole, **{part: option})


def test_an_npz_of_somebody_else_is_not_overwritten(pipeline, tmp_path, capsys):
    (tmp_path / "x.npz").write_bytes(b"mine")
    assert "without its x.json" in refusal(capsys, command(pipeline, tmp_path / "x.npz"))
    assert (tmp_path / "x.npz").read_bytes() == b"mine"


def test_a_run_that_stops_early_goes_on_elsewhere(pipeline, whole, tmp_path, monkeypatch, capsys):
    """Every kind of machine that drew is named; of a piece that was cut to nothing, nothing is left but its name."""
    output = tmp_path / "x.npz"
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "device_name", lambda device: "another machine")
        draw(pipeline, output, trainer={"limit_predict_batches": 4})
    assert "3 of 5 pieces are missing" in capsys.readouterr().out
    assert not output.exists()
    line = (
        r"x\.parts/settings\.json tells of images with top_k 0, now it is 3; choose another file or delete .*x\.parts$"
    )
    refused(line, draw, pipeline, output, model={"top_k": 3})
    (tmp_path / "x.parts" / FILES[0]).write_bytes(b"")
    draw(pipeline, output)
    assert output.read_bytes() == whole.read_bytes()
    runs = read_record(output)["provenance"]
    here = provenance.device_name(torch.device("cpu"))
    assert sorted(run["device"] for run in runs) == sorted(["another machine", here])
    assert all(run["versions"]["torch"] and run["precision"] == "32-true" for run in runs)


# ---- mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: GenerationModule(path, solver="eular"), "solver is 'eular'"),
        (lambda path: GenerationModule(path, rows=0), "rows is 0"),
        (lambda path: GenerationModule(path, seed=-1), "seed is -1"),
        (lambda path: GenerationModule("./nowhere"), "./nowhere is not a folder"),
        (lambda path: LabelsDataModule(), "num_images is None and per_class None: give one of the two"),
        (lambda path: LabelsDataModule(5, batch_size=0), "batch_size is 0"),
        (lambda path: LabelsDataModule(5, classes=[1, 1]), "name each class once"),
        (lambda path: SampleWriter("x.zip"), "output is x.zip"),
    ],
)
def test_mistakes_in_the_options(make, message, pipeline):
    refused(re.escape(message), make, pipeline)


@pytest.mark.parametrize(
    ("part", "option", "message"),
    [
        ("model", {"groups": 9}, "groups is 9"),
        ("model", {"groups": 0}, "groups is 0"),
        ("data", {"classes": [4]}, "classes is [4]: this pipeline has 0 to 3"),
    ],
)
def test_mistakes_that_the_work_shows(part, option, message, pipeline, tmp_path):
    refused(re.escape(message), draw, pipeline, tmp_path / "x.npz", **{part: option})
    assert list(tmp_path.iterdir()) == [], "nothing stands in the way of the right command"


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (GenerationModule, BoringDataModule, "LabelsDataModule: give it as data"),
        (lambda path: BoringModel(), lambda: LabelsDataModule(5), "model is BoringModel"),
    ],
)
def test_another_class_is_refused(model, data, message, pipeline, tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[SampleWriter(str(tmp_path / "x.npz"))])
    refused(message, lambda: trainer.predict(model(pipeline), data()))


# ---- in processes of their own


def predict(words: list[str]) -> None:
    """`dar predict`, whose messages are of no interest."""
    with redirect_stdout(None):
        main(words)


def predict_and_die(words: list[str], rank: int, function: str, calls: int, number: int) -> None:
    """The same, sending a signal to itself before the n-th call of a function, if it is that rank."""
    owner = {"replace": os, "predict_step": GenerationModule}[function]
    signal_before(owner, function, rank, calls, number)
    predict(words)


def left(output: Path) -> list[str]:
    return sorted(path.name for path in output.with_suffix(".parts").glob("[!.]*.npy"))


@pytest.mark.slow
def test_one_process_dies_and_goes_on(pipeline, whole, tmp_path):
    """Settings, then what drew, then each piece get their names; in the end npz and protocol."""
    output = tmp_path / "x.npz"
    words = command(pipeline, output)
    for function, calls, number, pieces in (
        ("replace", 4, signal.SIGKILL, 1),  # before the second piece
        ("predict_step", 4, signal.SIGTERM, 3),  # asked to end, as by a batch system: after the batch
        ("replace", 3, signal.SIGKILL, 5),  # before the npz
        ("replace", 2, signal.SIGKILL, 5),  # before the protocol
    ):
        code = -number if number == signal.SIGKILL else 128 + number
        assert run(predict_and_die, words, 0, function, calls, number) == [code]
        assert left(output) == FILES[:pieces]
    assert run(predict, words) == [0]
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz"]


@pytest.mark.slow
def test_one_of_two_processes_dies(pipeline, whole, tmp_path):
    """Pieces 0, 2 and 4 are rank 0's, 1 and 3 rank 1's; a damaged piece is drawn again."""
    output = tmp_path / "x.npz"
    words = command(pipeline, output, "--trainer.devices=2")
    assert run(predict_and_die, words, 1, "predict_step", 4, signal.SIGKILL, world=2)[1] == -signal.SIGKILL
    assert FILES[1] in left(output)
    assert FILES[3] not in left(output)
    assert not output.exists()
    damaged = output.with_suffix(".parts") / FILES[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run(predict, words, world=2) == [0, 0]
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_two_processes_of_a_user(pipeline, whole):
    """Lightning starts the second one. Other settings end both, with one line."""
    before = whole.read_bytes()
    words = command(pipeline, whole, "--trainer.devices=2", "--model.init_args.seed=1")
    words = [sys.executable, "-m", "dar_lightning", *words]
    process = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("dar predict: output: ") == 1
    assert "Traceback" not in process.stderr
    assert whole.read_bytes() == before


def predict_and_measure(words: list[str], output: Path) -> None:
    """Grey images instead of drawn ones; the peak of this process's resident memory, in kilobytes, beside the npz."""
    GenerationModule.predict_step = lambda self, batch, _: torch.full((len(batch["index"]), 3, SIZE, SIZE), 7).byte()
    predict(words)
    output.with_suffix(".peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


@pytest.mark.slow
def test_memory_is_flat_in_n(pipeline, tmp_path):
    peaks, output = {}, tmp_path / "x.npz"
    sizes = ["--data.init_args.batch_size=500", "--data.init_args.piece_size=500"]
    for count in (1000, 31_000):  # 3 and 95 MB
        words = command(pipeline, output, *sizes, f"--data.init_args.num_images={count}")
        output.unlink(missing_ok=True)
        assert run(predict_and_measure, words, output) == [0]
        peaks[count] = int(output.with_suffix(".peak").read_text()) / 1024
    assert output.stat().st_size > 31_000 * SIZE * SIZE * 3
    assert peaks[31_000] < peaks[1000] + 30, f"MB at each n: {peaks}"
