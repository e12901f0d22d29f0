"""A pipeline by its name: out of a Hub repository, here a stand-in, or out of the package without any network."""

import socket

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tiny_models import CLASSES, make_pipeline

from dar_lightning import ARModel, DARPipeline, SequentialDiffusionTokenizer
from dar_lightning.formats.model_sha256 import model_sha256
from dar_lightning.formats.pretrained import SHIPPED

LABELS = torch.tensor([0, 3, 1])


def draw(pipe: DARPipeline) -> torch.Tensor:
    return pipe.generate(LABELS, guidance=2.0, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repository name -> a folder that it is downloaded to; and what was asked for."""
    folders, asked = {}, []

    def download(repo: str, **options) -> str:
        asked.append((repo, options))
        return str(folders[repo])

    monkeypatch.setattr("dar_lightning.formats.pretrained.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return folders, asked


def test_a_pipeline_out_of_a_repository(hub, tmp_path):
    folders, asked = hub
    make_pipeline().save_pretrained(tmp_path / "snapshot")
    folders["someone/dar-tiny"] = tmp_path / "snapshot"
    pipe = DARPipeline.from_pretrained("someone/dar-tiny")
    assert pipe.classes == CLASSES
    assert torch.equal(draw(pipe), draw(DARPipeline.from_pretrained(tmp_path / "snapshot")))
    ((repo, options),) = asked
    assert repo == "someone/dar-tiny"
    # as patterns match: every file of the three folders that is read, and no other
    names = [str(path.relative_to(tmp_path / "snapshot")) for path in (tmp_path / "snapshot").rglob("*.*")]
    names += ["ar/optimizer.pt", "images/000-0.png", "samples.npz"]
    assert set(filter_repo_objects(names, allow_patterns=options["allow_patterns"])) == {
        "config.json",
        *(f"{part}/{name}" for part in ("tokenizer", "ar") for name in ("config.json", "model.safetensors")),
    }


def test_one_model_out_of_a_repository(hub, tmp_path):
    folders, asked = hub
    ar = make_pipeline().ar
    ar.save_pretrained(tmp_path / "snapshot")
    folders["someone/dar-ar"] = tmp_path / "snapshot"
    wanted = dict(revision="v2", cache_dir="cache", force_download=True, local_files_only=False, token="secret")
    assert model_sha256(ARModel.from_pretrained("someone/dar-ar", **wanted)) == model_sha256(ar)
    assert asked == [("someone/dar-ar", {"allow_patterns": ["config.json", "model.safetensors"], **wanted})]
    ARModel.from_pretrained("someone/dar-ar")
    assert asked[1][1]["revision"] is None, "the main branch"


def test_parts_out_of_two_repositories(hub, tmp_path):
    folders, asked = hub
    whole = make_pipeline()
    for part in ("tokenizer", "ar"):
        getattr(whole, part).save_pretrained(tmp_path / part)
        folders[f"someone/{part}"] = tmp_path / part
    assert torch.equal(draw(DARPipeline.from_parts("someone/tokenizer", "someone/ar")), draw(whole))
    assert [repo for repo, _ in asked] == ["someone/tokenizer", "someone/ar"]


# ---- what comes with the package


def test_the_shipped_pipeline_is_small():
    assert sum(path.stat().st_size for path in (SHIPPED / "fruit64").rglob("*") if path.is_file()) <= 12_000_000


def test_the_shipped_pipeline_needs_no_network(monkeypatch):
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
    for part in (SequentialDiffusionTokenizer, ARModel):
        part.from_pretrained("fruit64")
