"""A fingerprint changes with what a model computes, and with nothing else."""

import copy
import dataclasses

import torch
from tiny_models import make_ar, make_tokenizer

from dar_lightning.ar.config import ARConfig
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.tokenizer.config import TokenizerConfig


def test_it_sees_weights_config_and_class():
    tokenizer, ar = make_tokenizer(), make_ar()
    marks = {model_sha256(tokenizer), model_sha256(ar)}
    shifted = copy.deepcopy(tokenizer)
    shifted.config = TokenizerConfig(**(tokenizer.config.to_dict() | {"time_shift": 1.0}))
    marks.add(model_sha256(shifted))
    nudged = copy.deepcopy(ar)
    with torch.no_grad():
        nudged.norm.weight[3] += 1e-6
    marks.add(model_sha256(nudged))
    assert len(marks) == 4
    whole = copy.deepcopy(tokenizer)
    whole.config = TokenizerConfig(**(tokenizer.config.to_dict() | {"time_shift": 2}))
    assert model_sha256(whole) == model_sha256(tokenizer), "2 and 2.0 are one value"


def test_it_does_not_see_what_only_training_reads():
    tokenizer, ar = make_tokenizer(), make_ar()
    marks = model_sha256(tokenizer), model_sha256(ar)
    tokenizer.config = TokenizerConfig(**(tokenizer.config.to_dict() | {"repa_layer": 0}))
    tokenizer.decoder.repa_head = torch.nn.Linear(2, 2)
    ar.config = ARConfig(**(ar.config.to_dict() | {"class_dropout": 0.5, "ffn_dropout": 0.0}))
    assert (model_sha256(tokenizer), model_sha256(ar)) == marks

    # Nor an option that a later version adds, off by default.
    later = dataclasses.make_dataclass("Later", [("option", str, "off")], bases=(ARConfig,), frozen=True)
    ar.config = later(**ar.config.to_dict())
    assert model_sha256(ar) == marks[1]
    ar.config = dataclasses.replace(ar.config, option="on")
    assert model_sha256(ar) != marks[1]
