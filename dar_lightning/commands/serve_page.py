"""The web page of `dar serve`: previews, drafts to pick from, code that repeats a drawing, reconstructions."""

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dar_lightning.ar.guidance import Guidance, guidance_text, read_guidance
from dar_lightning.ar.pass_layout import check_prefix
from dar_lightning.commands.sample import command_line
from dar_lightning.commands.serve_edit import edit_tab
from dar_lightning.commands.serve_pictures import (
    draw_several,
    enlarge,
    pictures_html,
    preview_html,
    streamed,
    tokens_html,
)
from dar_lightning.devices import Dtype
from dar_lightning.errors import UserError, require
from dar_lightning.generation.drawing import Job
from dar_lightning.generation.editing import draw_alike, middle, read_photo, tokenize
from dar_lightning.generation.grids import MIN_SIDE, to_image
from dar_lightning.generation.pipeline import DARPipeline

LARGE = 384  # pixels that the page gives to the picture, at least
MAX_SEED = 2**31 - 1
MAX_GUIDANCE = 10  # of the slider
MAX_PROMPT = 1000  # letters
SCHEDULE = "1.1,8 or power_cosine,8,1.5 or interval,3,2,5 (scale, first and last group)"
NO_PHOTO = "drop a photo first"
GONE = "the photo is no longer here: drop it again"
NO_PICTURE = "draw a picture first, to its end"
DRAFTS, DRAFT_GROUP = 8, 2  # after group 1 a picture is a blur, after 2 it shows what lies where
PICK = """element.addEventListener('click', event => {
    const figure = event.target.closest('figure');
    if (figure) trigger('click', {number: Number(figure.dataset.number)});
});"""
HOUR, SWEEP = 3600, 600  # seconds: how old files of visitors and pictures get, and how often that is looked at
PYTHON = """\
import torch

from dar_lightning import DARPipeline
from dar_lightning.generation.drawing import image_seed
{imports}
pipe = DARPipeline.from_pretrained({pipeline!r}){cast}
{kept}generator = torch.Generator().manual_seed(image_seed({seed}, {label!r}, {number}))
stream = pipe.stream({asked}, guidance={guidance!r}{prefix}{jacobi}, generator=[generator])
for preview in stream:
    image = preview.images  # (1, 3, H, W) in [-1, 1]: the picture after each group"""


class Work:
    """What is being drawn, one step of one picture at a time; when it has been stopped, no step begins any more."""

    def __init__(self):
        # Held while something is computed. Reentrant: Python, at its end, closes generators in the thread that stopped.
        self.step = threading.RLock()
        self._open: set[Generator] = set()

    def steps(self, drawing: Generator) -> Iterator:
        """What the generator yields; it is closed with this one."""
        try:
            while True:
                with self.step:
                    self._open.add(drawing)
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
    pipe: DARPipeline,
    label: int | str,
    seed: int,
    guidance: Guidance,
    photo: Image.Image | None = None,
    prefix: int = 0,
    number: int = 0,
    jacobi: int = 0,
) -> Generator[tuple[Image.Image, str, str, list[int]], None, None]:
    """Draw an image of a class or prompt. Closing the iterator stops the work.

    Yields:
        After each group the preview, enlarged; HTML of all previews so far; HTML of the tokens so far; the tokens.
    """
    strip = ""
    with closing(streamed(pipe, [number], label, seed, guidance, photo, prefix, jacobi=jacobi)) as stream:
        for preview in stream:
            image, codes = to_image(preview.images[0]), preview.codes[0].tolist()
            strip += preview_html(enlarge(image, MIN_SIDE), f"{len(codes)} tokens")
            yield enlarge(image, LARGE), strip, tokens_html(pipe, codes, prefix), codes


@torch.inference_mode()
def reconstructions(pipe: DARPipeline, photo: Image.Image) -> Generator[Image.Image, None, None]:
    """A photo as the tokenizer sees it after 1, 2, ..., K groups; what it was given comes first."""
    yield enlarge(to_image(middle(pipe, photo)), LARGE)
    noise = pipe.tokenizer.draw_noise(1, torch.Generator().manual_seed(0))
    for preview in pipe.tokenizer.stream([tokenize(pipe, photo)], noise):
        yield enlarge(to_image(preview[0]), LARGE)


def repeat(
    pipeline: str,
    label: int | str,
    seed: int,
    guidance: Guidance,
    photo: str | None,
    prefix: int,
    dtype: Dtype | None = None,
    number: int = 0,
    encoder: str | None = None,
    jacobi: int = 0,
) -> tuple[str, str]:
    """The `dar sample`, and the lines of Python, that draw the same image."""
    text = isinstance(label, str)
    options = {"pipeline": pipeline, "prompt" if text else "classes": label, "per_class": 1, "seed": seed}
    options["guidance"] = guidance_text(guidance)
    options |= ({"numbers": number} if number else {}) | ({"jacobi": jacobi} if jacobi else {})
    parts = dict.fromkeys(("imports", "kept", "prefix"), "")
    if photo is not None and prefix:
        options |= {"layout": photo, "prefix": prefix}
        parts["imports"] = "from dar_lightning.generation.editing import read_photo, tokenize\n"
        parts["kept"] = f"kept = tokenize(pipe, read_photo({photo!r}))[:, :{prefix}]\n"
        parts["prefix"] = ", prefix=kept"
    parts["jacobi"] = f", jacobi={jacobi}" if jacobi else ""
    parts["cast"] = "" if dtype is None else f".to(torch.{dtype})"
    parts["cast"] += "" if encoder is None else f"\npipe.ar.condition.use_encoder({encoder!r})"
    parts["asked"] = f"prompts=[{label!r}]" if text else f"torch.tensor([{label}])"
    python = PYTHON.format(pipeline=pipeline, label=label, seed=seed, number=number, guidance=guidance, **parts)
    return command_line("sample", options | {"encoder": encoder, "dtype": dtype, "output": "runs/drawn"}), python


def build_page(
    gr: Any,
    pipe: DARPipeline,
    name: str,
    max_upload_mb: float,
    work: Work,
    dtype: Dtype | None = None,
    guidance: Guidance = 3.0,
    encoder: str | None = None,
    jacobi: int = 0,
):
    """The page, as gradio.Blocks.

    Args:
        gr: the gradio module.
        pipe: what draws.
        name: how the pipeline was called, for the code that repeats a picture.
        max_upload_mb: largest photo, in MB.
        work: where it draws.
        dtype: what its weights were cast to, for the same code.
        guidance: what the page begins with.
        encoder: the text encoder that was named, for the same code.
        jacobi: window of Jacobi sampling, for every drawing; 0 is off.
    """
    config, takes = pipe.tokenizer.config, pipe.ar.condition.takes
    plain = not isinstance(guidance, str | tuple | list) and 1 <= guidance <= MAX_GUIDANCE
    typed = "" if plain else guidance_text(guidance)  # what the slider cannot say

    def photo_input(**options):
        """An image that is not opened when it arrives: photo_of does that, and says what is wrong with it."""
        image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Photo", **options)
        image.preprocess = lambda payload: None if payload is None else payload.path
        return image

    def refusal(message: str):
        """A message on the page; a visitor's mistake is nothing that the server's console should trace."""
        return gr.Error(message, print_exception=False)

    def photo_of(path: str) -> Image.Image:
        try:
            size = Path(path).stat().st_size / 1e6
            require(size <= max_upload_mb, f"the photo has {size:.1f} MB: at most {max_upload_mb:g} MB are read")
            return read_photo(path)
        except FileNotFoundError as error:
            raise refusal(GONE) from error
        except UserError as error:
            raise refusal(str(error)) from error

    def guidance_of(text: str) -> Guidance:
        """A class that the server should import is named by who starts it, not by a visitor."""
        try:
            found = guidance if text == typed else read_guidance(text, own_classes=False)
            pipe.guidance_scales(found)
        except UserError as error:
            raise refusal(str(error)) from error
        return found

    def asked_of(
        label: int | str, seed: float | None, guidance: float, path: str | None, prefix: int, schedule: str
    ) -> tuple[int | str, int, Guidance, Image.Image | None, int]:
        """What a visitor has asked for, as the arguments of `draw_previews`."""
        if seed is None or not 0 <= seed <= MAX_SEED or seed != int(seed):
            raise refusal(f"the seed is {seed}: give a whole number from 0 to {MAX_SEED}")
        photo = None if path is None else photo_of(path)
        prefix = 0 if photo is None else int(prefix)
        most = pipe.ar.config.num_tokens - 1
        if not 0 <= prefix <= most:
            raise refusal(f"the tokens to keep are {prefix}: give a number from 0 to {most}")
        scale = guidance_of(schedule.strip()) if schedule.strip() else guidance
        if len(str(label)) > MAX_PROMPT:
            raise refusal(f"the prompt has {len(str(label))} letters: at most {MAX_PROMPT} are read")
        try:
            pipe.condition([label])
            check_prefix(pipe.ar.config, prefix)
        except UserError as error:
            raise refusal(str(error)) from error
        return label, int(seed), scale, photo, prefix

    def draw(inputs: tuple, number: int = 0) -> Iterator[tuple]:
        label, seed, scale, photo, prefix = asked = asked_of(*inputs)
        file_name = None if photo is None else Path(inputs[3]).name
        code = repeat(name, label, seed, scale, file_name, prefix, dtype, number, encoder, jacobi)
        for *shown, codes in work.steps(draw_previews(pipe, *asked, number, jacobi)):
            yield *shown, *code, (label, seed, number, codes)

    def on_draw(
        label: int | str, seed: float | None, guidance: float, path: str | None, prefix: int, schedule: str = ""
    ) -> Iterator[tuple]:
        yield from draw((label, seed, guidance, path, prefix, schedule))

    def on_drafts(*inputs) -> Iterator[tuple]:
        for shown in work.steps(draw_several(pipe, DRAFTS, DRAFT_GROUP, *asked_of(*inputs), jacobi=jacobi)):
            yield shown, inputs

    def on_alike(last: tuple | None, strength: float):
        if last is None or len(last[3]) < pipe.ar.config.num_tokens:
            raise refusal(NO_PICTURE)
        label, seed, number, codes = last
        jobs = [Job(label, other, torch.tensor(codes)) for other in range(number + 1, number + 1 + DRAFTS)]
        found = work.steps(draw_alike(pipe, jobs, number, seed, float(strength), DRAFTS))
        pictures = [to_image(previews[-1]) for previews, _ in found]
        return pictures_html(pictures), pictures

    def on_pick(offered: tuple | list | None, event: gr.EventData) -> Iterator[tuple]:
        """A click on one of the pictures: finish a draft, or show what is finished."""
        number = getattr(event, "number", None)
        if not offered or number not in range(DRAFTS):
            yield (gr.skip(),) * 6
        elif isinstance(offered, tuple):
            yield from draw(offered, number)
        else:
            yield enlarge(offered[number], LARGE), *(gr.skip(),) * 5

    def on_photo(path: str | None):
        if path is None:
            return [], None, config.num_groups
        pictures = list(work.steps(reconstructions(pipe, photo_of(path))))
        return pictures, (pictures[0], pictures[-1]), config.num_groups

    def on_groups(pictures: list, groups: float | None):
        if not pictures:
            raise refusal(NO_PHOTO)
        return (pictures[0], pictures[int(groups)]) if groups in range(1, len(pictures)) else gr.skip()

    def ask(elem_id: str):
        """The component for what is drawn: a class or a prompt."""
        if takes == "prompts":
            return gr.Textbox(label="Prompt", info="what to draw, in words", max_length=MAX_PROMPT, elem_id=elem_id)
        names = pipe.classes or map(str, range(pipe.num_labels))
        choices = [(text, label) for label, text in enumerate(names)]
        return gr.Dropdown(choices, value=0, label="Class", elem_id=elem_id, visible=takes == "labels")

    with gr.Blocks(title="D-AR", analytics_enabled=False, delete_cache=(SWEEP, HOUR)) as page:
        gr.Markdown(f"# D-AR: {name}\nA picture appears while its {config.num_tokens} tokens are still being written.")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=1):
                label = ask("label")
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                first, guided = guidance if plain else 3, takes != "nothing"
                scale = gr.Slider(1, MAX_GUIDANCE, value=first, step=0.25, label="Guidance", visible=guided)
                with gr.Accordion("Guidance as a function of the token", open=bool(typed), visible=guided):
                    schedule = gr.Textbox(typed, label="Instead of the slider", info=SCHEDULE, elem_id="schedule")
                with gr.Accordion("Layout from a photo", open=False):
                    photo = photo_input(height=160, elem_id="photo")
                    most = pipe.ar.config.num_tokens - 1
                    some = max(1, config.num_tokens // 16) if pipe.ar.config.tokens_per_pass == 1 else 0
                    prefix = gr.Slider(0, most, value=some, step=1, label="Tokens to keep of it")
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Row():
                    draft = gr.Button(f"{DRAFTS} drafts", elem_id="draft")
                    alike = gr.Button("More like this", elem_id="alike")
                strength = gr.Slider(0, 1, value=0.5, step=0.05, label="Variation strength", elem_id="strength")
            with gr.Column(scale=2):
                shown = {"interactive": False, "format": "png"}
                with gr.Row():
                    picture = gr.Image(label="Picture", buttons=["download"], elem_id="picture", **shown)
                    tokens = gr.HTML(tokens_html(pipe, []), elem_id="tokens")
                strip = gr.HTML(elem_id="strip")
                offers = gr.HTML(elem_id="offers", js_on_load=PICK)
                with gr.Accordion("Repeat it", open=False):
                    command = gr.Code(language="shell", label="Command line", interactive=False, elem_id="command")
                    python = gr.Code(language="python", label="Python", interactive=False, elem_id="python")
            inputs, outputs = [label, seed, scale, photo, prefix, schedule], [picture, strip, tokens, command, python]
            last, offered, quiet = gr.State(), gr.State(), {"show_progress": "minimal"}
            drawing = start.click(on_draw, inputs, [*outputs, last], **quiet, api_name="draw")
            drafting = draft.click(on_drafts, inputs, [offers, offered], **quiet, api_name=False)
            varying = alike.click(on_alike, [last, strength], [offers, offered], **quiet, api_name=False)
            picking = offers.click(on_pick, offered, [*outputs, last], **quiet, api_name=False)
            stop.click(None, cancels=[drawing, drafting, varying, picking])
        with gr.Tab("Edit"):
            drop = photo_input(height=160, elem_id="edit_photo", render=False)
            edit_tab(gr, pipe, work, drop, ask, [seed, scale, schedule], asked_of, photo_of, refusal, jacobi)
        with gr.Tab("Reconstruct"):
            with gr.Row():
                given = photo_input(height=400, elem_id="given")
                compared = gr.ImageSlider(label="Photo and reconstruction", elem_id="compared", **shown)
            last = config.num_groups
            groups = gr.Slider(1, last, value=last, step=1, label="Groups of tokens", elem_id="groups")
            groups.preprocess = lambda number: number  # half of one while somebody types; gr.update undoes this
            pictures = gr.State([])
            results = [pictures, compared, groups]
            given.change(on_photo, given, results, api_name="reconstruct", show_progress_on=compared)
            # Not `release`, which keys and the number's box do not cause; of the places on the way, the last counts.
            moved = {"trigger_mode": "always_last", "show_progress": "hidden"}
            groups.input(on_groups, [pictures, groups], compared, api_name=False, **moved)
    return page
