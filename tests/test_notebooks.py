"""The notebooks run to their end at tiny size, draw what they promise, and carry no outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_models import write_images
from tiny_sweep import write_sweep

pytestmark = pytest.mark.slow  # each starts a kernel
FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
FIGURES = {"ablation": 6, "generation": 4, "tokenizer_anatomy": 4, "training_curves": 4}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters_of(notebook) -> int:
    """Number of the one cell that says what may be changed."""
    [number] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return number


def execute(name: str, **values) -> list[bytes]:
    """Run a notebook with other values of its parameters, as papermill would; its pictures."""
    notebook = read(name)
    place = parameters_of(notebook)
    known: dict = {}
    exec(notebook.cells[place].source, known)
    assert values.keys() <= known.keys(), "only what the notebook has as a parameter"
    changes = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(changes))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("photos"), 8)


def test_each_notebook_is_executed_here():
    assert set(NOTEBOOKS) == set(FIGURES)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stripped(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []


def test_tokenizer_anatomy(pipeline, photos):
    sizes = dict(NUM_IMAGES=4, NUM_CODED=6, NUM_STRIPS=2)
    pictures = execute("tokenizer_anatomy", PIPELINE=pipeline, SHARDS=photos, CODE_SHARDS=photos, **sizes)
    assert len(set(pictures)) == FIGURES["tokenizer_anatomy"]


def test_generation(pipeline, photos):
    asked = dict(CLASSES=["red", "grey"], GUIDANCES=[1.0, (1.0, 3.0)], PREFIXES=[2, 4], NUM_IMAGES=8, NUM_PHOTOS=4)
    assert len(set(execute("generation", PIPELINE=pipeline, SHARDS=photos, **asked))) == FIGURES["generation"]


def test_ablation(tmp_path):
    assert len(set(execute("ablation", SWEEP=str(write_sweep(tmp_path))))) == FIGURES["ablation"]


def test_training_curves(tmp_path):
    options = ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--data.init_args.batch_size=4"]
    pictures = execute("training_curves", RUN=str(tmp_path / "run"), STEPS=2, OPTIONS=options)
    assert len(set(pictures)) == FIGURES["training_curves"]
