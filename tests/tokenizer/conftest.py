"""The official implementation's two small tokenizers, in ours, with their numbers."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dar_lightning.tokenizer.model import SequentialDiffusionTokenizer
from dar_lightning.weights import load_official_tokenizer


@dataclass
class Golden:
    config: dict  # the official config and the golden's own settings
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    grad_norms: dict
    tokenizer: SequentialDiffusionTokenizer

    @property
    def decoded(self) -> int:
        """How many of the images were decoded."""
        return self.config["decode_batch"]

    def teacher_features(self, shape) -> torch.Tensor:
        """Stand-in for the features of REPA's teacher."""
        draws = np.random.RandomState(self.config["repa_features"]["seed"]).standard_normal(shape)
        return torch.from_numpy(draws.astype("float32"))


@pytest.fixture(scope="session", params=["tokenizer_a", "tokenizer_b"])
def golden(request, official_config, official_state, golden_tensors, golden_norms) -> Golden:
    name = request.param
    config = official_config(name)
    return Golden(
        config=config,
        inputs=golden_tensors(name, "inputs"),
        outputs=golden_tensors(name, "outputs"),
        grad_norms=golden_norms(name),
        tokenizer=load_official_tokenizer(official_state(name), config),
    )
