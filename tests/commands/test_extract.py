"""`dar extract` goes on only with what made the token shards that are there."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_models import make_tokenizer, write_images

from dar_lightning.commands.extract import extract
from dar_lightning.data.token_dataset import HEADER, read_header
from dar_lightning.errors import UserError


@pytest.fixture
def begun(tmp_path):
    """Extracts tokens of a tokenizer that is stored in some dtype; the index is gone then, as after a kill."""

    def begin(dtype: torch.dtype):
        make_tokenizer().to(dtype).save_pretrained(tmp_path / "tokenizer")
        images = write_images(tmp_path / "images", 4)

        def run() -> None:
            paths = str(tmp_path / "tokenizer"), images, str(tmp_path / "codes")
            extract(*paths, crops="center", accelerator="cpu", devices=1)

        run()
        (tmp_path / "codes/index.json").unlink()
        return tmp_path / "codes/000000.safetensors", run

    return begin


def change_made_by(path, **changes) -> None:
    """Rewrite a header; None takes a fact away."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
        header = json.loads(file.metadata()[HEADER])
    header["made_by"] = {name: value for name, value in (header["made_by"] | changes).items() if value is not None}
    save_file(tensors, path, metadata={HEADER: json.dumps(header)})


def test_the_precision_of_the_computation_is_noted_and_compared(begun):
    path, run = begun(torch.float32)
    made_by = read_header(path)["made_by"]
    assert (made_by["dtype"], made_by["float32_matmul_precision"]) == ("float32", "highest")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(UserError, match="was made with float32_matmul_precision highest, now it is high; choose"):
            run()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_what_an_earlier_version_began_in_the_dtype_of_the_weights(begun, stored):
    """Its token shards do not say in which dtype they were computed: it was that in which the weights are stored."""
    path, run = begun(stored)
    change_made_by(path, dtype=None, float32_matmul_precision=None)
    before = path.read_bytes()
    if stored == torch.float32:
        run()
        assert (path.parent / "index.json").exists()
    else:
        with pytest.raises(UserError, match=r"000000\.safetensors was made with dtype bfloat16, now it is float32; ch"):
            run()
        assert not (path.parent / "index.json").exists()
    assert path.read_bytes() == before
