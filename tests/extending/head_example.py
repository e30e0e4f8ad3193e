"""A head from outside the project: moving averages of the features, then one linear layer.

export SURGSTAGE_PLUGINS=tests/extending/head_example.py
python pipeline.py train-temporal --set temporal.head.name=average --set temporal.head.decay=0.95
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from configs.head_settings import HeadSettings
from stage2_temporal.heads.base import Head, HeadOutput, State, register_head


class AverageSettings(HeadSettings):
    """The settings below temporal.head."""

    decay: float = Field(0.9, ge=0, lt=1, description="weight of the past in each average")


@register_head("average", AverageSettings)
class AverageHead(Head):
    """Logits of the exponential moving average of the embeddings. State: the average (B, D) after the last frame."""

    def __init__(self, config: AverageSettings, embedding_dim: int, phases: int) -> None:
        super().__init__(config, embedding_dim, phases)
        self.decay, self.hidden_dim = config.decay, embedding_dim
        self.fc = nn.Linear(embedding_dim, phases)

    def forward(self, x: Tensor, state: State | None = None, lengths: Tensor | None = None) -> HeadOutput:
        """See `Head`."""
        average, averages = state[0] if state else x[:, 0], []  # (B, D)
        for frame in x.unbind(dim=1):
            average = self.decay * average + (1 - self.decay) * frame
            averages.append(average)
        hidden = torch.stack(averages, dim=1)  # (B, T, D)
        return HeadOutput([self.fc(hidden)], hidden, (average,))
