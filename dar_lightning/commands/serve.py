"""`dar serve`: a Gradio page that streams previews while tokens are drawn."""

import os
import signal
from pathlib import Path

from dar_lightning.ar.guidance import Guidance, read_guidance
from dar_lightning.commands.sample import use_encoder
from dar_lightning.commands.serve_limit import BodyLimit
from dar_lightning.commands.serve_page import Work, build_page
from dar_lightning.commands.serve_pictures import CSS
from dar_lightning.devices import Dtype, choose_device, torch_dtype
from dar_lightning.errors import UserError, begin_work, check_range, require, whole_line
from dar_lightning.files import find_shipped
from dar_lightning.generation.pipeline import DARPipeline

SESSIONS = 200  # visitors whose pictures are kept for their next click, some MB each; Gradio's own number is 10,000
FONTS = ["system-ui", "sans-serif"]  # none from elsewhere


def serve(
    pipeline: str = "fruit64",
    host: str = "127.0.0.1",
    port: int = 7860,
    max_queue: int = 64,
    max_upload_mb: float = 10,
    guidance: Guidance = 3.0,
    device: str = "auto",
    dtype: Dtype | None = None,
    encoder: str | None = None,
    root_path: str = "",
) -> None:
    """Open a web page: pick a class (or type a prompt), seed and guidance, and watch the picture come group by group.

    A photo may give the first tokens (layout control), and be reconstructed from its first groups. Needs Gradio:
    pip install 'dar-lightning[demo]'. Ctrl-C or SIGTERM stop it; visitors' photos are deleted then, and after an
    hour. The page shows no path of this machine: a folder is called by its own name alone.

    Args:
        pipeline: folder, Hugging Face repository, or "fruit64", which comes with the package.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: port to listen on.
        max_queue: visitors who may wait; pictures are drawn one at a time.
        max_upload_mb: largest photo, in MB; a request with all that is in it may be twice as large, and 1 MB.
        guidance: what the page begins with, as for `dar sample`. A class of your own has to be named here: visitors
            cannot name one.
        device: where to compute: auto, cpu, cuda, cuda:N or mps.
        dtype: of the weights: float32, or bfloat16, which rounds more, so that some tokens are others; None: as stored.
        encoder: the text encoder of a model of features, where it is not where it was in training.
        root_path: behind a proxy that shows the page at a path, that path (/dar), or the whole address.
    """
    try:
        import gradio
        from gradio.route_utils import delete_files_created_by_app
        from starlette.middleware import Middleware
    except ModuleNotFoundError as error:
        raise UserError("serve needs Gradio, which is not installed: pip install 'dar-lightning[demo]'") from error
    except ImportError as error:  # it is there, and something else is not, such as what httpx needs for a SOCKS proxy
        raise UserError(f"serve needs Gradio, which cannot be imported: {whole_line(error)}") from error
    check_range(1, max_queue=max_queue)
    check_range(0.001, 10**6, max_upload_mb=max_upload_mb)
    check_range(0, 65535, port=port)
    known = not root_path or root_path.startswith(("/", "http://", "https://"))
    require(known, f"root_path is {root_path}: need a path from /, or an address from http:// or https://")
    pipe = DARPipeline.from_pretrained(pipeline).to(device=choose_device(device), dtype=torch_dtype(dtype))
    use_encoder(pipe, encoder)
    guidance, work = 1.0 if pipe.ar.condition.takes == "nothing" else read_guidance(guidance), Work()
    pipe.guidance_scales(guidance)  # says so if it does not fit
    names = [shown_name(pipeline), encoder and shown_name(encoder)]
    page = build_page(gradio, pipe, names[0], max_upload_mb, work, dtype, guidance, names[1])
    page.queue(max_size=max_queue, default_concurrency_limit=1)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which Gradio ends at
    # Gradio asks the page whether it is there, which a proxy of the environment could not answer
    direct = [os.environ.get(name) for name in ("no_proxy", "NO_PROXY")]
    os.environ["no_proxy"] = ",".join(filter(None, [*direct, host, "127.0.0.1", "localhost"]))
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
            root_path=root_path.rstrip("/"),
            state_session_capacity=SESSIONS,
            app_kwargs={"middleware": [Middleware(BodyLimit, most=2**20 + 2 * int(max_upload_mb * 2**20))]},
            enable_monitoring=False,
        )
    except Exception as error:  # a port that is taken, or httpx' of a proxy
        raise UserError(f"host {host}, port {port}: cannot listen there ({error})") from error
    else:
        begin_work()
        page.block_thread()
    finally:
        work.stop()  # Gradio leaves its threads running, and one inside torch aborts a Python that ends
        delete_files_created_by_app(page, age=None)  # again: what a step wrote after Gradio had deleted all
        signal.signal(signal.SIGTERM, before)


def shown_name(source: str) -> str:
    """What visitors are told: of a folder the last name alone, not where it is."""
    return Path(source).resolve().name if Path(find_shipped(source)).is_dir() else source
