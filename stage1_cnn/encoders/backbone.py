"""`Backbone`: a network of the registry without its classifier, built with weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from configs.encoder_spec import own_preprocess
from configs.errors import UserError, one_line
from configs.schema import Config, Size, height_width, size_text
from engine.checkpoints import load_external_state
from engine.progress import say
from stage1_cnn.encoders.layers import layers_until
from stage1_cnn.encoders.pretrained import (
    PUBLISHED_WORDS,
    fetch,
    is_release_file,
    published_weights,
    release_note,
    settled_weights,
    weights_file,
)
from stage1_cnn.encoders.registry import find_encoder
from stage1_cnn.encoders.suggestions import suggestion
from stage1_cnn.encoders.weights import NoMatchError, describe_match, find_weights

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Backbone(nn.Module):
    """A network that computes embeddings (N, D) of images (N, 3, S, S).

    The children of `net` keep their names (for ResNets conv1, bn1, relu, maxpool, layer1..4, avgpool). If
    `embedding_dim` is None, `net` is a classification network. Its last linear layer is then replaced by the identity,
    and D is the width of that layer's input. Raises UserError if there is no such layer. `removed` are the names of
    layers that files of weights have and `net` has not. `embed` computes the embeddings with `net`, if not `net`
    itself.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        embedding_dim: int | None = None,
        embed: Callable[[nn.Module, Tensor], Tensor] | None = None,
        removed: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.net = net
        self._embed = embed
        self.removed = removed
        if embedding_dim is None:
            layers = [(path, layer) for path, layer in net.named_modules() if isinstance(layer, nn.Linear)]
            if not layers:
                raise UserError(f"cnn.backbone={name}: has no linear layer to remove; resnet50 is the default")
            path, last = layers[-1]
            self.removed = (path,)
            embedding_dim = last.in_features
            replace_layer(net, path, nn.Identity())
        self.embedding_dim = embedding_dim
        self.batch_norm_frozen = False
        self.frozen_until: str | None = None  # the path of a layer in `net`

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, S, S) -> embeddings (N, D).

        Raises UserError if batch norm cannot learn, which is so for a single image with feature maps of 1 x 1.
        """
        try:
            embedding: Tensor = self.net(images) if self._embed is None else self._embed(self.net, images)  # (N, D)
        except ValueError as error:
            if not self.training or len(images) > 1:
                raise
            height, width = images.shape[2:]
            raise UserError(
                f"cnn.backbone={self.name}: batch norm cannot learn from a step with a single frame of "
                f"{height} x {width} pixels ({one_line(error)}); choose another number of frames or clips per step, a "
                "larger preprocess.crop_px, or freeze_batch_norm=true"
            ) from error
        return embedding

    def train(self, mode: bool = True) -> Backbone:
        """Switch to training or evaluation mode; frozen layers and frozen batch norm stay in evaluation mode."""
        super().train(mode)
        if self.batch_norm_frozen:
            for layer in batch_norms(self):
                layer.eval()
        if self.frozen_until is not None:
            for frozen in layers_until(self.net, self.frozen_until):
                if not frozen.divided:
                    frozen.module.eval()
        return self

    def keep_frozen(self) -> None:
        """Switch off the gradients of everything that is frozen, and put it into evaluation mode."""
        if self.batch_norm_frozen:
            for layer in batch_norms(self):
                layer.requires_grad_(False)
        if self.frozen_until is not None:
            for frozen in layers_until(self.net, self.frozen_until):
                for parameter in frozen.parameters:
                    parameter.requires_grad_(False)
        self.train(self.training)


def replace_layer(net: nn.Module, path: str, layer: nn.Module) -> None:
    """Replace the layer of `net` at `path` (a dotted name, as in `named_modules`) by `layer`."""
    parent, _, leaf = path.rpartition(".")
    setattr(net.get_submodule(parent), leaf, layer)


def batch_norms(module: nn.Module) -> Iterator[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm]:
    """Every batch norm layer of a module."""
    return (layer for layer in module.modules() if isinstance(layer, _BATCH_NORMS))


def freeze_batch_norm(backbone: Backbone) -> None:
    """Keep running statistics and affine parameters of every batch norm unchanged, even in training mode.

    "On the Pitfalls of Batch Normalization for End-to-End Video Learning" (arXiv 2203.07976) gives the reasons.
    """
    backbone.batch_norm_frozen = True
    backbone.keep_frozen()


def freeze_until(backbone: Backbone, name: str) -> None:
    """Freeze the layers of `backbone.net` from the input up to and including the one with path `name`.

    They get no gradients, their running statistics stay as they are, and their dropout is off, even in training mode.
    Prints how much is frozen. Raises UserError that lists the possible names if there is no such layer.
    """
    backbone.frozen_until = name
    backbone.keep_frozen()
    total = sum(one.numel() for one in backbone.parameters())
    frozen = sum(one.numel() for one in backbone.parameters() if not one.requires_grad)
    if total == frozen:
        what = f"the whole of {backbone.name} is frozen, and only what follows it is trained"
    else:
        what = f"{frozen / 1e6:.2f} of {total / 1e6:.2f} million parameters of {backbone.name} are frozen"
    say(f"cnn.freeze_until={name}: {what}")


def require_image_size(backbone: Backbone, size_px: Size) -> None:
    """Raise UserError if the network does not accept images of `size_px`. Print what it changes to accept them, if so.

    They may be too small for it, and some transformers have a fixed size.
    """
    about_size = find_encoder(backbone.name).about_size
    note = about_size(backbone.net, *height_width(size_px)) if about_size is not None else None
    training = backbone.training
    device = next(backbone.parameters()).device
    try:
        with torch.inference_mode():
            embedding = backbone.eval()(torch.zeros(1, 3, *height_width(size_px), device=device))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise UserError(
            f"cnn.backbone={backbone.name} cannot take images of preprocess.crop_px={size_text(size_px)} "
            f"({one_line(error)}); {_usual_size(backbone.name)}"
        ) from error
    finally:
        backbone.train(training)
    if embedding.shape != (1, backbone.embedding_dim):
        shape = tuple(embedding.shape)
        raise UserError(
            f"cnn.backbone={backbone.name} gives {shape} for one image, not (1, {backbone.embedding_dim}); correct "
            "embedding_dim of its registry entry, or its forward"
        )
    if note is not None:
        say(f"{backbone.name}: {note}")


def _usual_size(name: str) -> str:
    size = own_preprocess(name).get("crop_px")
    return "most nets take 224" if size is None else f"its own size is {size_text(size)}"


def build_backbone(name: str, weights: str, seed: int, *, trusted: bool = False, runs: Path = Path("runs")) -> Backbone:
    """Build the backbone of the registry entry `name`, with weights.

    `weights` is `published` or `imagenet` (the weights that the registry entry names), `random` (which depend on `seed`
    alone), `run:NAME` (`<runs>/NAME/cnn/best.pt`), or a file with a state dict, whose names may have any prefix (see
    `find_weights`); which tensors of a file were used, and whether it is the release's, is printed. With `trusted` a
    file is loaded even if torch is too old to load it safely. Raises UserError naming the choices if the weights are
    missing, or the tensors that do not fit.
    """
    entry = find_encoder(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = bare_backbone(name)
    if weights == "random":
        return backbone
    release = is_release_file(name, weights)
    if weights in PUBLISHED_WORDS and not release:
        fetch(name, published_weights(name))
    path = weights_file(name, weights, runs)
    # Weights that this program downloads, those of packages, and those of an earlier run need no `trusted`.
    known = (weights in PUBLISHED_WORDS and not release) or weights.startswith("run:")
    tensors = load_external_state(path, trusted or known)
    if entry.rename is not None:
        tensors = {entry.rename(key): tensor for key, tensor in tensors.items()}
    try:
        found = find_weights(backbone.net, backbone.removed, tensors, name, path, entry.layouts)
    except NoMatchError as error:
        raise UserError(f"{error}{suggestion(tensors, path, _net_and_removed)}") from error
    backbone.net.load_state_dict({**backbone.net.state_dict(), **found.state})
    if not known:
        notes = [describe_match(found, tensors, name), release_note(name, path)]
        say(f"{path}: {'; '.join(filter(None, notes))}")
    return backbone


def bare_backbone(name: str) -> Backbone:
    """The backbone of the registry entry `name` with random weights, drawn from torch's global generator.

    Under `torch.device("meta")` it has shapes only, which is enough to describe it; some networks cannot be built so,
    and raise NotImplementedError.
    """
    entry = find_encoder(name)
    net, dim = entry.build(), entry.embedding_dim
    removed = entry.removed(net) if entry.removed is not None else ()
    return Backbone(name, net, dim(net) if callable(dim) else dim, entry.forward, removed)


def _net_and_removed(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    backbone = bare_backbone(name)
    return backbone.net, backbone.removed


def initial_backbone(config: Config, *, trusted: bool = False) -> Backbone:
    """The backbone that `config.cnn` names, in its state before any training."""
    cnn = config.cnn
    weights = settled_weights(cnn)
    backbone = build_backbone(cnn.backbone, weights, config.seed, trusted=trusted, runs=config.runs)
    if cnn.zero_init_residual and weights == "random":
        _zero_residuals(backbone)
    return backbone


def _zero_residuals(backbone: Backbone) -> None:
    """Make every residual block start as the identity (Goyal et al., arXiv 1706.02677, section 5.1)."""
    for block in backbone.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
