"""Checkpoints in a store that fsspec reaches; here one in this process's memory."""

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from refusals import refusal
from tiny_models import fit_ar

from dar_lightning.cli import main

SAVES = ["--trainer.callbacks+=dar_lightning.training.callbacks.LastStepCheckpoint", "--ckpt_path=last"]
SAVES += ["--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.save_top_k=0"]


def words(tokens, folder, place, steps: int) -> list[str]:
    given = [*fit_ar(*tokens, folder, limit_val_batches=0, max_steps=steps), *SAVES]
    return [str(word) for word in given] + [f"--trainer.callbacks.dirpath={place}"]


@pytest.fixture
def store():
    yield fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()


def test_a_resumed_run_is_the_unbroken_one(tokens, store, tmp_path, caplog):
    """The second command, in another folder as on another machine, goes on from the store alone."""
    main(words(tokens, tmp_path / "whole", tmp_path / "whole" / "checkpoints", 5))
    main(words(tokens, tmp_path / "first", "memory://bucket/run", 3))
    assert list(store.find("/bucket")) == ["/bucket/run/last.ckpt"]
    caplog.clear()
    main(words(tokens, tmp_path / "second", "memory://bucket/run", 5))
    assert "goes on after step 3" in caplog.text
    one = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    two = torch.load(store.open("/bucket/run/last.ckpt"))
    assert one["global_step"] == two["global_step"] == 5
    assert all(torch.equal(tensor, two["state_dict"][name]) for name, tensor in one["state_dict"].items())
    assert not list(tmp_path.rglob("memory*")), "no folder of that name"


def test_an_upload_that_fails_costs_a_line(tokens, store, tmp_path, capsys, monkeypatch):
    uploads, upload = [], MemoryFileSystem.put_file

    def fails_once(self, *args, **options):
        uploads.append(args)
        if len(uploads) == 2:  # at step 4
            raise OSError("the store is away")
        upload(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", fails_once)
    main(words(tokens, tmp_path / "run", "memory://bucket/run", 5))
    said = capsys.readouterr().err
    assert "WARNING: cannot write memory://bucket/run/last.ckpt: the store is away; step 4 is not saved" in said
    assert torch.load(store.open("/bucket/run/last.ckpt"))["global_step"] == 5


def test_mistakes_are_one_line(tokens, store, tmp_path, capsys, monkeypatch):
    line = refusal(capsys, words(tokens, tmp_path / "run", "nosuch://bucket/run", 2))
    assert "trainer.callbacks.dirpath: " in line
    assert "nosuch" in line
    store.pipe_file("/bucket/run/last.ckpt", b"no checkpoint")
    line = refusal(capsys, words(tokens, tmp_path / "run", "memory://bucket/run", 2))
    assert "cannot read memory://bucket/run/last.ckpt: " in line

    def refuses(*args, **options):
        raise PermissionError("no key for this bucket")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuses)
    line = refusal(capsys, words(tokens, tmp_path / "run", "memory://other/run", 2))
    assert "cannot write checkpoints to memory://other/run: no key for this bucket" in line
    assert not (tmp_path / "run").exists()
