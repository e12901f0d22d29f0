"""Two real processes: no parameter without a gradient, one codebook for all, and validation as on one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import json, sys
import torch
from lightning.pytorch import Trainer
from tiny_models import SIZE, TOKENIZER
from dar_lightning.training.callbacks import EMA, CodebookWarmup, Reconstructions
from dar_lightning.data.imagenet import ImageNetDataModule
from dar_lightning.training import TokenizerModule
from dar_lightning.training.losses import AdversarialLoss
from dar_lightning.tokenizer.config import TokenizerConfig

train, val, out, world = *sys.argv[1:4], int(sys.argv[4])
torch.manual_seed(0)
adversarial = AdversarialLoss(start_step=2, channels=4, depth=2)
module = TokenizerModule(TokenizerConfig(**TOKENIZER | {"repa_layer": 0}), adversarial=adversarial)
warmup, ema = CodebookWarmup(2, 2, revive_every=2, revive_until=6), EMA(0.5)
options = dict(accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", logger=False)
options |= dict(enable_progress_bar=False, enable_checkpointing=False, num_sanity_val_steps=0)
trainer = Trainer(max_steps=5, callbacks=[warmup, ema, Reconstructions()], **options)
data = ImageNetDataModule(train, val, image_size=SIZE, batch_size=3)  # 7 images: rank 1 ends with padding alone
drawn, original = [], module.tokenizer.training_losses


def spy(images, u=None, noise=None):
    "What this rank draws for each batch: the times, and after them the noise."
    if module.training:
        after = torch.Generator().set_state(torch.get_rng_state())
        drawn.append([u.tolist(), torch.randn(4, generator=after).tolist()])
    return original(images, u, noise)


def of_images(images, **options):
    "Losses, of which one depends on nothing but the images."
    return original(images, **options) | {"vq": images.mean()}


module.tokenizer.training_losses = of_images
before = trainer.validate(module, datamodule=data)[0]
module.tokenizer.training_losses = spy
trainer.fit(module, datamodule=data)
codebook = module.tokenizer.quantizer.codebook
shared = [codebook.data, *trainer.optimizers[0].state[codebook].values(), *adversarial.state_dict().values()]
shared += ema._average_model.state_dict().values()
torch.save(shared, f"{out}.{trainer.global_rank}.pt")
torch.save(warmup.state_dict(), f"{out}.{trainer.global_rank}.state.pt")
with open(f"{out}.{trainer.global_rank}.json", "w") as file:
    json.dump(before, file)
with open(f"{out}.{trainer.global_rank}.drawn", "w") as file:
    json.dump(drawn, file)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks(images, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)

    def run(world: int) -> list[dict]:
        command = [sys.executable, tmp_path / "run.py", *images, tmp_path / f"of{world}", world]
        folders = Path(__file__).parents[1:3]
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
        subprocess.run([str(word) for word in command], check=True, timeout=300, env=paths)
        return [json.loads((tmp_path / f"of{world}.{rank}.json").read_text()) for rank in range(world)]

    (one,), two = run(1), run(2)
    # Noise and times are drawn per batch, so only what does not depend on them can be the same.
    assert two[0]["val/codebook_use"] == two[1]["val/codebook_use"] == one["val/codebook_use"]
    assert two[0]["val/vq"] == pytest.approx(one["val/vq"], rel=1e-5), "4 images on one rank, 3 on the other"
    assert two[0] == two[1]
    assert all(value == value for value in two[0].values()), two[0]
    first, second = (torch.load(tmp_path / f"of2.{rank}.pt") for rank in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    counts = [torch.load(tmp_path / f"of2.{rank}.state.pt")["counts"] for rank in range(2)]
    assert torch.equal(*counts)
    assert int(counts[0].sum()) == 2 * 3 * 8, "both ranks' tokens of step 5"
    # Each rank draws times and noise of its own, and others for every batch.
    drawn = [json.loads((tmp_path / f"of2.{rank}.drawn").read_text()) for rank in range(2)]
    every = [tuple(numbers) for rank in drawn for pair in rank for numbers in pair]
    assert len(every) == len(set(every)) == 2 * 5 * 2
