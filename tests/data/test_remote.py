"""Shards on a real HTTP server, which also breaks off, lies and goes away; and on a server that speaks S3."""

import functools
import os
import shutil
import sys
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
from tiny_shards import SIZES, module, sample

from dar_lightning.data import remote
from dar_lightning.data.shards import ShardIndex
from dar_lightning.errors import MachineFault, UserError

KEYS = [sample(number)[0] for number in range(26)]


class Server(ThreadingHTTPServer):
    """Serves a folder; `cut` says how often a file is broken off in the middle before it is given whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.silent: threading.Event | None = None  # until it is set, the middle of a file is its end
        self.url = f"http://127.0.0.1:{self.server_port}/train"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        if self.server.asked[name] > self.server.cut.get(name, 0) and not self.server.silent:
            return super().do_GET()
        content = (self.server.folder / self.path[1:]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        if self.server.silent:
            self.wfile.flush()
            self.server.silent.wait(60)
        self.close_connection = True

    def log_message(self, *words) -> None:
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.01)
    monkeypatch.setattr(remote, "AT_START", 0.1)


@pytest.fixture
def server(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "served" / "train")
    server = Server(tmp_path / "served")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(shards, tmp_path, monkeypatch):
    """A bucket with the shards under train/; s3fs finds server and keys where AWS's own tools do."""
    for name in list(os.environ):  # nothing of what this machine knows of AWS
        if name.startswith(("AWS_", "FSSPEC_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "CONFIG_FILE": str(tmp_path / "none"),
        "SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "EC2_METADATA_DISABLED": "true",
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ACCESS_KEY_ID": "key",
        "SECRET_ACCESS_KEY": "secret",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()  # an earlier test's server is gone
    client = boto3.client("s3")
    try:
        client.create_bucket(Bucket="bucket")
        for path in shards.iterdir():
            client.upload_file(str(path), "bucket", f"train/{path.name}")
        yield client
    finally:
        server.stop()


def tars(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.tar"))


def keys(source: str, cache: Path, **options) -> list[str]:
    """Of the good samples in validation."""
    batches = module(source, cache_dir=str(cache), **options).val_dataloader()
    return [key for b in batches for key, valid in zip(b["key"], b["valid"], strict=True) if valid]


@pytest.mark.parametrize(("protocol", "workers"), [("http", 0), ("http", 2), ("s3", 2)])
def test_the_same_batches_as_from_the_disk(request, shards, tmp_path, protocol, workers):
    server = request.getfixturevalue("server" if protocol == "http" else "bucket")
    local, cache = module(shards), tmp_path / "cache"
    url = server.url if protocol == "http" else "s3://bucket/train"
    data = module(f"{url}/", cache_dir=str(cache), num_workers=workers)
    assert data.index("train") != local.index("train")  # it has an address
    assert data.index("train").shards == local.index("train").shards
    assert tars(cache) == []  # nothing is copied before it is needed
    assert data.classes == local.classes
    for loader in ("train_dataloader", "val_dataloader"):
        for here, there in zip(getattr(local, loader)(), getattr(data, loader)(), strict=True):
            assert (here["key"], here["shard"]) == (there["key"], there["shard"])
            assert torch.equal(here["image"], there["image"])
    if protocol == "http":
        assert {name: server.asked[name] for name in tars(shards)} == dict.fromkeys(tars(shards), 1)  # once each
    for path in cache.rglob("*.tar"):
        assert path.read_bytes() == (shards / path.name).read_bytes()
    assert list(cache.rglob("*.part")) == []
    if protocol == "s3":
        server.delete_object(Bucket="bucket", Key="train/000001.tar")
        left = [key for number, key in enumerate(KEYS) if not 10 <= number < 19]
        assert keys(url, tmp_path / "other", max_bad_share=0.5) == left


@pytest.mark.parametrize(("patience", "away"), [(900, 600), (600, 600), (600, 601)])
def test_ten_minutes_by_a_clock_of_its_own(tmp_path, monkeypatch, patience, away):
    """Waits of 1/2, 1, 2, 4, 8 and 16 s, then of 30 s, the last one up to the end of the patience."""
    now, waits = 1000.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        waits.append(seconds)

    def copy(url: str, part: Path) -> None:
        if now - 1000 < away:
            raise OSError("away")
        part.write_bytes(b"shard")

    monkeypatch.setattr(remote, "WAIT", 0.5)
    monkeypatch.setattr(remote, "_copy", copy)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    if patience < away:
        with pytest.raises(
            MachineFault, match=r"^http://x cannot be copied, tried 26 times in 600 s \(OSError: away\);"
        ):
            remote.fetch("http://x", tmp_path / "x", patience=patience)
        assert sum(waits) == patience
        return
    remote.fetch("http://x", tmp_path / "x", patience=patience)
    expected = [0.5, 1, 2, 4, 8, 16, *[30] * 99][: len(waits)]
    expected[-1] = min(expected[-1], patience - sum(expected[:-1]))
    assert waits == expected
    assert away <= sum(waits) < away + 30


def test_without_patience_a_copy_that_differs_is_fetched_once_more(tmp_path, monkeypatch):
    """And used, unless the server is away by then."""
    copies = [b"other", b"other", b"other", None]

    def copy(url: str, part: Path) -> None:
        if (content := copies.pop(0)) is None:
            raise OSError("away")
        part.write_bytes(content)

    monkeypatch.setattr(remote, "_copy", copy)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: 9.0, sleep=[0.0].remove))
    remote.fetch("http://x", tmp_path / "x", 5, "0" * 64, patience=0)
    assert (tmp_path / "x").read_bytes() == b"other"
    assert "the server gives 5 bytes" in (tmp_path / "x.differs").read_text()
    monkeypatch.setattr(remote.time, "sleep", [0.0].remove)
    with pytest.raises(MachineFault, match=r"tried 2 times in 0 s \(OSError: away\)"):
        remote.fetch("http://x", tmp_path / "y", 5, "0" * 64, patience=0)
    assert not copies


def test_a_silent_server_is_named(server, tmp_path, monkeypatch, caplog):
    """After a minute, which is a moment here; a minute is what the package says."""
    assert remote.SILENCE == 60
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    server.silent = threading.Event()
    try:
        with pytest.raises(UserError, match=r"index\.json cannot be copied, tried 2 times .* silent for 0\.2 s\)"):
            keys(server.url, tmp_path / "cache")
        first = caplog.records[0].getMessage()
        assert first.startswith(f"{server.url}/index.json cannot be copied (no connection for 20 s, or silent for")
    finally:
        server.silent.set()


def test_patterns_with_and_without_an_index(server, shards, tmp_path):
    load = functools.partial(ShardIndex.load, cache_dir=str(tmp_path / "cache"))
    pattern = f"{server.url}/{{000000..000002}}.tar"
    assert load(pattern).shards == ShardIndex.load(shards).shards
    assert tars(tmp_path / "cache") == []
    (server.folder / "train" / "index.json").unlink()
    counted = load(pattern)
    assert [shard.samples for shard in counted.shards] == list(SIZES)
    assert counted.classes == ()
    with pytest.raises(UserError, match=r"shards: http://.*/train has no index\.json; give a pattern"):
        load(server.url)
    with pytest.raises(UserError, match=r"http://.*/000003\.tar is missing, and no index\.json says"):
        load(f"{server.url}/{{000000..000003}}.tar")


def test_transfers_that_break_off_are_repeated(server, tmp_path):
    server.cut = {"000001.tar": 2, "index.json": 1}
    assert keys(server.url, tmp_path / "once", max_bad_share=0) == KEYS
    assert server.asked["000001.tar"] == 3
    server.cut = {"000001.tar": 99}
    line = r"^http[^ ]*/train/000001\.tar cannot be copied, tried \d+ times in 0 s \(ClientPayload.*; check the .*$"
    for workers in (0, 1):
        cache = tmp_path / str(workers)
        with pytest.raises(MachineFault, match=line):
            keys(server.url, cache, num_workers=workers, patience=0.2)
        assert tars(cache) == ["000000.tar"]  # nothing half-written
        assert list(cache.rglob("*.part")) == []


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("missing", "the file is missing on the server"),
        ("shorter", "the tar file breaks off"),
        ("other", "not an image of a known format"),
    ],
)
def test_shards_that_are_not_as_the_index_says(server, tmp_path, what, reason):
    """What is good in them is used; they are fetched twice to be sure, and not once more for each reader."""
    path = server.folder / "train" / "000001.tar"
    whole = path.read_bytes()
    path.unlink()
    bad = {"missing": range(9), "shorter": range(3, 9), "other": [4]}[what]
    png = sample(14)[1]["png"]
    if what != "missing":
        end = whole.index(sample(13)[1]["png"]) - 1024  # of the third sample; there the fourth one's header begins
        path.write_bytes(whole[: end - 512] if what == "shorter" else whole.replace(png, bytes(len(png))))
    data = module(server.url, cache_dir=str(tmp_path / "cache"), max_bad_share=0.5)
    assert data.index("train") == data.index("val")
    list(data.train_dataloader())  # by a reader of its own
    for _ in range(2):
        valid = [bool(valid) for batch in data.val_dataloader() for valid in batch["valid"]]
        assert valid == [number - 10 not in bad for number in range(26)]
    names = [f"000001.tar/photo-{14:03d}" if what == "other" else f"000001.tar/#{number}" for number in bad]
    assert list(data.skipped["val"]) == names
    assert what == "missing" or server.asked["000001.tar"] == 2
    with pytest.raises(UserError, match=rf"data\.val: \d of 26 .* the first is {names[0]}: {reason}"):
        keys(server.url, tmp_path / "cache")
    path.write_bytes(whole)  # mended
    assert keys(server.url, tmp_path / "cache", max_bad_share=0) == KEYS


def test_what_was_copied_is_enough(server, tmp_path, monkeypatch, caplog):
    """For a server that is down, with a copy of another size, which is none; and in a cache that cannot be written.

    The rights are taken by a stand-in, since root has them all. Without an index the copies' sizes are not known.
    """
    cache = tmp_path / "cache"
    assert keys(server.url, cache) == KEYS
    pattern = f"{server.url}/{{000000..000002}}.tar"
    server.cut = {"index.json": 99, "000000.tar": 99, "000001.tar": 99}
    (copy,) = cache.rglob("000002.tar")
    copy.write_bytes(b"older")
    assert keys(server.url, cache, max_bad_share=0) == KEYS
    assert "going on with the copy of before" in caplog.text
    server.cut = {}
    caplog.clear()

    def refused(lock, *arguments, **options):
        raise PermissionError(13, "Permission denied", lock.lock_file)

    monkeypatch.setattr(remote.FileLock, "acquire", refused)
    assert keys(pattern, cache) == KEYS
    assert "Permission denied; going on with the copy of before" in caplog.text
    (index,) = cache.rglob("index.json")
    index.unlink()
    with pytest.raises(UserError, match=r"^cache_dir: .*: Permission denied$"):
        keys(pattern, cache)


def refuse(source: str, cache: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        module(source, cache_dir=cache).train_dataloader()
    assert "\n" not in str(error.value)


def test_mistakes_get_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    index = server.folder / "train" / "index.json"
    (server.folder / "hostile").mkdir()
    (server.folder / "hostile" / "index.json").write_text(index.read_text().replace("000001.tar", "../../../x.tar"))
    hostile, cache = server.url.replace("train", "hostile"), str(tmp_path / "cache")
    refuse(server.url, None, rf"data\.train: {server.url} is remote, set cache_dir to a folder")
    refuse(f"{server.url}/nowhere", cache, r"data\.train: .*/nowhere has no index\.json")
    refuse("s4://bucket/train", cache, "s4://bucket/train/index.json: Protocol not known: s4")
    refuse(server.url, str(tmp_path / "file" / "cache"), r"cache_dir: .*file/cache.*: Not a directory")
    refuse(hostile, cache, r"is not a shard index .*'\.\./\.\./\.\./x\.tar'")
    refuse("http://127.0.0.1:9/train", cache, r"index\.json cannot be copied, tried .*127\.0\.0\.1")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it could not be imported
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)  # what was imported before
    refuse("s3://bucket/train", cache, r"s3://bucket/train/index\.json: Install s3fs to access S3")


def test_mistakes_with_buckets_get_one_line(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    for source, name, value, message in (
        ("s3://nowhere/train", "AWS_MAX_ATTEMPTS", "1", r"s3://nowhere/train has no index\.json"),
        ("s3://bucket/train", "AWS_ENDPOINT_URL", "http://127.0.0.1:9", "cannot be copied, tried"),
        ("s3://bucket/train", "AWS_ACCESS_KEY_ID", None, r"cannot be copied, tried .* \(NoCredentialsError"),
    ):
        with monkeypatch.context() as patch:
            patch.delenv(name) if value is None else patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            refuse(source, str(tmp_path / "cache"), message)
    assert tars(tmp_path / "cache") == []
