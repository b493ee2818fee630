"""``ltrp-timm app``: a page in the browser to try photos, rankers and keep ratios on."""

import html
import os
import socket
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ltrp_timm._text import one_line, optional_import, printable, say
from ltrp_timm.commands._console import check_names, class_names, quiet_about_training
from ltrp_timm.commands._flags import Positive, add_command
from ltrp_timm.commands.demo import sample_photos
from ltrp_timm.data.photos import load_image
from ltrp_timm.measure.throughput import compare, ratio
from ltrp_timm.models.coarse import RESTS
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.open_model import check_name, is_source, open_model
from ltrp_timm.rankers import DEFAULT_RANKER, list_rankers, ranker_class
from ltrp_timm.runtime.world import usable_device
from ltrp_timm.selection.registry import SELECTIONS
from ltrp_timm.visualize import panels, to_tensor

BACKBONES = (
    *("vit_small_patch16_224", "vit_tiny_patch16_224", "vit_base_patch16_224"),
    *("deit3_small_patch16_224", "beitv2_base_patch16_224", "vit_small_patch16_dinov3"),
)
OWN = "the model's"  # in the list of rankers
MOST_VISITORS = 1000  # whose requests are remembered
_PAUSE = 0.3  # seconds without a change before time is measured
_ERRORS = (ValueError, TypeError, OSError, RuntimeError)
_CSS = """
.figure b {font-size: 2.2em; line-height: 1.2; margin-right: .2em}
.figure p {opacity: .75; margin: 0; font-size: .9em}
.classes td {width: 24em; vertical-align: top; border: none !important}
.classes progress {width: 6em; accent-color: var(--color-accent)}
.figures > * {min-width: 11em !important}
.shown label.float {position: static; display: inline-flex}
"""


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Options of ``ltrp-timm app``.

    Args:
        model: Models to offer first: ``ltrp_*`` names, timm ViTs, hf-hub:OWNER/NAME or
            local-dir:DIR. The page takes any other timm ViT by name.
        pretrained: Download the weights that timm publishes for a chosen model.
        host: Address to listen on; 127.0.0.1 lets in this machine only.
        port: Port to listen on (default: the first free one from 7860).
        device: Device, such as cpu, cuda or cuda:1.
        repeats: Number of timed rounds.
        threads: CPU threads (default: torch's choice).
    """

    model: Sequence[str] = ()
    pretrained: bool = False
    host: str = "127.0.0.1"
    port: Positive | None = None
    device: str = "cpu"
    repeats: Positive = 5
    threads: Positive | None = None


class Viewer:
    """Answers the page, one request at a time: nothing else runs while time is measured."""

    def __init__(self, options: AppOptions) -> None:
        self.options, self.device = options, usable_device(options.device)
        self.names = list(dict.fromkeys((*options.model, *BACKBONES)))
        self._lock = threading.Lock()
        self._open = lru_cache(maxsize=2)(self._open_model)
        self._load = lru_cache(maxsize=2)(lambda path: load_image(path, Path(path).name))
        self._latest: dict[Any, tuple[Any, ...]] = {}  # the request of each visitor
        for name in options.model:  # a wrong one is an error now, not on the page
            self._open(name, OWN, "drop")

    def rankers(self) -> list[str]:
        """Names to choose from: those that need no weights, or whose weights can be had."""
        found = [OWN] if self.options.model else []
        for name in list_rankers():
            kind = ranker_class(name)
            downloaded = kind.has_published_weights and self.options.pretrained
            if not kind.learned or kind.brings_weights or downloaded:
                found.append(name)
        return found

    def look(
        self, visitor: Any, *chosen: Any
    ) -> tuple[Image.Image | None, Image.Image | None, str, str]:
        """Rank a photo.

        Args:
            visitor: Who asks.
            *chosen: File of the photo, backbone, ranker, keep ratio, selection and rest.

        Returns:
            Score map, kept patches, number of tokens and classes; the latter two as HTML. In case
            of an error the last is a sentence, and there is nothing else.
        """
        self._latest.pop(visitor, None)
        self._latest[visitor] = chosen
        if len(self._latest) > MOST_VISITORS:  # forget who has been away for longest
            del self._latest[next(iter(self._latest))]
        try:
            with self._ready(*chosen) as (model, photo, names, note):
                return self._view(model, photo, names, note)
        except _ERRORS as error:
            reason = textwrap.shorten(one_line(error), 500, placeholder=" …")
            return None, None, "", html.escape(reason)

    def measure(self, visitor: Any, *chosen: Any) -> list[str] | None:
        """Speed-up and time as HTML; None if the visitor has moved on, or in case of an error."""
        time.sleep(_PAUSE)
        if self._latest.get(visitor) != chosen:
            return None
        try:
            with self._ready(*chosen) as (model, photo, *_), torch.inference_mode():
                x = to_tensor(photo, model).to(self.device)
                fns = {"full": partial(model.backbone, x), "pruned": partial(model, x)}
                times = compare(fns, repeats=self.options.repeats, device=self.device)
        except _ERRORS:
            return None  # ``look`` shows the reason
        if self._latest.get(visitor) != chosen:
            return None
        full, pruned = times["full"], times["pruned"]
        gain, where = ratio(full, pruned), f"CPU, {torch.get_num_threads()} thread(s)"
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        spread = f"ranking included; quartiles {gain.low:.2f} to {gain.high:.2f}"
        text = f"instead of {1e3 * full.median:.1f} ms; median of {len(full.seconds)}, {where}"
        return [
            _figure(f"{gain.median:.2f}×", "speed-up", spread),
            _figure(f"{1e3 * pruned.median:.1f}", "ms for this image", text),
        ]

    @contextmanager
    def _ready(self, *chosen: Any) -> Iterator[tuple[LTRPModel, Image.Image, list[str], str]]:
        """The model with these settings, the photo, class names, and why there are none."""
        path, name, ranker, keep_ratio, selection, rest = chosen
        if not path:
            raise ValueError("Choose a photo: drop a file on the left, or take a sample.")
        name = (name or "").strip()
        if name not in self.names:
            if is_source(name):
                raise ValueError(f"{name} is not offered here: start ltrp-timm app --model {name}.")
            check_name(name, "backbone")
        photo = self._load(path)
        with self._lock, quiet_about_training():
            model, names, note = self._open(name, ranker, rest)
            model.selection, model.keep_ratio = selection, keep_ratio
            yield model, photo, names, note

    def _open_model(self, name: str, ranker: str, rest: str) -> tuple[LTRPModel, list[str], str]:
        front: dict[str, Any] = {"rest": rest, "selection": "top"}
        if ranker != OWN:
            front["ranker"] = ranker
            if ranker_class(ranker).has_published_weights:
                front["ranker_weights"] = True
        why = "ltrp-timm app --pretrained downloads them."
        try:
            model, origin = open_model(name, pretrained=self.options.pretrained or None, **front)
        except OSError as error:
            if is_source(name) or not self.options.pretrained:
                raise
            why = one_line(error)
            model, origin = open_model(name, **front)
        names = class_names(model)
        note = "" if names else f"{name} has no named classes to show."
        if origin is None:
            note = (
                f"No classes are shown: the weights of {name} are not on this machine. {why} "
                "Score map, kept patches and time do not depend on them."
            )
        return model.to(self.device), names, note

    def _view(
        self, model: LTRPModel, photo: Image.Image, names: list[str], note: str
    ) -> tuple[Image.Image, Image.Image, str, str]:
        _, (heat, _), (kept, _) = panels(photo, model, [model.keep_ratio])
        x = to_tensor(photo, model).to(self.device)
        n, k = model.num_patches, model.num_tokens()
        prefix = int(getattr(model.backbone, "num_prefix_tokens", 0))
        text = f"instead of {prefix + n}; {k} of {n} patches"
        if model.rest == "coarse":
            fine = model.token_layout(x).indices[0].shape[1]
            text = f"instead of {prefix + n}; {fine} patches and {k - fine} coarse"
        tokens = _figure(str(prefix + k), "tokens", text)
        cells = "".join(
            f"<td><b>Top classes, {which} model</b>{_classes(net, x, names)}</td>"
            for which, net in (("full", model.backbone), ("pruned", model))
            if not note
        )
        classes = html.escape(note) or f"<table class='classes'><tr>{cells}</tr></table>"
        return _enlarge(heat), _enlarge(kept), tokens, classes


def _enlarge(picture: Image.Image) -> Image.Image:
    """As large as a column of the page, if it is smaller."""
    times = max(1, 448 // picture.width)
    return picture.resize((times * picture.width, times * picture.height))


def _figure(value: str, label: str, text: str) -> str:
    value, label, text = map(html.escape, (value, label, text))
    return f"<div class='figure'><b>{value}</b>{label}<p>{text}</p></div>"


@torch.inference_mode()
def _classes(net: Any, x: Tensor, names: Sequence[str], count: int = 3) -> str:
    """The likeliest classes of an image x (1, 3, H, W) as HTML."""
    likely, which = net(x)[0].float().softmax(-1).topk(min(count, len(names)))
    return "".join(
        f"<br><progress value={share:.4f}></progress> {share:.0%} {html.escape(names[index])}"
        for share, index in zip(likely.tolist(), which.tolist())
    )


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
    """gradio, which sends no statistics from now on; ImportError if it is not installed."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    return optional_import("gradio", "the page needs gradio", "'ltrp-timm[app]'")


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
    """Check, before anything slow, that the page can listen there; else ValueError or OSError."""
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
