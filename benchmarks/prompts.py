"""Does a text model draw what it is asked for? Pictures of emoji64's prompts, and the real picture nearest to each.

Three kinds of prompts: known (a picture of train), val_styles (a known name in a style that train does not have it in)
and val (a name that train does not have). A drawn picture follows its prompt if the nearest real picture, among all of
the data set, is of the prompted name, or style. Nearest is by Euclidean distance of features, each divided by its
standard deviation over the real pictures. Beside it: real pictures (each one's nearest other picture), and chance.

    python -m benchmarks.prompts --pipeline DIR [--data data/emoji64] [--prompts 97] [--guidance 3]
        [--features color_edges] [--weights FILE] [--output FILE.json] [--grid FILE.png]

The grid shows what was drawn above the nearest picture of train: a model that only repeats what it has seen shows it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import RESULTS, options, record
from dar_lightning import DARPipeline
from dar_lightning.data.decode import decode_rgb
from dar_lightning.data.shard_reader import ShardReader
from dar_lightning.data.shards import ShardIndex
from dar_lightning.generation.drawing import Job, draw_images
from dar_lightning.generation.grids import image_grid, save_png
from dar_lightning.metrics.features import load_features

SPLITS = ("train", "val_styles", "val")
SHOWN = 12  # pictures of each kind in the grid


class Pictures(NamedTuple):
    """All real pictures of the data set."""

    images: Tensor  # (n, 3, H, W) uint8
    names: list[str]
    styles: list[str]
    splits: list[str]
    prompts: list[str]


def read_pictures(folder: Path) -> Pictures:
    """The pictures of the three splits, in their order."""
    found: list[tuple] = []
    for split in SPLITS:
        reader = ShardReader(ShardIndex.load(folder / split))
        for number in range(len(reader)):
            _, _, members = reader[number]
            about, image = json.loads(members["json"]), np.asarray(decode_rgb(members["webp"]))
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
            found.append((pixels, about["name"], about["style"], split, members["txt"].decode()))
    images, names, styles, splits, prompts = zip(*found, strict=True)
    return Pictures(torch.stack(images), list(names), list(styles), list(splits), list(prompts))


def shares(pictures: Pictures, asked: Sequence[int], nearest: Sequence[int]) -> dict[str, float]:
    """How often the nearest picture has the name, and the style, of the one asked for; with standard errors."""
    found = {}
    for what, values in (("name", pictures.names), ("style", pictures.styles)):
        hits = np.array([values[one] == values[other] for one, other in zip(asked, nearest, strict=True)])
        found[what] = round(float(hits.mean()), 4)
        found[f"{what} error"] = round(float(hits.std() / len(hits) ** 0.5), 4)
    return found


def chance(pictures: Pictures, asked: Sequence[int]) -> dict[str, float]:
    """The same of a picture that is drawn from all others at random: its expectation."""
    others = len(pictures.names) - 1
    return {
        what: round(float(np.mean([(values.count(values[one]) - 1) / others for one in asked])), 4)
        for what, values in (("name", pictures.names), ("style", pictures.styles))
    }


def choose(pictures: Pictures, split: str, count: int) -> list[int]:
    """Up to `count` pictures of a split, spread evenly over it: its shards are in the order of a hash."""
    members = [number for number, each in enumerate(pictures.splits) if each == split]
    return [members[i * len(members) // min(count, len(members))] for i in range(min(count, len(members)))]


def rows(
    pipe: DARPipeline, pictures: Pictures, features: torch.nn.Module, count: int, guidance: float, seed: int, grid: Path
) -> Iterator[dict]:
    """Three rows for each kind of prompts: drawn pictures, real ones, and chance."""
    real = torch.cat([features(batch) for batch in pictures.images.split(256)])
    scale = real.std(dim=0).clamp(min=1e-6)
    seen = torch.tensor([split == "train" for split in pictures.splits])
    shown = []
    for split in SPLITS:
        asked = choose(pictures, split, count)
        jobs = [Job(pictures.prompts[number], 0) for number in asked]
        drawn = torch.stack([previews[-1] for previews, _ in draw_images(pipe, jobs, seed, 32, {"guidance": guidance})])
        far = torch.cdist(features(drawn) / scale, real / scale)
        between = torch.cdist(real[asked] / scale, real / scale)
        between[range(len(asked)), asked] = torch.inf  # a real picture's nearest other one
        kind = {"prompts": split, "count": len(asked)}
        yield kind | {"pictures": "drawn"} | shares(pictures, asked, far.argmin(dim=1).tolist())
        yield kind | {"pictures": "real"} | shares(pictures, asked, between.argmin(dim=1).tolist())
        yield kind | {"pictures": "chance"} | chance(pictures, asked)
        trained = pictures.images[far.masked_fill(~seen, torch.inf).argmin(dim=1)]
        shown += [drawn[:SHOWN], trained[:SHOWN]]
    width = min(map(len, shown))
    labels = [f"{split}: {what}" for split in SPLITS for what in ("drawn", "nearest of train")]
    save_png(image_grid(torch.stack([images[:width] for images in shown]), labels), grid)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    default = {"pipeline": "emoji64", "data": "data/emoji64", "prompts": 97, "guidance": 3.0, "seed": 0}
    default |= {"features": "color_edges", "weights": "", "output": RESULTS / "prompts.json"}
    given = options(__doc__, argv, **default, grid=Path("runs/prompts.png"))
    given.grid.parent.mkdir(parents=True, exist_ok=True)
    pipe, pictures = DARPipeline.from_pretrained(given.pipeline), read_pictures(Path(given.data))
    network = load_features(given.features, given.weights or None)
    measured = rows(pipe, pictures, network, given.prompts, given.guidance, given.seed, given.grid)
    record(given.output, "prompts", measured, features=given.features, guidance=given.guidance, seed=given.seed)


if __name__ == "__main__":
    main()
