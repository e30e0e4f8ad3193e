"""The encoder of extraction: a backbone in the arithmetic that suits the device, and the name of what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.load import differences
from configs.schema import Config, PreprocessConfig
from engine import onednn
from engine.device import DTYPES, choose_device, choose_precision, lower_precision
from engine.progress import say
from engine.runs import RESULT_FILE, require_same_classes
from features.frames.preprocess import crop_frames, normalise, preprocess_json
from features.store import EncoderSpec
from stage1_cnn.encoders.folding import fold_batch_norm
from stage1_cnn.encoders.fusing import fuse_relu
from stage1_cnn.model import (
    Backbone,
    ToolNet,
    best_checkpoint,
    initial_backbone,
    rebuild_encoder,
    rebuild_from_checkpoint,
    require_image_size,
    weights_sha256,
)


class Encoder:
    """A net in evaluation mode on its device, and the specification that names what it computes.

    `tool_head` is None for an encoder that was not trained; its tool logits are NaN. Only the backbone runs in the
    lower precision; the head, whose logits are ranked, takes float32. In the lower precision batch norm is folded into
    the convolutions before it (on a CPU that can, ReLU is fused with them, too), and what could be folded has such
    weights itself; other nets run under autocast.
    """

    def __init__(
        self, config: Config, backbone: Backbone, tool_head: torch.nn.Module | None, sha256: str, tools: int
    ) -> None:
        self.device = choose_device(config.device)
        precision = choose_precision("extract.precision", config.extract.precision, self.device, training=False)
        require_image_size(backbone, config.preprocess.crop_px)
        # fp32 is what others are compared with, the joint net among them: it computes the layers as they are
        folded = fold_batch_norm(backbone, config.preprocess.crop_px) if precision != "fp32" else None
        may_fuse = self.device.type == "cpu" and not config.extract.compile and onednn.convolves(DTYPES[precision])
        fused = fuse_relu(folded, config.preprocess.crop_px) if folded is not None and may_fuse else None
        net = (fused or folded or backbone).eval()
        net = net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dtype = DTYPES[precision] if folded is not None else torch.float32
        self._net: torch.nn.Module = net.to(self._dtype)
        if config.extract.compile:
            self._net = torch.compile(self._net)  # type: ignore[assignment]
        self.tool_head = tool_head.eval().to(self.device) if tool_head is not None else None
        self.tools = tools
        self.preprocess: PreprocessConfig = config.preprocess
        self.spec = EncoderSpec(
            backbone=backbone.name,
            weights_sha256=sha256,
            preprocess=preprocess_json(config.preprocess),
            fps=config.data.fps,
            precision=precision,
            storage=config.extract.storage,
            embedding_dim=backbone.embedding_dim,
            arithmetic=("folded" if folded is not None else "plain")
            + (", fused" if fused is not None else "")
            + (", compiled" if config.extract.compile else ""),
        )

    @property
    def device_name(self) -> str:
        """For the record: the kind of device, and which GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def __call__(self, crops: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Frames (N, S, S, 3) uint8 to embeddings (N, D) and tool logits (N, K), both float32."""
        return self._encode(torch.as_tensor(crops))

    def encode_pictures(self, pictures: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Resized frames (N, R, R, 3) uint8, pinned or not, cropped in the centre on the device; as `__call__`."""
        pixels = pictures.to(self.device, non_blocking=True)
        return self._encode(crop_frames(pixels, self.preprocess.crop_px)[:, 0])

    def _encode(self, crops: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            images = normalise(crops, self.preprocess, self.device).to(self._dtype)  # (N, 3, S, S)
            with lower_precision(self.device, self.spec.precision if self._dtype == torch.float32 else "fp32"):
                embedding = self._net(images).float()  # (N, D)
            if self.tool_head is None:
                logits = torch.full((len(crops), self.tools), torch.nan)  # (N, K)
            else:
                logits = self.tool_head(embedding)
        return embedding.cpu().numpy(), logits.cpu().numpy()


def load_encoder(config: Config, run: Path | None, tools: Sequence[str], trusted: bool = False) -> Encoder:
    """The encoder that `extract.encoder` asks for: the run's best epoch, or the initial weights untrained.

    Raises UserError when there is no such checkpoint or it was trained on other tools or another backbone.
    """
    with torch.random.fork_rng(devices=[]):  # nets are built with weights drawn at random before they are loaded
        if config.extract.checkpoint is not None:
            return _load_checkpoint(config, config.extract.checkpoint, tools)
        if config.extract.encoder == "initial":
            backbone = initial_backbone(config, trusted=trusted)
            return Encoder(config, backbone, None, weights_sha256(backbone), len(tools))
        net = _load_finetuned(config, run, tools)
        return Encoder(config, net.backbone, net.tool_head, weights_sha256(net), len(tools))


def _load_checkpoint(config: Config, path: Path, tools: Sequence[str]) -> Encoder:
    """Backbone and tool branch of a joint net, fed as it was trained."""
    backbone, tool_head, meta = rebuild_encoder(path)
    _require_fitting(path, meta, config, tools if tool_head is not None else meta["tools"])
    trained_on = PreprocessConfig(**meta["preprocess"])
    if trained_on != config.preprocess:
        changed = "; ".join(differences(trained_on.model_dump(), config.preprocess.model_dump()))
        raise UserError(f"{path}: trained with another preprocess ({changed}); set these to the former")
    parts = torch.nn.ModuleDict({"backbone": backbone} | ({"tool_head": tool_head} if tool_head is not None else {}))
    return Encoder(config, backbone, tool_head, weights_sha256(parts), len(tools))


def _require_fitting(path: Path, meta: Mapping[str, Any], config: Config, tools: Sequence[str]) -> None:
    if meta["backbone"] != config.cnn.backbone:
        raise UserError(f"{path}: holds {meta['backbone']}, but cnn.backbone={config.cnn.backbone}")
    require_same_classes(path, "tools", meta["tools"], tools)


def _load_finetuned(config: Config, run: Path | None, tools: Sequence[str]) -> ToolNet:
    """The net of the run's best epoch so far, checked against settings and data set."""
    if run is None:
        raise UserError("extract.encoder=finetuned takes the CNN of a run: give --name, or set extract.encoder=initial")
    try:
        path = best_checkpoint(run)
    except UserError as error:
        raise UserError(f"{error} (or set extract.encoder=initial for the backbone as it comes)") from error
    net, meta = rebuild_from_checkpoint(path)
    _require_fitting(path, meta, config, tools)
    if not (path.parent / RESULT_FILE).exists():
        say(f"{path.parent}: training is not finished; taking its best epoch so far")
    return net
