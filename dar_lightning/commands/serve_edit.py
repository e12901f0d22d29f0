"""The tab Edit of `dar serve`: paint over a photo what is to be drawn anew, and watch four versions of it."""

import base64
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image
from torch import Tensor

from dar_lightning.commands.serve_pictures import data_url, draw_several
from dar_lightning.data.decode import BadSample, decode_rgb
from dar_lightning.data.transforms import to_float
from dar_lightning.errors import UserError
from dar_lightning.generation.editing import middle, read_mask
from dar_lightning.generation.grids import to_image
from dar_lightning.generation.inpainting import EVIDENCE
from dar_lightning.generation.pipeline import DARPipeline

VERSIONS = 4
# The photo, and over it the mask so far and the stroke that is being painted; white is drawn anew.
CANVAS = """{{#if value}}<img src="{{value.image}}"><img class="mask" src="{{value.mask}}">
<canvas width="{{value.side}}" height="{{value.side}}"></canvas>{{else}}Drop a photo, then paint over it.{{/if}}"""
CANVAS_CSS = """
img, canvas { width: 320px; height: 320px; margin: 0; image-rendering: pixelated; }
.mask, canvas { position: absolute; left: 0; top: 0; opacity: 0.7; mix-blend-mode: screen; }
canvas { cursor: crosshair; touch-action: none; }
"""
PAINT = """
let from = null;
const stroke = event => {
    const canvas = element.querySelector('canvas'), box = canvas.getBoundingClientRect();
    const at = [event.clientX - box.left, event.clientY - box.top].map(place => place * canvas.width / box.width);
    const brush = canvas.getContext('2d');
    Object.assign(brush, {strokeStyle: 'white', lineCap: 'round', lineWidth: canvas.width / 6});
    brush.beginPath();
    brush.moveTo(...(from || at));
    brush.lineTo(...at);
    brush.stroke();
    from = at;
};
element.addEventListener('pointerdown', event => {
    if (event.target.tagName !== 'CANVAS') return;
    event.target.setPointerCapture(event.pointerId);
    stroke(event);
});
element.addEventListener('pointermove', event => { if (from) stroke(event); });
element.addEventListener('pointerup', () => {
    if (!from) return;
    from = null;
    const canvas = element.querySelector('canvas'), mask = document.createElement('canvas');
    mask.width = mask.height = canvas.width;
    for (const layer of [element.querySelector('.mask'), canvas]) mask.getContext('2d').drawImage(layer, 0, 0);
    props.value = {...props.value, mask: mask.toDataURL()};
});
"""


def painted(pipe: DARPipeline, paint: Any) -> Tensor | None:
    """What a visitor has not painted over: (1, 1, H, W) bool, or None if nothing is; UserError for what is no mask."""
    side = pipe.tokenizer.config.image_size
    try:
        url = paint["mask"] if paint else ""
        mask = decode_rgb(base64.b64decode(url.partition(",")[2], validate=True)) if url else None
    except (BadSample, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"the mask cannot be read: {error}") from error
    return None if mask is None or mask.getbbox() is None else ~read_mask(pipe, mask, (side, side))


def edit_tab(
    gr: Any,
    pipe: DARPipeline,
    work: Any,
    photo: Any,
    ask: Callable[[str], Any],
    shared: list[Any],
    asked_of: Callable[..., tuple],
    photo_of: Callable[[str], Image.Image],
    refusal: Callable[[str], Exception],
    jacobi: int = 0,
) -> None:
    """Put the tab into the page that is being built.

    Args:
        gr: the gradio module.
        pipe: what draws.
        work: where it draws, a `serve_page.Work`.
        photo: the component that takes a photo.
        ask: makes the component of the class or prompt, of an elem_id.
        shared: the components of seed, guidance and schedule.
        asked_of: reads class or prompt, seed, guidance, path of a photo, prefix and schedule.
        photo_of: reads a photo.
        refusal: what to raise with a message to the visitor.
        jacobi: window of Jacobi sampling; 0 is off.
    """
    side, most = pipe.tokenizer.config.image_size, min(6, pipe.num_groups - 1)

    def on_photo(path: str | None):
        if path is None:
            return None
        image = to_image(middle(pipe, photo_of(path)))
        return {"image": data_url(image), "mask": data_url(Image.new("RGB", (side, side))), "side": side}

    def on_edit(label, seed, guidance, schedule, path, paint, start, evidence) -> Iterator[str]:
        if path is None:
            raise refusal("drop a photo first")
        *asked, picture, _ = asked_of(label, seed, guidance, path, 0, schedule)
        try:
            edit = {"known": painted(pipe, paint), "start": int(start), "evidence": evidence, "jacobi": jacobi}
            edit["image"] = to_float(middle(pipe, picture)[None])
            yield from work.steps(draw_several(pipe, VERSIONS, pipe.num_groups, *asked, **edit))
        except UserError as error:
            raise refusal(str(error)) from error

    with gr.Row():
        with gr.Column(scale=1):
            photo.render()
            label = ask("edit_label")
            keep = {"label": "Start from the photo", "info": "start: groups of steps left out"}
            around = {"label": "Match the photo", "info": "evidence: 8 continues the photo, 0 to 4 change it"}
            sliders = [gr.Slider(0, most, value=0, step=1, **keep), gr.Slider(0, 16, value=EVIDENCE, step=1, **around)]
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="edit_draw")
                stop = gr.Button("Stop", elem_id="edit_stop")
                clear = gr.Button("Clear", elem_id="edit_clear")
            gr.Markdown("Without paint, the whole photo is drawn anew. Seed and guidance are those of the tab Draw.")
        with gr.Column(scale=2):
            canvas = {"html_template": CANVAS, "css_template": CANVAS_CSS, "js_on_load": PAINT}
            paint = gr.HTML(None, elem_id="paint", **canvas)
            versions = gr.HTML(elem_id="edited")
    inputs = [label, *shared, photo, paint, *sliders]
    for event in (photo.change, clear.click):
        event(on_photo, photo, paint, api_name=False)
    drawing = draw.click(on_edit, inputs, versions, show_progress="minimal", api_name="edit")
    stop.click(None, cancels=[drawing])
