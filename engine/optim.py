"""Optimisers and learning-rate schedules by their names in the settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from configs.schema import OptimConfig, ScheduleConfig


def build_optimizer(groups: Iterable[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """SGD, Adam or AdamW over parameter groups; a group's `lr_factor` scales its learning rate (0 excludes the group).

    Weight decay applies to the parameters of batch norm and to biases too, as in the reference implementation.
    """
    scaled = []
    for group in groups:
        factor = group.get("lr_factor", 1.0)
        parameters = [parameter for parameter in group["params"] if parameter.requires_grad]
        if factor > 0 and parameters:
            scaled.append({"params": parameters, "lr": config.lr * factor, "name": group.get("name", "")})
    if config.name == "sgd":
        return _eager(torch.optim.SGD)(
            scaled,
            lr=config.lr,
            momentum=config.momentum,
            dampening=config.dampening,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return _eager(kind)(scaled, lr=config.lr, weight_decay=config.weight_decay)


def _eager(kind: type[Optimizer]) -> type[Any]:
    """The same optimiser without the wrappers that import torch's compiler on the first step (1.4 s and 150 MB).

    Only compiled steps need them, and this project compiles none. A torch without such wrappers is left as it is.
    """
    methods: dict[str, Any] = {}
    for name in ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"):
        inner = getattr(getattr(kind, name), "__wrapped__", None)
        if inner is not None and not hasattr(inner, "__wrapped__"):
            methods[name] = torch.no_grad()(inner) if name == "step" else inner
    return type(kind.__name__, (kind,), methods)


class Schedule:
    """The learning rate of every group: its initial value times a factor, but at least `min_lr`.

    The factor rises linearly over the first `warmup_steps` and otherwise changes once per epoch: `step` (gamma every
    `step_epochs`), `cosine` (towards zero at the last epoch, but not below `min_lr`), `plateau` (gamma after
    `patience_epochs` without a better score), `constant`. torch's schedulers cannot combine `plateau` with a warm-up,
    and their state differs from that in existing checkpoints.
    """

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, epochs: int) -> None:
        self.optimizer, self.config, self.epochs = optimizer, config, epochs
        self.base = [float(group["lr"]) for group in optimizer.param_groups]
        self.steps = 0
        self.epoch_factor = 1.0
        self.best: float | None = None
        self.waited = 0
        self._apply()

    def step(self) -> None:
        """To be called after every optimiser step."""
        self.steps += 1
        if self.steps <= self.config.warmup_steps:
            self._apply()

    def end_epoch(self, epoch: int, score: float | None) -> None:
        """To be called after epoch `epoch` (from 0); `score` (higher is better) is None without validation."""
        config = self.config
        if config.name == "step":
            self.epoch_factor = config.gamma ** ((epoch + 1) // config.step_epochs)
        elif config.name == "cosine":
            self.epoch_factor = 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch + 1) / self.epochs)))
        elif config.name == "plateau" and score is not None:
            self._plateau(score)
        self._apply()

    def _plateau(self, score: float) -> None:
        if self.best is None or score > self.best:
            self.best, self.waited = score, 0
            return
        self.waited += 1
        if self.waited > self.config.patience_epochs:
            self.epoch_factor *= self.config.gamma
            self.waited = 0

    def _apply(self) -> None:
        warmup = self.config.warmup_steps
        factor = self.epoch_factor * (min(1.0, (self.steps + 1) / warmup) if warmup else 1.0)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = max(self.config.min_lr, base * factor)

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, as plain values."""
        return {
            "base": self.base,
            "steps": self.steps,
            "epoch_factor": self.epoch_factor,
            "best": self.best,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.base = list(state["base"])
        self.steps, self.epoch_factor = state["steps"], state["epoch_factor"]
        self.best, self.waited = state["best"], state["waited"]
        self._apply()
