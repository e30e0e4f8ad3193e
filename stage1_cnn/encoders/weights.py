"""Finding a net's weights in a third-party file, whatever prefixes and wrappers its names have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from configs.errors import UserError, listed
from stage1_cnn.encoders.layout import OWN, Layout, fit_shape

# Parts of names that wrappers insert before the names of a module or of one of its layers.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Prefixes of the encoder that is not loaded if a file has two: a running average or momentum encoder beside the trained
# one, such as VISSL keeps inside its loss; a student beside its teacher, since DINO and similar methods evaluate the
# teacher.
_SECOND = re.compile(r"(?:^|[._])(?:ema|k|key|momentum|target|averaged|student|loss)(?=[._])")
_DIGITS = "0123456789"
_UNKNOWN = " is unknown"
# Tokens that transformers compute with beside those of the patches: a net without them is another one.
_TOKENS = re.compile(r"(?:reg|register|storage|dist)_tokens?")
# The usual prefixes of a backbone: in published files, in this project's checkpoints and in those of MTRCNet.
_USUAL = re.compile(r"(?:state_dict\.)?(?:model\.)?(?:module\.)?(?:backbone\.net\.|net\.|share\.)?")


class NoMatchError(UserError):
    """A file does not hold all weights of the net."""


class SeveralMatchesError(UserError):
    """A file holds several sets of weights of the net, none of which is the usual one."""


class Found(NamedTuple):
    """The weights of a net under the net's own names; `place` is their prefix in the file.

    `numbered` says that the file numbers the net's children instead of naming them.
    """

    place: str
    state: dict[str, Tensor]
    numbered: bool = False
    passed_over: tuple[str, ...] = ()  # prefixes of other weights in the file that would fit
    layout: str = OWN.title
    origins: frozenset[str] = frozenset()  # the names in the file of the tensors that were taken

    @property
    def rank(self) -> tuple[int, bool]:
        """The sort key of a match: of several matches, the one with the smallest rank is loaded."""
        return len(_SECOND.findall(self.place)), not _USUAL.fullmatch(self.place)


class _Search(NamedTuple):
    """The matches of one layout in a file, and the closest prefix if there is none."""

    found: list[Found]
    hits: int  # number of names that fit under `start`
    start: str
    problems: list[str]
    layout: Layout


def find_weights(
    net: nn.Module,
    removed: Sequence[str],
    tensors: Mapping[str, Tensor],
    what: str,
    source: Path,
    layouts: Sequence[Layout] = (),
) -> Found:
    """Find all weights of `net` (called `what` in messages) among a file's tensors, under any prefix.

    The names in the file are those of `net` or of one of the `layouts`. The net's children may be numbered, as in an
    `nn.Sequential`. The layers `removed` and tensors outside the net's children are ignored. Raises
    UserError naming the closest prefix if there is none under which every tensor has the right shape, or naming two
    prefixes if both fit with different values and equal rank.
    """
    wanted = net.state_dict()
    searches = [_search(net, wanted, layout, removed, tensors) for layout in (OWN, *layouts)]
    if found := [one for search in searches for one in search.found]:
        return choose(found, what, source)
    closest = max(searches, key=lambda search: (search.hits, -len(search.problems)))
    raise NoMatchError(f"{source}: does not hold weights of {what} ({_mismatch(closest, len(wanted), tensors)})")


def _mismatch(closest: _Search, expected: int, tensors: Mapping[str, Tensor]) -> str:
    """What came nearest to the `expected` number of tensors, what is wrong with it, and what the file has instead."""
    problems, start = closest.problems, closest.start
    where, more = f"under `{start}`: " if start else "", f" and {len(problems) - 1} more" if problems[1:] else ""
    named = "" if closest.layout is OWN else f"named as {closest.layout.title}, "
    fitting = expected - sum(not problem.endswith(_UNKNOWN) for problem in problems)
    share = f"{fitting} of {expected} tensors fit" if closest.hits > expected // 4 else f"{expected} tensors expected"
    first = ", ".join(name[:60] for name in list(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
    return f"{named}{where}{problems[0]}{more}; {share}; the file has {first}"


def _search(
    net: nn.Module, own: Mapping[str, Tensor], layout: Layout, removed: Sequence[str], tensors: Mapping[str, Tensor]
) -> _Search:
    wanted = layout.expected(own)
    numbers = {name: str(number) for number, (name, _) in enumerate(net.named_children())} if layout is OWN else {}
    found: list[Found] = []
    closest = (len(wanted) // 4, "", misfits(wanted, {}))  # number of names that fit, the prefix, and the problems
    for names in ({name: name for name in tensors}, _unwrapped(tensors)):
        for children in ({}, numbers) if numbers else ({},):
            back = {number: name for name, number in children.items()}
            for start, hits in _starts(names, {_renamed(name, children) for name in wanted}):
                under = {name[len(start) :]: origin for name, origin in names.items() if name.startswith(start)}
                origins = {_renamed(name, back): origin for name, origin in under.items()}
                state = {name: tensors[origin] for name, origin in origins.items()}
                inside = _inside(state, wanted, removed, layout)
                problems = misfits(wanted, inside)
                if not problems:
                    state, problems = _converted(inside, own, layout)
                if not problems:
                    first = next(name for name in under if _renamed(name, back) in wanted)
                    taken = frozenset(origins[name] for name in inside)
                    place = under[first].removesuffix(first)
                    found.append(Found(place, state, bool(children), layout=layout.title, origins=taken))
                elif hits > closest[0]:
                    closest = (hits, start, problems)
    return _Search(found, *closest, layout)


def _converted(
    found: dict[str, Tensor], own: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the net's own names, and the reason why they cannot be converted, if there is one."""
    if layout is OWN:
        return found, []
    try:
        state = layout.converted(found, own)
    except ValueError as error:
        return {}, [str(error)]
    return {name: fit_shape(tensor, own[name]) for name, tensor in state.items()}, []


def choose(found: Sequence[Found], what: str, source: Path) -> Found:
    """The match to load out of several. Raises UserError if the two best have different values and the same rank."""
    distinct: list[Found] = []
    for one in found:
        if not any(_same(one.state, other.state) for other in distinct):
            distinct.append(one)
    best, *rest = sorted(distinct, key=lambda one: one.rank)
    if rest and rest[0].rank == best.rank:
        raise SeveralMatchesError(
            f"{source}: holds {what} twice, with different values, under `{best.place}` and "
            f"`{rest[0].place}`; load it where it was made and save only one of them"
        )
    return best._replace(passed_over=tuple(one.place for one in rest))


def describe_match(found: Found, tensors: Mapping[str, Tensor], what: str) -> str:
    """One line for the user: number and prefix of the weights found, and which other tensors were not used."""
    others = Counter(_group(name, found.place) for name in tensors if name not in found.origins)
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in found.state.values() if t.is_floating_point()})
    parts = [f"all {len(found.state)} tensors of {what} found"]
    parts[0] += f" under `{found.place}`" if found.place else " without a prefix"
    parts[0] += ", its children numbered" if found.numbered else ""
    parts[0] += f", named as {found.layout}" if found.layout != OWN.title else ""
    parts += [f"stored as {', '.join(kinds)}"] if kinds != ["float32"] else []
    parts += [f"`{place}` would fit too and was not taken" for place in found.passed_over]
    parts += [f"{others.total()} other tensors not used ({listed(list(others), 4)})"] if others else []
    return "; ".join(parts)


def below(layer: str, tensors: Mapping[str, Tensor], what: str, source: Path) -> dict[str, Tensor]:
    """The tensors of the net that has a child `layer`, under names without their prefix; a `module.` is kept.

    If no name contains `layer`, these are all tensors, without the prefix that all names share. Raises UserError if
    there are several such nets with different values.
    """
    at = re.compile(rf"((?:.*?\.)??)(?:module\.)?{layer}\.")
    places = dict.fromkeys(found[1] for name in tensors if (found := at.match(name)))
    if not places:
        levels = zip(*(name.split(".")[:-1] for name in tensors), strict=False)
        places = {"".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)): None}
    states = [{n.removeprefix(place): t for n, t in tensors.items() if n.startswith(place)} for place in places]
    return choose([Found(*one) for one in zip(places, states, strict=True)], what, source).state


def _starts(names: Iterable[str], wanted: set[str]) -> list[tuple[str, int]]:
    """Prefixes after which wanted names follow, with the number of such names, largest number first."""
    hits: Counter[str] = Counter()
    for name in names:
        cuts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        hits.update(name[:cut] for cut in cuts if name[cut:] in wanted)
    return hits.most_common()


def _renamed(name: str, children: Mapping[str, str]) -> str:
    child, dot, rest = name.partition(".")
    return f"{children.get(child, child)}{dot}{rest}"


def _unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names without the parts that wrappers inserted, mapped to the original names; empty if two become equal.

    Also empty if there are no such parts.
    """
    short = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in tensors}
    return short if len(short) == len(tensors) and short.keys() != tensors.keys() else {}


def _inside(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], removed: Sequence[str], layout: Layout
) -> dict[str, Tensor]:
    """The tensors of the net's own children without removed layers; an unknown name among them means another net."""
    children = {name.partition(".")[0] for name in wanted}
    counts = Counter(child.rstrip(_DIGITS) for child in children if child[-1:].isdigit())
    stages = {stem for stem, count in counts.items() if stem and count > 1}  # such as `layer` of layer1 to layer4
    without = tuple(f"{layer}." for layer in removed)
    return {
        name: tensor if layout is OWN or name not in wanted else fit_shape(tensor, wanted[name])
        for name, tensor in state.items()
        if (_child_of(name, children, stages) or _TOKENS.fullmatch(name))
        and not name.startswith(without)
        and not layout.ignores(name)
    }


def _child_of(name: str, children: Set[str], stages: Set[str]) -> bool:
    """Whether a tensor belongs to one of the net's children, or to a further stage, which the net does not have."""
    child = name.partition(".")[0]
    return child in children or (child[-1:].isdigit() and child.rstrip(_DIGITS) in stages)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[n] is other[n] or torch.equal(one[n], other[n]) for n in one)


def _group(name: str, place: str) -> str:
    """The shortest prefix of `name`, cut at a dot, that is not a prefix of `place`."""
    shared = 0
    parts, stem = name.split("."), place.split(".")[:-1]
    while shared < min(len(parts) - 1, len(stem)) and parts[shared] == stem[shared]:
        shared += 1
    return ".".join(parts[: shared + 1])


def misfits(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """The reasons why a state dict does not fit, one entry per problem; empty if it fits.

    Missing counters of batch norm are no problem, since old files do not have them.
    """
    problems = []
    for name, tensor in wanted.items():
        if name not in found:
            if not name.endswith("num_batches_tracked"):
                problems.append(f"{name} is missing")
        elif found[name].shape != tensor.shape:
            problems.append(f"{name} is {_shape(found[name])}, not {_shape(tensor)}")
        elif found[name].is_floating_point() != tensor.is_floating_point() or found[name].layout != torch.strided:
            problems.append(f"{name} is {found[name].dtype}")
    problems.extend(f"{name}{_UNKNOWN}" for name in found if name not in wanted)
    if problems:  # reading all values takes long
        return problems
    return [f"{name} holds values that are not finite" for name, tensor in found.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    small = tensor.element_size() == 1 and tensor.is_floating_point()  # 8-bit floats
    values = tensor.float() if small else tensor
    # the sum of values that are not finite is not finite either, and takes a fifth of the time
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
