"""Monitors on two real processes: curves are of both ranks; a sharded gradient has the norm of the whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from event_file import scalars
from tiny_models import CODES, TOKENS, make_ar, random_codes

pytestmark = pytest.mark.slow

DDP = """
import sys
import torch
from lightning.pytorch import Callback
from event_file import trainer
from tiny_models import SIZE, TOKENIZER, make_tokenizer
from dar_lightning.training.callbacks import CodebookMonitor, GroupLoss, OptimizerMonitor, Throughput
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.training import TokenizerModule
from dar_lightning.tokenizer.config import TokenizerConfig

train, val, out = sys.argv[1:]
seen = {"codes": [], "group": [], "flow_each": []}

class Keep(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name in seen:
            seen[name].append(outputs[name])

    def on_train_end(self, trainer, pl_module):
        torch.save({name: torch.cat(tensors) for name, tensors in seen.items()}, f"{out}/{trainer.global_rank}.pt")

torch.manual_seed(0)
monitors = [CodebookMonitor(), GroupLoss(), OptimizerMonitor(), Throughput(peak_tflops=1)]
fit = trainer(out, [Keep(), *monitors], devices=2, strategy="ddp", max_steps=3, log_every_n_steps=3)
module = TokenizerModule(TokenizerConfig(**TOKENIZER))
module.tokenizer.load_state_dict(make_tokenizer().state_dict())  # a new one gives all images the same tokens
fit.fit(module, datamodule=ImageNetDataModule(train, val, image_size=SIZE, batch_size=3))
"""

SHARDED = """
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tiny_models import make_ar, random_codes
from dar_lightning.training.callbacks import OptimizerMonitor, optimizer_monitor as optimization

rank, out = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
optimization.is_log_step = lambda trainer: True
ar = make_ar()
for block in ar.blocks:
    fully_shard(block, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
fully_shard(ar, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
codes = torch.from_numpy(random_codes(4))
ar(torch.arange(4), codes).gather(2, codes[..., None]).square().mean().backward()
logged = {}
module = SimpleNamespace(named_children=lambda: [("ar", ar)], log_dict=logged.update)
OptimizerMonitor().on_before_optimizer_step(None, module, SimpleNamespace(param_groups=[{"lr": 0.5}]))
torch.save(logged, f"{out}/{rank}.pt")
dist.destroy_process_group()
"""


def start(folder: Path, script: str, *words) -> subprocess.Popen:
    (folder / "run.py").write_text(script)
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, [here, *here.parents[1:3]]))
    command = [sys.executable, folder / "run.py", *words]
    return subprocess.Popen([str(word) for word in command], env=os.environ | {"PYTHONPATH": paths})


def test_curves_are_of_both_ranks(images, tmp_path):
    assert start(tmp_path, DDP, *images, tmp_path).wait(timeout=300) == 0
    logged, ranks = scalars(tmp_path), [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    both = {name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}
    assert not torch.equal(ranks[0]["codes"], ranks[1]["codes"])
    assert logged["codebook/dead"][2] == pytest.approx(CODES - len(both["codes"].unique()), abs=1e-4)
    step = [rank["flow_each"][-3:] for rank in ranks]  # a batch of three on each
    assert logged["train/flow"][2] == pytest.approx(float(torch.cat(step).mean()), rel=1e-5)
    for group in both["group"].unique().tolist():
        expected = float(both["flow_each"][both["group"] == group].mean())
        assert logged[f"groups/train_flow_{group}"][2] == pytest.approx(expected, rel=1e-5)
    images_per_second = logged["speed/images_per_second"][2]
    assert logged["speed/tokens_per_second"][2] == pytest.approx(images_per_second * TOKENS, rel=1e-5)
    assert logged["speed/mfu"][2] == pytest.approx(logged["speed/tflops"][2], rel=1e-5)


def test_the_norm_of_a_sharded_gradient(tmp_path):
    processes = [start(tmp_path, SHARDED, rank, tmp_path) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    whole, codes = make_ar(), torch.from_numpy(random_codes(4))
    whole(torch.arange(4), codes).gather(2, codes[..., None]).square().mean().backward()
    expected = sum(float((p.grad.double() ** 2).sum()) for p in whole.parameters()) ** 0.5
    for rank in range(2):
        logged = torch.load(tmp_path / f"{rank}.pt")
        assert float(logged["optimizer/grad_norm_ar"]) == pytest.approx(expected, rel=1e-5)
        assert float(logged["optimizer/lr"]) == 0.5
