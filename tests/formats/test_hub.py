"""A pipeline by its name: out of a Hub repository, here a stand-in, or out of the package without any network."""

import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tiny_models import CLASSES

from dar_lightning import ARModel, DARPipeline, SequentialDiffusionTokenizer
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.formats.pretrained import SHIPPED


def draw(pipe: DARPipeline) -> torch.Tensor:
    return pipe.generate(torch.tensor([0, 3, 1]), guidance=2.0, generator=torch.Generator().manual_seed(0))


def test_repositories(pipeline, tmp_path, monkeypatch):
    """The Hub has someone/pipeline, someone/tokenizer and someone/ar."""
    asked = []

    def download(repo: str, **options) -> str:
        asked.append((repo, options))
        return str(Path(pipeline) / repo.removeprefix("someone/").removeprefix("pipeline"))

    monkeypatch.setattr("dar_lightning.formats.pretrained.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    pipe = DARPipeline.from_pretrained("someone/pipeline")
    assert pipe.classes == CLASSES
    images = draw(DARPipeline.from_pretrained(pipeline))
    assert torch.equal(draw(pipe), images)
    ((repo, options),) = asked
    assert repo == "someone/pipeline"
    # as patterns match: every file of the three folders that is read, and no other
    names = [str(path.relative_to(pipeline)) for path in Path(pipeline).rglob("*.*")]
    names += ["ar/optimizer.pt", "images/000-0.png", "samples.npz"]
    assert set(filter_repo_objects(names, allow_patterns=options["allow_patterns"])) == {
        "config.json",
        *(f"{part}/{name}" for part in ("tokenizer", "ar") for name in ("config.json", "model.safetensors")),
    }
    wanted = dict(revision="v2", cache_dir="cache", force_download=True, local_files_only=False, token="secret")
    ar = ARModel.from_pretrained("someone/ar", **wanted)
    assert model_sha256(ar) == model_sha256(ARModel.from_pretrained(Path(pipeline) / "ar"))
    assert asked.pop() == ("someone/ar", {"allow_patterns": ["config.json", "model.safetensors"], **wanted})
    assert torch.equal(draw(DARPipeline.from_parts("someone/tokenizer", "someone/ar")), images)
    assert [repo for repo, _ in asked[1:]] == ["someone/tokenizer", "someone/ar"]


def test_the_shipped_pipeline_is_small_and_needs_no_network(monkeypatch):
    def refuse(*_):
        raise OSError("the network is blocked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(OSError, match="is blocked"):
        socket.create_connection(("127.0.0.1", 9))
    pipe = DARPipeline.from_pretrained("fruit64")
    images = draw(pipe)
    assert images.shape == (3, 3, 64, 64)
    assert images.isfinite().all()
    assert len(pipe.classes) == 14
    ARModel.from_pretrained("fruit64")
    # as it stands in stored protocols
    assert model_sha256(SequentialDiffusionTokenizer.from_pretrained("fruit64")).startswith("169cc7fb518a")
    assert sum(path.stat().st_size for path in (SHIPPED / "fruit64").rglob("*") if path.is_file()) <= 12_000_000
