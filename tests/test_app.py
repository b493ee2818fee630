"""What the page of ``ltrp-timm app`` answers; the page itself is in test_app_browser.py."""

import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ltrp_timm import drop_patches, list_rankers, num_keep, save_pretrained
from ltrp_timm.commands import app, main
from ltrp_timm.commands.app import BACKBONES, OWN, AppOptions, Viewer
from ltrp_timm.models.open_model import open_model

TINY = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "_PAUSE", 0.0)
    y, x = np.mgrid[0:120, 0:160]
    pixels = np.stack([x, 2 * y, 40 + 200 * (abs(x - 70) + abs(y - 50) < 40)], axis=-1)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save("a.png")
    Path("text.png").write_text("text")
    Image.new("RGB", (1, 5000)).save("strip.png")


@pytest.fixture(scope="module")
def viewer() -> Viewer:
    return Viewer(AppOptions(repeats=2))


def request(**changes: Any) -> tuple[Any, ...]:
    defaults = {"photo": "a.png", "name": TINY, "ranker": "border", "keep": 0.5}
    return tuple({**defaults, "selection": "top", "rest": "drop", **changes}.values())


def pixels(picture: Image.Image | None) -> np.ndarray:
    assert picture is not None
    assert picture.size == (448, 448)
    return np.asarray(picture).astype(int)


def test_the_slider_changes_what_is_kept_and_not_the_scores(viewer: Viewer) -> None:
    scores, kept, tokens, note = viewer.look("me", *request())
    assert f"<b>{1 + num_keep(196, 0.5)}</b>tokens" in tokens
    assert "instead of 197; 98 of 196 patches" in tokens
    assert f"the weights of {TINY} are not on this machine" in note
    assert "--pretrained downloads them" in note
    few_scores, few, tokens, _ = viewer.look("me", *request(keep=0.25))
    assert "<b>50</b>tokens" in tokens
    assert (pixels(scores) == pixels(few_scores)).all()
    changed = (pixels(kept) != pixels(few)).any(-1).reshape(14, 32, 14, 32)
    changed = changed[:, 8:24, :, 8:24].any((1, 3))  # enlarged, their borders are smooth
    assert changed.sum() == 98 - 49
    _, coarse, tokens, _ = viewer.look("me", *request(keep=0.25, rest="coarse"))
    assert re.search(r"<b>50</b>tokens.*instead of 197; 0 patches and 49 coarse", tokens)
    assert (pixels(coarse) != pixels(few)).any()
    other, *_ = viewer.look("me", *request(ranker="pixel_std"))
    assert (pixels(other) != pixels(scores)).any()


def test_time_is_measured_for_who_stays(viewer: Viewer) -> None:
    viewer.look("me", *request())
    speed_up, took = viewer.measure("me", *request()) or ("", "")
    assert re.search(r"<b>\d+\.\d\d×</b>speed-up<p>ranking included; quartiles [\d.]+ to", speed_up)
    assert re.search(r"<b>[\d.]+</b>ms for this image<p>instead of [\d.]+ ms; median of 2", took)
    assert viewer.measure("me", *request(keep=0.3)) is None  # the visitor has not seen that
    viewer.look("me", *request(keep=0.3))
    assert viewer.measure("me", *request()) is None  # the visitor has moved on


def test_visitors_of_long_ago_are_forgotten(
    viewer: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "MOST_VISITORS", 2)
    for visitor in ("first", "second", "first", "third"):
        viewer.look(visitor, *request())
    assert list(viewer._latest)[-2:] == ["first", "third"]
    assert "second" not in viewer._latest


def test_who_moves_on_meanwhile_gets_no_old_time(
    viewer: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*args: Any, **kwargs: Any) -> Any:
        viewer._latest["me"] = request(keep=0.1)
        return real(*args, **kwargs)

    real = app.compare
    viewer.look("me", *request())
    monkeypatch.setattr(app, "compare", compare)
    assert viewer.measure("me", *request()) is None


def test_requests_take_turns(viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time: two threads in one model would also be an error."""
    running, most, found = [0], [0], []

    def compare(*args: Any, **kwargs: Any) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.05)
        running[0] -= 1
        return real(*args, **kwargs)

    def visit(name: str) -> None:
        viewer.look(name, *request())
        found.append(viewer.measure(name, *request()))

    real = app.compare
    monkeypatch.setattr(app, "compare", compare)
    threads = [threading.Thread(target=visit, args=(str(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert None not in found
    assert most == [1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"photo": None}, "Choose a photo"),
        ({"photo": "text.png"}, "text.png: is not an image in a known format."),
        ({"photo": "gone.png"}, "gone.png: No such file"),
        ({"photo": "strip.png"}, "over 50 times longer than wide"),
        ({"name": "resnet10t"}, "cannot drop patches from ResNet"),
        ({"name": "vit_tiny_patch16_24"}, "did you mean vit_tiny_patch16_224"),
        ({"name": None}, "backbone &#x27;&#x27; is unknown"),
        ({"name": "local-dir:/etc"}, "start ltrp-timm app --model local-dir:/etc"),
        ({"name": "<b>x</b>"}, "&lt;b&gt;x&lt;/b&gt;"),
        ({"rest": "coarse", "selection": "mixed"}, "selection must be top or random"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    viewer: Viewer, changes: dict[str, Any], sentence: str
) -> None:
    scores, kept, tokens, note = viewer.look("me", *request(**changes))
    assert (scores, kept, tokens) == (None, None, "")
    assert sentence in note
    assert "<" not in note
    assert viewer.measure("me", *request(**changes)) is None


def test_a_model_of_ones_own_with_its_ranker_and_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(TINY, img_size=64, depth=1, num_classes=2)
    torch.nn.init.normal_(vit.head.weight)
    model = drop_patches(vit.eval(), "gradient", keep_ratio=0.5)
    names = {"num_classes": 2, "label_names": ["<cat>", "dog"]}
    model.pretrained_cfg = {**model.pretrained_cfg, **names}
    save_pretrained(model, tmp_path / "mine")
    name = "local-dir:mine"
    viewer = Viewer(AppOptions(model=[name]))
    assert viewer.names == [name, *BACKBONES]
    assert viewer.rankers()[0] == OWN
    own, *_, classes = viewer.look("me", *request(name=name, ranker=OWN))
    same, *_ = viewer.look("me", *request(name=name, ranker="gradient"))
    assert own is not None
    assert same is not None
    assert own.tobytes() == same.tobytes()
    for changes in ({"ranker": OWN, "rest": "coarse"}, {"ranker": "centre"}):
        *_, others = viewer.look("me", *request(name=name, **changes))
        assert "&lt;cat&gt;" in others
    rows = re.findall(r"value=([\d.]+)></progress> (\d+)% (&lt;cat&gt;|dog)", classes)
    assert len(rows) == 4  # two of the full, two of the pruned model
    assert sum(float(share) for share, *_ in rows) == pytest.approx(2, abs=1e-3)
    with torch.inference_mode():
        x = app.to_tensor(Image.open("a.png"), model)
        likely = [float(net(x).softmax(-1).max()) for net in (model.backbone, model)]
    assert [float(rows[0][0]), float(rows[2][0])] == pytest.approx(likely, abs=1e-3)


def test_rankers_on_offer_have_weights_or_need_none() -> None:
    offered = Viewer(AppOptions()).rankers()
    assert {"border", "contrast", "conv", "random"} <= set(offered)
    assert not {"vit_small", "attention", OWN} & set(offered)
    with_hub = set(Viewer(AppOptions(pretrained=True)).rankers())
    assert with_hub - set(offered) == {"attention", "cam", "grad_cam", "feature_contrast"}
    assert set(list_rankers()) - with_hub == {"vit_tiny", "vit_small", "vit_base"}


def test_a_ranker_in_the_package_has_its_weights(viewer: Viewer) -> None:
    scores, *_ = viewer.look("me", *request(ranker="conv"))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        again, *_ = Viewer(AppOptions()).look("me", *request(ranker="conv"))
    assert (pixels(scores) == pixels(again)).all()


def test_weights_that_cannot_be_downloaded_are_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, pretrained: bool | None = None, **kwargs: Any) -> Any:
        if pretrained:
            raise OSError("the Hub does not answer.")
        return open_model(name, **kwargs)

    monkeypatch.setattr(app, "open_model", offline)
    scores, _, tokens, note = Viewer(AppOptions(pretrained=True)).look("me", *request())
    assert pixels(scores).any()
    assert "99" in tokens
    assert "the Hub does not answer." in note
    assert "--pretrained" not in note


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--model", "vit_tiny_patch16_24"], "did you mean"),
        (["--model", "resnet10t"], "cannot drop patches from ResNet"),
        (["--model", "local-dir:nowhere"], "nowhere"),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--port", "0"], "--port: must be a whole number from 1"),
        (["--port", "70000"], "--port must be from 1 to 65535, got 70000."),
        (
            ["--host", "8.8.8.8"],
            "cannot listen at --host 8.8.8.8: Cannot assign requested address. Use",
        ),
        (["--repeats", "0"], "--repeats: must be a whole number from 1"),
    ],
)
def test_wrong_flags_are_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    assert main(["app", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


@pytest.mark.parametrize("missing", ["gradio", "skimage"])
def test_a_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "skimage":
        monkeypatch.setitem(sys.modules, "skimage.data", None)
        monkeypatch.setattr("ltrp_timm.commands.app.require_gradio", lambda: None)
    assert main(["app"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'ltrp-timm[app]'" in line
