"""Weights over real HTTP: a small Hub on loopback, and the real client in a process of its own."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import records_arguments, small_teacher
from hub_server import Hub, digest
from safetensors.torch import load, save

from ltrp_timm import create_ranker

BACKBONE = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
PREAMBLE = """
import sys, timm, torch, ltrp_timm
from ltrp_timm import create_ranker, create_teacher, drop_patches, push_to_hub
TINY = dict(img_size=64, depth=1, num_classes=10)
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        return f"{type(error).__name__}: {text}"
    return "no error"
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def client(hub: Hub, home: Path, source: str, *args: Any, **more: str) -> list[str]:
    """Run Python with the real client against the server; returns the lines it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + source, *map(str, args)],
        env=environment(hub, home, **more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


COMMANDS = """
import contextlib, io, json, sys
from ltrp_timm.commands import main
for line in json.loads(sys.argv[1]):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main(line)
    print(json.dumps([code, out.getvalue(), errors.getvalue()]))
"""


def command(hub: Hub, home: Path, *args: Any, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ltrp_timm", *map(str, args)],
        env=environment(hub, home, **more),
        capture_output=True,
        text=True,
        check=False,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def add_ranker(
    hub: Hub, folder: Path, name: str = "me/ranker", width: int = 8, **options: Any
) -> str:
    """A conv ranker with weights of its own, as a folder and as a repository."""
    ranker = create_ranker("conv", width=width, depth=1)
    ranker.save(folder, overwrite=True)
    return hub.add(name, files_of(folder), **options)


@records_arguments
def test_pull_push_and_pull_again(hub: Hub, tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224")
    hub.add(BACKBONE, {"config.json": b"{}", "model.safetensors": save(vit.state_dict())})
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    lines = client(
        hub,
        tmp_path / "home",
        """
model = timm.create_model("ltrp_vit_tiny", pretrained=True).eval()  # the backbone's weights
model.keep_ratio = 1.0
vit = timm.create_model("vit_tiny_patch16_224").eval()
vit.load_state_dict(torch.load(sys.argv[1], weights_only=True))
big = torch.randn(1, 3, 224, 224)
print(torch.equal(model(big), vit(big)))

ranker = create_ranker("conv", width=8, depth=1)
print("has no trained weights" in error(push_to_hub, ranker, "me/ranker"))
ranker.trained = True
print(push_to_hub(ranker, "me/ranker"))
print(same(create_ranker("conv", pretrained="hf-hub:me/ranker"), ranker))

args = dict(ranker="conv", ranker_weights="hf-hub:me/ranker", keep_ratio=0.4)
model = timm.create_model("ltrp_vit_tiny", **TINY, **args, cache_dir=sys.argv[2]).eval()
print(same(model.ranker, ranker))
print(push_to_hub(model, "me/model", private=True, model_card={"license": "mit"}))
back = timm.create_model("hf-hub:me/model", pretrained=True).eval()
print(torch.equal(back(images), model(images)), back.keep_ratio)
other = timm.create_model("hf-hub:me/model", pretrained=True, keep_ratio=0.8).eval()
model.keep_ratio = 0.8
print(torch.equal(other(images), model(images)))
head = timm.create_model("hf-hub:me/model", pretrained=True, num_classes=3, in_chans=1).eval()
print(list(head(images[:, :1]).shape))
print(torch.equal(head.backbone.norm.weight, model.backbone.norm.weight))

vit = timm.create_model("vit_small_patch16_dinov3", img_size=64, depth=1, num_classes=5)
model = drop_patches(vit, "conv", ranker_weights="hf-hub:me/ranker", selection="stratified").eval()
print(push_to_hub(model, "pruned"))
back = timm.create_model("hf-hub:me/pruned", pretrained=True).eval()
print(torch.equal(back(images), model(images)), back.selection)
""",
        tmp_path / "vit.pth",
        tmp_path / "cache",
        HF_TOKEN="writer",  # noqa: S106
    )
    assert lines == [
        *("True", "True", "hf-hub:me/ranker", "True", "True", "hf-hub:me/model", "True 0.4"),
        *("True", "[2, 3]", "True", "hf-hub:me/pruned", "True stratified"),
    ]
    assert list((tmp_path / "cache").glob("models--me--ranker"))
    assert hub.repositories["me/model"].private
    assert not hub.repositories["me/ranker"].private
    stored = hub.repositories["me/model"].commits[hub.repositories["me/model"].branches["main"]]
    assert set(stored) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    card = stored["README.md"].decode()
    assert "license: mit" in card
    assert 'timm.create_model("hf-hub:me/model", pretrained=True)' in card
    assert json.loads(stored["config.json"])["model_args"]["keep_ratio"] == 0.4
    assert "authorization" in hub.asked("HEAD", "me/model/resolve")[0]
    assert all("authorization" not in headers for headers in hub.asked("GET", "/cdn/"))


def add_sharded_and_pickled(hub: Hub, folder: Path) -> None:
    """A saved ranker in the other layouts; only what is read is downloaded of them."""
    content = files_of(folder)
    config, state = {"config.json": content["config.json"]}, load(content["model.safetensors"])
    names = sorted(state)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    places = {name: file for file, part in parts.items() for name in part}
    shards = {file: save({name: state[name] for name in part}) for file, part in parts.items()}
    index = {"model.safetensors.index.json": json.dumps({"weight_map": places}).encode()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    pickled, other = {"pytorch_model.bin": buffer.getvalue()}, {"tf_model.bin": b"x" * 1000}
    hub.add("me/sharded", {**config, **shards, **index, **pickled, **other})
    hub.add("me/pickled", {**config, **pickled, **other})


def test_revisions_layouts_teacher_and_offline(hub: Hub, tmp_path: Path) -> None:
    first = add_ranker(hub, tmp_path / "first")
    hub.repositories["me/ranker"].branches["v1"] = first
    add_ranker(hub, tmp_path / "second")
    add_sharded_and_pickled(hub, tmp_path / "second")
    small_teacher().save(tmp_path / "mae")
    hub.add("facebook/vit-mae-base", files_of(tmp_path / "mae"))
    source = """
folder = sys.argv[1]
ranker = create_ranker("conv", pretrained="hf-hub:me/ranker")
print(same(ranker, create_ranker("conv", pretrained=f"{folder}/second")))
for revision in ("v1", sys.argv[2]):
    ranker = create_ranker("conv", pretrained=f"hf-hub:me/ranker@{revision}")
    print(same(ranker, create_ranker("conv", pretrained=f"{folder}/first")))
for name in ("sharded", "pickled"):
    ranker = create_ranker("conv", pretrained=f"hf-hub:me/{name}")
    print(same(ranker, create_ranker("conv", pretrained=f"{folder}/second")))
for name in ("facebook/vit-mae-base", "hf-hub:facebook/vit-mae-base@main"):
    print(same(create_teacher(name), create_teacher(f"{folder}/mae")))
"""
    home = tmp_path / "home"
    assert client(hub, home, source, tmp_path, first) == ["True"] * 7
    downloads = len(hub.asked("GET", "/cdn/"))
    assert downloads == 6  # two revisions, two shards, a pickle, a teacher; nothing twice
    asked = len(hub.log)
    offline = source + 'print(error(create_ranker, "conv", pretrained="hf-hub:me/other@v2"))\n'
    lines = client(hub, home, offline, tmp_path, first, HF_HUB_OFFLINE="1")
    assert lines == [
        *["True"] * 7,
        "FileNotFoundError: me/other@v2 is not in the cache and HF_HUB_OFFLINE is set: unset it "
        "once to download.",
    ]
    assert len(hub.log) == asked
    # a dead network with a warm cache: as huggingface_hub, go on with what is there
    with Hub() as other:
        dead = other.endpoint
    lines = client(hub, home, source, tmp_path, first, HF_ENDPOINT=dead)
    assert lines == ["True"] * 7


def test_errors_are_one_sentence(hub: Hub, tmp_path: Path) -> None:
    add_ranker(hub, tmp_path / "ranker")
    add_ranker(hub, tmp_path / "ranker", "me/hidden", private=True)
    add_ranker(hub, tmp_path / "ranker", "me/gated", gated=True)
    hub.add("me/empty", {"config.json": b"{}"})
    hub.add("me/whole", {**files_of(tmp_path / "ranker"), "config.json": b'{"architecture": "x"}'})
    hub.fault("repos/create", "POST", times=1, status=500)
    hub.fault("repos/create", "POST", times=1, status=429, headers={"Retry-After": "7"})
    lines = client(
        hub,
        tmp_path / "home",
        """
names = ("none", "ranker@v9", "hidden", "gated", "empty", "whole")
for name in (*(f"me/{name}" for name in names), "me", "../a/b"):
    print(error(create_ranker, "conv", pretrained=f"hf-hub:{name}"))
print(error(create_ranker, "conv", pretrained="hf-hub:me/hidden", token="wrong"))
print(error(create_ranker, "conv", pretrained="hf-hub:me/hidden", token="reader"))
print(error(create_teacher, "me/none"))
print(error(timm.create_model, "ltrp_vit_tiny", pretrained=True))
name = "vit_tiny_patch16_224.augreg_in21k"
print(error(timm.create_model, "ltrp", backbone=name, pretrained=True))
vit = timm.create_model("vit_tiny_patch16_224", **TINY)
print(error(drop_patches, vit, "conv", ranker_weights="hf-hub:me/none"))
ranker = create_ranker("conv", pretrained="hf-hub:me/ranker")
for token in ("writer", "writer", "wrong", "writer"):
    print(error(push_to_hub, ranker, "me/ranker", token=token))
print(error(push_to_hub, ranker, "me/ranker", token="reader", overwrite=True))
print(error(push_to_hub, ranker, "me/ranker", token="writer", overwrite=True))
print(error(push_to_hub, ranker, "me/ranker", token="writer", revision="v2"))
print(error(push_to_hub, ranker, "somebody/else", token="writer"))
print(error(push_to_hub, ranker, "me/new"))
""",
    )
    shows = "FileNotFoundError: the Hub shows no repository {}: check the name, or set HF_TOKEN or "
    shows += "run `hf auth login` if it is private."
    refused = "PermissionError: the Hub wants a valid token for {} (401): set HF_TOKEN or "
    refused += "run `hf auth login`."
    login = "then set HF_TOKEN or run `hf auth login`."
    right = "PermissionError: the token lacks the right to do this with {} (403): use one that has "
    right += "it (https://huggingface.co/settings/tokens)."
    name = "ValueError: a repository is hf-hub:owner/name[@revision], got 'hf-hub:{}'."
    assert lines == [
        shows.format("me/none"),
        "FileNotFoundError: me/ranker has no revision 'v9': name a branch, tag or commit.",
        shows.format("me/hidden"),
        f"PermissionError: me/gated is gated: accept its terms at {hub.endpoint}/me/gated, {login}",
        "FileNotFoundError: me/empty on the Hub holds no model.safetensors or "
        "model.safetensors.index.json or pytorch_model.bin: check its name.",
        "ValueError: hf-hub:me/whole holds a whole model, not a conv ranker alone.",
        name.format("me"),
        name.format("../a/b"),
        refused.format("me/hidden"),
        "no error",
        "FileNotFoundError: me/none is no local path, and as a repository: "
        + shows.format("me/none").removeprefix("FileNotFoundError: "),
        shows.format(BACKBONE),
        shows.format("timm/vit_tiny_patch16_224.augreg_in21k"),
        shows.format("me/none"),
        "ConnectionError: the Hub has an internal error for me/ranker (500): try again later.",
        "ConnectionError: the Hub is busy with requests for me/ranker (429): try again in 7 s.",
        refused.format("me/ranker"),
        "FileExistsError: me/ranker already holds config.json and model.safetensors; pass "
        "overwrite=True (--overwrite) to replace.",
        right.format("me/ranker"),
        "no error",
        "no error",
        right.format("somebody/else"),
        refused.format("me/new"),
    ]


def test_a_broken_download_is_resumed_and_a_busy_hub_asked_again(hub: Hub, tmp_path: Path) -> None:
    add_ranker(hub, tmp_path / "ranker", width=1100)  # the client writes chunks of 10 MiB
    hub.fault("/cdn/", times=2, cut=True)
    hub.fault(r"resolve/\w+/config.json", "HEAD", times=2, status=429, headers={"Retry-After": "0"})
    add_ranker(hub, tmp_path / "other", "me/other")
    other = digest((tmp_path / "other" / "model.safetensors").read_bytes())
    hub.fault(f"/cdn/{other}", times=1, status=500)
    source = """
def compare(name):
    ranker = create_ranker("conv", pretrained=f"hf-hub:me/{name}")
    print(same(ranker, create_ranker("conv", pretrained=f"{sys.argv[1]}/{name}")))
compare("ranker")
print(error(compare, "other"))
compare("other")
"""
    assert client(hub, tmp_path / "home", source, tmp_path) == [
        "True",
        "ConnectionError: the Hub has an internal error for me/other (500): try again later.",
        "True",
    ]
    ranges = [headers.get("range") for headers in hub.asked("GET", f"/cdn/(?!{other})")]
    assert ranges == [None, f"bytes={20 * 2**20}-", f"bytes={30 * 2**20}-"]
    assert len(hub.asked("HEAD", r"me/ranker/resolve/\w+/config.json")) == 3
    assert not list((tmp_path / "home").rglob("*incomplete*"))


@pytest.mark.slow
def test_a_hub_that_stays_broken(hub: Hub, tmp_path: Path) -> None:
    """Half a minute each: the client has patience."""
    add_ranker(hub, tmp_path / "ranker")
    hub.fault("/cdn/", times=100, cut=True)
    source = 'print(error(create_ranker, "conv", pretrained="hf-hub:me/ranker"))\n'
    home = tmp_path / "home"
    assert client(hub, home, source)[0].startswith(
        "ConnectionError: the transfer of me/ranker broke off and left no partial file"
    )
    assert not list(home.rglob("*incomplete*"))
    hub.fault("resolve", "HEAD", times=100, status=503)
    assert client(hub, tmp_path / "new", source) == [
        "ConnectionError: the Hub has an internal error for me/ranker (503): try again later."
    ]
    with Hub() as other:
        dead = other.endpoint
    assert client(hub, tmp_path / "new", source, HF_ENDPOINT=dead) == [
        f"ConnectionError: the Hub at {dead} cannot be reached for me/ranker: check the "
        "connection, or set HF_HUB_OFFLINE=1 to use what is in the cache."
    ]


@pytest.mark.slow
@records_arguments
def test_save_and_push_on_the_command_line(hub: Hub, tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=4)
    torch.save({"state_dict": vit.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    home, folder = tmp_path / "home", tmp_path / "model"
    save_it = ("save", "ltrp_vit_tiny", "-o", folder, "--overwrite", "--num-classes", 4)
    save_it += ("--license", "mit")
    done = command(hub, home, *save_it, "--checkpoint", tmp_path / "last.pth.tar")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"{folder}: config.json, model.safetensors, README.md",
        f"backbone weights: read from {tmp_path / 'last.pth.tar'}",
        "The card has no training data; add it with --training-data.",
    ]
    done = command(hub, home, "push", folder, "--repo-id", "me/model", "--token", "writer")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hf-hub:me/model\n", "")
    pushed = hub.repositories["me/model"].commits[hub.repositories["me/model"].branches["main"]]
    assert 'create_model("hf-hub:me/model"' in pushed["README.md"].decode()
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    twin = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(twin.backbone.head.weight, vit.head.weight)
    refused = (
        (("push", folder, "--repo-id", "me/model"), "me/model already holds config.json and"),
        (("push", folder, "--repo-id", "me/new"), "wants a valid token for me/new (401)"),
        (("push", folder, "--repo-id", "../x"), "cannot name a repository"),
        ((*save_it, "--pretrained"), "the Hub shows no repository timm/vit_tiny_patch16_224"),
        (save_it, "save needs weights: either --pretrained or --checkpoint FILE"),
        (
            (*save_it[:5], "--num-classes", 5, "--checkpoint", tmp_path / "last.pth.tar"),
            "fit the model: mismatched backbone.head",
        ),
        (("push", tmp_path / "no", "--repo-id", "me/x"), "holds no config.json and no model"),
    )
    lines = json.dumps([list(map(str, args)) for args, _ in refused])
    for (_, message), found in zip(refused, client(hub, home, COMMANDS, lines), strict=True):
        code, out, errors = json.loads(found)
        assert (code, out) == (2, "")
        assert message in errors
        assert len(errors.splitlines()) == 1
