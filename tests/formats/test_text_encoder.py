"""The frozen text encoder against transformers itself, on networks made here; what it reads, and what it does not."""

import json
import sys

import numpy as np
import pytest
import torch
from refusals import refused
from tiny_encoder import WORDS, write_encoder

from dar_lightning.files import file_sha256
from dar_lightning.formats.text_encoder import TextEncoder

TEXTS = ["a red apple", "apple", "red red red red apple a"]


@pytest.fixture(params=["bert", "t5", "clip"])
def folder(request, tmp_path):
    pytest.importorskip("transformers")
    return tmp_path, write_encoder(tmp_path, request.param)


def test_features_are_those_of_the_network(folder):
    path, network = folder
    encoder = TextEncoder(path, 6)
    assert (encoder.dim, encoder.sha256) == (16, file_sha256(path / "model.safetensors"))
    assert not encoder.train().network.training
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(TEXTS, batch_size=2)
    network = getattr(
        network, "text_model", getattr(network, "encoder", network) if network.config.is_encoder_decoder else network
    )
    assert encoder.count_tokens(TEXTS) == [5, 3, 8]
    for text, features in zip(TEXTS, found, strict=True):
        ids = [2, *(WORDS.index(word) for word in text.split()), 3]
        ids = ids if len(ids) <= 6 else [*ids[:5], 3]
        with torch.no_grad():
            alone = network(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert features.dtype == np.float16
        np.testing.assert_allclose(features, alone.numpy(), atol=2e-3, rtol=2e-3)


def test_without_transformers_or_safetensors(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").touch()
    refused(r"encoder: .* has no \.safetensors; weights in other formats are not read", TextEncoder, tmp_path, 4)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(r"needs transformers: pip install 'dar-lightning\[text\]'", TextEncoder, tmp_path, 4)


def test_a_folder_that_transformers_cannot_read(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    refused("encoder: transformers cannot read", TextEncoder, tmp_path, 4)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_texts_longer_than_its_places(kind, tmp_path):
    pytest.importorskip("transformers")
    write_encoder(tmp_path, kind)
    TextEncoder(tmp_path, 32)
    refused(r"encoder: .* cannot encode texts of up to 33 tokens: ", TextEncoder, tmp_path, 33)


@pytest.mark.parametrize(("lacks", "key"), [("mask", "model_input_names"), ("padding", "pad_token")])
def test_a_tokenizer_without_what_is_needed(lacks, key, tmp_path):
    pytest.importorskip("transformers")
    write_encoder(tmp_path, "bert")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: {"mask": ["input_ids"], "padding": None}[lacks]}))
    refused(f"cannot encode texts of up to 4 tokens: .*{lacks}", TextEncoder, tmp_path, 4)
