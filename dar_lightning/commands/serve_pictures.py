"""Pieces of the web page of `dar serve`: images that are drawn, and tokens and small pictures as HTML."""

import base64
import io
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from dar_lightning.ar.guidance import Guidance
from dar_lightning.generation.drawing import generators
from dar_lightning.generation.editing import tokenize
from dar_lightning.generation.grids import MIN_SIDE, to_image
from dar_lightning.generation.pipeline import DARPipeline, Preview

CSS = """
.token { display: inline-block; width: 3.2em; margin: 1px; font: 11px/1.6 monospace; text-align: center; }
.token { background: #eee; color: #eee; }
.written { color: #222; }
.kept { outline: 2px solid #222; }
.group { white-space: nowrap; }
.preview { display: inline-block; margin: 0 6px 6px 0; text-align: center; font-size: 12px; }
.preview img { width: 84px; }
#offers img { cursor: pointer; }
#edited img { width: 160px; }
"""


def streamed(
    pipe: DARPipeline,
    numbers: Sequence[int],
    label: int | str,
    seed: int,
    guidance: Guidance,
    photo: Image.Image | None = None,
    prefix: int = 0,
    **options: Tensor | float | None,
) -> Generator[Preview, None, None]:
    """Draw images of a class or prompt by their numbers, as `dar sample` does.

    Of a photo, the first `prefix` tokens are kept. `options` are others of DARPipeline.stream: jacobi, image, known,
    start and evidence.
    """
    kept = None if photo is None or prefix == 0 else tokenize(pipe, photo)[:, :prefix].expand(len(numbers), -1)
    options |= {"guidance": guidance, "prefix": kept, "generator": generators(seed, [(label, i) for i in numbers])}
    return pipe.stream(pipe.condition([label] * len(numbers)), **options)


@torch.inference_mode()
def draw_several(pipe: DARPipeline, count: int, groups: int, *asked, **options) -> Generator[str, None, None]:
    """Images 0 to count - 1 side by side, as HTML after each of so many groups. The other arguments: `streamed`."""
    with closing(streamed(pipe, range(count), *asked, **options)) as stream:
        for preview in islice(stream, groups):
            yield pictures_html(map(to_image, preview.images))


def pictures_html(pictures: Iterable[Image.Image]) -> str:
    """Pictures with their numbers."""
    return "".join(preview_html(enlarge(picture, MIN_SIDE), str(i), i) for i, picture in enumerate(pictures))


def tokens_html(pipe: DARPipeline, codes: list[int], kept: int = 0) -> str:
    """A row of cells per group: each token in a colour of its own, those to come empty, those kept framed."""
    config = pipe.tokenizer.config
    cells = ['<span class="token">·</span>'] * config.num_tokens
    for place, code in enumerate(codes):
        kind = "token written kept" if place < kept else "token written"
        hue = round(360 * (code * 0.618 % 1))  # golden-ratio steps: neighbouring codes get distant hues
        cells[place] = f'<span class="{kind}" style="background:hsl({hue},70%,80%)">{code}</span>'
    size = config.num_tokens // config.num_groups
    rows = (cells[start : start + size] for start in range(0, len(cells), size))
    return "".join(f'<div class="group">{"".join(row)}</div>' for row in rows)


def preview_html(image: Image.Image, caption: str, number: int = 0) -> str:
    """A small picture with a caption, which knows its number, as HTML."""
    picture = f'<img src="{data_url(image)}" alt="{caption}">'
    return f'<figure class="preview" data-number="{number}">{picture}<figcaption>{caption}</figcaption></figure>'


def data_url(image: Image.Image) -> str:
    """A PNG inside the page: a file of its own could be read while it is written."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """By the whole factor that brings it to `side` pixels or more, so that pixels stay sharp."""
    factor = max(1, -(-side // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
