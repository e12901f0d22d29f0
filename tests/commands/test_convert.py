"""`dar convert`: official weights as a folder of ours."""

import json

import official
import torch
from refusals import refused
from safetensors.torch import save_file

from dar_lightning import ARModel, SequentialDiffusionTokenizer
from dar_lightning.commands.convert import convert
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.weights import load_official_tokenizer


def test_official_models(tmp_path, capsys):
    """With the config that the file carries, and with one in a file beside it."""
    state, config = official.state_dict("tokenizer_a"), official.numbers("tokenizer_a", "config")
    path = official.save_pt(tmp_path / "x.pt", config, ema=state)
    convert(path, tmp_path / "out")
    again = model_sha256(SequentialDiffusionTokenizer.from_pretrained(tmp_path / "out"))
    assert again == model_sha256(load_official_tokenizer(path))
    assert again[:12] in capsys.readouterr().out
    for name, kind in (("tokenizer_b", SequentialDiffusionTokenizer), ("ar_b", ARModel)):
        config = official.numbers(name, "config")
        (tmp_path / "x.yaml").write_text(json.dumps(config if name == "tokenizer_b" else config["model"]))  # or JSON
        source = official.GOLDENS / name / "state_dict.safetensors"
        convert(source, tmp_path / name, official_config=tmp_path / "x.yaml")
        kind.from_pretrained(tmp_path / name)


def test_what_is_neither(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    for name, message in (("x.safetensors", "neither an official tokenizer nor"), ("absent.pt", "is missing")):
        refused(message, convert, tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
