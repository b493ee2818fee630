"""The model at work: gradients, updates, precision, the average of the weights."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ltrp_timm.data.keyed import Batch
from ltrp_timm.runtime.keyed_rng import sample_seed
from ltrp_timm.runtime.world import World
from ltrp_timm.train.settings import Settings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, lr: float, settings: Settings) -> Any:
    """Make timm's optimiser of that name; AdamW's default betas are (0.9, 0.95)."""
    betas = {"betas": (0.9, 0.95)} if settings.opt == "adamw" else {}
    arguments = betas if settings.opt_args is None else settings.opt_args
    optimizer = create_optimizer_v2(
        model,
        settings.opt,
        lr,
        settings.weight_decay,
        layer_decay=settings.layer_decay,
        **arguments,
    )
    if settings.sched == "none":  # otherwise the schedule scales the rates of layers
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer


def make_scheduler(optimizer: Any, updates_per_epoch: int, settings: Settings) -> Any:
    """Make timm's schedule of that name, which runs after the warm-up; None for "none"."""
    warmup = settings.warmup_epochs
    warmup = settings.epochs / 10 if warmup is None else warmup
    if warmup * updates_per_epoch < 1.0:  # its only update would have the rate it starts at
        warmup = 0.0
    return create_scheduler_v2(
        optimizer,
        settings.sched,
        num_epochs=settings.epochs - warmup,
        warmup_epochs=warmup,
        warmup_prefix=True,
        warmup_lr=settings.warmup_lr,
        min_lr=settings.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )[0]


def autocast(device: torch.device, precision: str) -> Any:
    """torch's autocast at a ``Precision``; "fp32" changes nothing."""
    dtype = _DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Engine:
    """The model of a ``Task``, and all that changes its weights.

    ``lr`` is the learning rate at the top of the schedule.
    """

    def __init__(
        self, task: Any, settings: Settings, world: World, lr: float, updates_per_epoch: int
    ) -> None:
        self.lr, self.settings, self.world, self.device = lr, settings, world, world.device
        self.model, self.forward, self.num_graphs = task.model, task.forward, task.num_graphs
        default = "bf16" if self.device.type == "cuda" else "fp32"
        self.precision = settings.precision or default
        self.optimizer = make_optimizer(self.model, lr, settings)
        self.scheduler = make_scheduler(self.optimizer, updates_per_epoch, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        decay = settings.ema_decay
        # at first a plain EMA would hold little but the start: its decay is t / (10 + t) until then
        warmup = {"use_warmup": True, "warmup_gamma": 10.0, "warmup_power": 1.0}
        self.ema = None if not decay else ModelEmaV3(self.model, decay=decay, **warmup)

    def wrap(self) -> None:
        """Wrap the model, with its final start weights, for several processes and the compiler."""
        if self.world.size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(self.forward, device_ids=ids)
        if self.settings.compile:
            self.forward = torch.compile(self.forward)

    @property
    def rate(self) -> float:
        """Learning rate of the next update; with layer decay, that of the last layer."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    @property
    def trained_model(self) -> nn.Module:
        """What is measured and saved: the average of the weights, where there is one."""
        return self.ema.module if self.ema else self.model

    def gradients(
        self, batches: list[Batch], loss_of: Callable[[nn.Module, Batch], Tensor], step: int
    ) -> float:
        """Compute gradients of the mean loss over batches; returns the loss of this process."""
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for number, batch in enumerate(batches, start=1):
            with (
                self._exchange(last=number == len(batches)),
                self._seeded_model(step, number),
                self._compiler(),
            ):
                with autocast(self.device, self.precision):
                    loss = loss_of(self.forward, batch) / len(batches)
                self.scaler.scale(loss).backward()
            total += loss.detach().float()
        return total.item()

    def update(self, step: int) -> None:
        """Change the weights by the gradients; it is update number ``step``, counted from 1."""
        clip, mode = self.settings.clip_grad, self.settings.clip_mode
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), clip, mode=mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler:
            self.scheduler.step_update(step)
        if self.ema:
            self.ema.update(self.model, step=step)

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs."""
        parts = self._parts().items()
        return {name: {} if part is None else part.state_dict() for name, part in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "scaler")}
        return {**own, "ema": self.ema and self.ema.module}

    @contextlib.contextmanager
    def measuring(self) -> Iterator[nn.Module]:
        """Yield the trained model in eval mode, without gradients."""
        model = self.trained_model
        before = model.training
        model.eval()
        try:
            with torch.no_grad(), autocast(self.device, self.precision):
                yield model
        finally:
            model.train(before)

    def _exchange(self, last: bool) -> Any:
        """Exchange gradients between processes at the last of the accumulated batches only."""
        if last or self.world.size == 1:
            return contextlib.nullcontext()
        return getattr(self.forward, "_orig_mod", self.forward).no_sync()

    def _compiler(self) -> Any:
        """Allow a graph for each kind of update: beyond its limit torch runs uncompiled."""
        if not self.settings.compile:
            return contextlib.nullcontext()
        config = torch._dynamo.config
        return config.patch(recompile_limit=max(config.recompile_limit, self.num_graphs + 1))

    @contextlib.contextmanager
    def _seeded_model(self, step: int, number: int) -> Iterator[None]:
        """Seed what the model draws itself (drop path) by step, batch and process."""
        index = step * self.world.size + self.world.rank
        devices = [self.device.index or 0] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(sample_seed(self.settings.seed, number, index, "model"))
            yield
