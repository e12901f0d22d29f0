"""What tests of several commands share."""

import os
import sys
from pathlib import Path

import pytest
import yaml

from dar_lightning.cli import main
from dar_lightning.records import provenance
from dar_lightning.sweeps import run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs a sweep file; its commands do nothing, but for those that have a word in `broken`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(provenance, "_git", lambda *words: None)  # several calls a stage
    monkeypatch.setattr(os, "fsync", lambda number: None)
    done, broken = [], []

    def call(words, log, lock):
        assert words[:3] == [sys.executable, "-m", "dar_lightning"]
        done.append(words[3:])
        failed = any(word in " ".join(words) for word in broken)
        print("no such thing" if failed else "fine", file=log, flush=True)
        return 2 if failed else 0, 0

    monkeypatch.setattr(run, "_call", call)

    def sweep(settings: dict, *options: str) -> list[list[str]]:
        Path("sweep.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        done.clear()
        main(["sweep", "sweep.yaml", "--output", "out", *options])
        return list(done)

    sweep.broken = broken
    return sweep
