"""``ltrp-timm app`` in a real browser: Chromium, driven by Playwright."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.elsewhere
TINY = ("--model", "vit_tiny_patch16_224", "--repeats", "2")
APP = [sys.executable, "-m", "ltrp_timm", "app", *TINY]
PATIENCE = 180_000  # milliseconds


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from skimage import data

    folder = tmp_path_factory.mktemp("home")
    Image.fromarray(data.rocket()).save(folder / "rocket.jpg")
    Image.new("RGB", (3300, 3300)).save(folder / "large.bmp")  # 33 MB
    (folder / "text.png").write_text("text")
    return folder


def start(home: Path, *flags: str) -> subprocess.Popen[str]:
    """The command in a folder of its own, without a Hub."""
    env = {**os.environ, "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    env |= {"GRADIO_TEMP_DIR": str(home / "uploads"), "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*APP, *flags], cwd=home, env=env, **pipes)


@pytest.fixture(scope="module")
def address(home: Path) -> Iterator[str]:
    process = start(home)
    assert process.stdout is not None
    assert process.stderr is not None
    watch = threading.Timer(120, process.kill)
    watch.start()
    line = process.stdout.readline()
    watch.cancel()
    found = re.search(r"http://\S+", line)
    assert found, process.stderr.read()
    yield found[0]
    process.send_signal(signal.SIGINT)  # Ctrl-C is how a page ends
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == ""


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        hosts = []
        page.on("request", lambda request: hosts.append(request.url))
        page.goto(address)
        page.wait_for_selector("text=speed-up")
        yield page
        browser.close()
    strangers = [url for url in hosts if not url.startswith((address, "data:", "blob:"))]
    assert not strangers  # all that the page needs is on this machine


def pictures(page: Any) -> list[str]:
    """Addresses of the score map and of the kept patches; a new picture has a new one."""
    images = page.locator(".shown img")
    images.nth(1).wait_for()
    return [images.nth(number).get_attribute("src") for number in (0, 1)]


def wait_for_tokens(page: Any, count: int) -> None:
    page.wait_for_selector(f".figure:has-text('{count}tokens')")


def test_upload_a_photo_and_move_the_slider(page: Any, home: Path) -> None:
    wait_for_tokens(page, 99)
    scores, kept = pictures(page)
    page.locator("input[type=file]").first.set_input_files(home / "rocket.jpg")
    page.wait_for_function("old => document.querySelector('.shown img').src != old", arg=scores)
    page.wait_for_selector("text=speed-up")
    uploaded, uploaded_kept = pictures(page)
    assert uploaded_kept != kept
    box = page.locator("input[type=range]").bounding_box()
    start, end = (box["x"] + share * box["width"] for share in (0.47, 0.21))
    page.mouse.move(start, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(end, box["y"] + box["height"] / 2, steps=5)
    wait_for_tokens(page, 50)  # still holding it
    page.mouse.up()
    page.wait_for_selector("text=speed-up")
    assert re.search(r"\d\.\d\d×", page.inner_text(".figure >> nth=1"))
    assert re.search(r"[\d.]+ ?ms", page.inner_text(".figure >> nth=2"))
    same, fewer = pictures(page)
    assert fewer != uploaded_kept
    assert same == uploaded  # the name is a hash of what is in it
    assert "are not on this machine" in page.inner_text("body")


def test_samples_rankers_and_the_coarse_rest(page: Any) -> None:
    seen = {tuple(pictures(page))}
    page.locator("button.gallery-item").nth(1).click()
    page.wait_for_function(
        "old => document.querySelector('.shown img').src != old", arg=pictures(page)[0]
    )
    page.wait_for_selector("text=speed-up")
    seen.add(tuple(pictures(page)))
    page.get_by_label("coarse").check()
    page.wait_for_selector("text=and 33 coarse")
    page.wait_for_selector("text=speed-up")
    seen.add(tuple(pictures(page)))
    assert len(seen) == 3


def test_broken_large_and_wrong_input_is_a_sentence(page: Any, home: Path) -> None:
    upload = page.locator("input[type=file]").first
    upload.set_input_files(home / "text.png")
    page.wait_for_selector("text=text.png: is not an image in a known format.")
    assert page.locator(".shown img").count() == 0
    page.get_by_label("Remove Image").click()
    page.wait_for_selector("text=Choose a photo")
    page.locator("input[type=file]").first.set_input_files(home / "large.bmp")
    page.wait_for_selector("text=exceed the maximum allowed size")
    page.locator("button.gallery-item").nth(2).click()
    page.wait_for_selector("text=speed-up")
    for name, sentence in (("resnet50", "cannot drop patches from ResNet"), ("vit", "is unknown")):
        page.get_by_label("Backbone").fill(name)
        page.keyboard.press("Enter")
        page.wait_for_selector(f"text={sentence}")
    page.get_by_label("Backbone").fill("vit_tiny_patch16_224")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=speed-up")


def test_a_port_in_use_is_one_line(address: str, home: Path) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    process = start(home, "--port", port)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.fullmatch(rf"ltrp-timm: cannot listen at --host 127.0.0.1, --port {port}: .+\n", err)
