"""Contents of the web page of `dar serve`: previews, tokens as coloured cells, code that repeats a drawing."""

import base64
import colorsys
import io
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from PIL import Image

from dar_lightning.commands.sample import command_line
from dar_lightning.devices import Dtype
from dar_lightning.generation.drawing import image_seed
from dar_lightning.generation.editing import middle, tokenize
from dar_lightning.generation.grids import MIN_SIDE, to_image
from dar_lightning.generation.pipeline import DARPipeline

LARGE = 384  # pixels that the page gives to the picture, at least


@dataclass(frozen=True)
class Shown:
    """The state of the page after a group of tokens."""

    picture: Image.Image  # the preview, enlarged
    strip: str  # HTML of all previews so far
    tokens: str  # HTML of the tokens so far


class Work:
    """What is being drawn, one step of one picture at a time; when it has been stopped, no step begins any more."""

    def __init__(self):
        # Held while something is computed. Reentrant: Python, at its end, closes generators in the thread that stopped.
        self.step = threading.RLock()
        self._open: set[Generator] = set()

    def steps(self, drawing: Generator) -> Iterator:
        """What the generator yields; it is closed with this one."""
        with self.step:
            self._open.add(drawing)
        try:
            while True:
                with self.step:
                    try:
                        shown = next(drawing)
                    except StopIteration:
                        return
                yield shown
        finally:
            with self.step:
                drawing.close()
                self._open.discard(drawing)

    def stop(self) -> None:
        """Wait for the end of the step that is under way, and close all that is open. Others wait from then on."""
        self.step.acquire()
        for drawing in self._open:
            drawing.close()


@torch.inference_mode()
def draw_previews(
    pipe: DARPipeline, label: int, seed: int, guidance: float, photo: Image.Image | None = None, prefix: int = 0
) -> Generator[Shown, None, None]:
    """Draw image 0 of a class, as `dar sample` does; yield after each group. Closing the iterator stops the work.

    With a photo, its first `prefix` tokens are kept.
    """
    kept = None if photo is None or prefix == 0 else tokenize(pipe, photo)[:, :prefix]
    generator = torch.Generator().manual_seed(image_seed(seed, label, 0))
    stream = pipe.stream(torch.tensor([label]), guidance=guidance, prefix=kept, generator=[generator])
    strip, config = "", pipe.tokenizer.config
    with closing(stream):
        for preview in stream:
            image = to_image(preview.images[0])
            strip += preview_html(enlarge(image, MIN_SIDE), f"group {preview.group}")
            tokens = tokens_html(preview.codes[0].tolist(), config.num_tokens, config.num_groups, prefix)
            yield Shown(enlarge(image, LARGE), strip, tokens)


@torch.inference_mode()
def reconstructions(pipe: DARPipeline, photo: Image.Image) -> Generator[Image.Image, None, None]:
    """A photo as the tokenizer sees it after 1, 2, ..., K groups; what it was given comes first."""
    yield enlarge(to_image(middle(pipe, photo)), LARGE)
    noise = pipe.tokenizer.draw_noise(1, torch.Generator().manual_seed(0))
    for preview in pipe.tokenizer.stream([tokenize(pipe, photo)], noise):
        yield enlarge(to_image(preview[0]), LARGE)


def tokens_html(codes: list[int], num_tokens: int, num_groups: int, kept: int = 0) -> str:
    """A row of cells per group: each token in a colour of its own, those to come empty, those kept framed."""
    per_group = num_tokens // num_groups
    cells = []
    for place in range(num_tokens):
        kind, style, text = "token", "background:#eee;color:#eee", "·"
        if place < len(codes):
            # Golden-ratio steps: neighbouring codes get distant hues.
            red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(codes[place] * 0.618 % 1, 0.8, 0.7))
            kind, text = "token written", str(codes[place])
            style = f"background:rgb({red},{green},{blue});color:#222"
        frame = ";outline:2px solid #222" if place < min(kept, len(codes)) else ""
        cells.append(f'<span class="{kind}" style="{style}{frame}">{text}</span>')
    rows = [cells[start : start + per_group] for start in range(0, num_tokens, per_group)]
    return "".join(f'<div class="group">{"".join(row)}</div>' for row in rows)


def preview_html(image: Image.Image, caption: str) -> str:
    """A small picture with a caption, inside the page: a file of its own could be read while it is written."""
    content = io.BytesIO()
    image.save(content, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return f'<figure class="preview"><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def repeat(
    pipeline: str, label: int, seed: int, guidance: float, photo: str | None, prefix: int, dtype: Dtype | None = None
) -> tuple[str, str]:
    """The `dar sample`, and the lines of Python, that draw the same image."""
    options = {"pipeline": pipeline, "classes": label, "per_class": 1, "seed": seed, "guidance": guidance}
    lines = ["import torch", "", "from dar_lightning import DARPipeline"]
    lines += ["from dar_lightning.generation.drawing import image_seed"]
    cast = "" if dtype is None else f".to(torch.{dtype})"
    made = ["", f"pipe = DARPipeline.from_pretrained({pipeline!r}){cast}"]
    kept = ""
    if photo is not None and prefix:
        options |= {"layout": photo, "prefix": prefix}
        lines += ["from dar_lightning.generation.editing import read_photo, tokenize"]
        made += [f"kept = tokenize(pipe, read_photo({photo!r}))[:, :{prefix}]"]
        kept = ", prefix=kept"
    lines += [
        *made,
        f"generator = torch.Generator().manual_seed(image_seed({seed}, {label}, 0))",
        f"stream = pipe.stream(torch.tensor([{label}]), guidance={guidance}{kept}, generator=[generator])",
        "for preview in stream:",
        "    image = preview.images  # (1, 3, H, W) in [-1, 1]: the picture after each group",
    ]
    return command_line("sample", options | {"dtype": dtype, "output": "runs/drawn"}), "\n".join(lines)


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """By the whole factor that brings it to `side` pixels or more, so that pixels stay sharp."""
    factor = max(1, -(-side // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
