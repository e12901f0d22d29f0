"""What benchmarks/soak.py calls flat, on runs whose truth is known."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "soak.py"
spec = importlib.util.spec_from_file_location("soak", PATH)
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def notes(leak: float = 0.0, **late: int) -> list[dict]:
    """Of 10,000 steps: memory rises at the start, is noisy, and leaks so many bytes a step."""
    generator = np.random.default_rng(0)
    constant = {"file_descriptors": 11, "threads": 2, "processes": 1}
    return [
        {"step": step, "memory_mb": 900 - 100 * np.exp(-step / 500) + generator.normal() + leak * step / 1e6}
        | constant
        | (late if step > 8000 else {})
        for step in range(50, 10_001, 50)
    ]


def test_noise_and_a_beginning_are_flat():
    assert soak.verdict(notes())["flat"]


def test_a_leak_of_memory_is_found_and_measured():
    result = soak.verdict(notes(leak=4000))
    assert not result["flat"]
    assert result["memory_bytes_per_step"] == pytest.approx(4000, rel=0.1)


@pytest.mark.parametrize("name", ["file_descriptors", "threads", "processes"])
def test_one_more_of_anything_else_is_found(name):
    assert not soak.verdict(notes(**{name: 12}))["flat"]


def test_what_a_process_and_its_children_hold(tmp_path):
    before = soak.held(os.getpid())
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with open(tmp_path / "x", "w"), subprocess.Popen([sys.executable, "-c", "print(); input()"], **pipes) as child:
        child.stdout.readline()
        during = soak.held(os.getpid())
        child.communicate(b"\n")
    assert during["processes"] == before["processes"] + 1
    assert during["file_descriptors"] >= before["file_descriptors"] + 3 + 3  # ours and two pipes, and the child's three
    assert during["memory_mb"] > before["memory_mb"] + 3
