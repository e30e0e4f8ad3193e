"""GPUs without one: steps run on fake CUDA tensors, and what would make the host wait for the GPU is noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
# Their results depend on values, in number or in shape.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "masked_scatter_backward")


class Waits(TorchDispatchMode):
    """Notes the operations that wait for devices of the type `gpu`. What has no part there is computed for real.

    With `cpu` the CPU stands in for a GPU: what a backward pass would wait for there.
    """

    def __init__(self, gpu: str = GPU.type) -> None:
        super().__init__()
        self.gpu = gpu
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.device.type == self.gpu]
        to = kwargs.get("device")
        if name == "_pin_memory":
            return args[0]
        if name == "_pack_padded_sequence" and on_gpu:  # has no fake; needs the lengths, which are on the CPU
            with unset_fake_temporarily():
                data, sizes = function(torch.zeros(args[0].shape), *args[1:])
            return torch.empty(data.shape, device=GPU), sizes
        if name in ("_to_copy", "copy_"):
            places = {tensor.device.type for tensor in tensors} | ({torch.device(to).type} if to else set())
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if len(places) > 1 and not non_blocking:
                self.found.append(name)
        elif on_gpu and name in READS:
            self.found.append(name)
        elif on_gpu and name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]):
            self.found.append(f"{name} by a mask")
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if fake or (to is not None and torch.device(to).type == "cuda"):
            return function(*args, **kwargs)
        with unset_fake_temporarily():
            return function(*args, **kwargs)


def start_autograd() -> None:
    """Autograd counts devices at its first backward pass and starts threads for a fake one: no test could then fork."""
    torch.ones(1, requires_grad=True).sum().backward()


@contextmanager
def noted_waits() -> Iterator[list[str]]:
    """Tensors made on `GPU` are fake; gives the names of the operations that wait for them.

    Neither cuDNN nor a backward pass takes fake tensors without a driver.
    """
    start_autograd()
    waits = Waits()
    with torch.backends.cudnn.flags(enabled=False), FakeTensorMode(allow_non_fake_inputs=True), waits:
        yield waits.found


def faked(net: nn.Module) -> nn.Module:
    """The net with fake parameters and buffers on `GPU`; call it where waits are noted."""
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=GPU), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=GPU))
    return net
