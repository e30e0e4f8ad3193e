"""The layers of a network in the order of computation, by which `cnn.freeze_until` and `cnn.layer_lr_decay` count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from configs.errors import UserError, did_you_mean

# Where a module is found: outside any sequence of modules, in one, or in a stage that is a member of one.
_OUTSIDE, _SEQUENCE, _STAGE = range(3)


@dataclass(frozen=True)
class Layer:
    """A part of a network: its dotted path, the module, and its parameters.

    A `divided` module, whose parts are layers of their own, only has the parameters that belong to none of its parts,
    such as the position embedding of a transformer.
    """

    path: str
    module: nn.Module
    divided: bool

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this layer, which no other layer has."""
        return list(self.module.parameters(recurse=not self.divided))


def layers(net: nn.Module) -> list[Layer]:
    """The layers of `net`, from input to output: its children, with the members of sequences one by one.

    A child that contains a sequence of blocks (the encoder of a transformer, a stage of ConvNeXt) is divided in the
    same way; a block is never divided. A divided module comes before its parts, and the first is `net` itself, with an
    empty path. The order is that in which the network defines its modules.
    """
    return list(_layers("", net, _OUTSIDE))


def _layers(path: str, module: nn.Module, where: int) -> Iterator[Layer]:
    yield Layer(path, module, divided=True)
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if is_sequence(child) and (where == _OUTSIDE or has_blocks(child)):
            yield from _layers(below, child, max(where, _SEQUENCE))
        elif where == _OUTSIDE and any(has_blocks(part) for part in child.modules()):
            yield from _layers(below, child, where)
        elif where == _SEQUENCE and is_stage(child):
            yield from _layers(below, child, _STAGE)
        else:
            yield Layer(below, child, divided=False)


def is_sequence(module: nn.Module) -> bool:
    """Whether a module is a list of modules."""
    return isinstance(module, nn.Sequential | nn.ModuleList)


def has_blocks(module: nn.Module) -> bool:
    """Whether a module is a sequence with blocks: with modules that consist of layers."""
    return is_sequence(module) and any(next(member.children(), None) is not None for member in module.children())


def is_stage(module: nn.Module) -> bool:
    """Whether a module, which is no sequence itself, has a sequence of blocks of one class, as ConvNeXt's stages do.

    Blocks are no sequences themselves, since the branches of many a block are: convolutions with norm and activation.
    """
    for part in () if is_sequence(module) else module.children():
        kinds = {type(block) for block in part.children()} if has_blocks(part) else set()
        if len(kinds) == 1 and not issubclass(kinds.pop(), nn.Sequential):
            return True
    return False


def layers_until(net: nn.Module, name: str) -> list[Layer]:
    """The layers of `net` from the input up to and including the one with path `name`, or the last one inside `name`.

    Raises UserError that lists the possible names if there is no such layer.
    """
    found = layers(net)
    last = [n for n, layer in enumerate(found) if layer.path == name or layer.path.startswith(f"{name}.")]
    if name and last:
        return found[: last[-1] + 1]
    names = [layer.path for layer in found if layer.path and next(layer.module.parameters(), None) is not None]
    if not names:
        raise UserError(f"cnn.freeze_until={name}: the network has no layers with names; set it to null")
    inside = next((one.path for one in found if not one.divided and name.startswith(f"{one.path}.")), None)
    alike = [one for one in names if one.count(".") == name.count(".")]
    hint = f", only the whole of {inside}" if inside in names else did_you_mean(name, alike)
    raise UserError(f"cnn.freeze_until={name}: not a layer that can be named{hint}; possible are {_spans(names)}")


def _spans(names: list[str]) -> str:
    """Names in order, with consecutive ones that differ in their last number only as `layer1.0 to layer1.2`."""
    spans: list[list[str]] = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        before = spans[-1][-1].rpartition(".") if spans else ("", "", "")
        if leaf.isdecimal() and before[0] == parent and before[2].isdecimal():
            spans[-1].append(name)
        else:
            spans.append([name])
    return ", ".join(span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)


def learning_steps(net: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """The parameters of `net`, from input to output, in the blocks that each have a learning rate of their own.

    Each block has the path of its first layer. Layers with vectors only, such as batch norm, belong to the block before
    them. Parameters of a divided module (class token, position embedding) belong to the block after them.
    """
    steps: list[tuple[str, list[nn.Parameter]]] = []
    waiting: list[nn.Parameter] = []
    taken: set[int] = set()  # layers may share parameters
    for layer in layers(net):
        own = [one for one in layer.parameters if id(one) not in taken]
        taken.update(id(one) for one in own)
        if layer.divided:
            waiting += own
        elif not steps or any(one.ndim > 1 for one in own):
            if own:
                steps.append((layer.path, waiting + own))
                waiting = []
        else:
            steps[-1][1].extend(own)
    if waiting:
        steps.append(("", waiting))
    return steps
