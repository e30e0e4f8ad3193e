"""The exponential moving average of a model's weights, which training loops validate and keep if they are asked to."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """A copy of a model, `module`, that holds the moving average of its parameters and floating-point buffers.

    Other buffers, such as counters, are the model's own.

    After step n (from 0) the average keeps the fraction min(decay, (1 + n) / (10 + n)) of itself. A short training
    would otherwise end with an average of its first steps. The average begins with the weights after the first step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's weights into the average; called after every optimiser step."""
        n = int(self.n_averaged)  # type: ignore[operator]  # on the CPU, where reading it waits for nothing
        self.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        super().update_parameters(model)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            if not ours.is_floating_point():
                ours.copy_(theirs)
