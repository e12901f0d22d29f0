"""How bad samples are counted: of a part of the classes, over several ranks, and when a pass is limited."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from damaged import module
from tiny_shards import CLASSES, sample

from dar_lightning.data.bad_samples import Bad, Skipped
from dar_lightning.data.shards import ShardIndex, write_shard
from dar_lightning.errors import UserError

HERE = Path(__file__).parent


def write(folder: Path, count: int, bad: set[int]) -> Path:
    """One shard of numbered pictures of four classes; the bad ones are no pictures."""
    samples = [sample(number) for number in range(count)]
    samples = [(key, parts | {"png": b"x"}) if i in bad else (key, parts) for i, (key, parts) in enumerate(samples)]
    ShardIndex(folder, (write_shard(folder / "0.tar", samples),), CLASSES).save()
    return folder


def test_the_share_is_one_of_the_classes_in_use(tmp_path):
    """One of four classes, most of which is bad: it is a small part of the shards and a large one of the data."""
    write(tmp_path, 40, bad=set(range(0, 36, 4)))
    assert len(list(module(tmp_path, max_bad_share=0.225).val_dataloader())) == 10  # 9 of 40
    for loader in ("train_dataloader", "val_dataloader"):
        data = module(tmp_path, classes=["a"], max_bad_share=0.225, batch_size=2)
        with pytest.raises(UserError, match=r"\d of 10 samples cannot be used"):
            list(getattr(data, loader)())


@pytest.mark.parametrize("key", ["i: x", "a:b: c/d"])
def test_keys_with_colons_keep_their_names(tmp_path, key):
    write_shard(tmp_path / "0.tar", [(f"{key}{i}", {"png": b"x", "cls": b"0"}) for i in range(2)] + [sample(0)])
    data = module(tmp_path, max_bad_share=0.9)
    (batch,) = data.val_dataloader()
    assert batch["key"][:2] == [f"{key}0", f"{key}1"]
    assert batch["shard"] == ["0.tar"] * 3
    assert data.skipped["val"] == dict.fromkeys((f"0.tar/{key}0", f"0.tar/{key}1"), "not an image of a known format")


def compare(rank: int, store: str, results) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    skipped = Skipped("data.train", 100, 0.03)
    known = []
    for found in ([], [rank], [rank], [1 - rank], [2], [3 + rank]):  # the last one is one too many
        skipped.add(Bad(f"0.tar/{number}", "empty") for number in found)
        try:
            skipped.check(everywhere=True)
            known.append(sorted(skipped.reasons))
        except (UserError, SystemExit) as error:
            known.append(f"{type(error).__name__}: {error}")
    results.put((rank, known))
    dist.destroy_process_group()


def test_ranks_count_a_sample_once(tmp_path):
    """What one has met the other knows, so that it does not count twice when it comes to that one."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=compare, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for process in processes:
        process.start()
    ranks = dict(results.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    both, three = ["0.tar/0", "0.tar/1"], ["0.tar/0", "0.tar/1", "0.tar/2"]
    assert ranks[0][:-1] == ranks[1][:-1] == [[], both, both, both, three]
    assert ranks[0][-1].startswith("UserError: data.train: 5 of 100 samples cannot be used (5.00%")
    assert ranks[1][-1] == "SystemExit: 0"


SCRIPT = """
import json, sys
import lightning as L
import torch
from test_loader import Recorder, make


class Model(Recorder):
    def training_step(self, batch, batch_idx):
        return self.weight * batch["index"].sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with open(f"{sys.argv[2]}.{self.global_rank}", "a") as file:
            file.write(json.dumps(batch["index"].tolist()) + "\\n")


trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    num_sanity_val_steps=0, **json.loads(sys.argv[3]),
)
data = make(sys.argv[1], batch_size=2, max_bad_share=0.01)
data.val = None
try:
    trainer.fit(Model(), datamodule=data)
finally:
    torch.distributed.destroy_process_group()
"""


def run_on_two_ranks(folder: Path, options: dict) -> subprocess.CompletedProcess:
    """Train on folder/data; folder/seen.0 and folder/seen.1 get the indices of each rank's batches, a line each."""
    (folder / "run.py").write_text(SCRIPT)
    command = [sys.executable, folder / "run.py", folder / "data", folder / "seen", json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[list[int]]:
    """What rank 1 sees in seven steps."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data").mkdir()
    write(folder / "data", 40, bad=set())
    done = run_on_two_ranks(folder, {"max_steps": 7})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "seen.1").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "batches"),
    [({"max_steps": 7}, 7), ({"max_epochs": 1, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 3)],
    ids=["steps", "batches"],
)
def test_what_comes_after_the_last_comparison_counts(tmp_path, seen, options, batches):
    """One sample of the last batch of a limited run is bad, on rank 1; both ranks end, and rank 0 says why."""
    assert len(seen) == 7
    bad = seen[batches - 1][0]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", 40, bad={bad})
    done = run_on_two_ranks(tmp_path, options)
    assert done.returncode == 1, done.stderr
    assert (
        f"UserError: data.train: 1 of 40 samples cannot be used (2.50%, max_bad_share is 1.00%), the first is 0.tar/"
        f"photo-{bad:03d}: " in done.stderr
    )
