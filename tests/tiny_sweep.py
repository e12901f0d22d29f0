"""A small sweep's folder, as `dar sweep` leaves it: three orders, three seeds; one run failed, one is to come."""

import json
import zlib
from pathlib import Path

from PIL import Image
from torch.utils.tensorboard import SummaryWriter

ORDERS = {"coarse": 1.0, "reversed": 1.5, "random": 1.2}  # order -> last validation loss with seed 0; +0.1 per seed
PAPER = {"coarse": {"gFID": 2.44}, "reversed": {"gFID": 4.17}, "random": {}}
GROUPS, STEPS = 4, (10, 20, 30)
RECONSTRUCTED = {"num_images": 207, "crop": "centre 64"}
PROTOCOL = {"samples": {"n": 28}, "reference": {"n": 207}, "image_size": [64, 64], "features": {"name": "color_edges"}}


def measured(order: str, seed: int) -> float:
    return ORDERS[order] / 10 + 0.01 * seed


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_logs(folder: Path, order: str, seed: int) -> None:
    """Event files, with the hyperparameters that Lightning logs."""
    last = ORDERS[order] + 0.1 * seed
    with SummaryWriter(str(folder / "logs")) as writer:
        for step in STEPS:
            writer.add_scalar("val/loss", last + (STEPS[-1] - step) / 10, step)
            writer.add_scalar("train/loss", 0.0, step)
            for k in range(GROUPS):
                writer.add_scalar(f"groups/val_loss_{k}", last - k / 10, step)
                writer.add_scalar(f"written/val_loss_{k}", last - (GROUPS - k) / 10, step)
        writer.add_hparams({"config/dim": 32}, {"hp_metric": -1.0}, run_name=".")


def write_sweep(root: Path, failed: tuple = ("random", 1), pending: tuple = ("random", 2)) -> Path:
    """The tokenizer is the same work for all; `failed` and `pending` are (order, seed)."""
    cells = [{"name": name, "values": {"order": name}, "seeds": [0, 1, 2], "paper": PAPER[name]} for name in ORDERS]
    told = {"name": "orders", "title": "Does order matter?", "axes": {"order": list(ORDERS)}, "x_axis": "order"}
    told |= {"cells": cells, "figures": ["FD-color_edges"], "budget": "30 steps of 4 images"}
    write_json(root / "sweep.json", told)
    with SummaryWriter(str(root / "shared" / "tokenizer-0" / "logs")) as writer:
        writer.add_scalar("val/flow", 0.1, 10)
    for order in ORDERS:
        for seed in range(3):
            folder, status = root / "cells" / order / f"seed{seed}", "done"
            if (order, seed) == pending:
                continue
            if (order, seed) == failed:
                status = "failed"
            ar = f"shared/ar-{zlib.crc32(f'{order}{seed}'.encode()):08x}"
            stages = [
                {"name": name, "folder": place, "command": [], "hash": "", "status": how, "seconds": 2.0}
                for name, place, how in (("tokenizer", "shared/tokenizer-0", "done"), ("ar", ar, status))
            ]
            run = {"cell": order, "seed": seed, "values": {"order": order}, "status": status, "stages": stages}
            write_json(folder / "cell.json", run)
            if status == "done":
                write_logs(root / ar, order, seed)
                figures = {"val/loss": ORDERS[order] + 0.1 * seed, "FD-color_edges": measured(order, seed)}
                figures["psnr"] = None  # infinite
                protocol = {"reconstruct": RECONSTRUCTED | {"seed": seed, "tokenizer": order}, "measure": PROTOCOL}
                write_json(folder / "metrics.json", {"figures": figures, "protocol": protocol})
                color = (60 * list(ORDERS).index(order), 40 * seed, 200)
                Image.new("RGB", (256, 128), color).save(folder / "samples.png")
    return root
