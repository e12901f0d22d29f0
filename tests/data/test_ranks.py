"""Two real processes: the same global batches as one, and a run that moves between the two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SCRIPT = """
import json, sys
import lightning as L
from test_stream import Recorder, make
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
trainer.fit(model, datamodule=make(shards, batch_size=4 // world), ckpt_path=checkpoint[0] if checkpoint else None)
trainer.save_checkpoint(out + ".ckpt")
with open(f"{out}.{trainer.global_rank}.json", "w") as file:
    json.dump({"seen": model.seen, "validated": model.validated}, file)
"""


@pytest.mark.slow
def test_two_ranks_see_what_one_sees(shards, tmp_path):
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
    assert sorted(validated) == sorted(one["validated"][:26]) == [f"photo-{number:03d}" for number in range(26)]
