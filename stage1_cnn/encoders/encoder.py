"""The encoder that extraction uses: a backbone in the precision that suits the device, and its specification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.load import differences
from configs.schema import Config, PreprocessConfig
from engine import onednn
from engine.device import DTYPES, choose_device, choose_precision, lower_precision, require_kernels
from engine.progress import say
from engine.runs import RESULT_FILE, require_same_classes
from features.frames.preprocess import crop_frames, normalise, preprocess_json
from features.store import EncoderSpec
from stage1_cnn.encoders.backbone import Backbone, initial_backbone, require_image_size
from stage1_cnn.encoders.calibration import Int8Source, int8_arithmetic
from stage1_cnn.encoders.folding import fold_batch_norm
from stage1_cnn.encoders.fusing import fuse_relu
from stage1_cnn.encoders.openvino_net import OpenVinoNet, convert
from stage1_cnn.encoders.pretrained import best_checkpoint
from stage1_cnn.model import ToolNet, rebuild_encoder, rebuild_from_checkpoint, require_same_backbone, weights_sha256

# The activations of a small batch fit into the caches of a CPU core; a GPU needs many frames at once.
_CPU_BATCH_FRAMES, _GPU_BATCH_FRAMES = 8, 64


def encoded_at_once(config: Config) -> int:
    """Frames per batch in inference: `extract.batch_frames`, or a size that suits the device."""
    on_cpu = choose_device(config.device).type == "cpu"
    return config.extract.batch_frames or (_CPU_BATCH_FRAMES if on_cpu else _GPU_BATCH_FRAMES)


class _TorchNet:
    """A backbone in torch: crops (N, S, S, 3) uint8 -> embeddings (N, D) float32 on `device`.

    In a precision below fp32, batch norm is folded into the convolution before it, ReLU is fused with the convolution
    on CPUs that support this, and the weights are stored in the lower precision. A net that cannot be folded runs under
    autocast instead.
    """

    def __init__(self, config: Config, backbone: Backbone, precision: str, device: torch.device) -> None:
        self.device, self.precision, self.preprocess = device, precision, config.preprocess
        # the joint net is compared with fp32, so nothing is folded or fused in fp32
        folded = fold_batch_norm(backbone, config.preprocess.crop_px) if precision != "fp32" else None
        may_fuse = device.type == "cpu" and not config.extract.compile and onednn.convolves(DTYPES[precision])
        fused = fuse_relu(folded, config.preprocess.crop_px) if folded is not None and may_fuse else None
        net = (fused or folded or backbone).eval()
        net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dtype = DTYPES[precision] if folded is not None else torch.float32
        self._net: torch.nn.Module = net.to(self._dtype)
        if config.extract.compile:
            self._net = torch.compile(self._net)  # type: ignore[assignment]
        self.arithmetic = (
            ("folded" if folded is not None else "plain")
            + (", fused" if fused is not None else "")
            + (", compiled" if config.extract.compile else "")
            + (", tf32" if config.cuda.tf32 and device.type == "cuda" else "")
        )

    def __call__(self, crops: torch.Tensor) -> torch.Tensor:
        images = normalise(crops, self.preprocess, self.device).to(self._dtype)  # (N, 3, S, S)
        with lower_precision(self.device, self.precision if self._dtype == torch.float32 else "fp32"):
            embedding: torch.Tensor = self._net(images).float()  # (N, D)
        return embedding


class Encoder:
    """A net in evaluation mode on its device, and the specification that identifies its features.

    `tool_head` is None for an encoder that was not trained; its tool logits are NaN. The lower precision applies to the
    backbone only; the tool head computes in float32, since mAP ranks its logits. `int8` provides the net if
    `extract.precision=int8`.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        tool_head: torch.nn.Module | None,
        sha256: str,
        tools: int,
        int8: Int8Source | None = None,
    ) -> None:
        self.device = choose_device(config.device)
        require_kernels(self.device)
        require_image_size(backbone, config.preprocess.crop_px)
        self._net: _TorchNet | OpenVinoNet
        if config.extract.engine == "openvino":
            self._net, arithmetic = _openvino(config, backbone, sha256, self.device, int8)
        else:
            wanted = config.extract.torch_precision
            precision = choose_precision("extract.precision", wanted, self.device, training=False)
            self._net = _TorchNet(config, backbone, precision, self.device)
            arithmetic = self._net.arithmetic
        self.tool_head = tool_head.eval().to(self.device) if tool_head is not None else None
        self.tools = tools
        self.preprocess: PreprocessConfig = config.preprocess
        self.spec = EncoderSpec(
            backbone=backbone.name,
            weights_sha256=sha256,
            preprocess=preprocess_json(config.preprocess),
            fps=config.data.fps,
            precision=self._net.precision,
            storage=config.extract.storage,
            embedding_dim=backbone.embedding_dim,
            arithmetic=arithmetic,
        )

    @property
    def backbone(self) -> torch.nn.Module | None:
        """The net in torch, as it computes: normalised images (N, 3, S, S) -> (N, D); None if OpenVINO computes."""
        return self._net._net if isinstance(self._net, _TorchNet) else None

    @property
    def device_name(self) -> str:
        """The kind of device or, for a GPU, its name, as recorded in feature files."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def __call__(self, frames: NDArray[np.uint8] | torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embeddings (N, D) and tool logits (N, K), both float32, of the centre crops of frames (N, R, R, 3) uint8.

        R is the size to which frames are resized, or the crop size S if the frames are cropped already.
        """
        pixels = torch.as_tensor(frames).to(self.device, non_blocking=True)
        crops = crop_frames(pixels, self.preprocess.crop_px)[:, 0]
        with torch.inference_mode():
            embedding = self._net(crops)  # (N, D)
            if self.tool_head is None:
                logits = torch.full((len(crops), self.tools), torch.nan)  # (N, K)
            else:
                logits = self.tool_head(embedding)
        return embedding.cpu().numpy(), logits.cpu().numpy()


def _openvino(
    config: Config, backbone: Backbone, sha256: str, device: torch.device, int8: Int8Source | None
) -> tuple[OpenVinoNet, str]:
    """The net in OpenVINO, and the value of `EncoderSpec.arithmetic` for it."""
    if device.type != "cpu":
        raise UserError(f"extract.engine=openvino computes on the CPU, but device is {device.type}; set device=cpu")
    if config.extract.precision == "int8":
        if int8 is None:
            raise ValueError("no source of int8 nets")
        net = int8(backbone, sha256)
        return net, int8_arithmetic(net)
    precision = choose_precision("extract.precision", config.extract.precision, device, training=False)
    return convert(backbone, config.preprocess, precision), "openvino"


def load_encoder(
    config: Config,
    run: Path | None,
    tools: Sequence[str],
    trusted: bool = False,
    int8: Int8Source | None = None,
) -> Encoder:
    """The encoder that `extract` uses: the checkpoint `extract.checkpoint`, the run's best epoch, or initial weights.

    `int8` provides the net if `extract.precision=int8`. Raises UserError if the checkpoint does not exist or was
    trained on other tools or with another backbone.
    """
    with torch.random.fork_rng(devices=[]):  # building a net draws random weights, which the loaded ones replace
        if config.extract.checkpoint is not None:
            return _load_checkpoint(config, config.extract.checkpoint, tools, int8)
        if config.extract.encoder == "initial":
            backbone = initial_backbone(config, trusted=trusted)
            return Encoder(config, backbone, None, weights_sha256(backbone), len(tools), int8)
        net = _load_finetuned(config, run, tools)
        tool_head = net.tool_head if config.extract.tool_head else None
        return Encoder(config, net.backbone, tool_head, weights_sha256(net), len(tools), int8)


def _load_checkpoint(config: Config, path: Path, tools: Sequence[str], int8: Int8Source | None) -> Encoder:
    """The encoder made of the backbone and tool branch of a joint net's checkpoint.

    Raises UserError if `preprocess` differs from the one that the net was trained with.
    """
    backbone, tool_head, about = rebuild_encoder(path)
    require_same_backbone(path, about.backbone, config.cnn.backbone)
    if tool_head is not None:
        _require_same_tools(config, path, about.tools, tools)
    if about.preprocess != config.preprocess:
        changed = "; ".join(differences(about.preprocess.model_dump(), config.preprocess.model_dump()))
        raise UserError(f"{path}: trained with other preprocess settings ({changed}); use the values marked 'there'")
    parts = torch.nn.ModuleDict({"backbone": backbone} | ({"tool_head": tool_head} if tool_head is not None else {}))
    kept = tool_head if config.extract.tool_head else None
    return Encoder(config, backbone, kept, weights_sha256(parts), len(tools), int8)


def _load_finetuned(config: Config, run: Path | None, tools: Sequence[str]) -> ToolNet:
    """The net of the run's best epoch so far. Raises UserError if its backbone or tools are not those expected."""
    if run is None:
        raise UserError("extract.encoder=finetuned takes the CNN of a run: give --name, or set extract.encoder=initial")
    try:
        path = best_checkpoint(run)
    except UserError as error:
        other = "set extract.encoder=initial, and its cnn.weights, for the backbone without fine-tuning"
        raise UserError(f"{error} (or {other})") from error
    net, about = rebuild_from_checkpoint(path)
    require_same_backbone(path, about.backbone, config.cnn.backbone)
    _require_same_tools(config, path, about.tools, tools)
    if not (path.parent / RESULT_FILE).exists():
        say(f"{path.parent}: training is not finished; using its best epoch so far")
    return net


def _require_same_tools(config: Config, path: Path, found: Sequence[str], tools: Sequence[str]) -> None:
    """Raise UserError if the tool head of a checkpoint would be used for other tools."""
    if not config.extract.tool_head:
        return
    try:
        require_same_classes(path, "tools", found, tools)
    except UserError as error:
        raise UserError(f"{error}; extract.tool_head=false extracts features without tool logits") from error
