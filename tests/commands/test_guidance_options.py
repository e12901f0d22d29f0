"""Schedules of guidance by the option of one name: verbs, configs, callbacks, the page, and what their records say."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refusal
from tiny_models import fit_ar, make_pipeline, write_images, write_tokens

from dar_lightning import DARPipeline
from dar_lightning.cli import main
from dar_lightning.commands.evaluate import evaluate
from dar_lightning.commands.sample import sample
from dar_lightning.commands.serve_page import Work, build_page, draw_previews, repeat
from dar_lightning.commands.table import Row, table
from dar_lightning.data.transforms import to_uint8
from dar_lightning.errors import UserError
from dar_lightning.generation.drawing import image_generator, image_seed
from dar_lightning.generation.grids import to_image

INTERVAL = "interval,scale=4,from_group=2,to_group=3"
SCALES = [1.0, 1.0, 4.0, 4.0, 4.0, 4.0, 1.0, 1.0]
INTERVAL_LAYER = """
model:
  class_path: dar_lightning.generation.predict.GenerationModule
  init_args:
    guidance: interval,4,2,3
"""
OWN = '''
class Steps:
    """One scale for the first tokens, another one for the rest."""

    def __init__(self, first: float, rest: float = 1.0, count: int = 4):
        self.first, self.rest, self.count = first, rest, count

    def scales(self, groups):
        return [self.first if i < self.count else self.rest for i in range(len(groups))]
'''


class Listed:
    """The scales themselves."""

    def __init__(self, scales: list[float]):
        self.given = scales

    def scales(self, groups):
        return self.given


def record_of(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


def arrays(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["arr_0"].astype(int)


def expected(pipeline: str, scales: list[float], generators: list[torch.Generator]) -> np.ndarray:
    """Images of the classes in turn, (n, H, W, 3), by the scales themselves."""
    labels = torch.arange(len(generators)) % 4
    images = DARPipeline.from_pretrained(pipeline).generate(labels, guidance=Listed(scales), generator=generators)
    return to_uint8(images).permute(0, 2, 3, 1).numpy().astype(int)


@pytest.mark.parametrize("kind", ["command line", "config", "own class"])
def test_sample_draws_by_it_and_says_how_to_repeat_it(pipeline, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    words, recorded, scales = ["--guidance", "interval,4,2,3"], INTERVAL, SCALES
    if kind == "config":
        Path("draw.yaml").write_text("guidance: interval,4,2,3\n")
        words = ["--config", "draw.yaml"]
    if kind == "own class":
        Path("drawn_steps.py").write_text(OWN)
        words, recorded = ["--guidance", "drawn_steps.Steps,5,count=3"], "drawn_steps.Steps,first=5,rest=1,count=3"
        scales = [5.0] * 3 + [1.0] * 5
    main(["sample", "--pipeline", pipeline, "--per_class", "1", "--device", "cpu", *words, "--output", "drawn"])
    record, images = record_of(Path("drawn")), arrays(Path("drawn/samples.npz"))
    assert record["guidance"] == recorded
    generators = [torch.Generator().manual_seed(image_seed(0, label, 0)) for label in range(4)]
    assert np.abs(images - expected(pipeline, scales, generators)).max() <= 1
    again = shlex.split(record["command"])
    assert again[again.index("--guidance") + 1] == recorded
    main([*again[1:-1], "again"])
    assert record_of(Path("again"))["pixels_sha256"] == record["pixels_sha256"]


def test_evaluate_and_table_measure_by_it(pipeline, tmp_path):
    reference = write_images(tmp_path / "reference", 6)
    options = {"features": "color_edges", "device": "cpu"}
    found = evaluate(pipeline, reference, output=str(tmp_path / "o.json"), guidance="interval,4,2,3", **options)
    assert found["protocol"]["samples"]["guidance"] == INTERVAL
    again = evaluate(pipeline, reference, output=str(tmp_path / "o.json"), guidance=(1.1, 8.0), **options)
    assert again["metrics"] != found["metrics"]

    config = {"rows": [{"guidance": "power_cosine,8,1.5"}, {"guidance": "interval,4,2,3"}], "title": "A"}
    config |= {"task": "generate", "pipeline": pipeline, "reference": reference, "output": str(tmp_path / "t")}
    (tmp_path / "table.yaml").write_text(json.dumps(config | options | {"num_samples": 6, "batch_size": 6}))
    main(["table", "--config", str(tmp_path / "table.yaml")])
    rows = json.loads((tmp_path / "t/table.json").read_text())["rows"]
    assert [row["settings"]["guidance"] for row in rows] == ["power_cosine,scale=8,power=1.5", INTERVAL]
    assert [row["protocol"]["samples"]["guidance"] for row in rows] == ["power_cosine,scale=8,power=1.5", INTERVAL]
    drawn = arrays(tmp_path / "t/row1/seed0/samples.npz")  # by GenerationModule
    assert np.abs(drawn - expected(pipeline, SCALES, [image_generator(0, i) for i in range(6)])).max() <= 1
    with pytest.raises(UserError, match="this model's tokens are of groups 1 to 4"):
        table(**config | options | {"rows": [Row(), Row(guidance="interval,4,2,5")], "output": str(tmp_path / "u")})
    assert not (tmp_path / "u").exists(), "found before anything is drawn"


def test_predict_takes_it_from_a_config_and_the_command_line(pipeline, tmp_path):
    words = ["predict", "--config=experiments/evaluate/sample50k.yaml", f"--model.init_args.pipeline={pipeline}"]
    words += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.init_args.num_images=4"]
    words += [f"--trainer.callbacks.output={tmp_path}/x.npz", "--model.init_args.rows=4"]
    (tmp_path / "interval.yaml").write_text(INTERVAL_LAYER)
    main([*words, f"--config={tmp_path}/interval.yaml"])
    assert json.loads((tmp_path / "x.json").read_text())["guidance"] == INTERVAL
    images = expected(pipeline, SCALES, [image_generator(0, i) for i in range(4)])
    assert np.abs(arrays(tmp_path / "x.npz") - images).max() <= 1
    with pytest.raises(SystemExit):
        main([*words, "--model.init_args.guidance=power_cosine,8,1.5"])  # of an npz that was drawn otherwise


def test_callbacks_draw_by_it(pipeline, tmp_path, capsys):
    tokens, reference = write_tokens(tmp_path / "tokens", 8), write_images(tmp_path / "reference", 6)
    command = fit_ar(tokens, tokens, tmp_path / "run", max_steps=1, val_check_interval=1)
    ours = "--trainer.callbacks+=dar_lightning.training.callbacks"
    shared = [f"--trainer.callbacks.tokenizer={pipeline}/tokenizer"]
    fid = [f"{ours}.GenerationFID", *shared, f"--trainer.callbacks.reference={reference}"]
    fid += ["--trainer.callbacks.features=color_edges", "--trainer.callbacks.num_samples=4"]
    pictures = [f"{ours}.Samples", *shared, "--trainer.callbacks.per_class=1"]
    given = "--trainer.callbacks.guidance"
    main([*map(str, command), *fid, f"{given}=interval,4,2,3", *pictures, f"{given}=power_cosine,8,1.5"])
    (found,) = (tmp_path / "run/evaluation").iterdir()
    assert json.loads(found.read_text())["protocol"]["samples"]["guidance"] == INTERVAL
    for callback in (fid, pictures):
        said = "guidance interval: from_group 2 to_group 5: this model's tokens are of groups 1 to 4"
        assert refusal(capsys, [*command, *callback, f"{given}=interval,4,2,5"]) == f"dar fit: {said}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidance", "interval,4,2,5"], "guidance interval: from_group 2 to_group 5: this model's tokens are of"),
        (["--guidance", "cosine,4"], "guidance is 'cosine,4': give a number, or a,b"),
        (["--guidance", "no_file.Steps,4"], "guidance no_file.Steps: not constant, linear"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(pipeline, tmp_path, capsys, words, message):
    words = ["sample", "--pipeline", pipeline, "--device", "cpu", *words, "--output", tmp_path / "out"]
    assert refusal(capsys, words).startswith(f"dar sample: {message}")
    assert not (tmp_path / "out").exists()


def test_the_page_repeats_a_drawing_by_sample_and_by_python(pipeline, tmp_path):
    """The last picture that the page shows is the one that both codes draw."""
    pipe = DARPipeline.from_pretrained(pipeline)
    *_, (shown, *_) = draw_previews(pipe, 1, 3, "interval,4,2,3")
    command, python = repeat(pipeline, 1, 3, INTERVAL, None, 0)
    names: dict = {}
    exec(python, names)  # what the page gives
    image = to_image(names["image"][0])
    assert np.array_equal(np.asarray(image.resize(shown.size, 0)), np.asarray(shown))
    words = shlex.split(command)
    assert words[words.index("--guidance") + 1] == INTERVAL
    sample(str(tmp_path), pipeline, classes="1", per_class=1, seed=3, guidance=INTERVAL, device="cpu")
    assert np.abs(arrays(tmp_path / "samples.npz")[0] - np.asarray(image).astype(int)).max() <= 1


@pytest.mark.parametrize("start", [3.0, 12.5, "interval,4,1,1", (1.1, 8.0)], ids=str)
def test_the_page_begins_with_what_it_is_given_and_takes_text(start):
    """Visitors' class paths are refused: they would run a file of the server."""
    gradio = pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
    page = build_page(gradio, make_pipeline(), "tiny", 1, Work(), guidance=start)
    draw = next(each for each in page.fns.values() if each.api_name == "draw")
    _, _, scale, _, _, schedule = draw.inputs
    values = {3.0: (3.0, ""), 12.5: (3, "12.5"), "interval,4,1,1": (3, "interval,4,1,1"), (1.1, 8.0): (3, "1.1,8")}
    assert (scale.value, schedule.value) == values[start]
    *_, (_, _, _, command, *_) = draw.fn(1, 3, scale.value, None, 0, schedule.value)
    assert f"--guidance {schedule.value or 3} " in command
    *_, (_, _, _, command, *_) = draw.fn(1, 3, 2, None, 0, "interval,4,2,3")
    assert f"--guidance {INTERVAL} " in command
    for text, message in (
        ("os.path,1", r"guidance is 'os\.path,1': give a number"),
        ("interval,4,2,9", "groups 1 to 4"),
        ("strong", "guidance is 'strong'"),
    ):
        with pytest.raises(gradio.Error, match=message):
            next(draw.fn(1, 3, 2, None, 0, text))


def test_serve_begins_with_a_class_of_its_owner(tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="pip install 'dar-lightning[demo]'")
    monkeypatch.chdir(tmp_path)
    Path("served_steps.py").write_text(OWN)
    page = build_page(gradio, make_pipeline(), "tiny", 1, Work(), guidance="served_steps.Steps,first=5,rest=1,count=3")
    draw = next(each for each in page.fns.values() if each.api_name == "draw")
    text = draw.inputs[-1].value
    *_, (_, _, _, command, *_) = draw.fn(1, 3, 2, None, 0, text)
    assert f"--guidance {text} " in command
    with pytest.raises(gradio.Error, match="give a number"):
        next(draw.fn(1, 3, 2, None, 0, "served_steps.Steps,6"))
