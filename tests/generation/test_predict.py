"""`dar predict` that draws: which labels, the same image however it is drawn, and one line for each mistake."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from tiny_models import CLASSES, GROUPS, SIZE

from dar_lightning import DARPipeline
from dar_lightning.cli import main
from dar_lightning.data.transforms import to_uint8
from dar_lightning.errors import UserError
from dar_lightning.generation.drawing import image_generator
from dar_lightning.generation.labels import LabelsDataModule
from dar_lightning.generation.predict import GenerationModule
from dar_lightning.generation.writer import SampleWriter
from dar_lightning.records import provenance

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of options and loggers
CONFIG = Path(__file__).parents[2] / "experiments" / "evaluate" / "sample50k.yaml"
COUNT = 13


def command(pipeline: str, output: Path, *more: str) -> list[str]:
    words = ["predict", f"--config={CONFIG}", f"--trainer.callbacks.output={output}", "--trainer.accelerator=cpu"]
    words += ["--trainer.enable_progress_bar=false", f"--model.init_args.pipeline={pipeline}"]
    words += ["--model.init_args.rows=4", "--model.init_args.seed=5"]
    sizes = {"num_images": COUNT, "batch_size": 4, "piece_size": 4}
    return [*words, *(f"--data.init_args.{name}={value}" for name, value in sizes.items()), *more]


def draw(pipeline: str, output: Path, model=None, data=None, trainer=None) -> None:
    """The same without the command line, and with some options changed."""
    options = {"seed": 5, "rows": 4, "guidance": (1.1, 8.0)} | (model or {})
    numbers = {"num_images": COUNT, "batch_size": 4, "piece_size": 4} | (data or {})
    common = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    runner = L.Trainer(**common, callbacks=[SampleWriter(str(output))], **(trainer or {}))
    runner.predict(GenerationModule(pipeline, **options), LabelsDataModule(**numbers))


def refusal(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dar predict: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "x.npz"
    main(command(pipeline, output))
    return output


def test_images_are_those_of_the_pipeline(pipeline, whole):
    """One by one, without Lightning; batches of other sizes round otherwise."""
    pipe = DARPipeline.from_pretrained(pipeline)
    with np.load(whole) as found:
        images, labels = found["arr_0"], found["labels"]
    assert labels.tolist() == [i % len(CLASSES) for i in range(COUNT)]
    for i, image in enumerate(images):
        generator = image_generator(5, i)
        alone = to_uint8(pipe.generate(torch.tensor([i % 4]), guidance=(1.1, 8.0), generator=[generator]))
        assert np.abs(alone[0].permute(1, 2, 0).numpy().astype(int) - image).max() <= 1
    assert len({image.tobytes() for image in images}) == COUNT


def test_every_seed_and_number_has_a_generator_of_its_own(pipeline):
    first = [torch.rand(4, generator=image_generator(seed, i)) for seed in (0, 1, 2, 9999) for i in range(500)]
    assert len({tuple(values.tolist()) for values in first}) == 2000
    starts = sorted(image_generator(seed, 0).initial_seed() for seed in range(10_000))
    assert min(b - a for a, b in zip(starts, [*starts[1:], starts[0] + 2**32], strict=True)) == 341_411
    batch = {"index": torch.arange(4), "label": torch.arange(4)}
    drawn = [GenerationModule(pipeline, seed, rows=4).predict_step(batch, 0) for seed in (0, 1)]
    assert all(not torch.equal(*pair) for pair in zip(*drawn, strict=True))


@pytest.mark.parametrize("sizes", [(1, 4), (64, 4), (5, 100), (2, 3)], ids=str)
def test_neither_batches_nor_pieces_change_a_bit(pipeline, whole, sizes, tmp_path):
    draw(pipeline, tmp_path / "y.npz", data={"batch_size": sizes[0], "piece_size": sizes[1]})
    assert (tmp_path / "y.npz").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["y.json", "y.npz"]


def test_bfloat16_would_show_the_batch_size(pipeline, tmp_path):
    """Why passes have a fixed number of rows: this is exact where the last test would have no power."""
    module = GenerationModule(pipeline, rows=4).to(torch.bfloat16)
    batch = {"index": torch.arange(8), "label": torch.arange(8) % 4}
    together = module.predict_step(batch, 0)
    for parts in ([1] * 8, [3, 5], [7, 1]):
        split = {name: values.split(parts) for name, values in batch.items()}
        batches = [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]
        assert torch.equal(torch.cat([module.predict_step(one, 0) for one in batches]), together)


def test_the_protocol_lies_beside(whole):
    protocol = json.loads(whole.with_suffix(".json").read_text())
    expected = {"seed": 5, "guidance": [1.1, 8.0], "solver": "adams2", "num_steps": GROUPS, "n": COUNT, "rows": 4}
    expected |= {"groups": GROUPS, "num_tokens": 8, "image_size": SIZE, "dtype": "float32", "device": "cpu"}
    expected |= {"token_draws": "races of lowbias32"}
    assert expected.items() <= protocol.items()
    with np.load(whole) as found:
        digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in found["arr_0"])
    assert hashlib.sha256(digests).hexdigest() == protocol["pixels_sha256"]


def test_a_finished_one_is_left_alone(pipeline, whole, capsys):
    before = whole.stat().st_mtime_ns
    main(command(pipeline, whole))
    assert f"{COUNT} images" in capsys.readouterr().out
    assert whole.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("part", "option", "named"),
    [
        ("model", {"guidance": 3.0}, "guidance"),
        ("model", {"rows": 5}, "rows"),
        ("data", {"num_images": 14}, "n"),
        ("data", {"classes": [0, 1]}, "classes"),
        ("data", {"piece_size": 5}, "piece_size"),
        ("trainer", {"precision": "bf16-mixed"}, "precision"),
    ],
)
def test_other_settings_are_refused(part, option, named, pipeline, whole):
    with pytest.raises(UserError, match=rf"^output: {whole.with_suffix('.json')} tells of images with {named} "):
        draw(pipeline, whole, **{part: option})


def test_another_model_is_refused(pipeline, whole, tmp_path):
    other = DARPipeline.from_pretrained(pipeline)
    other.ar.head.weight.data[0] += 1
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="with ar_sha256"):
        draw(str(tmp_path), whole)


def test_an_npz_of_somebody_else_is_not_overwritten(pipeline, tmp_path, capsys):
    (tmp_path / "x.npz").write_bytes(b"mine")
    assert "without its x.json" in refusal(capsys, command(pipeline, tmp_path / "x.npz"))
    assert (tmp_path / "x.npz").read_bytes() == b"mine"


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
    with pytest.raises(UserError, match=re.escape(message)):
        make(pipeline)


@pytest.mark.parametrize(
    ("part", "option", "message"),
    [
        ("model", {"groups": 9}, "groups is 9"),
        ("model", {"groups": 0}, "groups is 0"),
        ("model", {"num_steps": 0}, "num_steps is 0"),
        ("model", {"temperature": 0}, "temperature is 0"),
        ("data", {"classes": [4]}, "classes is [4]: this pipeline has 0 to 3"),
    ],
)
def test_mistakes_that_the_work_shows(part, option, message, pipeline, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        draw(pipeline, tmp_path / "x.npz", **{part: option})
    assert list(tmp_path.iterdir()) == [], "nothing stands in the way of the right command"


@pytest.mark.parametrize(
    ("part", "path", "message"),
    [("data", "BoringDataModule", "LabelsDataModule"), ("model", "BoringModel", "model is BoringModel")],
)
def test_another_class_is_refused(part, path, message, pipeline, tmp_path, capsys):
    words = command(pipeline, tmp_path / "x.npz", f"--{part}=lightning.pytorch.demos.boring_classes.{path}")
    words = [word for word in words if not word.startswith(f"--{part}.init_args")]
    assert message in refusal(capsys, words)


def test_a_run_that_stops_early_goes_on_elsewhere(pipeline, whole, tmp_path, monkeypatch, capsys):
    """Every kind of machine that drew is named; of a piece that was cut to nothing, nothing is left but its name."""
    output = tmp_path / "x.npz"
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "device_name", lambda device: "another machine")
        draw(pipeline, output, trainer={"limit_predict_batches": 2})
    assert "2 of 4 pieces are missing" in capsys.readouterr().out
    assert not output.exists()
    (tmp_path / "x.parts/0000000.npy").write_bytes(b"")
    draw(pipeline, output)
    assert output.read_bytes() == whole.read_bytes()
    runs = json.loads(output.with_suffix(".json").read_text())["provenance"]
    here = provenance.device_name(torch.device("cpu"))
    assert sorted(run["device"] for run in runs) == sorted(["another machine", here])
    assert all(run["versions"]["torch"] and run["precision"] == "32-true" for run in runs)


@pytest.mark.parametrize("parts", ["tokenizer ar", "ar"])
def test_the_record_names_the_dtype_of_the_weights(parts, pipeline, tmp_path):
    """The Trainer's precision is 32-true also where it draws with weights in bfloat16."""
    pipe = DARPipeline.from_pretrained(pipeline)
    for part in parts.split():
        getattr(pipe, part).to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "half")
    draw(str(tmp_path / "half"), tmp_path / "x.npz")
    record = json.loads((tmp_path / "x.json").read_text())
    assert [run["precision"] for run in record["provenance"]] == ["32-true, weights in bfloat16"]
    mixed = {"tokenizer": "float32", "ar": "bfloat16"}
    assert (record["precision"], record["dtype"]) == ("32-true", mixed if parts == "ar" else "bfloat16")


def test_weights_that_the_trainer_casts(pipeline, tmp_path):
    draw(pipeline, tmp_path / "x.npz", trainer={"precision": "bf16-true"})
    (run,) = json.loads((tmp_path / "x.json").read_text())["provenance"]
    assert run["precision"] == "bf16-true, weights in bfloat16"


def test_images_of_other_draws_are_not_continued(pipeline, whole, tmp_path):
    record = json.loads(whole.with_suffix(".json").read_text())
    del record["token_draws"]  # as versions before wrote it
    (tmp_path / "x.parts").mkdir()
    (tmp_path / "x.parts/settings.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="tells of images with token_draws None, now it is"):
        draw(pipeline, tmp_path / "x.npz")


def test_pieces_that_a_kill_left_behind_are_cleared_away(pipeline, whole, tmp_path):
    for suffix in (".npz", ".json"):
        shutil.copy(whole.with_suffix(suffix), tmp_path / f"x{suffix}")
    (tmp_path / "x.parts").mkdir()
    (tmp_path / "x.parts/settings.json").write_text(whole.with_suffix(".json").read_text())
    draw(pipeline, tmp_path / "x.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz"]
    assert (tmp_path / "x.npz").read_bytes() == whole.read_bytes()


def test_per_class_and_fewer_classes():
    data = LabelsDataModule(per_class=2, classes=[3, 1])
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(num_classes=4), global_rank=0, world_size=1)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["label"].tolist() == [3, 1, 3, 1]
    assert batch["index"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fewer_groups_are_a_preview_and_cost_less(pipeline, groups):
    module, pipe = GenerationModule(pipeline, rows=4, groups=groups), DARPipeline.from_pretrained(pipeline)
    steps = []
    module.ar.step, step = lambda *a: steps.append(1) or step(*a), module.ar.step
    batch = {"index": torch.arange(4), "label": torch.arange(4)}
    images = module.predict_step(batch, 0)
    generators = [image_generator(0, i) for i in range(4)]
    previews = list(pipe.stream(torch.arange(4), generator=generators))
    assert torch.equal(images, to_uint8(previews[groups - 1].images))
    assert len(steps) == groups * 2 - 1, "2 tokens per group, the first from the class token"
    assert module.protocol["num_tokens"] == groups * 2
