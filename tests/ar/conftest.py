"""The official implementation's three small AR models, in ours, with their numbers."""

from dataclasses import dataclass

import pytest
import torch

from dar_lightning.ar.model import ARModel
from dar_lightning.weights import load_official_ar


@dataclass
class Golden:
    config: dict  # the official constructor's arguments and the golden's own settings
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    grad_norms: dict
    ar: ARModel


@pytest.fixture(scope="session", params=["ar_a", "ar_b", "ar_b_gqa_train"])
def golden(request, official_config, official_state, golden_tensors, golden_norms) -> Golden:
    name = request.param
    config = official_config(name)
    return Golden(
        config=config,
        inputs=golden_tensors(name, "inputs"),
        outputs=golden_tensors(name, "outputs"),
        grad_norms=golden_norms(name),
        ar=load_official_ar(official_state(name), config["model"]),
    )
