"""Broken and malicious files: a clear error, nothing runs, nothing wrong is loaded."""

import argparse
import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL_MAE, records_arguments, small_teacher
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_convert import script as convert_ltrp
from torch import Tensor

from ltrp_timm import create_ranker, create_teacher, save_pretrained
from ltrp_timm.rankers.vit import VitRanker
from ltrp_timm.train.folder import read_state
from ltrp_timm.weights.files import read_weights
from ltrp_timm.weights.untrusted import MAX_BYTES

RANKER = {"width": 8, "depth": 1}
MODEL = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2, "num_classes": 3}
# what a reader may say; anything else is a hole
ERRORS = (ValueError, TypeError, RuntimeError, FileNotFoundError)
AMOUNTS = [200, pytest.param(2000, marks=pytest.mark.slow)]


def tries(amount: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=amount,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with a bit flipped, cut short, grown, or with a stretch overwritten."""
    near_start = st.integers(0, min(len(content), 1200) - 1)  # headers are worth more tries
    place = draw(st.one_of(near_start, st.integers(0, len(content) - 1)))
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "overwrite", "header size"]))
    noise = draw(st.binary(min_size=1, max_size=12))
    if kind == "flip":
        flipped = content[place] ^ (1 << draw(st.integers(0, 7)))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "insert":
        return content[:place] + noise + content[place:]
    if kind == "overwrite":
        return content[:place] + noise + content[place + len(noise) :]
    return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + content[8:]


nasty = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 65536, 10**6]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "../../etc/passwd",
            "/etc/passwd",
            "hf-hub:a/b",
            "local-dir:/",
            "C:\\x",
            "__import__('os')",
        ]
    ),
    st.lists(st.integers(-3, 10**7), max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)


@st.composite
def changed(draw: st.DrawFn, config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The configuration with one to three places replaced, removed or added."""
    out = json.loads(json.dumps(config))
    for _ in range(draw(st.integers(1, 3))):
        at = out
        while True:
            inner = [name for name, value in at.items() if isinstance(value, dict)]
            if not inner or draw(st.booleans()):
                break
            at = at[draw(st.sampled_from(sorted(inner)))]
        name = draw(st.sampled_from(sorted({*at, *names})))
        if draw(st.integers(0, 4)) == 0:
            at.pop(name, None)
        else:
            at[name] = draw(nasty)
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_damaged_safetensors_are_never_loaded_as_something_else(
    amount: int, tmp_path: Path
) -> None:
    ranker = create_ranker("conv", **RANKER)
    ranker.save(tmp_path)
    path, expected = tmp_path / "model.safetensors", ranker.state_dict()
    content, refused = path.read_bytes(), []

    @tries(amount)
    @given(damaged(content))
    def attack(broken: bytes) -> None:
        path.write_bytes(broken)
        for source in (tmp_path, path):
            try:
                loaded = create_ranker("conv", pretrained=source, **RANKER)
            except ERRORS as error:
                refused.append(str(error))
            else:
                assert same(loaded.state_dict(), expected)

    attack()
    assert len(refused) > amount
    assert any("is damaged: its content is not what was saved" in text for text in refused)
    assert any("cannot be read as a safetensors file" in text for text in refused)
    path.write_bytes(content)
    assert same(create_ranker("conv", pretrained=path).state_dict(), expected)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_damaged_pickles_run_nothing(amount: int, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    weights = create_ranker("conv", **RANKER).state_dict()
    torch.save({"model": weights, "args": argparse.Namespace(lr=1.0)}, buffer)
    path, refused = tmp_path / "model.pth", []

    @tries(amount)
    @given(damaged(buffer.getvalue()))
    def attack(broken: bytes) -> None:
        path.write_bytes(broken)
        try:
            found = read_weights(path).tensors
        except ERRORS as error:
            refused.append(str(error))
        else:
            assert all(isinstance(tensor, Tensor) for tensor in found.values())

    attack()
    assert len(refused) > amount // 4
    path.write_bytes(buffer.getvalue())
    assert same(read_weights(path).tensors, weights)


@pytest.mark.parametrize("kind", ["ranker", "teacher"])
@pytest.mark.parametrize("amount", AMOUNTS)
def test_hostile_configurations(amount: int, kind: str, tmp_path: Path) -> None:
    saved = create_ranker("conv", **RANKER) if kind == "ranker" else small_teacher()
    saved.save(tmp_path)
    file = tmp_path / "config.json"
    text, refused = file.read_text(), []
    names = ["device", "dtype", "model_type", "auto_map", "depth", "generator", "frozen", "mean"]

    def read() -> Any:
        if kind == "ranker":
            return create_ranker("conv", pretrained=tmp_path)
        return create_teacher(tmp_path)

    @tries(amount // 2)
    @given(changed(json.loads(text), names))
    def attack(config: dict[str, Any]) -> None:
        file.write_text(json.dumps(config))
        try:
            model = read()
        except ERRORS as error:
            refused.append(str(error))
        else:
            assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
            assert all(isinstance(value, (int, float)) for value in [*model.mean, *model.std])
            if kind == "ranker":
                model(torch.zeros(1, model.in_chans, 32, 32))

    attack()
    assert len(refused) > amount // 8
    file.write_text(text)
    assert same(read().state_dict(), saved.state_dict())


@records_arguments
@pytest.mark.parametrize("amount", AMOUNTS)
def test_hostile_configurations_of_whole_models(amount: int, tmp_path: Path) -> None:
    """They reach us through timm, whose own reader has its own words for what is no layout."""
    ranker = create_ranker("conv", **RANKER)
    ranker.trained = True
    model = timm.create_model("ltrp", backbone="vit_tiny_patch16_224", ranker=ranker, **MODEL)
    save_pretrained(model, tmp_path)
    file = tmp_path / "config.json"
    config, refused = json.loads(file.read_text()), []
    names = [
        *("ranker_weights", "checkpoint_path", "backbone", "cache_dir", "custom_load", "depth"),
        *("hf_hub_filename", "input_size", "num_classes", "url", "file", "embed_dim", "img_size"),
    ]
    parts = {name: config[name] for name in ("model_args", "pretrained_cfg")}

    @tries(amount // 2)
    @given(changed(parts, names))
    def attack(broken: dict[str, Any]) -> None:
        file.write_text(json.dumps({**config, **broken}))
        try:
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        except (*ERRORS, AttributeError, KeyError, AssertionError) as error:
            refused.append(str(error))

    attack()
    assert len(refused) > amount // 8
    file.write_text(json.dumps(config))
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


LAYOUTS = ("stage 1", "stage 2", "mae")
_ODD_TENSORS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.tensor(1.0),
    "empty": lambda: torch.zeros(0, 3, 8, 8),
    "long": lambda: torch.zeros(1, 1000, 1),
    "negative": lambda: torch.full((16, 3, 8, 8), -torch.inf),
    "whole numbers": lambda: torch.zeros(16, 16, dtype=torch.int64),
    "complex": lambda: torch.zeros(16, 16, dtype=torch.complex64),
    "sparse": lambda: torch.eye(16).to_sparse(),
    "without data": lambda: torch.zeros(16, 16, device="meta"),
    "a view": lambda: torch.zeros(1).expand(2**20, 2**20),
    "a long view": lambda: torch.zeros(1).expand(1, 2**40 + 1, 16),
    "a deep view": lambda: torch.zeros(1).expand(16, 3, 2**20, 2**20),
}
_ODD_NAMES = [
    *("blocks.99999999.norm1.weight", "blocks.1023.norm1.weight", "blocks.٣.norm1.weight", "", "."),
    *(
        "head.weight",
        "pos_embed.x",
        "mim.pos_embed",
        "score_net.",
        "../../x",
        "decoder_embed.weight",
    ),
    *("mim.decoder_blocks.500.attn.qkv.weight", "score_net.blocks.-1.x", "vit.layernorm.weight"),
    *("norm.weight", "fc_norm.weight", "embeddings.cls_token", "backbone.x", "module.x"),
]


def other_layout(layout: str) -> dict[str, Tensor]:
    """Small weights in one of the authors' layouts."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    if layout == "stage 2":
        vit = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=3)
        return dict(vit.state_dict())
    mae = small_teacher(depth=1, decoder_depth=1).state_dict()
    if layout == "mae":
        return dict(mae)
    ranker = VitRanker(**sizes).state_dict()
    inner = {f"mim.{name}": tensor for name, tensor in mae.items()}
    return inner | {f"score_net.{name}": tensor for name, tensor in ranker.items()}


def read_all(path: Path, layout: str, folder: Path) -> None:
    """Read a file, or convert it: what is written must load, and refused files leave nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    if layout == "stage 2":
        try:
            convert_ltrp.convert(path, folder, "contrast", num_heads=2)
        except ERRORS:
            assert not folder.exists()
            raise
        timm.create_model(f"local-dir:{folder}", pretrained=True)
        return
    if layout == "stage 1":
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        create_ranker("vit_small", pretrained=path, **sizes)
    create_teacher(path, num_heads=4, decoder_num_heads=3)


@records_arguments
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amount", AMOUNTS)
def test_damaged_checkpoints_are_read_whole_or_not_at_all(
    amount: int, layout: str, tmp_path: Path
) -> None:
    buffer, refused = io.BytesIO(), []
    torch.save({"model": other_layout(layout), "args": argparse.Namespace(lr=1.0)}, buffer)
    path = tmp_path / "model.pth"

    @tries(amount // 2)
    @given(damaged(buffer.getvalue()))
    def attack(broken: bytes) -> None:
        path.write_bytes(broken)
        try:
            read_all(path, layout, tmp_path / "new")
        except ERRORS as error:
            refused.append(str(error))

    attack()
    assert len(refused) > amount // 16
    path.write_bytes(buffer.getvalue())
    read_all(path, layout, tmp_path / "new")


@st.composite
def disguised(draw: st.DrawFn, names: list[str]) -> list[tuple[str, str]]:
    """One to three places of a state dict, and what becomes of each."""
    actions = st.sampled_from(["drop", *_ODD_TENSORS, *(f"name {name}" for name in _ODD_NAMES)])
    return draw(st.lists(st.tuples(st.sampled_from(names), actions), min_size=1, max_size=3))


@records_arguments
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("amount", AMOUNTS)
def test_hostile_checkpoints_are_read_whole_or_not_at_all(
    amount: int, layout: str, tmp_path: Path
) -> None:
    """Names, shapes, kinds of tensors and training arguments that no training would leave."""
    weights, path, refused = other_layout(layout), tmp_path / "model.pth", []
    told = st.sampled_from(["num_heads", "mim_num_heads", "score_net", "norm_pix_loss", "x"])

    @tries(amount // 2)
    @given(disguised(sorted(weights)), st.dictionaries(told, nasty, max_size=2))
    def attack(changes: list[tuple[str, str]], args: dict[str, Any]) -> None:
        model = dict(weights)
        for name, action in changes:
            tensor = model.pop(name, torch.zeros(1))
            if action.startswith("name "):
                model[action[5:]] = tensor
            elif action != "drop":
                model[name] = _ODD_TENSORS[action]()
        torch.save({"model": model, "args": argparse.Namespace(**args)}, path)
        try:
            read_all(path, layout, tmp_path / "new")
        except ERRORS as error:
            refused.append(str(error))

    attack()
    assert len(refused) > amount // 4
    assert any("missing  " in text for text in refused)


class Trap:
    """Makes a folder when it is unpickled by a reader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def malicious(kind: str, target: Path, path: Path) -> None:
    """A file whose weights are a trap."""
    weights = create_ranker("conv", **RANKER).state_dict()
    content = {"model": weights, "trap": Trap(target)}
    if kind == "zip":
        torch.save(content, path)
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "in a namespace":
        torch.save({"model": weights, "args": argparse.Namespace(x=Trap(target))}, path)
    else:  # the words of an old protocol, in the place of torch's own pickle
        torch.save(weights, path)
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        code = f"c{os.mkdir.__module__}\nmkdir\n(S'{target}'\ntR."
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, code.encode() if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    "kind", ["zip", "legacy", "plain pickle", "in a namespace", "old protocol"]
)
def test_malicious_pickles_run_nothing(kind: str, tmp_path: Path) -> None:
    target, folder = tmp_path / "ran", tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"ranker": "conv", "args": RANKER}))
    malicious(kind, target, folder / "pytorch_model.bin")
    shutil.copy(folder / "pytorch_model.bin", tmp_path / "weights.pth")
    for source in (folder, tmp_path / "weights.pth"):
        with pytest.raises(ValueError, match="cannot be read as a pickle of weights only"):
            create_ranker("conv", pretrained=source, **RANKER)
        with pytest.raises(ValueError, match="cannot be read as a pickle of weights only"):
            create_teacher(source)
        with pytest.raises(ValueError, match="cannot be read as a pickle of weights only"):
            convert_ltrp.convert(source, tmp_path / "converted", "contrast")
    assert not target.exists()
    if kind != "plain pickle":
        torch.load(tmp_path / "weights.pth", weights_only=False)  # the trap does work
        assert target.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def rewritten(path: Path, records: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    """Write weights again, with other contents for some of the records of their archive."""
    torch.save({"weight": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name, records.get(name.partition("/")[2], data))


BIG = 2**26


def deflated(path: Path) -> None:
    rewritten(path, {"data/0": bytes(BIG)}, zipfile.ZIP_DEFLATED)


def long_pickle(path: Path) -> None:
    rewritten(path, {"data.pkl": bytes(BIG)}, zipfile.ZIP_DEFLATED)


def claim(module: str) -> bytes:
    return f"c{module}\nbytearray\n".encode() + b"J" + struct.pack("<i", BIG) + b"\x85R."


def grows_when_unpickled(path: Path) -> None:
    rewritten(path, {"data.pkl": b"\x80\x02" + claim("builtins")})


def grows_in_an_old_file(path: Path) -> None:
    torch.save({}, path, _use_new_zipfile_serialization=False)
    content, empty = path.read_bytes(), pickle.dumps({}, protocol=2)[:-1]
    start = content.rindex(empty)
    path.write_bytes(content[:start] + b"\x80\x02" + claim("__builtin__") + content[start:])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (deflated, r"it has \d+ bytes but unpacks to 67\d+\.$"),
        (long_pickle, r"it has \d+ bytes but unpacks to 67\d+\.$"),
        (grows_when_unpickled, "it holds a bytearray, which could have any size"),
        (grows_in_an_old_file, "it holds a bytearray, which could have any size"),
    ],
)
@pytest.mark.parametrize("reader", [read_weights, read_state])
def test_a_small_file_takes_little_memory(
    reader: Callable[[Path], Any], write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.pth"
    write(path)
    assert path.stat().st_size < 2**18
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BIG // 2, hard))
    try:
        with pytest.raises(ValueError, match=message):
            reader(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def no_weights(kind: str, path: Path) -> None:
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a module":
        torch.save(torch.nn.Linear(1, 1), path)
    elif kind == "an array":
        torch.save({"weight": torch.zeros(1), "x": np.zeros(1)}, path)
    elif kind == "cut short":
        torch.save({"weight": torch.zeros(99)}, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    else:
        path.write_text("" if kind == "empty" else "<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a pipe", "is not a regular file."),
        ("a module", "it holds torch.nn.modules.linear.Linear, which is no tensor or number; save"),
        (
            "an array",
            "multiarray._reconstruct, which is no tensor or number; save the",
        ),
        ("cut short", "it is damaged or cut short."),
        ("TorchScript", "it is a TorchScript program."),
        ("empty", "it is empty."),
        ("a web page", "it was not written by torch.save."),
    ],
)
def test_what_is_no_file_of_weights(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    no_weights(kind, path)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_weights(path)
    text = str(caught.value)
    assert text.isprintable()  # torch's colours are not
    assert text.endswith(".")
    assert len(text.removeprefix(str(path))) < 150


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"args": [1]}, "the saved arguments in .* must be a JSON object, got list"),
        (
            {"args": {"trust_remote_code": True}},
            "must not set 'trust_remote_code'; known are border_distances, depth",
        ),
        ({"args": {**RANKER, "device": "cuda"}}, "must not set 'device'"),
        ({"args": {**RANKER, "mean": "abc"}}, "sets 'mean' to 'abc': refused"),
        ({"args": {**RANKER, "std": [0.2, 0.0, 0.2]}}, "sets 'std' to .*: refused"),
        ({"args": {**RANKER, "width": 10**12}}, "sets 'width' to 1000000000000: refused"),
        ({"args": {**RANKER, "width": 10**8}}, r"a model of \d+ GiB; its weights have 0.0"),
        ({"args": {**RANKER, "in_chans": 10**7}}, r"a model of \d+ GiB; its weights have 0.0"),
        ({"args": {**RANKER, "depth": 10**6}}, "sets 'depth' to 1000000: refused"),
        ({"args": {**RANKER, "mean": "../../x"}}, "sets 'mean' to '../../x': refused"),
        ({"args": {**RANKER, "mean": [float("nan")] * 3}}, r"sets 'mean' to \[nan, nan, nan\]"),
        ({"ranker": None}, r"[^ ]+ holds no ranker\.$"),
        ({"ranker": "/etc/passwd"}, "holds a '/etc/passwd' ranker, not 'conv'"),
    ],
)
def test_what_a_ranker_may_not_say(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    create_ranker("conv", **RANKER).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        create_ranker("conv", pretrained=tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, "{", "[]", '{"a": ' * 10**5, "\x00", ""])
def test_what_is_no_configuration(tmp_path: Path, text: str) -> None:
    create_ranker("conv", **RANKER).save(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"the configuration in .*config\.json (is not|must be)"):
        create_ranker("conv", pretrained=tmp_path)
    (tmp_path / "config.json").write_text(" " * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match=f"has {MAX_BYTES + 1} bytes, more than {MAX_BYTES}"):
        create_ranker("conv", pretrained=tmp_path)


@records_arguments
@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model_args", {"ranker_weights": "/etc/passwd"}, "must not set 'ranker_weights'"),
        ("model_args", {"ranker_weights": "hf-hub:a/b"}, "must not set 'ranker_weights'"),
        ("model_args", {"checkpoint_path": "x.pth"}, "must not set 'checkpoint_path'"),
        ("model_args", {"backbone": "local-dir:/tmp"}, "sets 'backbone' to 'local-dir:/tmp'"),
        ("model_args", {"backbone": "hf-hub:a/b"}, "sets 'backbone' to 'hf-hub:a/b'"),
        ("model_args", {"depth": 10**6}, "sets 'depth' to 1000000"),
        ("model_args", {"embed_dim": 2**22}, "describes a model of [0-9]+ GiB"),
        ("model_args", {"ranker_args": {"width": 10**7}}, "describes a model of [0-9]+ GiB"),
        ("model_args", {"selection_args": {"a": "../x"}}, "sets 'selection_args' to"),
        ("pretrained_cfg", {"custom_load": "hf"}, "must not set 'custom_load'"),
        ("pretrained_cfg", {"hf_hub_filename": "x.pth"}, "must not set 'hf_hub_filename'"),
        ("pretrained_cfg", {"input_size": "x"}, "input_size in .* must be three sizes, got 'x'"),
        ("pretrained_cfg", {"first_conv": "../x"}, "sets 'first_conv' to '../x': refused"),
    ],
)
def test_what_a_model_may_not_say(
    tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    ranker = create_ranker("conv", **RANKER)
    ranker.trained = True
    model = timm.create_model("ltrp", backbone="vit_tiny_patch16_224", ranker=ranker, **MODEL)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[part] = {**config[part], **changes}
    if "input_size" in changes:
        del config["model_args"]["img_size"], config["model_args"]["in_chans"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for pretrained in (False, True):
        with pytest.raises(ValueError, match=message):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=pretrained)


@pytest.mark.parametrize(
    "odd",
    [
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: torch.empty_like(tensor, device="meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # torch thinks aloud
def test_what_is_no_plain_tensor(tmp_path: Path, odd: Callable[[Tensor], Tensor]) -> None:
    """Names and shapes fit, but there are no real numbers to load, or other ones."""
    weights = create_ranker("conv", **RANKER).state_dict()
    name = next(iter(weights))
    weights[name] = odd(weights[name])
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=f"holds tensors that are not plain weights: {name}"):
        create_ranker("conv", pretrained=tmp_path / "odd.pth", **RANKER)


def test_a_teacher_of_gigantic_shapes(tmp_path: Path) -> None:
    """Without a configuration shapes tell the sizes: of few numbers a model of very many."""
    weights = small_teacher().state_dict()
    heads = {"num_heads": SMALL_MAE["num_heads"], "decoder_num_heads": 1}
    wide = {**weights, "patch_embed.proj.weight": torch.zeros(2**17, 3, 1, 1)}
    torch.save(wide, tmp_path / "huge.pth")
    assert (tmp_path / "huge.pth").stat().st_size < 10**7
    with pytest.raises(ValueError, match=r"describes a model of \d+ GiB; its weights have 0\.0\."):
        create_teacher(tmp_path / "huge.pth", **heads)
    weights["decoder_embed.weight"] = torch.zeros(1).expand(2**20, 2**20)
    torch.save(weights, tmp_path / "view.pth")  # a view of one number has any shape
    assert (tmp_path / "view.pth").stat().st_size < 10**6
    with pytest.raises(ValueError, match="are not plain weights: decoder_embed"):
        create_teacher(tmp_path / "view.pth", **heads)
    save_file({"x": torch.zeros(0)}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match=r"is an encoder only|is not a whole MAE"):
        create_teacher(tmp_path / "empty.safetensors", **heads)


@pytest.mark.parametrize("shape", [(), (24,), (1, 0, 24), (1, 26, 7), (2, 10, 24)])
def test_position_tables_of_odd_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weights = {**small_teacher().state_dict(), "decoder_pos_embed": torch.zeros(shape)}
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(RuntimeError, match="mismatched  decoder_pos_embed"):
        create_teacher(tmp_path / "odd.pth", num_heads=4, decoder_num_heads=3)
