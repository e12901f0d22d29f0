"""What editing gives with the shipped weights: seam, hole PSNR and class in a hole; class changes; drafts; likeness.

python -m benchmarks.editing [--pipeline fruit64] [--rows inpaint change inside drafts alike time] [--output FILE.json]
python -m benchmarks.editing --grids docs/images     # the pictures of docs/editing.md, and no numbers

Photos are those of data/fruit64/val from the fifth of each class on. L = 8, its halving and the reach of one decoder
patch were chosen before on 56 of them, taken to be the first four of each class: rows with "set": "first" show these.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import RESULTS, ROOT, in_turns, options, ratio, record
from dar_lightning import DARPipeline
from dar_lightning.data.transforms import to_float, to_uint8
from dar_lightning.generation import inpainting
from dar_lightning.generation.drawing import Job, draw_images
from dar_lightning.generation.editing import draw_alike
from dar_lightning.generation.grids import image_grid
from dar_lightning.metrics.color_edges import ColorEdges
from dar_lightning.metrics.images import ShardImages
from dar_lightning.metrics.probe import LinearProbe

GUIDANCE = 3.0
FIRST, LAST = 4, 12  # photos of each class that settings were chosen on; and where those that are measured end
SHIFT = 5  # class y becomes y + 5


class Photos(NamedTuple):
    """Images (n, 3, H, W) in [-1, 1] and classes (n,)."""

    images: Tensor
    labels: Tensor


def read(split: str, size: int) -> Photos:
    """All photos of a split."""
    pixels, labels = next(ShardImages(str(ROOT / "data/fruit64" / split), split, size).batches(10**6))
    return Photos(to_float(pixels), labels)


def some(photos: Photos, first: int, last: int) -> Photos:
    """Photos number `first` to `last` - 1 of each class, classes in turn."""
    found = [numbers[first:last] for label in photos.labels.unique() for numbers in [where(photos.labels == label)]]
    order = torch.cat(found)
    return Photos(photos.images[order], photos.labels[order])


def where(mask: Tensor) -> Tensor:
    """Numbers of the true ones."""
    return mask.nonzero()[:, 0]


def holes(size: int) -> dict[str, tuple[Tensor, tuple[slice, slice]]]:
    """What is known, (1, 1, H, W), and the part of an image in which its class is looked for."""
    quarter = slice(size // 4, -size // 4)
    center, right = torch.zeros(2, 1, 1, size, size, dtype=torch.bool)
    center[..., quarter, quarter] = True
    right[..., size // 2 :] = True
    whole = slice(None)
    parts = {"center": (~center, (quarter, quarter)), "right": (~right, (whole, slice(size // 2, None)))}
    return parts | {"outside": (center, (whole, whole))}


# ---- figures


def seam(images: Tensor, known: Tensor) -> float:
    """Mean difference of neighbours across the border of `known`, over that of pairs two and three pixels off it."""
    across = off = torch.zeros(2)
    for turn in (False, True):
        x, mask = (each.transpose(-1, -2) if turn else each for each in (images, known))
        steps, border = x.diff(dim=-1).abs().mean(dim=1), (mask[..., 1:] != mask[..., :-1])[:, 0]  # (n, H, W - 1)
        near = torch.zeros_like(border)
        for shift in (2, 3):
            near[..., shift:] |= border[..., :-shift]
            near[..., :-shift] |= border[..., shift:]
        across, off = (
            total + torch.stack([(steps * which).sum(), which.expand_as(steps).sum()])
            for total, which in ((across, border), (off, near & ~border))
        )
    return round(((across[0] / across[1]) / (off[0] / off[1])).item(), 2)


def psnr(images: Tensor, photos: Tensor, where: Tensor | bool = True) -> float:
    """Mean over images of the PSNR, in dB, of the pixels `where`."""
    where = torch.as_tensor(where).expand(len(photos), 1, *photos.shape[-2:])
    error = ((images.clamp(-1, 1) - photos).square() * where).sum(dim=(1, 2, 3)) / where.sum(dim=(1, 2, 3)) / 3
    return round((10 * (4 / error).log10()).mean().item(), 1)


def coarse(images: Tensor) -> Tensor:
    """8x8 pixels."""
    return F.adaptive_avg_pool2d(images.clamp(-1, 1), 8)


def correlation(images: Tensor, photos: Tensor) -> float:
    """Mean correlation of lightness at 8x8 pixels: how much of the layout is there."""
    a, b = (coarse(each).mean(dim=1).flatten(1) for each in (images, photos))
    a, b = (each - each.mean(dim=1, keepdim=True) for each in (a, b))
    return round(F.cosine_similarity(a, b).mean().item(), 2)


class Judge:
    """Linear probe on colours and edges of a part of the training photos."""

    def __init__(self, train: Photos, part: tuple[slice, slice]):
        self.part, self.features = part, ColorEdges()
        self.probe = LinearProbe(self._features(train.images), train.labels)

    def _features(self, images: Tensor) -> Tensor:
        return self.features(to_uint8(images[..., self.part[0], self.part[1]].contiguous()))

    def __call__(self, images: Tensor, labels: Tensor) -> int:
        """Percent of the images that are named as their label."""
        return round(100 * self.probe.accuracy(self._features(images), labels))


# ---- drawings


def draw(pipe: DARPipeline, photos: Photos, labels: Tensor | None = None, seed: int = 0, **edit) -> Tensor:
    """One image for each photo, of its class or another, from the generator of its number."""
    labels, drawn = photos.labels if labels is None else labels, []
    for batch in torch.arange(len(labels)).split(32):
        each = {name: value[batch] if isinstance(value, Tensor) else value for name, value in edit.items()}
        if each.keys() & {"known", "start", "evidence"}:
            each["image"] = photos.images[batch]
        generators = [torch.Generator().manual_seed(10_000 * seed + int(i)) for i in batch]
        drawn.append(pipe.generate(labels[batch], guidance=GUIDANCE, generator=generators, **each))
    return torch.cat(drawn)


def no_spread() -> AbstractContextManager:
    """The velocity is pinned where it is known, and the error ends at the border."""
    return mock.patch.object(inpainting, "spread", lambda x, known, reach: torch.zeros_like(x))


def ways(pipe: DARPipeline, photos: Photos, plain: Tensor, known: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each way to fill a hole, and what it gives; `plain` are drawings of the class without the photo."""
    everywhere = known.expand(len(plain), -1, -1, -1)
    yield "the class drawn, pasted", torch.where(known, photos.images, plain)
    for name, context, evidence in (
        ("+ velocity pinned", no_spread, 0.0),
        ("+ error spread", nullcontext, 0.0),
        ("+ evidence 8", nullcontext, 8.0),
    ):
        with context():
            yield name, draw(pipe, photos, known=everywhere, evidence=evidence)


def inpaint(pipe: DARPipeline, train: Photos, val: Photos) -> Iterator[dict]:
    """Rows of holes: every way on held-out photos; evidence 8 on the first ones, too."""
    held, first = some(val, FIRST, LAST), some(val, 0, FIRST)
    plain = draw(pipe, held)
    for hole, (known, part) in holes(held.images.shape[-1]).items():
        judge = Judge(train, part)

        def row(way: str, images: Tensor, photos: Photos, which: str, known=known, judge=judge, hole=hole) -> dict:
            found = {"hole": hole, "way": way, "set": which, "photos": len(images), "seam": seam(images, known)}
            found["psnr_hole"] = None if way == "the photo" else psnr(images, photos.images, ~known)
            return found | {"named_percent": judge(images, photos.labels)}

        yield row("the photo", held.images, held, "held out")
        for way, images in ways(pipe, held, plain, known):
            yield row(way, images, held, "held out")
        everywhere = known.expand(len(first.images), -1, -1, -1)
        yield row("+ evidence 8", draw(pipe, first, known=everywhere), first, "first")


def changes(pipe: DARPipeline, photos: Photos) -> dict[str, dict]:
    """Ways to draw another class from a photo, as options of `draw`."""
    tokens = pipe.tokenizer.tokenize(photos.images)
    found = {"the class alone": {}, "prefix 4": {"prefix": tokens[:, :4]}, "evidence 8": {"evidence": 8.0}}
    found |= {f"start {start}": {"start": start, "evidence": 0.0} for start in (3, 4, 5, 6)}
    return found | {"start 4, evidence 4": {"start": 4, "evidence": 4.0}}


def change(pipe: DARPipeline, train: Photos, val: Photos) -> Iterator[dict]:
    """Rows of class changes of the whole photo."""
    held, judge = some(val, FIRST, FIRST + 5), Judge(train, (slice(None), slice(None)))
    labels = (held.labels + SHIFT) % pipe.ar.config.num_classes
    for way, edit in changes(pipe, held).items():
        images = draw(pipe, held, labels, **edit)
        found = {"way": way, "photos": len(images), "named_new_percent": judge(images, labels)}
        found["layout_correlation"] = correlation(images, held.images)
        yield found | {"psnr_8x8": psnr(coarse(images), coarse(held.images))}


def inside(pipe: DARPipeline, train: Photos, val: Photos) -> Iterator[dict]:
    """Rows of another class inside the central hole."""
    held, (known, part) = some(val, FIRST, FIRST + 5), holes(val.images.shape[-1])["center"]
    judge, labels = Judge(train, part), (held.labels + SHIFT) % pipe.ar.config.num_classes
    for start, evidence in ((0, 0.0), (0, 4.0), (0, 8.0), (4, 0.0)):
        everywhere = known.expand(len(held.images), -1, -1, -1)
        images = draw(pipe, held, labels, known=everywhere, start=start, evidence=evidence)
        found = {"start": start, "evidence": evidence, "photos": len(images), "seam": seam(images, known)}
        yield found | {"named_new_percent": judge(images, labels), "psnr_hole": psnr(images, held.images, ~known)}


def drafts(pipe: DARPipeline, train: Photos, val: Photos) -> Iterator[dict]:
    """Rows of previews: whether the nearest one of eight belongs to the image, and how like it is."""
    jobs = [Job(label, number) for label in range(pipe.ar.config.num_classes) for number in range(8)]
    shown = torch.stack([previews for previews, _ in draw_images(pipe, jobs, 0, 32, {"guidance": GUIDANCE})])
    previews = to_float(shown).unflatten(0, (-1, 8))  # (classes, 8, K, 3, H, W)
    final = previews[:, :, -1].flatten(2)
    for group in range(1, 5):
        distances = torch.cdist(previews[:, :, group - 1].flatten(2), final)
        right = (distances.argmin(dim=2) == torch.arange(8)).float().mean().item()
        own = psnr(previews[:, :, group - 1].flatten(0, 1), previews[:, :, -1].flatten(0, 1))
        yield {"group": group, "images": len(jobs), "nearest_is_own_percent": round(100 * right), "psnr_to_own": own}


def alike(pipe: DARPipeline, train: Photos, val: Photos) -> Iterator[dict]:
    """Rows of variation strengths: how far images with all tokens of another are from it, and from each other."""
    classes = range(pipe.ar.config.num_classes)
    originals = list(draw_images(pipe, [Job(c, 0) for c in classes], 0, 32, {"guidance": GUIDANCE}))
    finals = to_float(torch.stack([previews[-1] for previews, _ in originals]))
    for strength in (0.25, 0.5, 0.75, 1.0):
        jobs = [Job(c, number, codes) for c, (_, codes) in zip(classes, originals, strict=True) for number in (1, 2)]
        found = to_float(torch.stack([previews[-1] for previews, _ in draw_alike(pipe, jobs, 0, 0, strength, 32)]))
        pairs = found.unflatten(0, (-1, 2))
        apart = (pairs[:, 0] - pairs[:, 1]).square().mean().sqrt().item() / math.sqrt(2) / 2
        yield {
            "strength": strength,
            "images": len(jobs),
            "psnr_to_original": psnr(pairs.flatten(0, 1), finals.repeat_interleave(2, dim=0)),
            "deviation_of_pixels": round(apart, 3),  # of 0 to 1
        }


def time(pipe: DARPipeline, train: Photos, val: Photos) -> Iterator[dict]:
    """Rows of times, as ratios to one plain drawing; eight rows of a batch are eight images."""
    few = some(val, FIRST, FIRST + 1)
    photos = Photos(few.images[:8], few.labels[:8])
    one = Photos(few.images[:1], few.labels[:1])
    known = holes(val.images.shape[-1])["center"][0].expand(8, -1, -1, -1)
    works: dict[str, Callable[[], object]] = {
        "plain 8": lambda: draw(pipe, photos),
        "inpainted 8": lambda: draw(pipe, photos, known=known),
        "8 drafts": lambda: draw(pipe, photos, groups=2),
        "plain 1": lambda: draw(pipe, one),
    }
    seconds = in_turns(works, least=7)
    yield {"what": "a hole filled, to a plain drawing", "ratio": ratio(seconds, "inpainted 8", "plain 8")}
    yield {"what": "8 drafts to group 2, to one image", "ratio": ratio(seconds, "8 drafts", "plain 1")}
    yield {"what": "8 images in full, to one", "ratio": ratio(seconds, "plain 8", "plain 1")}


ROWS = {row.__name__: row for row in (inpaint, change, inside, drafts, alike, time)}


# ---- grids


def grids(pipe: DARPipeline, val: Photos, folder: Path) -> None:
    """Pictures with the original first; the photos are chosen by number, not by how well they come out."""
    names, held = pipe.classes, some(val, FIRST, FIRST + 1)
    held = Photos(held.images[::2], held.labels[::2])  # 7 of 14 classes

    def save(name: str, columns: dict[str, Tensor], labels: list[str]) -> None:
        grid = torch.stack([to_uint8(images) for images in columns.values()], dim=1)
        image_grid(grid, labels, [*columns]).save(folder / name, quality=88)

    plain, rows = draw(pipe, held), [names[label] for label in held.labels]
    parts = holes(held.images.shape[-1])
    for hole in ("center", "outside"):
        known = parts[hole][0]
        columns = {"original": held.images, "given": torch.where(known, held.images, 0.0)}
        columns |= dict(ways(pipe, held, plain, known))
        columns["another seed"] = draw(pipe, held, seed=1, known=known.expand(len(rows), -1, -1, -1))
        save(f"inpainting_{hole}.jpg", {name.removeprefix("the class "): x for name, x in columns.items()}, rows)
    labels = (held.labels + SHIFT) % len(names)
    columns = {way: draw(pipe, held, labels, **edit) for way, edit in changes(pipe, held).items()}
    columns["start 4, ev. 4"] = columns.pop("start 4, evidence 4")
    rows = [f"{names[a]}: {names[b]}" for a, b in zip(held.labels, labels, strict=True)]
    save("editing_class.jpg", {"original": held.images} | columns, rows)

    label, number = names.index("Orange"), 6
    jobs = [Job(label, i) for i in range(8)]
    drawn = list(draw_images(pipe, jobs, 0, 32, {"guidance": GUIDANCE}))
    rows = {f"after group {group}": torch.stack([previews[group - 1] for previews, _ in drawn]) for group in (1, 2, 8)}
    jobs = [Job(label, i, drawn[number][1]) for i in range(number + 1, number + 9)]
    for strength in (0.25, 0.5, 1.0):
        found = draw_alike(pipe, jobs, number, 0, strength, 32)
        rows[f"like {number}, {strength}"] = torch.stack([previews[-1] for previews, _ in found])
    grid = torch.stack([*rows.values()])
    image_grid(grid, [*rows], [str(i) for i in range(8)]).save(folder / "drafts.jpg", quality=88)


if __name__ == "__main__":
    output = RESULTS / "editing.json"
    given = options(__doc__, pipeline="fruit64", rows=[*ROWS], grids="", output=output)
    pipe = DARPipeline.from_pretrained(given.pipeline)
    size = pipe.tokenizer.config.image_size
    val = read("val", size)
    if given.grids:
        grids(pipe, val, Path(given.grids))
    else:
        train = read("train", size)
        found = ({"row": name} | row for name in given.rows for row in ROWS[name](pipe, train, val))
        facts = {"pipeline": given.pipeline, "guidance": GUIDANCE, "dtype": pipe.dtypes["ar"]}
        record(given.output, "editing of held-out photos", found, **facts)
