"""Import checkpoints of the original MTRCNet programs as runs, and export runs as checkpoints of these programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.head_settings import LstmHead
from configs.load import NO_KEYS, GivenKeys, flatten, load_config, load_dataset
from configs.schema import JOINT_FOLDER, Config, size_text
from engine.checkpoints import load_external_state, save_checkpoint, save_external_weights
from engine.files import read_json_object, sha256_file
from engine.progress import say
from engine.runs import BEST_FILE, RESULT_FILE, StageFolder, StageIdentity, require_same_classes
from features.dataset.phase_order import describe_order, parse_phase_order
from features.frames.settings_match import require_preprocess_of
from interop.mtrcnet_checkpoints import (
    NORMALISATIONS,
    UNITS,
    VARIANTS,
    Original,
    Variant,
    choose_normalisation,
    compose_file_name,
    is_mapping,
    mapping_tensors,
    parse_file_name,
    recognise,
    standardises,
    to_joint,
    to_original,
    variant_of,
)
from stage1_cnn.encoders.weights import below
from stage1_cnn.model import linear, weights_sha256
from stage2_temporal.joint.net import IMPORTED, STEPS, JointAbout, JointNet, joint_checkpoint, load_joint


@dataclass(frozen=True)
class ImportRequest:
    """A checkpoint of the original programs and the options of its import; an option is None if it is not given."""

    file: Path
    phase_order: str | None = None
    normalisation: str | None = None
    variant: str | None = None
    into: Path | None = None  # for a file with the mapping only: the run whose net gets the mapping
    trusted: bool = False
    given: GivenKeys = NO_KEYS  # the settings that come from the user and not from a preset


def import_original(config: Config, run: Path, request: ImportRequest) -> dict[str, Any]:
    """Convert a checkpoint of the original programs into a net in `RUN/joint/imported/`, and report its content.

    `config` determines the data set, the sampling rate, the size of images and, if the user gave it, their
    normalisation. All other settings come from the file and are written beside the net. Returns the content of
    `result.json`. Raises UserError if the file is missing, unreadable or not such a checkpoint, if it contradicts the
    data set or the user's settings, or if RUN contains another joint net.
    """
    tensors = load_external_state(request.file, request.trusted)
    state = below("share", tensors, "a net of the original programs", request.file)
    if request.into is not None:
        if not is_mapping(state):
            raise UserError(f"{request.file}: --into is for files with the mapping only, and this is a whole net")
        return _import_mapping(config, run, request, request.into, state)
    original = recognise(state, request.file, request.variant)
    spec = load_dataset(config.data.dataset)
    _require_phases(original.phases, request.phase_order, request.file)
    order = parse_phase_order(request.phase_order, spec, str(request.file)) if original.phases else None
    net = to_joint(original, spec, order, request.file)
    normalisation, reason = _normalisation(config, original, request)
    fitting = _fitting_settings(config, original, request, normalisation)
    for line in _findings(request.file, original, order, normalisation, reason, fitting):
        say(line)
    provenance = {
        "file": request.file.name,
        "sha256": sha256_file(request.file),
        "variant": original.variant.name,
        "phase_order": list(order) if order else None,
        "prefixed": original.prefixed,
        "normalisation": normalisation,
    }
    about = JointAbout.of(net, original.head, fitting, spec, IMPORTED)
    return _write_run(run, fitting, net, replace(about, original=provenance))


def _require_phases(phases: object, phase_order: str | None, where: Path) -> None:
    if phase_order is not None and not phases:
        raise UserError(f"--phase-order: {where} is a net for tools only; omit this option")


def _normalisation(config: Config, original: Original, request: ImportRequest) -> tuple[str, str]:
    """The key in `NORMALISATIONS`, or `given` if the user gave the values, and the reason in words."""
    name, reason = choose_normalisation(original, request.normalisation)
    keys = request.given.any_of("preprocess.mean", "preprocess.std")
    if not keys or config.preprocess == config.preprocess.model_copy(update=NORMALISATIONS[name]):
        return name, reason
    if request.normalisation is not None:
        if request.given.by_set.isdisjoint(keys):
            return name, reason
        raise UserError(f"{request.file}: --normalisation {name} and --set {keys[0]} differ; give only one of them")
    if len(keys) == 1:
        raise UserError(f"{request.file}: {keys[0]} is given alone; give both preprocess.mean and preprocess.std")
    return "given", f"given by preprocess.mean and preprocess.std; otherwise it would be {name}: {reason}"


def _fitting_settings(config: Config, original: Original, request: ImportRequest, normalisation: str) -> Config:
    """The settings for `train-joint --from-joint` and `extract`, with the values that the file determines.

    Raises UserError if the user gave another one of these values with `--set`.
    """
    tree = config.model_dump()
    tree["cnn"] |= {"backbone": original.backbone, "weights": "random"}  # the file contains all weights
    if original.head is not None:
        tree["temporal"]["head"] = original.head.model_dump()
    tree["joint"]["net"] = original.net.model_dump()
    if not original.net.mapping:
        tree["joint"] |= {"mapping": None, "correlation": None}
    named = parse_file_name(request.file.name)
    clips = {"mode": "clips", "inference": "clip"} | ({"frames": named.frames} if named else {})
    by_set = request.given.by_set
    tree["joint"]["sequence"] |= {key: clips[key] for key in clips if f"joint.sequence.{key}" not in by_set}
    if normalisation != "given":
        tree["preprocess"] |= NORMALISATIONS[normalisation]
    fitting = Config.model_validate(tree)
    asked, settled = flatten(config.model_dump()), flatten(fitting.model_dump())
    if overruled := [key for key in sorted(by_set) if key in asked and asked[key] != settled.get(key)]:
        key = overruled[0]
        raise UserError(
            f"{request.file}: {key}={asked[key]} is given, but the file has {settled.get(key)}; omit this setting"
        )
    return fitting


def _findings(
    file: Path, original: Original, order: Sequence[str] | None, normalisation: str, reason: str, fitting: Config
) -> Iterator[str]:
    named, frames = parse_file_name(file.name), fitting.joint.sequence.frames
    yield f"{file}: {original.sentence()}"
    yield (
        f"file name: {named.sentence()}" if named else f"file name without settings; assuming clips of {frames} frames"
    )
    if named and named.variant and named.variant != original.variant.name:
        yield f"note: named like {VARIANTS[named.variant].title}, but its layers are those of another net"
    if original.unused:
        layers = sorted({name.partition(".")[0] for name in original.unused})
        yield f"kept only for export, since a net for tools does not use them: {', '.join(layers)}"
    elif original.guessed:
        yield "note: a net for tools with an unused LSTM has the same layers; if this is one, add --variant tool"
    if order:
        yield f"phases in the file: {describe_order(order)}"
    if original.tools:
        tools = load_dataset(fitting.data.dataset).tools
        yield f"tools in the file, in the order of the annotation files: {describe_order(tools)}"
    pixels = fitting.preprocess
    yield f"normalisation {normalisation}: mean {pixels.mean}, std {pixels.std} ({reason})"
    yield (
        f"images: resized to {size_text(pixels.resize_px)}, cropped to {size_text(pixels.crop_px)}, margin "
        f"{'cut' if pixels.cut_margin else 'kept'}, {fitting.data.fps:g} fps, as in the settings "
        "(the original programs: 250, 224, 1 fps)"
    )


def _import_mapping(
    config: Config, run: Path, request: ImportRequest, into: Path, state: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Write a new run whose net is that of the run `into` with the mapping of the file."""
    file = request.file
    for option in ("phase_order", "normalisation", "variant"):
        if getattr(request, option) is not None:
            given = f"--{option.replace('_', '-')}"
            raise UserError(f"{given}: {file} contains only the mapping, the rest is that of --into; omit this option")
    path = joint_checkpoint(into)
    net, about = load_joint(path)
    require_preprocess_of(about.preprocess, config, request.given, path)
    head = about.head
    if net.phase is None or not net.tools or net.mapping is not None:
        raise UserError(f"{path}: --into needs a net for phases and tools without a mapping")
    if not isinstance(head, LstmHead) or not head.relu:
        raise UserError(f"{path}: the mapping needs a ReLU after the LSTM, which this net does not have")
    net.mapping = linear(head.hidden, net.tools)
    net.mapping.load_state_dict(mapping_tensors(state, net.mapping.state_dict(), file))
    net.net_config = net.net_config.model_copy(update={"mapping": True})
    fitting = load_config(path.parent / "config.yaml")
    fitting = fitting.model_copy(update={"joint": fitting.joint.model_copy(update={"net": net.net_config})})
    named = parse_file_name(file.name)
    say(f"{file}: the mapping from the phase branch (LSTM {head.hidden}) to {net.tools} tools")
    say(f"file name: {named.sentence()}" if named else "file name without settings")
    say(f"added to {path}")
    mapping = {"file": file.name, "sha256": sha256_file(file), "into_sha256": sha256_file(path)}
    original = about.provenance | {"mapping": mapping}
    return _write_run(run, fitting, net, replace(about, step=IMPORTED, net=net.net_config, original=original))


def _write_run(run: Path, config: Config, net: JointNet, about: JointAbout) -> dict[str, Any]:
    trained = [step for step in STEPS if (run / JOINT_FOLDER / step).exists()]
    if trained:
        raise UserError(f"{run / JOINT_FOLDER / trained[0]}: this run has a trained joint net; choose another --name")
    content = replace(about, scores=None).to_json()
    weights = weights_sha256(net)
    named = {key: value for key, value in content.items() if key != "unused"}  # the file's hash in `original` covers it
    stage = StageFolder(run, f"{JOINT_FOLDER}/{IMPORTED}", config, StageIdentity({**named, "weights_sha256": weights}))
    path = stage.path / BEST_FILE
    found = stage.result
    if found is not None and path.is_file():
        say(f"{stage.path}: already imported, nothing to do")
        return found
    stage.open()
    save_checkpoint(path, {"model": net.state_dict(), "scores": {}, **content})
    say(f"settings for it: --config {stage.path / 'config.yaml'}")
    return stage.finish(
        {
            "step": IMPORTED,
            "checkpoint": str(path),
            "original": about.provenance,
            "weights_sha256": weights,
            "sentence": f"{path}; next: evaluate --model joint --name {run.name}",
        }
    )


# ---------------------------------------------------------------------------------------------- export


def export_original(config: Config, run: Path, out: Path, phase_order: str | None, prefix: bool | None = None) -> Path:
    """Write the joint net of a run into the folder `out`, under the original keys and file name; returns the path.

    `phase_order` is the order of the phases in the file. `prefix` says whether keys start with `module.`; if it is
    None, they do if those of the imported file do or, for a net that was not imported, if those of the original program
    do. Raises UserError if the original programs have no such net, if a net for phases is exported without an order, or
    if the file exists.
    """
    path = joint_checkpoint(run)
    net, about = load_joint(path)
    variant = variant_of(net, about.head, path)
    file = out / _file_name(variant, about, path)
    if file.exists():
        raise UserError(f"{file}: exists; choose another folder")
    _require_phases(net.phase, phase_order, path)
    order = None
    if net.phase is not None:
        spec = load_dataset(config.data.dataset)
        require_same_classes(path, "phases", about.phases, spec.phases, spec.name)
        order = parse_phase_order(phase_order, spec, str(file))
    if prefix is None:
        prefix = bool(about.provenance.get("prefixed", variant.name != "pytorch1.2.0"))
    save_external_weights(file, to_original(net, variant, about.phases, order, prefix))
    for line in _notes_of_export(net, variant, about, order):
        say(line)
    return file


def _file_name(variant: Variant, about: JointAbout, path: Path) -> str:
    """The name of the imported file or, for a net that was not imported, one composed of the training's settings."""
    if about.step == IMPORTED and about.provenance.get("variant") == variant.name:
        return Path(about.provenance["file"]).name
    values = {"length": about.frames}
    settings, result = path.parent / "config.yaml", path.parent / RESULT_FILE
    if about.step != IMPORTED and settings.is_file():
        joint = load_config(settings).joint
        step = getattr(joint, about.step)
        values |= {
            "opt": int(step.optim.name != "sgd"),
            "mulopt": int(step.backbone_lr_factor != 1),
            "flip": int(joint.augment.flip),
            "crop": {"random": 0, "centre": 1, "five": 5, "ten": 10}[joint.crops],
            "batch": joint.sequence.batch * joint.sequence.frames,
        }
    if result.is_file():
        values["epoch"] = int(read_json_object(result).get("epochs", 0))
    accuracy = (about.scores or {}).get("val_accuracy")
    if accuracy is not None:
        values |= dict.fromkeys(("val", "val2", "valPhase"), round(10_000 * accuracy))
    return compose_file_name(variant, values)


def _notes_of_export(net: JointNet, variant: Variant, about: JointAbout, order: Sequence[str] | None) -> Iterator[str]:
    yield f"{net.backbone.name}, {variant.title}"
    if about.step != IMPORTED:
        yield "0 in the file name means: not measured"
    if order:
        yield f"phases in the file: {describe_order(order)}"
    if net.phase is not None and standardises(net.phase.standardise):
        yield "the standardisation of embeddings is folded into the input weights and bias of the LSTM"
    mean, std = list(about.preprocess.mean), list(about.preprocess.std)
    yield f"the file has no normalisation of images: this net needs mean {mean}, std {std}"
    if variant.unused and not net.unused:
        yield "the original tool program also has an unused LSTM: load the file with strict=False there"
    widths = {net.net_config.tool_hidden or UNITS}
    if isinstance(about.head, LstmHead):
        widths |= {about.head.hidden, about.head.fc_hidden or UNITS}
    if net.backbone.name != "resnet50" or widths != {UNITS}:
        yield f"note: the original programs use ResNet50 and {UNITS} units; change them to load this net"
