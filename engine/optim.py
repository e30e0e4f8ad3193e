"""Build optimisers and learning-rate schedules from the settings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from configs.schema import OptimConfig, ScheduleConfig


class Undecayed(nn.Parameter):
    """A parameter that weight decay does not apply to, such as the decay rates of a state-space layer."""


def build_optimizer(groups: Iterable[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """Build SGD, Adam or AdamW over parameter groups.

    A group's `lr_factor` scales its learning rate; a group with factor 0 is not trained. As in the reference
    implementation, weight decay applies to all parameters, including biases and those of batch norm, but not to those
    of the type `Undecayed`, which form a group of their own.
    """
    scaled: list[dict[str, Any]] = []
    for group in groups:
        factor, name = group.get("lr_factor", 1.0), group.get("name", "")
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        plain = [parameter for parameter in trained if not isinstance(parameter, Undecayed)]
        undecayed = [parameter for parameter in trained if isinstance(parameter, Undecayed)]
        if factor > 0 and plain:
            scaled.append({"params": plain, "lr": config.lr * factor, "name": name})
        if factor > 0 and undecayed:
            apart = {"name": f"{name}_undecayed", "weight_decay": 0.0}
            scaled.append({"params": undecayed, "lr": config.lr * factor, **apart})
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
    """Return a subclass of an optimiser without wrappers that import torch's compiler at the first step.

    That import takes 1.4 s and 150 MB. Only compiled optimiser steps need the wrappers, and this project compiles none.
    With a torch that has no such wrappers, the subclass is identical to the optimiser.
    """
    methods: dict[str, Any] = {}
    for name in ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"):
        inner = getattr(getattr(kind, name), "__wrapped__", None)
        if inner is not None and not hasattr(inner, "__wrapped__"):
            methods[name] = torch.no_grad()(inner) if name == "step" else inner
    return type(kind.__name__, (kind,), methods)


class Schedule:
    """Set the learning rate of every parameter group to its initial value times a factor, but at least `min_lr`.

    During the first `warmup_steps`, the factor rises linearly. Apart from that it changes at the end of an epoch,
    depending on the schedule: `step` multiplies it by gamma every `step_epochs`, `plateau` multiplies it by gamma after
    `patience_epochs` without a better score, `cosine` lowers it along a half cosine that ends at zero after the last
    epoch, and `constant` leaves it.

    torch's schedulers are not used: they cannot combine `plateau` with a warm-up, and existing checkpoints contain the
    state of this class.
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
        """Advance the warm-up. Call this after every optimiser step."""
        self.steps += 1
        if self.steps <= self.config.warmup_steps:
            self._apply()

    def end_epoch(self, epoch: int, score: float | None) -> None:
        """Update the factor. Call this after every epoch (counted from 0).

        A higher `score` is better; it is None without validation.
        """
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
        """Return the schedule's state as plain values, for `load_state_dict`."""
        return {
            "base": self.base,
            "steps": self.steps,
            "epoch_factor": self.epoch_factor,
            "best": self.best,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.base = list(state["base"])
        self.steps, self.epoch_factor = state["steps"], state["epoch_factor"]
        self.best, self.waited = state["best"], state["waited"]
        self._apply()
