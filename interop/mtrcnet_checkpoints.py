"""Convert state dicts of the original MTRCNet programs (Jin et al. 2020, arXiv 1907.06099) to a `JointNet` and back.

Their nets have the backbone as named children of `share`, an `lstm`, and linear layers `fc` (phases), `fc_h`, `fc2`,
`fc3` (tools) and `fc_p2t` (the mapping), with the prefix `module.` after data-parallel training. The files contain
neither class names nor the normalisation of images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.dataset_spec import DataSetSpec
from configs.errors import UserError
from configs.head_settings import HeadSettings, LstmHead
from configs.schema import JointNetConfig
from features.dataset.phase_order import ids_of_order
from stage1_cnn.encoders.backbone import build_backbone
from stage1_cnn.encoders.weights import misfits
from stage2_temporal.heads.standardise import Standardise
from stage2_temporal.joint.net import JointNet, build_joint

PREFIX = "module."
MAPPING_KEYS = frozenset({"weight", "bias"})
UNITS = 512  # number of units of every layer in the original programs
_BACKBONE = ("share", "backbone.net")
_PHASE_LAYER = "fc"
_MOST_UNITS = 1 << 14
# The name of a ResNet by its kind of block and number of blocks per layer. The original programs use ResNet50; their
# files can hold the others as well.
_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("conv2", (2, 2, 2, 2)): "resnet18",
    ("conv2", (3, 4, 6, 3)): "resnet34",
    ("conv3", (3, 4, 6, 3)): "resnet50",
    ("conv3", (3, 4, 23, 3)): "resnet101",
    ("conv3", (3, 8, 36, 3)): "resnet152",
}


@dataclass(frozen=True)
class Variant:
    """One of the nets that the original programs can train.

    `layers` maps its layers except `share` to modules of a `JointNet`. Layers in `unused` may be in a file although the
    net does not use them. File names start with `stem` and end with the accuracies whose keys are in `accuracies`.
    """

    name: str
    title: str
    layers: Mapping[str, str]
    tasks: Literal["both", "tool", "phase"]
    stem: str
    accuracies: tuple[str, ...] = ("train1", "train2", "val1", "val2")
    relu: bool = False
    unused: frozenset[str] = frozenset()

    @property
    def form(self) -> tuple[str, bool, bool, bool, bool]:
        """What identifies a variant.

        These are its tasks, and whether it has a two-layer tool branch, a mapping, a ReLU after the LSTM, and a hidden
        layer before the phase layer.
        """
        return self.tasks, "fc3" in self.layers, "fc_p2t" in self.layers, self.relu, "fc_h" in self.layers


_PHASE = {"lstm": "phase.head.rnn", _PHASE_LAYER: "phase.head.fc"}
_TOOLS = {"fc2": "tool_head"}
_TWO_LAYERS = {"fc2": "tool_head.0", "fc3": "tool_head.2"}
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "tool",
            "the single-task net for tools",
            _TOOLS,
            "tool",
            "cnn_lstm_tool",
            ("train1", "val1"),
            unused=frozenset(_PHASE),
        ),
        Variant("phase", "the single-task net for phases", _PHASE, "phase", "lstm_phase", ("train", "val")),
        Variant("multitask", "MTRCNet: phases and tools", _PHASE | _TOOLS, "both", "cnn_lstm"),
        Variant(
            "two-layer",
            "phases and tools with the tool branch of MTRCNet-CL, without the mapping",
            _PHASE | _TWO_LAYERS,
            "both",
            "cnn_lstm_1",
            relu=True,
        ),
        Variant(
            "cl",
            "MTRCNet-CL: phases, tools and the mapping",
            _PHASE | _TWO_LAYERS | {"fc_p2t": "mapping"},
            "both",
            "cnn_lstm1_p2t",
            relu=True,
        ),
        Variant(
            "pytorch1.2.0",
            "phases and tools as in the pytorch1.2.0 release",
            _PHASE | {"fc_h": "phase.head.fc_hidden"} | _TOOLS,
            "both",
            "cnn_lstm_phase+tool",
            ("trainPhase", "trainTool", "valPhase", "valTool"),
        ),
    )
}
_LAYERS = frozenset(layer for variant in VARIANTS.values() for layer in variant.layers)


# ---------------------------------------------------------------------------------------------- file names


@dataclass(frozen=True)
class NamedRun:
    """The description of a training run that a file name contains; `values` holds the numbers in it by key."""

    stem: str
    values: Mapping[str, int]

    @property
    def frames(self) -> int:
        """The length of a clip in frames."""
        return self.values["length"]

    @property
    def variant(self) -> str | None:
        """The name of the variant; None if the file name does not determine it."""
        if self.stem == "cnn_lstm" and "train1" in self.values and "train2" not in self.values:
            return "tool"  # the main release's tool program begins its file names like those of the net for both tasks
        stems = {variant.stem: variant.name for variant in VARIANTS.values()} | {"lstm": "phase"}
        return stems.get(self.stem)

    def sentence(self) -> str:
        """A sentence for the user with the settings, and then the accuracies in percent."""
        known = self.values
        parts = [f"epoch {known['epoch']}", f"clips of {known['length']} frames"]
        parts += [words[known[key]] for key, words in _CODES.items() if known.get(key) in words]
        parts += [f"batches of {known['batch']} frames"] if "batch" in known else []
        scores = [f"{words} {known[key] / 100:.2f} %" for key, words in _ACCURACIES.items() if key in known]
        return "; ".join([", ".join(parts), *([f"accuracies: {', '.join(scores)}"] if scores else [])])


_ACCURACIES = {
    **dict.fromkeys(("train1", "trainTool"), "training tools"),
    **dict.fromkeys(("train2", "trainPhase"), "training phases"),
    **dict.fromkeys(("val1", "valTool"), "validation tools"),
    **dict.fromkeys(("val2", "valPhase"), "validation phases"),
    "train": "training",
    "val": "validation",
}
_CODES: Mapping[str, Mapping[int, str]] = {
    "opt": {0: "SGD", 1: "Adam"},
    "mulopt": {0: "one learning rate", 1: "backbone at a tenth of the learning rate"},
    "flip": {0: "no flips", 1: "flips"},
    "crop": {0: "random crop", 1: "centre crop", 2: "no crop", 5: "five crops", 10: "ten crops"},
}
_RUN_NAME = re.compile(r"^(?P<stem>[\w+]+?)_(?P<values>epoch_\d{1,6}_length_\d{1,4}(?:_[A-Za-z0-9]+)*?)(?:_p2t)?$")
_VALUE = re.compile(r"([A-Za-z]+[12]?)_(\d{1,6})(?=_|$)")


def parse_file_name(name: str) -> NamedRun | None:
    """Parse names like `cnn_lstm_epoch_25_length_10_opt_1_..._val2_8864.pth`; None for any other name."""
    found = _RUN_NAME.match(Path(name).stem)
    if found is None:
        return None
    values = {key: int(value) for key, value in _VALUE.findall(found["values"])}
    return NamedRun(found["stem"], values) if values.get("length") else None


def compose_file_name(variant: Variant, values: Mapping[str, int]) -> str:
    """The file name that an original program would use, with 0 for numbers missing in `values`."""
    keys = ("epoch", "length", "opt", "mulopt", "flip", "crop", "batch", *variant.accuracies)
    return "_".join([variant.stem, *(f"{key}_{values.get(key, 0)}" for key in keys)]) + ".pth"


# ---------------------------------------------------------------------------------------------- normalisation


# The values of `preprocess` that normalise images, for each release: red, green and blue, on a scale from 0 to 1.
NORMALISATIONS = {
    "main": {"mean": (0.3456, 0.2281, 0.2233), "std": (0.2528, 0.2135, 0.2104)},
    "pytorch1.2.0": {"mean": (0.44893518, 0.3226702, 0.34424525), "std": (0.22357443, 0.18503027, 0.1900281)},
}


def choose_normalisation(original: Original, asked: str | None) -> tuple[str, str]:
    """The key in `NORMALISATIONS` and the reason for it in words.

    The key is `asked` or, if this is None, inferred from the layers and the prefix of the keys.
    """
    if asked is not None:
        return asked, "given by --normalisation"
    if original.variant.name == "pytorch1.2.0":
        return "pytorch1.2.0", "only files of the pytorch1.2.0 release contain fc_h, and its tool programs use it"
    if original.variant.name == "tool" and not original.prefixed:
        return "pytorch1.2.0", "a net for tools without `module.` in its keys is from the pytorch1.2.0 release"
    if original.prefixed:
        return "main", "keys with `module.` are from the main release"
    if original.variant.tasks == "phase":
        return "main", "both releases use it to train nets for phases only"
    return "main", "only the main release has this net, though its keys usually start with `module.`"


# ---------------------------------------------------------------------------------------------- from the original


@dataclass(frozen=True)
class Original:
    """A recognised state dict of an original net, with keys without `module.`.

    `unused` holds the layers in the file that the net does not use.
    """

    variant: Variant
    backbone: str
    tensors: Mapping[str, Tensor] = field(repr=False)
    prefixed: bool
    unused: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    guessed: bool = False  # True if neither layers, file name nor user determine which of two nets this is

    @property
    def net(self) -> JointNetConfig:
        """The settings of the joint net's branches."""
        return JointNetConfig(
            tasks=self.variant.tasks,
            tool_hidden=self._units("fc2") if "fc3" in self.variant.layers else None,
            mapping="fc_p2t" in self.variant.layers,
        )

    @property
    def head(self) -> LstmHead | None:
        """The settings of the phase branch; None for a net for tools."""
        if "lstm" not in self.variant.layers:
            return None
        return LstmHead(
            hidden=self.tensors["lstm.weight_hh_l0"].shape[1],
            relu=self.variant.relu,
            fc_hidden=self._units("fc_h") if "fc_h" in self.variant.layers else None,
        )

    @property
    def phases(self) -> int:
        """The number of phases, C; 0 without a phase branch."""
        return self._units(_PHASE_LAYER) if _PHASE_LAYER in self.variant.layers else 0

    @property
    def tools(self) -> int:
        """The number of tools, K; 0 without a tool branch."""
        last = next((layer for layer in ("fc3", "fc2") if layer in self.variant.layers), None)
        return self._units(last) if last else 0

    def _units(self, layer: str) -> int:
        return len(self.tensors[f"{layer}.weight"])

    def sentence(self) -> str:
        """A sentence for the user about the content of the file."""
        head = self.head
        parts = [self.backbone]
        parts += [f"LSTM {head.hidden}"] if head else []
        parts += [f"{count} {what}" for count, what in ((self.phases, "phases"), (self.tools, "tools")) if count]
        keys = "keys with `module.`" if self.prefixed else "keys without `module.`"
        return f"{self.variant.title} ({', '.join(parts)}; {keys})"


def is_mapping(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict contains the mapping only (`fc_epoch_..._p2t.pth`)."""
    return {name.removeprefix(PREFIX) for name in state} == MAPPING_KEYS


def recognise(state: Mapping[str, Tensor], source: Path, asked: str | None = None) -> Original:
    """Recognise which of the original nets a state dict contains.

    The layers may fit several variants, since a net for tools may contain an unused LSTM. In this case `asked` decides;
    without it, the name of the file `source`; if that does not tell, the variant that uses every layer is taken. Raises
    UserError with the reason if no variant fits.
    """
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    layers = {name.partition(".")[0] for name in tensors}
    if len(tensors) < len(state):
        raise UserError(f"{source}: contains some keys twice, with and without `{PREFIX}`; save one net only")
    if "share" not in layers:
        raise UserError(f"{source}: {_what_else(tensors)}")
    fitting = _fitting_variants(layers - {"share"}, source)
    variant, guessed = _choose(fitting, source, asked)
    used = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in ("share", *variant.layers)}
    _require_matrices(variant, used, source)
    return Original(
        variant,
        _backbone_name(used),
        used,
        prefixed=any(name.startswith(PREFIX) for name in state),
        unused={name: tensor.clone() for name, tensor in tensors.items() if name not in used},
        guessed=guessed,
    )


def _what_else(tensors: Mapping[str, Tensor]) -> str:
    if is_mapping(tensors):
        return "only the mapping; give the run of its net with --into RUN"
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return "only a ResNet, not a net of the original programs; train from it with --set cnn.weights=FILE"
    if any(name.startswith("backbone.net.") for name in tensors):
        return "a checkpoint of this project, not of the original programs; use its run directly"
    shown = ", ".join(name[:40] for name in list(tensors)[:3])
    return f"not a net of the original programs: no backbone named `share` among its keys ({shown}, ...)"


def _fitting_variants(layers: set[str], source: Path) -> list[Variant]:
    unknown = sorted(layers - _LAYERS)
    if unknown:
        raise UserError(f"{source}: not a net of the original programs: none of them has a layer {unknown[0][:40]!r}")
    fitting = [one for one in VARIANTS.values() if set(one.layers) <= layers <= set(one.layers) | one.unused]
    if not fitting:
        known = "; ".join(f"{one.name}: {', '.join(sorted(one.layers))}" for one in VARIANTS.values())
        raise UserError(
            f"{source}: not a net of the original programs: no variant has the layers "
            f"{', '.join(sorted(layers)) or 'share only'} (besides share; {known})"
        )
    return fitting


def _choose(fitting: Sequence[Variant], source: Path, asked: str | None) -> tuple[Variant, bool]:
    """The variant to take among those that fit, and whether it is a guess."""
    names = [variant.name for variant in fitting]
    if asked is not None and asked not in names:
        raise UserError(f"{source}: --variant {asked}: its layers are those of {' or '.join(names)}")
    named = parse_file_name(source.name)
    wanted = asked or (named.variant if named else None)
    for variant in fitting:
        if variant.name == wanted:
            return variant, False
    return max(fitting, key=lambda variant: len(variant.layers)), len(fitting) > 1


def _require_matrices(variant: Variant, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise UserError if one of the matrices that determine layer sizes is missing or has an impossible shape."""
    names = ["lstm.weight_hh_l0" if layer == "lstm" else f"{layer}.weight" for layer in variant.layers]
    for name in names:
        tensor = tensors.get(name)
        if tensor is None:
            raise UserError(f"{source}: incomplete net: {name} is missing")
        if tensor.dim() != 2 or not 0 < min(tensor.shape) <= max(tensor.shape) <= _MOST_UNITS:
            raise UserError(f"{source}: {name} has the impossible shape {tuple(tensor.shape)}")


def _backbone_name(tensors: Mapping[str, Tensor]) -> str:
    blocks: list[set[str]] = [set(), set(), set(), set()]
    for name in tensors:
        found = re.match(r"share\.layer([1-4])\.(\d{1,3})\.", name)
        if found:
            blocks[int(found[1]) - 1].add(found[2])
    kind = "conv3" if "share.layer1.0.conv3.weight" in tensors else "conv2"
    return _RESNETS.get((kind, tuple(len(layer) for layer in blocks)), "resnet50")


def to_joint(original: Original, spec: DataSetSpec, order: Sequence[str] | None, source: Path) -> JointNet:
    """Convert a net to a `JointNet` in evaluation mode, with the phases in the order of `spec`.

    `order` names the phases 0, 1, ... of the file; None for a net without phases. Raises UserError if the file and the
    data set have different numbers of classes, or if a tensor is missing, has another shape or is not finite.
    """
    _require_class_counts(original, spec, source)
    backbone = build_backbone(original.backbone, "random", 0)
    net = build_joint(backbone, original.net, original.head, len(spec.tools), len(spec.phases)).eval()
    ours = net.state_dict()
    names = _names(original.variant, ours)
    problems = misfits({theirs: ours[mine] for theirs, mine in names.items()}, original.tensors)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{source}: not {original.variant.title} on {original.backbone} ({problems[0]}{more})")
    tensors = dict(original.tensors)
    if order is not None:
        _reorder_phases(tensors, np.argsort(ids_of_order(order, spec.phases)))
    net.load_state_dict(ours | {names[theirs]: tensor for theirs, tensor in tensors.items()})
    net.unused = dict(original.unused)
    return net


def _require_class_counts(original: Original, spec: DataSetSpec, source: Path) -> None:
    for what, found, classes in (("phases", original.phases, spec.phases), ("tools", original.tools, spec.tools)):
        if found and found != len(classes):
            raise UserError(
                f"{source}: has {found} {what}, but {spec.name} has {len(classes)} "
                f"({', '.join(classes) or 'none'}); give its data set with --set data.dataset=FILE"
            )


def _names(variant: Variant, ours: Mapping[str, Any]) -> dict[str, str]:
    """A dictionary from original keys to `JointNet` keys, for every tensor in `ours`."""
    return {
        theirs + name.removeprefix(mine): name
        for theirs, mine in (_BACKBONE, *variant.layers.items())
        for name in ours
        if name.startswith(f"{mine}.")
    }


def _reorder_phases(tensors: dict[str, Tensor], rows: NDArray[np.int64]) -> None:
    """Rearrange the rows of the phase layer: new row i is the old row `rows[i]`."""
    for part in ("weight", "bias"):
        tensors[f"{_PHASE_LAYER}.{part}"] = tensors[f"{_PHASE_LAYER}.{part}"][torch.from_numpy(rows)]


def mapping_tensors(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Weight (K, H) and bias (K,) of the mapping. Raises UserError unless they have the shapes in `wanted`."""
    found = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    problems = misfits(wanted, found)
    if problems:
        raise UserError(f"{source}: this mapping does not fit the net given by --into ({problems[0]})")
    return found


# ---------------------------------------------------------------------------------------------- to the original


def variant_of(net: JointNet, head: HeadSettings | None, source: Path) -> Variant:
    """The original net that has the same layers as a `JointNet`. Raises UserError with the reason if there is none."""
    if net.backbone.name not in _RESNETS.values():
        raise UserError(f"{source}: the original programs use ResNets only; this net has {net.backbone.name}")
    relu = fc_hidden = False
    if net.phase is not None:
        if not isinstance(head, LstmHead):
            raise UserError(f"{source}: the original programs use an LSTM; this net has {head.name if head else '?'}")
        if head.layers > 1 or head.bidirectional or head.dropout:
            raise UserError(
                f"{source}: the original LSTM has one layer, one direction and no dropout; this one differs"
            )
        relu, fc_hidden = head.relu, head.fc_hidden is not None
    settings = net.net_config
    form = (settings.tasks, settings.tool_hidden is not None, settings.mapping, relu, fc_hidden)
    for variant in VARIANTS.values():
        if variant.form == form:
            return variant
    raise UserError(
        f"{source}: no original net has these branches (tasks {form[0]}; two-layer tool branch {form[1]}, mapping "
        f"{form[2]}, ReLU after the LSTM {form[3]}, hidden layer before the last {form[4]})"
    )


def to_original(
    net: JointNet, variant: Variant, phases: Sequence[str], order: Sequence[str] | None, prefix: bool
) -> dict[str, Tensor]:
    """The state dict of a `JointNet` under the original keys, with the phases in the order `order`.

    The original nets do not standardise embeddings, so the constants of standardisation are folded into the input
    weights and the bias of the LSTM.
    """
    ours = net.state_dict()
    state = {theirs: ours[mine].detach().clone() for theirs, mine in _names(variant, ours).items()}
    state |= {name: tensor for name, tensor in net.unused.items() if name.partition(".")[0] in variant.unused}
    if net.phase is not None:
        _fold(state, net.phase.standardise)
    if order is not None:
        _reorder_phases(state, ids_of_order(order, phases))
    return {f"{PREFIX}{name}": tensor for name, tensor in state.items()} if prefix else state


def standardises(standardise: Standardise) -> bool:
    """Whether the layer changes its input, that is, whether it is not the identity."""
    return bool((standardise.mean != 0).any() or (standardise.scale != 1).any())


def _fold(state: dict[str, Tensor], standardise: Standardise) -> None:
    """Fold standardisation: W ((x - m) s) + b = (W s) x + (b - (W s) m), in double precision."""
    if not standardises(standardise):
        return
    mean, scale = standardise.mean.double(), standardise.scale.double()  # (D,)
    weight = state["lstm.weight_ih_l0"].double() * scale  # (4 H, D)
    state["lstm.bias_ih_l0"] = (state["lstm.bias_ih_l0"].double() - weight @ mean).float()
    state["lstm.weight_ih_l0"] = weight.float()
