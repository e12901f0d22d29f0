"""A small sweep's folder, as `dar sweep` leaves it: three orders, three seeds; one run failed, one is to come."""

import json
from pathlib import Path

from PIL import Image
from torch.utils.tensorboard import SummaryWriter

ORDERS = {"coarse": 1.0, "reversed": 1.5, "random": 1.2}  # order -> last validation loss with seed 0; +0.1 per seed
PAPER = {"coarse": {"gFID": 2.44}, "reversed": {"gFID": 4.17}, "random": {}}
STATUS = {("random", 1): "failed", ("random", 2): "pending"}  # all others are done
GROUPS, STEPS = 4, (10, 20, 30)
MEASURED = {"samples": {"n": 28}, "reference": {"n": 207}, "image_size": [64, 64], "features": {"name": "color_edges"}}
RECONSTRUCTED = {"reference": {"crop": "centre 64", "n": 207}, "reconstruction": {"psnr": "mean"}}


def measured(order: str, seed: int) -> float:
    return ORDERS[order] / 10 + 0.01 * seed


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_sweep(root: Path) -> Path:
    """The tokenizer is the same work for all."""
    cells = [{"name": name, "values": {"order": name}, "seeds": [0, 1, 2], "paper": PAPER[name]} for name in ORDERS]
    told = {"name": "orders", "title": "Does order matter?", "axes": {"order": list(ORDERS)}, "x_axis": "order"}
    told |= {"cells": cells, "figures": ["FD-color_edges"], "budget": "30 steps of 4 images"}
    write_json(root / "sweep.json", told)
    with SummaryWriter(str(root / "shared/tokenizer-0/logs")) as writer:
        writer.add_scalar("val/flow", 0.1, 10)
    for order, seed in ((order, seed) for order in ORDERS for seed in range(3)):
        status, folder, ar = STATUS.get((order, seed), "done"), f"cells/{order}/seed{seed}", f"shared/ar-{order}{seed}"
        if status == "pending":
            continue
        stages = [{"name": "tokenizer", "folder": "shared/tokenizer-0", "status": "done"}]
        stages.append({"name": "ar", "folder": ar, "status": status})
        write_json(root / folder / "cell.json", {"status": status, "stages": stages})
        if status == "failed":
            continue
        last = ORDERS[order] + 0.1 * seed
        figures = {"val/loss": last, "FD-color_edges": measured(order, seed), "psnr": None}  # infinite
        samples = {"samples": {"n": 207, "reconstructions": "", "seed": seed, "tokenizer_sha256": order}}
        protocol = {"reconstruct": RECONSTRUCTED | samples, "measure": MEASURED}
        metrics = {"figures": figures, "stages": dict.fromkeys(figures, "ar"), "protocol": protocol}
        write_json(root / folder / "metrics.json", metrics)
        size = (700, 950) if order == "random" else (256, 128)
        Image.new("RGB", size, (60 * list(ORDERS).index(order), 40 * seed, 200)).save(root / folder / "samples.png")
        with SummaryWriter(str(root / ar / "logs")) as writer:
            for step in STEPS:
                writer.add_scalar("val/loss", last + (STEPS[-1] - step) / 10, step)
                writer.add_scalar("train/loss", 0.0, step)
                for k in range(GROUPS):
                    writer.add_scalar(f"groups/val_loss_{k}", last - k / 10, step)
                    writer.add_scalar(f"written/val_loss_{k}", last - (GROUPS - k) / 10, step)
            writer.add_hparams({"config/dim": 32}, {"hp_metric": -1.0}, run_name=".")  # as Lightning logs them
    return root
