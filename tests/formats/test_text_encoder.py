"""The frozen text encoder against transformers itself, on networks made here; what it reads, and what it does not."""

import sys

import numpy as np
import pytest
import torch

from dar_lightning.errors import UserError
from dar_lightning.files import file_sha256
from dar_lightning.formats.text_encoder import TextEncoder

TEXTS = ["a red apple", "apple", "red red red red apple a"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple"]


@pytest.fixture(params=["bert", "t5"])
def folder(request, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    if request.param == "bert":
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        config = transformers.BertConfig(vocab_size=len(WORDS), **sizes)
        network = transformers.BertModel(config)
    else:
        config = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        network = transformers.T5ForConditionalGeneration(config)
    network.eval().save_pretrained(tmp_path)
    return tmp_path, network


def test_features_are_those_of_the_network(folder):
    path, network = folder
    encoder = TextEncoder(path, 6)
    assert (encoder.dim, encoder.sha256) == (16, file_sha256(path / "model.safetensors"))
    assert not encoder.train().network.training
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(TEXTS, batch_size=2)
    network = getattr(network, "encoder", network) if network.config.is_encoder_decoder else network
    for text, features in zip(TEXTS, found, strict=True):
        ids = [2, *(WORDS.index(word) for word in text.split()), 3]
        ids = ids if len(ids) <= 6 else [*ids[:5], 3]
        with torch.no_grad():
            alone = network(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert features.dtype == np.float16
        np.testing.assert_allclose(features, alone.numpy(), atol=2e-3, rtol=2e-3)


def test_without_transformers_or_safetensors(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"encoder: .* has no \.safetensors; weights in other formats are not read"):
        TextEncoder(tmp_path, 4)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'dar-lightning\[text\]'"):
        TextEncoder(tmp_path, 4)


def test_a_folder_that_transformers_cannot_read(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    with pytest.raises(UserError, match="encoder: transformers cannot read"):
        TextEncoder(tmp_path, 4)
