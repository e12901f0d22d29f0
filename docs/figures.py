"""Figures of these pages, from the package's schedule, solvers and shipped weights: python docs/figures.py [NAMES]"""

import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dar_lightning import TokenizerConfig
from dar_lightning.cli import main as dar
from dar_lightning.tokenizer.flow import SOLVERS, integrate, sampling_times, shift_time
from dar_lightning.tokenizer.schedule import GroupSchedule

IMAGES = Path(__file__).parent / "images"
# Name -> the page whose command above the picture draws it, with the shipped weights, and the file of that command.
DRAWN = {
    "stream.webp": ("tour.md", "stream.webp"),
    "previews.jpg": ("tour.md", "previews.png"),
    "layout_prefixes.jpg": ("tour.md", "layout.png"),
    "variations.jpg": ("tour.md", "variations.png"),
    "samples.jpg": ("quickstart.md", "samples.png"),
    "reconstructions.jpg": ("quickstart.md", "reconstructions.png"),
    "layout.jpg": ("quickstart.md", "layout.png"),
}
LARGEST = (1300, 1100)  # pixels of a JPEG
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
MODE, SPREAD = 1.0, 0.2  # of the solver's example: data are N(-MODE, SPREAD^2) or N(MODE, SPREAD^2)


def schedule() -> Figure:
    """Left: which tokens are read at which time, in training and by each sampling step. Right: the shift of time."""
    config = TokenizerConfig.preset("v1")
    groups = GroupSchedule.from_config(config)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", width_ratios=(3, 2))

    u = torch.linspace(0, 1, 161)
    first = groups.start(groups.group_of_time(u))
    left.fill_between(u, first, first + groups.window, step="post", color="C0", alpha=0.35, lw=0, label="training")
    for step in range(config.num_groups):
        start = groups.start(groups.group_of_step(step, config.num_groups))
        where = dict(x=step / config.num_groups, ymin=start, ymax=start + groups.window)
        left.vlines(**where, color="C1", lw=3, label="" if step else f"the {config.num_groups} sampling steps")
    ticks = range(0, config.num_tokens + 1, groups.window)
    left.set(xlabel="uniform time u (0: noise, 1: image)", ylabel="token", yticks=ticks, xlim=(-0.02, 1.02))
    left.legend(loc="upper left")
    left.set_title("which tokens a step reads", loc="left", fontsize=9)

    for i, beta in enumerate((1, 2, 4)):
        right.plot(u, shift_time(u, beta), color=f"C{(1, 2, 3)[i]}", lw=1, label=f"beta {beta}" + " (v1)" * (beta == 2))
    times = torch.tensor(sampling_times(config.num_groups, config.time_shift)[:-1])
    right.plot(torch.arange(config.num_groups) / config.num_groups, times, "o", color="C2", ms=4)
    right.set(xlabel="uniform time u", ylabel="flow time t")
    right.legend(loc="upper left")
    right.set_title("t = u / (u + beta (1 - u))", loc="left", fontsize=9)
    return figure


def velocity(x: Tensor, step: int, t: float) -> Tensor:
    """Of the flow from N(0, 1) to the two modes, in closed form: (E[x1 | x_t] - x_t) / (1 - t)."""
    variance = (t * SPREAD) ** 2 + (1 - t) ** 2  # of x_t around t times its mode
    share = torch.sigmoid(2 * t * MODE * x / variance)  # that x_t comes from the upper mode
    mode = MODE * (2 * share - 1)
    x1 = mode + t * SPREAD**2 / variance * (x - t * mode)
    return (x1 - x) / (1 - t)


def solver() -> Figure:
    """Left: a path in 8 steps with its previews. Right: distance of the end from that of 4,096 steps, by solver."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", width_ratios=(3, 2))
    times = sampling_times(8, 2.0)
    starts = torch.tensor([-1.2, -0.25, 0.15, 0.8], dtype=torch.float64)
    exact = [starts, *(x for x, _ in integrate(velocity, starts, sampling_times(4096, 2.0), "euler"))]
    left.plot(sampling_times(4096, 2.0)[::64], torch.stack(exact)[::64], color="0.6", lw=1)
    states, previews = zip(*integrate(velocity, starts, times, "adams2"), strict=True)
    left.plot(times, torch.stack([starts, *states]), "o", color="C0", ms=4)
    before = [starts, *states[:-1]]
    for t, x, preview in zip(times, before, previews, strict=False):
        left.plot([t, 1], [x[2], preview[2]], color="C1", lw=0.8, ls="--")
        left.plot(1, preview[2], "<", color="C1", ms=4)
    left.plot([], [], color="0.6", label="4,096 steps")
    left.plot([], [], "o", color="C0", ms=4, label="8 steps of adams2")
    left.plot([], [], "<--", color="C1", lw=0.8, ms=4, label="previews of one path")
    left.set(xlabel="flow time t (0: noise, 1: image)", ylabel="value of a pixel", ylim=(-1.5, 2.0))
    left.legend(loc="upper left", fontsize=8)
    left.set_title("one pixel, two kinds of image", loc="left", fontsize=9)

    starts = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.005, 0.995, 200, dtype=torch.float64))
    *_, (end, _) = integrate(velocity, starts, sampling_times(4096, 2.0), "euler")
    counts = (4, 8, 16, 32, 64)
    for name in SOLVERS:
        errors = []
        for count in counts:
            *_, (x, _) = integrate(velocity, starts, sampling_times(count, 2.0), name)
            errors.append((x - end).abs().mean())
        right.plot(counts, errors, "o-", ms=3, lw=1, label=name)
    right.set(xscale="log", yscale="log", xlabel="steps", ylabel="mean distance", xticks=counts, xticklabels=counts)
    right.minorticks_off()
    right.legend()
    right.set_title("distance from the end of 4,096 steps", loc="left", fontsize=9)
    return figure


def command_above(page: Path, picture: str) -> list[str]:
    """The words after `dar` of the last `dar sample` or `dar reconstruct` that a page shows above a picture."""
    above = page.read_text().partition(f"/{picture})")[0].replace("\\\n", " ")
    return shlex.split(re.findall(r"^dar ((?:sample|reconstruct) .*)", above, re.MULTILINE)[-1], comments=True)


def draw(names: Sequence[str]) -> None:
    """Run the commands of these pictures, each once, and keep the files that they write; a PNG becomes a JPEG."""
    with tempfile.TemporaryDirectory() as folder:
        done: dict[tuple[str, ...], Path] = {}
        for name in names:
            page, written = DRAWN[name]
            words = tuple(command_above(Path(__file__).with_name(page), name))
            if words not in done:
                done[words] = Path(folder) / str(len(done))
                dar([*words, "--output", str(done[words])])
            path = done[words] / written
            if path.suffix == Path(name).suffix:
                shutil.copyfile(path, IMAGES / name)
            else:
                image = Image.open(path)
                image.thumbnail(LARGEST)
                image.save(IMAGES / name, quality=88)


def main(names: Sequence[str]) -> None:
    """Write the pictures of these names, or all of them, beside the others."""
    plots = {f"{make.__name__}.svg": make for make in (schedule, solver)}
    names = names or (*DRAWN, *plots)
    draw([name for name in names if name in DRAWN])
    matplotlib.use("agg")
    with plt.rc_context(STYLE | {"svg.hashsalt": "dar_lightning", "svg.fonttype": "none"}):
        for name in names:
            if name not in DRAWN:
                plots[name]().savefig(IMAGES / name, facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
