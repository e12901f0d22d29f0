"""Shards on a real HTTP server, which also breaks off, lies and goes away."""

import functools
import json
import multiprocessing
import shutil
import sys
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import fsspec
import pytest
import torch
from tiny_shards import SIZES, sample

from dar_lightning.data import remote
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import ShardIndex
from dar_lightning.errors import UserError


class Server(ThreadingHTTPServer):
    """Serves a folder; `cut` says how often a file is broken off in the middle before it is given whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        if self.server.asked[name] > self.server.cut.get(name, 0):
            return super().do_GET()
        content = (self.server.folder / self.path[1:]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def log_message(self, *words) -> None:
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.01)


@pytest.fixture
def server(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "served" / "train")
    server = Server(tmp_path / "served")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def module(source: str, cache: Path | None, workers: int = 0, **options) -> ImageNetDataModule:
    common = {"image_size": 16, "batch_size": 4, "num_classes": 4, "seed": 3, "num_workers": workers}
    return ImageNetDataModule(source, source, cache_dir=cache and str(cache), **common | options)


def tars(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_the_disk(server, shards, tmp_path, workers):
    local = module(str(shards), None)
    data = module(f"{server.url}/train/", tmp_path / "cache", workers)
    assert data.index("train").num_samples == sum(SIZES)
    assert tars(tmp_path / "cache") == []  # nothing is copied before it is needed
    assert data.classes == local.classes
    for loader in ("train_dataloader", "val_dataloader"):
        for here, there in zip(getattr(local, loader)(), getattr(data, loader)(), strict=True):
            assert here["key"] == there["key"]
            assert here["shard"] == there["shard"]
            assert torch.equal(here["image"], there["image"])
    assert {name: server.asked[name] for name in tars(shards)} == dict.fromkeys(tars(shards), 1)  # once each
    for path in (tmp_path / "cache").rglob("*.tar"):
        assert path.read_bytes() == (shards / path.name).read_bytes()
    assert list((tmp_path / "cache").rglob("*.part")) == []


def test_patterns_with_and_without_an_index(server, shards, tmp_path):
    pattern = f"{server.url}/train/{{000000..000002}}.tar"
    known = ShardIndex.load(pattern, cache_dir=str(tmp_path / "cache"))
    assert known.shards == ShardIndex.load(shards).shards
    assert tars(tmp_path / "cache") == []
    (server.folder / "train" / "index.json").unlink()
    counted = ShardIndex.load(pattern, cache_dir=str(tmp_path / "cache"))
    assert [shard.samples for shard in counted.shards] == list(SIZES)
    assert counted.classes == ()
    with pytest.raises(UserError, match=r"shards: http://.*/train has no index\.json; give a pattern"):
        ShardIndex.load(f"{server.url}/train", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"http://.*/000003\.tar is missing, and no index\.json says"):
        ShardIndex.load(f"{server.url}/train/{{000000..000003}}.tar", cache_dir=str(tmp_path / "cache"))


def test_transfers_that_break_off_are_repeated(server, shards, tmp_path):
    server.cut = {"000001.tar": 2, "index.json": 1}
    data = module(f"{server.url}/train", tmp_path / "cache")
    keys = [key for batch in data.val_dataloader() for key in batch["key"]]
    assert keys == [sample(number)[0] for number in range(26)]
    assert server.asked["000001.tar"] == 3
    assert data.skipped["val"] == {}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_always_breaks_off(server, tmp_path, workers):
    server.cut = {"000001.tar": 99}
    data = module(f"{server.url}/train", tmp_path / "cache", workers)
    with pytest.raises(UserError, match=r"/train/000001\.tar cannot be copied after 4 tries \(ClientPayload") as error:
        list(data.val_dataloader())
    assert "\n" not in str(error.value)
    assert tars(tmp_path / "cache") == ["000000.tar"]  # nothing half-written
    assert list((tmp_path / "cache").rglob("*.part")) == []


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing", "the file is missing on the server"),
        ("shorter", "the tar file breaks off"),
        ("other", "not an image of a known format"),
    ],
)
def test_shards_that_are_not_as_the_index_says(server, tmp_path, caplog, what, reason):
    """What is good in them is used; they are fetched twice to be sure, and not once more for each reader."""
    path = server.folder / "train" / "000001.tar"
    whole = path.read_bytes()
    path.unlink()
    bad = {"missing": range(9), "shorter": range(3, 9), "other": [4]}[what]
    png = sample(14)[1]["png"]
    if what != "missing":
        end = whole.index(sample(13)[1]["png"]) - 1024  # of the third sample; there the fourth one's header begins
        path.write_bytes(whole[: end - 512] if what == "shorter" else whole.replace(png, bytes(len(png))))
    data = module(f"{server.url}/train", tmp_path / "cache", max_bad_share=0.5, workers=2)
    for _ in range(2):
        valid = [bool(valid) for batch in data.val_dataloader() for valid in batch["valid"]]
        assert valid == [number - 10 not in bad for number in range(26)]
    names = [f"000001.tar/photo-{14:03d}" if what == "other" else f"000001.tar/#{number}" for number in bad]
    assert list(data.skipped["val"]) == names
    assert what == "missing" or server.asked["000001.tar"] == 2
    with pytest.raises(UserError, match=rf"data\.val: \d of 26 .* the first is {names[0]}: {reason}"):
        list(module(f"{server.url}/train", tmp_path / "cache").val_dataloader())
    path.write_bytes(whole)  # mended
    data = module(f"{server.url}/train", tmp_path / "cache")
    assert all(batch["valid"].all() for batch in data.val_dataloader())
    assert data.skipped["val"] == {}


def test_a_server_that_is_down(server, tmp_path, caplog):
    """What was copied is enough."""

    def keys() -> list[str]:
        loader = module(f"{server.url}/train", tmp_path / "cache").val_dataloader()
        return [key for batch in loader for key in batch["key"]]

    before = keys()
    server.cut = {"index.json": 99, "000000.tar": 99, "000001.tar": 99, "000002.tar": 99}
    assert keys() == before
    assert "going on with the copy of before" in caplog.text


def test_a_copy_of_another_version_is_replaced(server, shards, tmp_path):
    list(module(f"{server.url}/train", tmp_path / "cache").val_dataloader())
    (copy,) = (tmp_path / "cache").rglob("000002.tar")
    copy.write_bytes(b"older")
    data = module(f"{server.url}/train", tmp_path / "cache")
    assert all(batch["valid"].all() for batch in data.val_dataloader())
    assert copy.read_bytes() == (shards / "000002.tar").read_bytes()


def fetch_many(url: str, path: Path) -> None:
    remote.fetch(url, path)


def test_many_processes_copy_a_shard_once(server, shards, tmp_path):
    path = tmp_path / "cache" / "000000.tar"
    arguments = [(f"{server.url}/train/000000.tar", path)] * 4
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(fetch_many, arguments)
    assert server.asked["000000.tar"] == 1
    assert path.read_bytes() == (shards / "000000.tar").read_bytes()


def test_other_protocols(shards, tmp_path):
    """What fsspec knows; here its file system in memory."""
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket/train", recursive=True)
    data = module("memory://bucket/train", tmp_path / "cache")
    assert [key for batch in data.val_dataloader() for key in batch["key"]] == [sample(i)[0] for i in range(26)]
    memory.rm("/bucket", recursive=True)


def test_a_protocol_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it could not be imported
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)  # what was imported before
    with pytest.raises(UserError, match=r"s3://bucket/train/index\.json: Install s3fs to access S3"):
        module("s3://bucket/train", tmp_path / "cache").train_dataloader()


def test_mistakes_get_one_line(server, tmp_path):
    url = f"{server.url}/train"
    cases = [
        (url, None, rf"data\.train: {url} is remote, set cache_dir to a folder"),
        (f"{server.url}/nowhere", "cache", r"data\.train: .*/nowhere has no index\.json"),
        ("s4://bucket/train", "cache", "s4://bucket/train/index.json: Protocol not known: s4"),
        (url, "file/cache", r"cache_dir: .*file/cache/.* cannot be written \(Not a directory\)"),
    ]
    (tmp_path / "file").touch()
    for source, cache, message in cases:
        with pytest.raises(UserError, match=message) as error:
            module(source, cache and tmp_path / cache).train_dataloader()
        assert "\n" not in str(error.value)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"index\.json cannot be copied after 4 tries \(.*127\.0\.0\.1") as error:
        module(url, tmp_path / "cache").train_dataloader()
    assert "\n" not in str(error.value)


def test_an_index_cannot_name_files_elsewhere(server, tmp_path):
    path = server.folder / "train" / "index.json"
    content = json.loads(path.read_text())
    content["shards"][0]["name"] = "../../../x.tar"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is not a shard index .*'\.\./\.\./\.\./x\.tar'"):
        module(f"{server.url}/train", tmp_path / "cache").train_dataloader()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch, caplog, indexed):
    """Its copies serve if they are enough; here the rights are taken by a stand-in, since root has them all."""
    pattern = f"{server.url}/train/{{000000..000002}}.tar"
    if not indexed:
        (server.folder / "train" / "index.json").unlink()
    before = [batch["key"] for batch in module(pattern, tmp_path / "cache").val_dataloader()]

    def refused(lock, *arguments, **options):
        raise PermissionError(13, "Permission denied", lock.lock_file)

    monkeypatch.setattr(remote.FileLock, "acquire", refused)
    if indexed:
        assert [batch["key"] for batch in module(pattern, tmp_path / "cache").val_dataloader()] == before
        assert "cannot be written (Permission denied); going on with the copy of before" in caplog.text
    else:
        with pytest.raises(UserError, match=r"cache_dir: .* cannot be written \(Permission denied\)$"):
            module(pattern, tmp_path / "cache").val_dataloader()
