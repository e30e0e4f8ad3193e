"""The nets of a run as one torch module that recognises a single frame and holds no state itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.errors import UserError
from live.nets import EncoderParts, Nets
from stage2_temporal.heads.base import State, softmax_by_track
from stage2_temporal.tool_probe import ToolProbe


class FrameNet(nn.Module):
    """(image, *state) -> (probabilities, embedding, *new state), for the next frame of one video.

    `image` is a preprocessed frame (1, 3, S, S). There is one table of probabilities (1, C) for each label track,
    phases first, and one of the tools (1, K) if the nets recognise any. The embedding (1, D) is not rounded yet. A
    video starts with a state of zeros, `zero_state`.

    With `inference=clip` and clips of L frames, the label of a frame is that of the clip which ends with it. The state
    has a row for each of the L - 1 clips that have begun and not ended, the youngest first. Every frame begins a clip,
    advances all of them by a step, and ends the oldest.
    """

    def __init__(self, nets: Nets) -> None:
        super().__init__()
        if nets.parts is None:
            raise UserError("extract.engine=openvino: only torch's nets can be exported; set extract.engine=torch")
        self.backbone, self.read_out = nets.parts.backbone, ReadOut(nets.parts)
        self.phase = nets.phase
        shapes = _state_of_final_size(nets)
        self.clip_frames = nets.clip_frames if nets.inference == "clip" and shapes else 1
        rows = self.clip_frames - 1 if nets.inference == "clip" else 1
        self.zero_state: State = tuple(one.new_zeros(rows, *one.shape[1:]) for one in shapes) if rows else ()

    def forward(self, image: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        embedding = self.backbone(image)  # (1, D)
        x, tools = self.read_out(embedding)
        if self.clip_frames == 1:
            logits, after = self.phase.step(x, state or None)
            after = after if state else ()
        else:
            begun = tuple(torch.cat([torch.zeros_like(one[:1]), one]) for one in state)
            logits, after = self.phase.step(x.expand(self.clip_frames, -1), begun)
            logits, after = logits[-1:], tuple(one[:-1] for one in after)
        probabilities = self.phase.by_track(softmax_by_track(logits.float(), self.phase.head.widths, 1))
        return (*probabilities, *([] if tools is None else [tools]), embedding, *after)


class ReadOut(nn.Module):
    """An embedding (1, D) -> the input of stage two, (1, D) or (1, D + K), and tools' probabilities (1, K) or None."""

    def __init__(self, parts: EncoderParts) -> None:
        super().__init__()
        self.tool_head = parts.tool_head
        self.probe = None if parts.probe is None else _ProbeLayer(parts.probe)
        self.storage = getattr(torch, parts.storage)
        self.tool_inputs = parts.tool_inputs

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """See the class; the numbers are those of `Nets.encode`."""
        x = embedding.to(self.storage).float()
        if self.tool_head is None:
            return x, None if self.probe is None else self.probe(x).sigmoid()
        logits = self.tool_head(embedding)  # (1, K)
        if self.tool_inputs:
            x = torch.cat([x, logits.to(self.storage).float()], dim=1)
        return x, logits.sigmoid()


class _ProbeLayer(nn.Module):
    """The linear probe of tools (`train-tools`) in torch: embeddings (1, D) -> logits (1, K)."""

    def __init__(self, probe: ToolProbe) -> None:
        super().__init__()
        for name in ("mean", "scale", "weights", "bias"):
            self.register_buffer(name, torch.from_numpy(getattr(probe.probe, name)))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return ((x - self.mean) * self.scale) @ self.weights + self.bias  # type: ignore[operator]


@torch.no_grad()
def _state_of_final_size(nets: Nets) -> State:
    """A state after some frames; empty without memory. Some heads' tables have their size from the second frame on.

    Raises UserError for a head whose state has another size after every frame.
    """
    x = torch.zeros_like(nets.phase.standardise.mean)[None]
    states: list[State] = [()]
    for _ in range(3):
        states.append(nets.phase.step(x, states[-1] or None)[1])
    if [one.shape for one in states[-1]] != [one.shape for one in states[-2]]:
        name = nets.phase.head.name
        raise UserError(f"temporal.head: the state of {name} grows from frame to frame, so it cannot be exported")
    return states[-1]
