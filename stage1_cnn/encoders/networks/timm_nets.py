"""The networks of timm (`timm:NAME`, `timm:NAME.TAG`), and what other families use of timm.

timm is imported only when one of its networks is built. Nothing is ever downloaded: weights come from a file, or from
the local cache of the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.encoder_spec import TIMM, EncoderDescription, Pooling
from configs.errors import UserError, one_line
from stage1_cnn.encoders.layout import Layout
from stage1_cnn.encoders.registry import FAMILIES, EncoderEntry, Pretrained

# Computes embeddings (N, D) of images (N, 3, S, S) with a network.
Embed = Callable[[nn.Module, Tensor], Tensor]


def build_timm(network: str, **options: Any) -> nn.Module:
    """timm's `network` without a classifier, with random weights.

    Vision transformers take images of every size that their patches divide: they interpolate their position embeddings
    to it in each forward pass. Raises UserError if timm is missing or cannot build the network with `options`.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{TIMM}{network}: needs a package; in the checkout: pip install -e '.[timm]'") from error
    try:
        try:
            net: nn.Module = timm.create_model(
                network, pretrained=False, num_classes=0, dynamic_img_size=True, **options
            )
        except TypeError:  # this network has no position embeddings, or a fixed size
            net = timm.create_model(network, pretrained=False, num_classes=0, **options)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{TIMM}{network}: timm {timm.__version__} cannot build it ({one_line(error)})") from error
    return net


def build_with_class_token(network: str, **options: Any) -> nn.Module:
    """The same for a transformer whose tokens are pooled here. Raises UserError if it has no class token."""
    net = build_timm(network, global_pool="token", **options)
    if getattr(net, "cls_token", None) is None or not getattr(net, "num_prefix_tokens", 0):
        raise UserError(f"{TIMM}{network}: has no class token, so that @token, @mean and @both do not apply")
    return net


def embedding_dim(net: nn.Module, pooling: Pooling | None = None) -> int:
    """The dimension of the embeddings of a network of timm that has no classifier."""
    dim = int(getattr(net, "head_hidden_size", None) or net.num_features)  # type: ignore[arg-type]
    return 2 * dim if pooling == "both" else dim


def classifier(net: nn.Module) -> tuple[str, ...]:
    """The names of the classifier's layers, which are part of published files.

    A classifier of several layers (CAFormer's) is named as a whole: timm names its last layer only.
    """
    named = net.pretrained_cfg.get("classifier") or ()  # type: ignore[operator, union-attr]
    layers = (named,) if isinstance(named, str) else tuple(named)
    return tuple(_absent(layer, net.state_dict()) for layer in layers)


def _absent(layer: str, kept: Iterable[str]) -> str:
    """The outermost module around `layer`, or `layer` itself, of which the network has no tensors."""
    while (parent := layer.rpartition(".")[0]) and not any(name.startswith(f"{parent}.") for name in kept):
        layer = parent
    return layer


def pool_tokens(net: nn.Module, images: Tensor, pooling: Pooling) -> Tensor:
    """Embeddings of images (N, 3, S, S) from the normalised tokens of a vision transformer.

    They are the class token, the mean of the patch tokens, or both in this order: (N, D) or (N, 2 D).
    """
    tokens = net.forward_features(images)  # type: ignore[operator]  # (N, prefix + patches, D)
    return join_poolings(tokens[:, 0], tokens[:, net.num_prefix_tokens :].mean(dim=1), pooling)


def join_poolings(token: Tensor, mean: Tensor, pooling: Pooling) -> Tensor:
    """The class token (N, D), the mean of the patch tokens (N, D), or both in this order (N, 2 D)."""
    return {"token": token, "mean": mean}[pooling] if pooling != "both" else torch.cat([token, mean], dim=1)


def about_size(net: nn.Module, height: int, width: int) -> str | None:
    """What to tell the user about images of this size: that position embeddings are interpolated, or nothing.

    Raises UserError if the patches of a vision transformer do not divide the size.
    """
    if not getattr(net, "dynamic_img_size", False):
        config: Any = net.pretrained_cfg
        made_for = tuple(config["input_size"][1:])
        if not config.get("fixed_input_size") or made_for == (height, width):
            return None
        return f"made for images of {_size(*made_for)}, not {_size(height, width)} pixels"
    patches: Any = net.patch_embed
    step = int(patches.feat_ratio()) if hasattr(patches, "feat_ratio") else max(patches.patch_size)  # pixels per patch
    if height % step or width % step:
        sizes = [[step * (side // step + more * (side % step > 0)) for side in (height, width)] for more in (0, 1)]
        near = " and ".join(_size(*size) for size in sizes if min(size) > 0)
        raise UserError(
            f"preprocess.crop_px={_size(height, width)}: must be a multiple of {step} pixels, the size of the patches "
            f"of cnn.backbone; the nearest are {near}"
        )
    native = patches.img_size
    if native is None or tuple(native) == (height, width) or getattr(net, "pos_embed", None) is None:
        return None
    return f"position embeddings are interpolated from images of {_size(*native)} to {_size(height, width)} pixels"


def _size(height: int, width: int) -> str:
    return f"{height} x {width}" if height != width else str(height)


def hub_weights(network: str) -> Pretrained:
    """timm's weights of `network` in the local cache of the Hugging Face hub. Raises UserError if there are none."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from timm.models import get_pretrained_cfg
    except ImportError as error:
        raise UserError(
            f"{TIMM}{network}: its weights are looked up by a package; in the checkout: pip install -e '.[timm]'"
        ) from error
    config = get_pretrained_cfg(network)
    repository = config.hf_hub_id if config is not None else None
    if config is None or not repository:
        raise UserError(f"{TIMM}{network}: timm publishes no weights of it on the hub; set cnn.weights=FILE or random")
    try:
        found = try_to_load_from_cache(repository, "model.safetensors")
    except OSError as error:
        raise UserError(f"{TIMM}{network}: the cache of the hub cannot be read ({one_line(error)})") from error
    if isinstance(found, str):
        return Pretrained(Path(found), mean=tuple(config.mean), std=tuple(config.std))
    raise UserError(
        f"{TIMM}{network}: its weights are not on this machine, and this program does not download them: on a machine "
        f"with internet run `hf download {repository} model.safetensors`, copy the file, and set cnn.weights=FILE"
    )


def timm_entry(
    network: str,
    pooling: Pooling | None,
    *,
    layouts: tuple[Layout, ...] = (),
    pretrained: Callable[[], Pretrained] | None = None,
    embed: Embed | None = None,
    **options: Any,
) -> EncoderEntry:
    """The entry of a network of timm; with a `pooling`, of a vision transformer whose tokens are pooled.

    If the network is no transformer, `embed` pools instead.
    """
    build: Callable[..., nn.Module] = build_timm
    if pooling is not None and embed is None:
        build, embed = build_with_class_token, partial(pool_tokens, pooling=pooling)
    return EncoderEntry(
        build=partial(build, network, **options),
        embedding_dim=partial(embedding_dim, pooling=pooling),
        pretrained=pretrained,
        layouts=layouts,
        forward=embed,
        removed=classifier,
        about_size=about_size,
    )


def _entry(description: EncoderDescription, pooling: Pooling | None) -> EncoderEntry:
    return timm_entry(description.network, pooling, pretrained=partial(hub_weights, description.network))


FAMILIES.register("timm", _entry)
