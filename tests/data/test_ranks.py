"""Two real processes: the same global batches as one, and a run that moves between the two."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from tiny_shards import sample

HERE = Path(__file__).parent

SCRIPT = """
import json, sys
import lightning as L
import torch
from test_loader import Recorder, make
shards, out, world, steps, checkpoint = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]


class Model(Recorder):
    def training_step(self, batch, batch_idx):
        self.seen.append(batch["key"])
        return self.weight * batch["index"].sum()


model = Model()
trainer = L.Trainer(
    accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_steps=steps, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
)
data = make(shards, batch_size=4 // world, max_bad_share=0.5)
trainer.fit(model, datamodule=data, ckpt_path=checkpoint[0] if checkpoint else None)
trainer.save_checkpoint(out + ".ckpt")
with open(f"{out}.{trainer.global_rank}.json", "w") as file:
    json.dump({"seen": model.seen, "validated": model.validated, "skipped": data.skipped}, file)
if world > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.fixture
def damaged(shards, tmp_path):
    """What is left of the 26 pictures: sample 4 breaks off, and the second shard behind its first pictures."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    first, second, _ = sorted(folder.glob("*.tar"))
    png = sample(4)[1]["png"]
    first.write_bytes(first.read_bytes().replace(png, png[:500] + bytes(len(png) - 500)))
    cut = second.stat().st_size // 3
    with tarfile.open(second) as tar:
        lost = {member.name.partition(".")[0] for member in tar if member.offset_data + member.size > cut}
    second.write_bytes(second.read_bytes()[:cut])
    good = [number for number in range(26) if number != 4 and f"photo-{number:03d}" not in lost]
    assert 17 < len(good) < 25
    return folder, good


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(damaged, tmp_path):
    shards, good = damaged
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def run(name, world, steps, *checkpoint):
        command = [sys.executable, str(script), str(shards), str(tmp_path / name), str(world), str(steps), *checkpoint]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(HERE)})
        return [json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(world)]

    (one,) = run("one", 1, 14)
    two = run("two", 2, 8)  # stops in the second epoch
    together = [first + second for first, second in zip(*(rank["seen"] for rank in two), strict=True)]
    assert together == one["seen"][:8]
    (resumed,) = run("resumed", 1, 14, str(tmp_path / "two.ckpt"))
    assert resumed["seen"] == one["seen"][8:]
    validated = [key for rank in two for key in rank["validated"]]
    assert sorted(validated) == sorted(one["validated"][: len(good)]) == [f"photo-{number:03d}" for number in good]
    bad = {f"photo-{number:03d}" for number in {*range(26)} - {*good}}
    assert not bad & {key for rank in two for keys in rank["seen"] for key in keys}
    assert all(len(rank["skipped"]["val"]) > 0 for rank in two)
