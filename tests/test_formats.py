"""Each deployment format gives the eager pruned output, and not the full model's."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor
from torch.fx.proxy import TraceError
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from ltrp_timm import create_ranker, drop_patches

FAMILIES = ["vit", "registers", "siglip", "hybrid", "eva02", "dinov3", "rope_mixed"]
FAMILIES += ["beit", "beit_shared", "cait", "relpos", "relpos_shared", "relpos_bias_cls"]
ROPE = ["naflex_eva02", "naflex_mixed"]
NAFLEX = ["naflex", "naflex_siglip", "naflex_clip", *ROPE]
FAMILIES += NAFLEX
ONE_OF_A_SLOT = ("vit", "beit", "relpos", "naflex")
RANKERS = ["border", "contrast", "conv", "vit_tiny", "random", "attention", "feature_contrast"]
ON_A_VIT = ("attention", "feature_contrast")
RANKERS += ["contrast at 64", "conv at 64"]

# every family with one ranker, every other ranker on one backbone of each slot
CASES = [(family, "contrast") for family in FAMILIES] + [
    (family, ranker) for family in ("vit", "eva02") for ranker in RANKERS if ranker != "contrast"
]
# and every selection on one backbone of each slot, with options of its own
CASES += [
    (family, f"contrast with {selection}")
    for family in ("vit", "eva02")
    for selection in ("random", "mixed", "stratified", "dithered")
]
OPTIONS = {
    "top": {},
    "random": {"seed": 3},
    "mixed": {"ratio": 0.4, "pixels": 2},
    "stratified": {"cell": 3},
    "dithered": {"strength": 1.0},
}
# minutes of compiling: by default one family of a kind, and each ranker and selection once
REPEATED = ("registers", "siglip", "dinov3", "relpos_shared", "naflex_siglip", "naflex_clip")


def is_slow(family: str, ranker: str) -> bool:
    """Whether another case goes the same way through the code."""
    return family in REPEATED or (family == "eva02" and ranker not in ("contrast", "conv"))


both = pytest.mark.parametrize(
    ("family", "ranker"),
    [pytest.param(*case, marks=pytest.mark.slow if is_slow(*case) else ()) for case in CASES],
)


def prepare(
    backbone_of: Callable[..., Any], family: str, ranker: str
) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A pruned model, images, its eager output, and that of the full model."""
    backbone, images = backbone_of(family, depth=1)  # every block is the same code
    full = backbone(images)
    ranker, _, selection = ranker.partition(" with ")
    ranker, _, side = ranker.partition(" at ")
    small = {"img_size": 64, "depth": 1} if ranker.startswith(("vit", "att")) else {}
    small |= {"backbone": "vit_tiny_patch16_224"} if ranker in ON_A_VIT else {}
    small |= {"img_size": int(side)} if side else {}
    small |= {"patch_size": 14} if family == "eva02" and ranker == "random" else {}
    net = create_ranker(ranker, **small)
    net.trained = True
    selection = selection or "top"
    model = drop_patches(
        backbone, net, 0.4, selection=selection, selection_args=OPTIONS[selection]
    ).eval()
    return model, images, model(images), full


def check(out: Tensor, eager: Tensor, full: Tensor, tolerance: float = 1e-5) -> None:
    assert (out - eager).abs().max() <= tolerance
    assert (out - full).abs().max() > 1e-3


# what timm's own models cannot do either
NOT_SCRIPTED = ["beit_shared", *NAFLEX]
NOT_TRACED = ["hybrid", *NAFLEX]  # without timm's leaves
NOT_TRACED_BY_TIMM = ROPE


def fx_by_timm(model: Any) -> Any:
    """As timm traces its models: its leaves, its functions."""
    options = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    nodes = get_graph_node_names(model, tracer_kwargs=options)[1]
    return create_feature_extractor(
        model, train_return_nodes=nodes[-1:], eval_return_nodes=nodes[-1:], tracer_kwargs=options
    )


@pytest.mark.parametrize(
    ("family", "convert"),
    [(family, torch.jit.script) for family in NOT_SCRIPTED]
    + [(family, torch.fx.symbolic_trace) for family in NOT_TRACED]
    + [(family, fx_by_timm) for family in NOT_TRACED_BY_TIMM],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch.jit.script, before it fails
def test_what_the_plain_model_cannot_do_either(
    backbone_of: Callable[..., Any], family: str, convert: Callable[..., Any]
) -> None:
    plain, _ = backbone_of(family)
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError, TraceError)):
        convert(plain)


@pytest.mark.parametrize(
    ("family", "ranker"), [case for case in CASES if case[0] not in NOT_SCRIPTED]
)
@torch.no_grad()
def test_script(backbone_of: Callable[..., Any], family: str, ranker: str) -> None:
    model, images, eager, full = prepare(backbone_of, family, ranker)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for _ in range(3):  # the profiling executor specialises after the first calls
        check(scripted(images), eager, full)
    keep = torch.arange(5).expand(3, -1)
    check(scripted(images, keep), model(images, keep_indices=keep), eager)


@both
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are constants of a trace
@torch.no_grad()
def test_trace(backbone_of: Callable[..., Any], family: str, ranker: str) -> None:
    model, images, eager, full = prepare(backbone_of, family, ranker)
    traced = torch.jit.trace(model, images)
    check(traced(images), eager, full)
    other = torch.randn_like(images)
    check(traced(other), model(other), model.backbone(other))


@both
def test_fx(backbone_of: Callable[..., Any], family: str, ranker: str) -> None:
    model, images, eager, full = prepare(backbone_of, family, ranker)
    if family not in NOT_TRACED:
        graph = torch.fx.symbolic_trace(model)
        check(graph(images), eager, full)
        keep = torch.arange(5).expand(3, -1)
        check(graph(images, keep), model(images, keep_indices=keep), eager)
    if family in NOT_TRACED_BY_TIMM:
        return
    traced = fx_by_timm(model).eval()
    check(next(iter(traced(images).values())), eager, full)
    next(iter(traced(images).values())).sum().backward()
    assert all(p.grad is not None for p in traced.parameters() if p.requires_grad)


@both
@torch.no_grad()
def test_compile_is_one_graph(backbone_of: Callable[..., Any], family: str, ranker: str) -> None:
    model, images, eager, full = prepare(backbone_of, family, ranker)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    check(compiled(images), eager, full)
    if ranker != "contrast":  # what follows is the backbone's
        return
    keep = torch.arange(5).expand(3, -1)
    check(compiled(images, keep_indices=keep), model(images, keep_indices=keep), eager)
    if family not in ONE_OF_A_SLOT:
        return
    model.keep_ratio = 0.2  # each K is a graph of its own, and the right one
    check(compiled(images), model(images), eager)
    model.keep_ratio = 1.0
    assert (compiled(images) - full).abs().max() <= 1e-5


def test_compiled_training_step(backbone_of: Callable[..., Any]) -> None:
    gradients = []
    for compile_it in (False, True):
        model, images, _, _ = prepare(backbone_of, "vit", "contrast")
        torch.compiler.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        run(images).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_compiled_training_at_several_sizes() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, dynamic_img_size=True)
    model = drop_patches(vit, keep_ratio=0.5)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((64, 64), (64, 96)):
        images = torch.randn(2, 3, *size)
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            run(images).square().mean().backward()
            gradients.append([p.grad.clone() for p in vit.parameters()])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


@pytest.mark.parametrize("family", ["naflex", "naflex_mixed"])
@torch.no_grad()
def test_a_compiled_backbone(backbone_of: Callable[..., Any], family: str) -> None:
    model, images, eager, full = prepare(backbone_of, family, "contrast")
    torch.compiler.reset()
    model.backbone = torch.compile(model.backbone, backend="aot_eager")
    for _ in range(2):
        check(model(images), eager, full)
    keep = torch.arange(5).expand(3, -1)
    assert not torch.allclose(model(images, keep_indices=keep), eager)


@pytest.mark.parametrize("family", ["vit", "eva02"])
@torch.no_grad()
def test_inductor(backbone_of: Callable[..., Any], family: str) -> None:
    model, images, eager, full = prepare(backbone_of, family, "contrast")
    torch.compiler.reset()
    check(torch.compile(model, fullgraph=True)(images), eager, full, 1e-4)


@both
@torch.no_grad()
def test_export_with_a_dynamic_batch(
    backbone_of: Callable[..., Any], family: str, ranker: str
) -> None:
    model, images, eager, full = prepare(backbone_of, family, ranker)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes={"x": {0: batch}})
    check(program.module()(images), eager, full)
    for size in (1, 2, 5):
        other = torch.randn(size, *images.shape[1:])
        check(program.module()(other), model(other), model.backbone(other))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    check(torch.export.load(file).module()(images), eager, full)


@torch.no_grad()
def test_export_with_keep_indices_of_any_length(backbone_of: Callable[..., Any]) -> None:
    model, images, eager, _ = prepare(backbone_of, "vit", "contrast")
    keep = torch.arange(9).expand(3, -1).contiguous()
    length = torch.export.Dim("k", min=1, max=35)  # K = N is another graph: the plain model
    program = torch.export.export(
        model, (images, keep), dynamic_shapes={"x": None, "keep_indices": {1: length}}
    )
    for k in (1, 9, 20):
        keep = torch.arange(k).expand(3, -1).contiguous()
        check(program.module()(images, keep), model(images, keep_indices=keep), eager)


@both
@torch.no_grad()
def test_onnx(backbone_of: Callable[..., Any], family: str, ranker: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model, images, eager, full = prepare(backbone_of, family, ranker)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes={"x": {0: batch}}, verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for pixels, wanted, plain in (
        (images, eager, full),
        (images[:1], model(images[:1]), model.backbone(images[:1])),
    ):
        out = torch.from_numpy(session.run(None, {name: pixels.numpy()})[0])
        check(out, wanted, plain, 1e-4)
