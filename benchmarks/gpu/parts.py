"""The timed parts of ``benchmarks/gpu.py``: each yields its cases, the most valuable one first."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import VIT_B, VIT_L, VIT_S, VIT_TI, Row, create_full, inference, make_images, pruned
from peers.matched import MERGING, Peer, dropping, match, merging
from pseudo_score_cost import callables
from torch import Tensor
from training_speed import training_step

import ltrp_timm
from gpu.record import Case, Make, Method, NotHereError
from ltrp_timm import num_keep
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal, twin
from ltrp_timm.teacher import random_visible_indices

RANKERS = ("border", "conv")
COARSE = {"coarse": {}, "coarse, no bias": {"size_bias": 0.0}}  # with the default ranker
FUSED = ("merging_proportional_fused", "merging_plain_fused")
Methods = Iterator[Method]


def pick(args: argparse.Namespace, real: Any, toy: Any) -> Any:
    """The real size, or the toy size of a rehearsal."""
    return toy if args.smoke else real


def columns(args: argparse.Namespace, model: str, batch: int, **more: Any) -> Row:
    """Columns that all rows of a case share."""
    return {"model": model, "img_size": pick(args, 224, 64), "batch": batch, **more}


def new(name: str, args: argparse.Namespace, side: int = 0) -> Any:
    """``create_full``, random weights drawn on the device: for a ViT-L that saves seconds."""
    with torch.device(args.device):
        return create_full(name, args, img_size=side or pick(args, 224, 64))


def variants(ratios: Sequence[float]) -> dict[tuple[str, float], Callable[[Any], Any]]:
    """(method, keep ratio) -> a function plain model -> model to time, the plain one first."""
    found: dict[tuple[str, float], Callable[[Any], Any]] = {("full", 1.0): lambda full: full}
    for ratio in ratios:
        found["ideal", ratio] = functools.partial(given_for_nothing, ratio=ratio)
        for ranker in RANKERS:
            found[ranker, ratio] = functools.partial(pruned, ranker=ranker, keep_ratio=ratio)
    return found


def coarse(full: Any, ratio: float, options: Row) -> Any:
    """The rest given coarsely, with weights shared."""
    return ltrp_timm.drop_patches(twin(full), keep_ratio=ratio, rest="coarse", **options)


def given_for_nothing(full: Any, ratio: float) -> Any:
    """The ideal model at a keep ratio."""
    return ideal(full, num_keep(full.patch_embed.num_patches, ratio))


def forward(build: Callable[[Any], Any], full: Any, images: Tensor) -> Make:
    """Makes the forward pass of ``build(full)`` on these images."""
    return lambda: inference(build(full), images)


def pruning(full: Any, batch: int, ratios: Sequence[float], args: argparse.Namespace) -> Methods:
    """The forward passes of all variants."""
    images = make_images(full, batch, args)
    for (method, ratio), build in variants(ratios).items():
        yield Method({"method": method, "keep_ratio": ratio}, forward(build, full, images))


def speed(args: argparse.Namespace) -> Iterator[Case]:
    """Throughput of three sizes at three batch sizes; dropping beside the coarse rest."""
    # the cases of a model follow each other
    full = functools.lru_cache(maxsize=1)(functools.partial(new, args=args))

    def build(name: str, batch: int) -> Methods:
        ratios = pick(args, (0.75, 0.5, 0.25), (0.5,))
        yield from pruning(full(name), batch, ratios, args)
        images = make_images(full(name), batch, args)
        for ratio, (method, options) in itertools.product(ratios, COARSE.items()):
            one = functools.partial(coarse, ratio=ratio, options=options)
            yield Method({"method": method, "keep_ratio": ratio}, forward(one, full(name), images))

    for name in pick(args, (VIT_B, VIT_S, VIT_L), (VIT_TI,)):
        for batch in pick(args, (256, 64, 1), (1, 2)):
            yield Case(columns(args, name, batch), functools.partial(build, name, batch))


def graphed(model: Any, images: Tensor) -> Callable[[], Any]:
    """Capture the model in a CUDA graph, as K is static. Each call copies the images in.

    Raises:
        NotHereError: the images are not on a CUDA device.
    """
    if images.device.type != "cuda":
        raise NotHereError("needs CUDA")
    held, stream = images.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(3):  # first calls set up libraries: not to be captured
            model(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = model(held)

    def replay() -> Any:
        held.copy_(images)
        graph.replay()
        return out

    return replay


def compiled(model: Any, images: Tensor) -> Callable[[], Any]:
    """torch.compile with CUDA graphs; a CPU rehearses with aot_eager."""
    on_cuda = images.device.type == "cuda"
    options: Any = {"mode": "reduce-overhead"} if on_cuda else {"backend": "aot_eager"}
    call = inference(torch.compile(model, dynamic=False, **options), images)
    for _ in range(3):  # compiles, warms up, captures
        call()
    return call


FORMS: dict[str, Callable[[Any, Tensor], Callable[[], Any]]] = {
    "eager": inference,
    "graph": graphed,
    "compiled": compiled,
}


def latency(args: argparse.Namespace) -> Iterator[Case]:
    """Small batches: eager, as a graph, compiled. Compiling takes longest and comes last."""

    def build(name: str, batch: int, forms: Sequence[str]) -> Methods:
        full = new(name, args)
        images = make_images(full, batch, args)
        yield Method({"method": "full", "form": "eager"}, forward(lambda full: full, full, images))
        rankers = RANKERS[:1] if "compiled" in forms else RANKERS
        models = {"full": full} | {ranker: pruned(full, ranker, 0.5) for ranker in rankers}
        if "compiled" not in forms:
            models |= {"ideal": given_for_nothing(full, 0.5), "coarse": coarse(full, 0.5, {})}
        for form in forms:
            for method, model in models.items():
                if (form, method) != ("eager", "full"):
                    make = functools.partial(FORMS[form], model, images)
                    yield Method({"method": method, "form": form}, make)

    names = pick(args, (VIT_B, VIT_S, VIT_L), (VIT_TI,))
    cases = [(name, 1, ("eager", "graph")) for name in names]
    more = pick(args, ((0, 64), (0, 256), (1, 64)), ((0, 2),))
    cases += [(names[i], batch, ("eager", "graph")) for i, batch in more]
    for name, batch, forms in [*cases, (names[0], 1, ("compiled",))]:
        row = columns(args, name, batch, keep_ratio=0.5)
        yield Case(row, functools.partial(build, name, batch, forms))


def least_merging(full: Any, attention: str, limit: float, images: Tensor) -> Peer:
    """Token merging with the smallest r that takes at most ``limit`` seconds, by bisection."""
    low, high = 0, full.patch_embed.num_patches // 2
    while low < high:
        middle = (low + high) // 2
        took = seconds_of(merging(full, attention, middle).build(twin(full)), images)
        low, high = (low, middle) if took <= limit else (middle + 1, high)
    return merging(full, attention, high)


def seconds_of(model: Any, images: Tensor) -> float:
    """Seconds of a forward pass, good enough to choose a setting."""
    call = inference(model, images)
    return throughput.compare({"": call}, repeats=5, device=images.device)[""].median


def merging_against_dropping(args: argparse.Namespace) -> Iterator[Case]:
    """Token merging with fused attention against ranking before the first block."""
    name, ratio = pick(args, VIT_B, VIT_TI), 0.5

    def build(batch: int, equal: str) -> Methods:
        full = new(name, args)
        images = make_images(full, batch, args)
        kept = num_keep(full.patch_embed.num_patches, ratio)
        if equal == "equal FLOPs":
            peers = match(full, kept, "flops")
        else:
            limit = seconds_of(pruned(full, RANKERS[0], ratio), images)
            peers = {key: least_merging(full, MERGING[key], limit, images) for key in FUSED}
        for (method, share), make in variants([ratio]).items():
            if method != "ideal":
                work = dropping(full, num_keep(full.patch_embed.num_patches, share))
                yield Method(_work(method, work), forward(make, full, images))
        for key in FUSED:
            merged = functools.partial(_merged, peers[key])
            yield Method(_work(key, peers[key]), forward(merged, full, images))

    for batch in pick(args, (64, 256), (1,)):
        for equal in ("equal FLOPs", "equal time"):
            row = columns(args, name, batch, keep_ratio=ratio, form=equal)
            yield Case(row, functools.partial(build, batch, equal))


def _merged(peer: Peer, full: Any) -> Any:
    return peer.build(twin(full))


def _work(method: str, peer: Peer) -> Row:
    setting = f"{peer.setting}, {peer.flops / 1e9:.2f} GFLOPs, {peer.last} tokens at the end"
    return {"method": method, "setting": setting}


def multiple_of_8(args: argparse.Namespace) -> Iterator[Case]:
    """The encoder at numbers of tokens around multiples of 8."""
    name, batch = pick(args, (VIT_B, 256), (VIT_TI, 2))

    def build() -> Methods:
        full = new(name, args)
        images = make_images(full, batch, args)
        yield Method({"method": "full"}, forward(lambda full: full, full, images))
        for tokens in pick(args, range(95, 105), (8, 9)):
            first = functools.partial(ideal, kept=tokens - full.num_prefix_tokens)
            row = {"method": "first patches", "setting": f"{tokens} tokens"}
            yield Method(row, forward(first, full, images))

    yield Case(columns(args, name, batch, keep_ratio=""), build)


def large_images(args: argparse.Namespace) -> Iterator[Case]:
    """4096 patches: attention takes much of the time."""
    name, side = pick(args, ("ltrp_dinov3_large", 1024), ("ltrp_dinov3_small", 64))

    def build(batch: int) -> Methods:
        full = new(name, args, side).restore()  # the plain model in it
        return pruning(full, batch, (0.5, 0.25), args)

    for batch in pick(args, (8, 1), (1,)):
        yield Case(columns(args, name, batch, img_size=side), functools.partial(build, batch))


def training(args: argparse.Namespace) -> Iterator[Case]:
    """Training steps (float32 weights, autocast), then pseudo-scores."""
    name, whole = (
        pick(args, VIT_B, VIT_TI),
        argparse.Namespace(**{**vars(args), "dtype": "float32"}),
    )

    def step(build: Callable[[Any], Any], batch: int) -> Callable[[], None]:
        full = new(name, whole)  # weights are trained: share none
        one = training_step(build(full), make_images(full, batch, whole))

        def call() -> None:
            with torch.autocast(torch.device(args.device).type, torch.bfloat16):
                one()

        return call

    def steps(batch: int) -> Methods:
        for (method, ratio), build in variants([0.5]).items():
            make = functools.partial(step, build, batch)
            yield Method({"method": method, "keep_ratio": ratio}, make)

    def scores(batch: int) -> Methods:
        depth = {"depth": args.depth, "decoder_depth": args.depth} if args.depth else {}
        side, hidden = pick(args, (224, 0.9), (64, 0.5))
        place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        teacher = ltrp_timm.MAETeacher(side, **depth).to(**place)
        images = torch.randn(batch, 3, side, side).to(**place)
        visible = random_visible_indices(batch, teacher.num_patches, hidden, None, args.device)
        none = argparse.Namespace(chunks=[], num_removed=[])
        for method, call in callables(teacher, images, visible, "full", none).items():
            yield Method({"method": method}, lambda call=call: call)  # type: ignore[misc]

    batch = pick(args, 128, 2)
    row = columns(args, name, batch, form="training step", dtype="bfloat16 autocast")
    yield Case(row, functools.partial(steps, batch))
    for batch in pick(args, (32, 1), (1,)):
        row = columns(args, "MAE ViT-B", batch, form="pseudo-scores", keep_ratio="")
        yield Case(row, functools.partial(scores, batch))
