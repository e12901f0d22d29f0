"""The notebooks run to their end at tiny size, draw what they promise, and carry no outputs."""

from pathlib import Path

import pytest
from tiny_models import write_images
from tiny_sweep import write_sweep

FOLDER = Path(__file__).parents[1] / "notebooks"
PICTURES = {"ablation": 6, "generation": 4, "tokenizer_anatomy": 4, "training_curves": 4}


@pytest.fixture(scope="module")
def notebooks() -> dict:
    import nbformat  # takes seconds, which only the process that runs these tests needs to spend

    return {path.stem: nbformat.read(path, as_version=4) for path in FOLDER.glob("*.ipynb")}


def test_outputs_are_stripped(notebooks):
    code = [cell for notebook in notebooks.values() for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []


def with_parameters(notebook, values: dict) -> list:
    """A notebook's cells with other values of its parameters, as papermill would set them."""
    from nbformat.v4 import new_code_cell

    cells, known = list(notebook.cells), {}
    (place,) = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    exec(cells[place].source, known)
    assert values.keys() <= known.keys(), "only what the notebook has as a parameter"
    changes = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    return [*cells[: place + 1], new_code_cell(changes), *cells[place + 1 :]]


@pytest.mark.slow
def test_all_in_one_kernel(notebooks, pipeline, tmp_path):
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    photos = write_images(tmp_path / "photos", 8)
    options = ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--data.init_args.batch_size=4"]
    given = {"PIPELINE": pipeline, "SHARDS": photos}
    sizes = {"NUM_IMAGES": 8, "NUM_PHOTOS": 4, "PREFIXES": [2, 4], "GUIDANCES": [1.0, (1.0, 3.0)]}
    values = {
        "tokenizer_anatomy": given | {"CODE_SHARDS": photos, "NUM_IMAGES": 4, "NUM_CODED": 6, "NUM_STRIPS": 2},
        "generation": given | sizes | {"CLASSES": ["red", "grey"]},
        "ablation": {"SWEEP": str(write_sweep(tmp_path / "sweep"))},
        "training_curves": {"RUN": str(tmp_path / "run"), "STEPS": 2, "OPTIONS": options},
    }
    assert values.keys() == notebooks.keys() == PICTURES.keys()
    cells = {name: with_parameters(notebooks[name], changes) for name, changes in values.items()}
    forget = [new_code_cell("%reset -f")]
    whole = new_notebook()
    whole.cells = [cell for each in cells.values() for cell in (*each, *forget)]
    NotebookClient(whole, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    for name, expected in PICTURES.items():
        outputs = [output for cell in cells[name] if cell.cell_type == "code" for output in cell.outputs]
        assert [output for output in outputs if output.get("name") == "stderr"] == []
        pictures = {output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})}
        assert len(pictures) == expected, name
