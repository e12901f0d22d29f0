"""The SHA-256 of a model changes with what it computes, and with nothing else."""

import dataclasses

import torch
from tiny_models import make_ar, make_tokenizer

from dar_lightning.formats.model_sha256 import model_sha256


def test_it_sees_weights_config_and_class():
    tokenizer, ar = make_tokenizer(), make_ar()
    hashes = [model_sha256(tokenizer), model_sha256(ar)]
    with torch.no_grad():
        ar.norm.weight[3] += 1e-6
    config = tokenizer.config
    tokenizer.config = dataclasses.replace(config, time_shift=1.0)
    hashes += [model_sha256(tokenizer), model_sha256(ar)]
    assert len(set(hashes)) == 4
    tokenizer.config = dataclasses.replace(config, time_shift=2)
    assert model_sha256(tokenizer) == hashes[0], "2 and 2.0 are one value"


def test_it_does_not_see_what_only_training_reads():
    tokenizer, ar = make_tokenizer(), make_ar()
    hashes = model_sha256(tokenizer), model_sha256(ar)
    tokenizer.config = dataclasses.replace(tokenizer.config, repa_layer=0)
    tokenizer.decoder.repa_head = torch.nn.Linear(2, 2)
    ar.config = dataclasses.replace(ar.config, class_dropout=0.5, ffn_dropout=0.0)
    assert (model_sha256(tokenizer), model_sha256(ar)) == hashes
    # Nor an option that a later version adds, off by default.
    later = dataclasses.make_dataclass("Later", [("option", str, "off")], bases=(type(ar.config),), frozen=True)
    ar.config = later(**ar.config.to_dict())
    assert model_sha256(ar) == hashes[1]
    ar.config = dataclasses.replace(ar.config, option="on")
    assert model_sha256(ar) != hashes[1]
