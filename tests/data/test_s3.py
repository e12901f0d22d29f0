"""Shards in S3, as a server on this machine gives them that speaks S3's protocol (moto)."""

import os

import boto3
import pytest
import s3fs
import torch
from moto.server import ThreadedMotoServer
from tiny_shards import SIZES, sample

from dar_lightning.data import remote
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.data.shards import ShardIndex
from dar_lightning.errors import UserError


@pytest.fixture
def bucket(shards, tmp_path, monkeypatch):
    """A bucket with the shards under train/; s3fs finds server and keys where AWS's own tools do."""
    for name in list(os.environ):  # nothing of what this machine knows of AWS
        if name.startswith(("AWS_", "FSSPEC_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(remote, "WAIT", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()  # an earlier test's server is gone
    client = boto3.client("s3")
    try:
        client.create_bucket(Bucket="bucket")
        for path in shards.iterdir():
            client.upload_file(str(path), "bucket", f"train/{path.name}")
        yield client
    finally:
        server.stop()


def module(source: str, cache, workers: int = 0) -> ImageNetDataModule:
    options = {"image_size": 16, "batch_size": 4, "num_classes": 4, "seed": 3, "num_workers": workers}
    return ImageNetDataModule(source, source, cache_dir=str(cache), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_batches_as_from_the_disk(bucket, shards, tmp_path, workers):
    local = module(str(shards), tmp_path)
    data = module("s3://bucket/train", tmp_path / "cache", workers)
    assert data.index("train").num_samples == sum(SIZES)
    for loader in ("train_dataloader", "val_dataloader"):
        for here, there in zip(getattr(local, loader)(), getattr(data, loader)(), strict=True):
            assert here["key"] == there["key"]
            assert torch.equal(here["image"], there["image"])
    for path in (tmp_path / "cache").rglob("*.tar"):
        assert path.read_bytes() == (shards / path.name).read_bytes()
    assert data.skipped["val"] == {}


def test_a_pattern_without_an_index_is_counted(bucket, tmp_path):
    bucket.delete_object(Bucket="bucket", Key="train/index.json")
    counted = ShardIndex.load("s3://bucket/train/{000000..000002}.tar", cache_dir=str(tmp_path / "cache"))
    assert [shard.samples for shard in counted.shards] == list(SIZES)
    with pytest.raises(UserError, match=r"s3://bucket/train/000003\.tar is missing, and no index\.json says"):
        ShardIndex.load("s3://bucket/train/{000000..000003}.tar", cache_dir=str(tmp_path / "cache"))


def test_a_shard_that_is_not_as_the_index_says_is_skipped_and_named(bucket, tmp_path):
    bucket.delete_object(Bucket="bucket", Key="train/000001.tar")
    data = ImageNetDataModule(
        "s3://bucket/train",
        "s3://bucket/train",
        cache_dir=str(tmp_path / "cache"),
        image_size=16,
        batch_size=4,
        num_classes=4,
        max_bad_share=0.5,
    )
    batches = list(data.val_dataloader())
    keys = [key for batch in batches for key, valid in zip(batch["key"], batch["valid"], strict=True) if valid]
    assert keys == [sample(number)[0] for number in range(26) if not 10 <= number < 19]
    assert list(data.skipped["val"]) == [f"000001.tar/#{number}" for number in range(9)]


@pytest.mark.parametrize(
    ("source", "broken", "message"),
    [
        ("s3://nowhere/train", {}, r"s3://nowhere/train has no index\.json"),
        ("s3://bucket/test", {}, r"s3://bucket/test has no index\.json"),
        ("s3://bucket/train", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be copied after 4 tries"),
        ("s3://bucket/train", {"AWS_ACCESS_KEY_ID": None}, r"after 4 tries \(NoCredentialsError"),
    ],
)
def test_mistakes_get_one_line(bucket, tmp_path, monkeypatch, source, broken, message):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    for name, value in broken.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=message) as error:
        module(source, tmp_path / "cache").train_dataloader()
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").rglob("*.tar")) == []
