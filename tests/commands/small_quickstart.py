"""`dar quickstart` made small: its configs with few steps, and few of its photos."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from dar_lightning.commands.quickstart import CONFIGS, VAL
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex, write_shard

ROOT = Path(__file__).parents[2]


def small_configs(folder: Path, from_scratch: bool, tokenizer_steps: int = 12) -> str:
    """The real configs, a hundredth of the steps; from scratch a quarter of the width."""
    folder.mkdir()
    layers = ("tokenizer", "ar") if from_scratch else ("tokenizer", "ar", "finetune_tokenizer", "finetune_ar")
    configs = {name: yaml.safe_load((ROOT / CONFIGS / f"{name}.yaml").read_text()) for name in layers}
    for name, config in configs.items():
        steps = tokenizer_steps if name.endswith("tokenizer") else 8
        config["trainer"] |= {"max_steps": steps, "val_check_interval": max(4, steps // 3), "limit_val_batches": 1}
        config["trainer"] |= {"accelerator": "cpu", "log_every_n_steps": 1}
        for callback in config["trainer"].get("callbacks", []):
            _shorten(callback)
    for name in ("tokenizer", "ar"):
        configs[name]["data"]["init_args"]["batch_size"] = 4
        configs[name]["model"]["init_args"]["optimizer"] = {"lr": 1e-3}
    if from_scratch:
        width = dict(encoder_dim=32, encoder_depth=1, conditioner_dim=32, conditioner_depth=1)
        width |= dict(decoder_dim=32, decoder_depth=1, head_dim=16)
        configs["tokenizer"]["model"]["init_args"]["config"] |= width
        configs["ar"]["model"]["init_args"]["config"] |= dict(dim=32, depth=1, num_heads=2)
    configs["sample"] = {"classes": "all", "per_class": 2}
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    shutil.copyfile(ROOT / CONFIGS / "layout.png", folder / "layout.png")
    return str(folder)


def _shorten(callback: dict[str, Any]) -> None:
    name = callback["class_path"].rpartition(".")[2]
    if name == "LastStepCheckpoint":
        callback["init_args"]["every_n_train_steps"] = 4
    elif name == "EMA":
        callback["init_args"] = {"decay": 0.5}
    elif name == "CodebookWarmup":
        callback["init_args"] = {"warmup_steps": 4, "collect_steps": 2}


def small_photos(folder: Path) -> str:
    """Two of the validation photos of each class, as shards."""
    index = ShardIndex.load(ROOT / VAL)
    reader, classes = ShardReader(index), {}
    for number in range(len(reader)):
        _, key, members = reader[number]
        classes.setdefault(members["cls"], []).append((key, members))
    shard = write_shard(folder / "000000.tar", [photo for photos in classes.values() for photo in photos[:2]])
    ShardIndex(folder, (shard,), index.classes).save()
    return str(folder)
