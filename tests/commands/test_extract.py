"""`dar extract` goes on only with what made the token shards that are there."""

import json

import pytest
import torch
from refusals import refused
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_models import make_tokenizer, write_images

from dar_lightning.commands.extract import extract
from dar_lightning.data.token_dataset import HEADER, read_header


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_the_precision_of_the_computation(tmp_path, stored):
    """It is noted and compared. Versions that did not note it computed in the dtype in which weights are stored."""
    make_tokenizer().to(stored).save_pretrained(tmp_path / "tokenizer")
    words = str(tmp_path / "tokenizer"), write_images(tmp_path / "images", 4), str(tmp_path / "codes")
    options = {"crops": "center", "accelerator": "cpu", "devices": 1}
    path, index = tmp_path / "codes/000000.safetensors", tmp_path / "codes/index.json"
    extract(*words, **options)
    index.unlink()  # as after a kill
    made_by = read_header(path)["made_by"]
    assert (made_by["dtype"], made_by["float32_matmul_precision"]) == ("float32", "highest")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        refused("was made with float32_matmul_precision highest, now it is high; choose", extract, *words, **options)
    finally:
        torch.set_float32_matmul_precision(before)

    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dictionary)
        header = json.loads(file.metadata()[HEADER])
    del header["made_by"]["dtype"], header["made_by"]["float32_matmul_precision"]
    save_file(tensors, path, metadata={HEADER: json.dumps(header)})
    content = path.read_bytes()
    if stored == torch.float32:
        extract(*words, **options)
    else:
        refused(r"000000\.safetensors was made with dtype bfloat16, now it is float32; ch", extract, *words, **options)
    assert index.exists() == (stored == torch.float32)
    assert path.read_bytes() == content
