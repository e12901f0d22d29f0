"""What several folders of tests share."""

import json
import logging
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file
from tiny_models import make_pipeline

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"

QUIET = ("lightning.pytorch", "lightning.fabric", "torch.distributed")

# What processes that tests start say of options and devices is Lightning's and torch's, not a failure.
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"


def pytest_configure():
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="session", autouse=True)
def one_parser():
    """LightningCLI's parser takes seconds to build: once for all runs of a test process."""
    build, built = LightningCLI.setup_parser, {}

    def setup_parser(self, *arguments) -> None:
        if type(self) not in built:
            before = {*vars(self)}
            build(self, *arguments)
            built[type(self)] = {name: value for name, value in vars(self).items() if name not in before}
        vars(self).update(built[type(self)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightningCLI, "setup_parser", setup_parser)
        yield


def pytest_collection_finish():
    """The server that killable's processes are forked from is up before a loader starts one that has imported less.

    Loaders of tests that run in this process then use it, too.
    """
    if "killable" in sys.modules:
        forkserver.ensure_running()


def from_recipe(seed: int, shape, std: float = 1.0) -> torch.Tensor:
    """A tensor that a golden does not store but describes."""
    return torch.from_numpy((np.random.RandomState(seed).standard_normal(shape) * std).astype("float32"))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> str:
    """The folder of a small random pipeline, not to be written to."""
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def official_config() -> Callable[[str], dict]:
    """Name of a golden -> its config.json."""
    return lambda name: json.loads((GOLDENS / name / "config.json").read_text())


@pytest.fixture(scope="session")
def official_state(official_config) -> Callable[[str], dict[str, torch.Tensor]]:
    """Name of a golden -> the complete official state dict, a tokenizer's REPA head made from its recipe."""

    def load(name: str) -> dict[str, torch.Tensor]:
        recipe = official_config(name).get("repa_head", {"tensors": []})
        state = load_file(GOLDENS / name / "state_dict.safetensors")
        return state | {t["name"]: from_recipe(t["seed"], t["shape"], t["std"]) for t in recipe["tensors"]}

    return load


@pytest.fixture(scope="session")
def golden_tensors() -> Callable[[str, str], dict[str, torch.Tensor]]:
    """Name of a golden, "inputs" or "outputs" -> its tensors, halves as float32."""

    def load(name: str, which: str) -> dict[str, torch.Tensor]:
        tensors = load_file(GOLDENS / name / f"{which}.safetensors")
        return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}

    return load


@pytest.fixture(scope="session")
def golden_norms() -> Callable[[str], dict]:
    """Name of a golden -> its gradient norms."""
    return lambda name: json.loads((GOLDENS / name / "grad_norms.json").read_text())


@pytest.fixture
def at_the_root_with_a_random_teacher(monkeypatch):
    """Configs name their data from there; DINOv2 is not downloaded, and has one block."""
    monkeypatch.chdir(ROOT)
    make = timm.create_model
    random = {"pretrained": False, "depth": 1}
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: make(*names, **options | random))
