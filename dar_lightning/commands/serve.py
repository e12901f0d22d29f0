"""`dar serve`: a Gradio page that streams previews while tokens are drawn."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dar_lightning.commands.serve_page import Work, draw_previews, reconstructions, repeat, tokens_html
from dar_lightning.devices import Dtype, choose_device, torch_dtype
from dar_lightning.errors import UserError
from dar_lightning.generation.editing import read_photo
from dar_lightning.generation.pipeline import DARPipeline

CSS = """
.token { display: inline-block; width: 3.2em; margin: 1px; font: 11px/1.6 monospace; text-align: center; }
.group { white-space: nowrap; }
.preview { display: inline-block; margin: 0 6px 6px 0; text-align: center; font-size: 12px; }
.preview img { width: 92px; }
"""
FONTS = ["system-ui", "sans-serif"]  # none from elsewhere
MAX_SEED = 2**31 - 1
NO_PHOTO = "drop a photo first"
DAY, SWEEP = 86_400, 600  # seconds: how old a visitor's photo gets, and how often that is looked at


def serve(
    pipeline: str = "fruit64",
    host: str = "127.0.0.1",
    port: int = 7860,
    max_queue: int = 8,
    max_upload_mb: float = 10,
    device: str = "auto",
    dtype: Dtype | None = None,
) -> None:
    """Open a web page: pick a class, seed and guidance, and watch the picture come group by group.

    A photo may give the first tokens (layout control), and be reconstructed from its first groups. Needs Gradio:
    pip install 'dar-lightning[demo]'. Ctrl-C or SIGTERM stop it; visitors' photos are deleted then, and after a day.

    Args:
        pipeline: folder, Hugging Face repository, or "fruit64", which comes with the package.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: port to listen on.
        max_queue: visitors who may wait; pictures are drawn one at a time.
        max_upload_mb: largest photo, in MB.
        device: where to compute: auto, cpu, cuda, cuda:N or mps.
        dtype: of the weights: float32, or bfloat16, which rounds more, so that some tokens are others; None: as stored.
    """
    try:
        import gradio
    except ImportError as error:
        raise UserError("serve needs Gradio, which is not installed: pip install 'dar-lightning[demo]'") from error
    for name, value in (("max_queue", max_queue), ("max_upload_mb", max_upload_mb)):
        if value <= 0:
            raise UserError(f"{name} is {value}: it must be positive")
    pipe = DARPipeline.from_pretrained(pipeline).to(device=choose_device(device), dtype=torch_dtype(dtype))
    work = Work()
    page = build_page(gradio, pipe, pipeline, max_upload_mb, work, dtype)
    page.queue(max_size=max_queue, default_concurrency_limit=1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which Gradio ends at
    try:
        page.launch(
            prevent_thread_lock=True,  # else it waits here, but not under `python -i`
            server_name=host,
            server_port=port,
            # Gradio counts and words it in MiB, so "10.0 Mb" it is; photo_of refuses what lies between.
            max_file_size=int(max_upload_mb * 2**20),
            css=CSS,
            theme=gradio.themes.Default(font=FONTS, font_mono=["monospace"]),
            footer_links=[],
            enable_monitoring=False,
        )
    except OSError as error:
        raise UserError(f"host {host}, port {port}: cannot listen there ({error})") from error
    else:
        page.block_thread()
    finally:
        work.stop()  # Gradio leaves its threads running, and one inside torch aborts a Python that ends
        signal.signal(signal.SIGTERM, before)


def build_page(gr: Any, pipe: DARPipeline, name: str, max_upload_mb: float, work: Work, dtype: Dtype | None = None):
    """The page, as gradio.Blocks.

    Args:
        gr: the gradio module.
        pipe: what draws.
        name: how the pipeline was called, for the code that repeats a picture.
        max_upload_mb: largest photo, in MB.
        work: where it draws.
        dtype: what its weights were cast to, for the same code.
    """
    config = pipe.tokenizer.config
    labels = list(pipe.classes) or [str(label) for label in range(pipe.ar.config.num_classes)]

    def photo_input(**options):
        """An image that is not opened when it arrives: photo_of does that, and says what is wrong with it."""
        image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Photo", **options)
        image.preprocess = lambda payload: None if payload is None else payload.path
        return image

    def refusal(message: str):
        """A message on the page; a visitor's mistake is nothing that the server's console should trace."""
        return gr.Error(message, print_exception=False)

    def photo_of(path: str):
        size = Path(path).stat().st_size / 1e6
        if size > max_upload_mb:
            raise refusal(f"the photo has {size:.1f} MB: at most {max_upload_mb:g} MB are read")
        try:
            return read_photo(path)
        except UserError as error:
            raise refusal(str(error)) from error

    def on_draw(label: int, seed: float | None, guidance: float, path: str | None, prefix: int) -> Iterator[tuple]:
        if seed is None or not 0 <= seed <= MAX_SEED or seed != int(seed):
            raise refusal(f"the seed is {seed}: give a whole number from 0 to {MAX_SEED}")
        photo, shown_path = (None, None) if path is None else (photo_of(path), Path(path).name)
        seed, prefix = int(seed), 0 if photo is None else int(prefix)
        command, python = repeat(name, label, seed, guidance, shown_path, prefix, dtype)
        for shown in work.steps(draw_previews(pipe, label, seed, guidance, photo, prefix)):
            yield shown.picture, shown.strip, shown.tokens, command, python

    def on_photo(path: str | None):
        if path is None:
            return [], None, config.num_groups
        photo = photo_of(path)
        pictures = list(work.steps(reconstructions(pipe, photo)))
        return pictures, (pictures[0], pictures[-1]), config.num_groups

    def on_groups(pictures: list, groups: float | None):
        if not pictures:
            raise refusal(NO_PHOTO)
        if groups not in range(1, len(pictures)):
            return gr.skip()
        return pictures[0], pictures[int(groups)]

    with gr.Blocks(title="D-AR", analytics_enabled=False, delete_cache=(SWEEP, DAY)) as page:
        gr.Markdown(f"# D-AR: {name}\nA picture appears while its {config.num_tokens} tokens are still being written.")
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(scale=1):
                choices = [(text, label) for label, text in enumerate(labels)]
                label = gr.Dropdown(choices, value=0, label="Class", elem_id="label")
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                guidance = gr.Slider(1, 10, value=3, step=0.25, label="Guidance")
                with gr.Accordion("Layout from a photo", open=False):
                    photo = photo_input(height=160, elem_id="photo")
                    some = max(1, config.num_tokens // 16)
                    prefix = gr.Slider(0, config.num_tokens - 1, value=some, step=1, label="Tokens to keep of it")
                with gr.Row():
                    start = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=2):
                with gr.Row():
                    picture = gr.Image(
                        label="Picture", interactive=False, format="png", buttons=["download"], elem_id="picture"
                    )
                    empty = tokens_html([], config.num_tokens, config.num_groups)
                    tokens = gr.HTML(empty, elem_id="tokens")
                strip = gr.HTML(elem_id="strip")
                with gr.Accordion("Repeat it", open=False):
                    command = gr.Code(language="shell", label="Command line", interactive=False, elem_id="command")
                    python = gr.Code(language="python", label="Python", interactive=False, elem_id="python")
            inputs, outputs = [label, seed, guidance, photo, prefix], [picture, strip, tokens, command, python]
            drawing = start.click(on_draw, inputs, outputs, show_progress="minimal", api_name="draw")
            stop.click(None, cancels=[drawing])
        with gr.Tab("Reconstruct"):
            with gr.Row():
                given = photo_input(height=400, elem_id="given")
                compared = gr.ImageSlider(
                    label="Photo and reconstruction", interactive=False, format="png", elem_id="compared"
                )
            groups = gr.Slider(
                1, config.num_groups, value=config.num_groups, step=1, label="Groups of tokens", elem_id="groups"
            )
            groups.preprocess = lambda number: number  # half of one while somebody types; gr.update undoes this
            pictures = gr.State([])
            results = [pictures, compared, groups]
            given.change(on_photo, given, results, api_name="reconstruct", show_progress_on=compared)
            # Not `release`, which keys and the number's box do not cause; of the places on the way, the last counts.
            shown, moved = [pictures, groups], {"trigger_mode": "always_last", "show_progress": "hidden"}
            groups.input(on_groups, shown, compared, api_name=False, **moved)
    return page
