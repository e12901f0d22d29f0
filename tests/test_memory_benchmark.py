"""benchmarks/memory.py counts without data what a real step keeps, and the paper's sizes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny_models import AR, TOKENIZER

from dar_lightning.ar.config import ARConfig
from dar_lightning.tokenizer.config import TokenizerConfig
from dar_lightning.training import ARModule, TokenizerModule

PATH = Path(__file__).parents[1] / "benchmarks" / "memory.py"
spec = importlib.util.spec_from_file_location("memory_benchmark", PATH)
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)

TINY = {
    "tokenizer": lambda: TokenizerModule(TokenizerConfig(**TOKENIZER)),
    "checkpointed": lambda: TokenizerModule(TokenizerConfig(**TOKENIZER), activation_checkpointing=memory.PARTS),
    "ar": lambda: ARModule(ARConfig(**AR)),
}


@pytest.mark.parametrize("name", TINY)
def test_counted_is_what_a_real_step_keeps(name):
    counted = memory.count(TINY[name], device="cpu")
    for batch_size in (3, 5):
        module = TINY[name]()
        kept, flops = memory.forward(module, batch_size)
        expected = counted["activation_bytes_fixed"] + batch_size * counted["activation_bytes_per_sample"]
        assert kept == pytest.approx(expected, rel=0.01)
        assert flops == pytest.approx(batch_size * 1e9 * counted["forward_gflop_per_sample"], rel=0.01)


def test_a_gpu_is_not_needed():
    counted = memory.count(lambda: ARModule(preset="B"))
    assert counted["parameters"] == 110_888_448
    assert 3 * counted["forward_gflop_per_sample"] == pytest.approx(153, rel=0.05)
    assert not torch.is_autocast_enabled("cuda")
