"""Goldens: weights and numbers of the official implementation, as its files in tests/goldens describe them."""

import argparse
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dar_lightning import ARModel, SequentialDiffusionTokenizer
from dar_lightning.weights import load_official_ar, load_official_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-4  # of a tensor's largest magnitude


def numbers(golden: str, name: str) -> dict:
    return json.loads((GOLDENS / golden / f"{name}.json").read_text())


def tensors(golden: str, name: str) -> dict[str, Tensor]:
    """A golden's file, halves as float32."""
    found = load_file(GOLDENS / golden / f"{name}.safetensors")
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in found.items()}


def from_recipe(seed: int, shape, std: float = 1.0) -> Tensor:
    """A tensor that a golden does not store but describes."""
    return torch.from_numpy((np.random.RandomState(seed).standard_normal(shape) * std).astype("float32"))


def state_dict(golden: str) -> dict[str, Tensor]:
    """The complete official weights, a tokenizer's REPA head made from its recipe."""
    recipe = numbers(golden, "config").get("repa_head", {"tensors": []})
    state = load_file(GOLDENS / golden / "state_dict.safetensors")
    return state | {t["name"]: from_recipe(t["seed"], t["shape"], t["std"]) for t in recipe["tensors"]}


@dataclass
class Golden:
    """A small official model, in ours, with its numbers."""

    config: dict  # the official config and the golden's own settings
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grad_norms: dict
    model: SequentialDiffusionTokenizer | ARModel


def load(name: str) -> Golden:
    config, state = numbers(name, "config"), state_dict(name)
    tokenizer = name.startswith("tokenizer")
    model = load_official_tokenizer(state, config) if tokenizer else load_official_ar(state, config["model"])
    return Golden(config, tensors(name, "inputs"), tensors(name, "outputs"), numbers(name, "grad_norms"), model)


def assert_close(ours: Tensor, golden: Tensor) -> None:
    assert ours.shape == golden.shape
    error = (ours.detach() - golden).abs().max() / golden.abs().max()
    assert error < TOLERANCE, f"off by {error:.1e} of the largest magnitude"


def save_pt(path: Path, config, **content) -> Path:
    """Write a .pt as the official training does, with a pickled Namespace and a config of the official code's class."""
    module = types.ModuleType("config_util")
    module.Config = type("Config", (), {"__module__": "config_util"})
    content = {"args": argparse.Namespace(lr=2e-4), "steps": 7, "config": module.Config()} | content
    content["config"]._data = config
    sys.modules["config_util"] = module
    try:
        torch.save(content, path)
    finally:
        del sys.modules["config_util"]
    return path
