"""`dar convert`: official weights as a folder of ours."""

import json

import official
import pytest
import torch
from safetensors.torch import save_file

from dar_lightning.commands.convert import convert
from dar_lightning.errors import UserError
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights import load_official_tokenizer


def test_an_official_tokenizer(tmp_path, capsys):
    path = official.save_pt(
        tmp_path / "x.pt", official.numbers("tokenizer_a", "config"), ema=official.state_dict("tokenizer_a")
    )
    convert(path, tmp_path / "out")
    again = SequentialDiffusionTokenizer.from_pretrained(tmp_path / "out")
    assert model_sha256(again) == model_sha256(load_official_tokenizer(path))
    assert model_sha256(again)[:12] in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*has no REPA head")
@pytest.mark.parametrize("name", ["tokenizer_b", "ar_b"])
def test_with_a_config_file(name, tmp_path):
    config = official.numbers(name, "config")
    config = config if name == "tokenizer_b" else config["model"]
    (tmp_path / "official.yaml").write_text(json.dumps(config))  # JSON is YAML
    source = official.GOLDENS / name / "state_dict.safetensors"
    convert(source, tmp_path / "out", official_config=tmp_path / "official.yaml")
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_is_neither(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="neither an official tokenizer nor"):
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    with pytest.raises(UserError, match="is missing"):
        convert(tmp_path / "absent.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
