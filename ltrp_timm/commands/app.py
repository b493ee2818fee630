"""``ltrp-timm app``: a page in the browser to try photos, rankers and keep ratios on."""

import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

from ltrp_timm._text import printable, say
from ltrp_timm.commands._console import check_names
from ltrp_timm.commands._flags import add_command
from ltrp_timm.commands._viewer import OWN, AppOptions, Viewer
from ltrp_timm.commands.demo import sample_photos
from ltrp_timm.models.coarse import RESTS
from ltrp_timm.rankers import DEFAULT_RANKER
from ltrp_timm.selection.registry import SELECTIONS

_CSS = """
.figure b {font-size: 2.2em; line-height: 1.2; margin-right: .2em}
.figure p {opacity: .75; margin: 0; font-size: .9em}
.classes td {width: 24em; vertical-align: top; border: none !important}
.classes progress {width: 6em; accent-color: var(--color-accent)}
.figures > * {min-width: 11em !important}
.shown label.float {position: static; display: inline-flex}
"""


def add_app(commands: Any) -> None:
    """Add ``ltrp-timm app``."""
    about = "Open a page in the browser: a photo, its score map, what is kept, the time saved."
    add_command(commands, "app", about, _run, AppOptions)


def _run(**given: Any) -> int:
    options = AppOptions(**given)
    for name in options.model:
        check_names(name)
    check_address(options.host, options.port)
    viewer = Viewer(options)
    with tempfile.TemporaryDirectory() as folder:
        page = make_page(viewer, Path(folder))
        say(f"page        {serve(page, options.host, options.port)}  (Ctrl-C stops it)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            page.close(verbose=False)
    return 0


def require_gradio() -> Any:
    """gradio, which sends no statistics from now on.

    Raises:
        ImportError: gradio is not installed.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio: pip install 'ltrp-timm[app]'") from error
    return gradio


def make_page(viewer: Viewer, folder: Path) -> Any:
    """Lay out the page; ``folder`` takes the sample photos."""
    gr = require_gradio()
    samples = []
    for name, picture in sample_photos("app").items():
        samples.append(str(folder / f"{name}.png"))
        picture.save(samples[-1])

    def look(request: gr.Request, *chosen: Any) -> list[Any]:  # type: ignore[name-defined]
        *pictures, tokens, classes = viewer.look(request.session_hash, *chosen)
        shown = [gr.update(value=each, visible=each is not None) for each in pictures]
        return [*shown, tokens, classes, "", ""]

    def measure(request: gr.Request, *chosen: Any) -> Any:  # type: ignore[name-defined]
        return viewer.measure(request.session_hash, *chosen) or [gr.skip(), gr.skip()]

    still = {"interactive": False, "buttons": ["fullscreen"], "format": "png"}
    # uploads are looked through every hour and deleted after a day
    with gr.Blocks(title="ltrp_timm", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            "## What does a faster Vision Transformer look at?\n"
            "A *ranker* scores the patches of a photo; the model encodes only the best."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                photo = gr.Image(
                    samples[0], sources=["upload", "clipboard"], type="filepath", height=260
                )
                photo.preprocess = lambda payload: payload and payload.path  # we read it ourselves
                gr.Examples([[sample] for sample in samples], photo, label="Samples")
                keep = gr.Slider(0.05, 1, 0.5, step=0.05, label="Keep ratio")
                with gr.Row():
                    first = OWN if viewer.options.model else DEFAULT_RANKER
                    ranker = gr.Dropdown(viewer.rankers(), value=first, label="Ranker")
                    selection = gr.Dropdown(list(SELECTIONS), label="Selection")
                rest = gr.Radio(
                    list(RESTS),
                    value="drop",
                    label="The other patches",
                    info="coarse: one token of a smaller image for 2 × 2 patches.",
                )
                name = gr.Dropdown(
                    viewer.names, label="Backbone: any timm ViT", allow_custom_value=True
                )
            with gr.Column(scale=5, min_width=300):
                with gr.Row(elem_classes="figures"):
                    tokens, speed_up, took = gr.HTML(min_height=80), gr.HTML(), gr.HTML()
                with gr.Row():
                    heat = gr.Image(
                        label="Scores: yellow is best", elem_classes="shown", min_width=280, **still
                    )
                    kept = gr.Image(
                        label="What is encoded", elem_classes="shown", min_width=280, **still
                    )
                classes = gr.HTML()
        private = {"api_visibility": "private"}
        chosen = [photo, name, ranker, keep, selection, rest]
        gr.on(
            [page.load, *(part.change for part in chosen)],
            look,
            chosen,
            [heat, kept, tokens, classes, speed_up, took],
            show_progress="hidden",
            trigger_mode="always_last",
            **private,
        ).then(
            measure,
            chosen,
            [speed_up, took],
            **private,
            trigger_mode="multiple",
            concurrency_limit=None,
        )
    return page


def check_address(host: str, port: int | None) -> None:
    """Check that the page can listen there, before anything slow.

    Raises:
        ValueError: The port is none.
        OSError: The address cannot be used.
    """
    if port is not None and port > 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {port}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port or 0), family=family).close()
    except OSError as error:
        where = f"--host {printable(host)}" + f", --port {port}" * (port is not None)
        hint = "Leave --port out to take a free one." if port else "Use 127.0.0.1 or 0.0.0.0."
        reason = str(error.strerror).partition(" (")[0]  # Python adds the address in brackets
        raise OSError(f"cannot listen at {where}: {reason}. {hint}") from error


def serve(page: Any, host: str, port: int | None) -> str:
    """Start the server in the background; returns its address."""
    gr = require_gradio()
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        max_file_size="30mb",
        enable_monitoring=False,
        footer_links=[],
        css=_CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    return str(url)
