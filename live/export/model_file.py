"""`export-model`: write the nets of a run as an ONNX file, once ONNX Runtime has given what torch gives."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from engine.files import atomic_path, make_folder, read_json_object, sha256_file, write_json
from engine.progress import say
from engine.stopping import StopRequest
from live.export.agreement import CHECK_FRAMES, TOLERANCE, Agreement, compare
from live.export.description import describe
from live.export.frame_net import FrameNet
from live.export.onnx_model import OPSET, OnnxSession, convert, package
from live.nets import Nets


@dataclass(frozen=True)
class Exported:
    """What `export_model` did: the file, its result beside it, and whether both were there already."""

    path: Path
    result: dict[str, Any]
    unchanged: bool = False

    def sentence(self) -> str:
        """The outcome in one line."""
        if self.unchanged:
            return f"{self.path}: unchanged"
        size, largest = self.result["bytes"] / 1e6, max(self.result["check"]["largest_difference"].values())
        return f"{self.path}: {size:.1f} MB; ONNX Runtime and torch differ by at most {largest:.1e}"


def result_path(path: Path) -> Path:
    """The file beside an exported model that holds the result of its check."""
    return path.with_suffix(".json")


def export_model(nets: Nets, path: Path, stop: StopRequest, *, replace: bool = False) -> Exported:
    """Write the model to `path`, and beside it a JSON file with hashes and the result of the check.

    A model that was made of the same nets is left as it is. Raises UserError if another file would be replaced without
    `replace`, if the nets cannot be converted, or if ONNX Runtime gives other probabilities than torch; nothing is
    written then. Raises Stopped when `stop` is set.
    """
    if path.suffix != ".onnx":
        raise UserError(f"--out {path}: the name of the file must end in .onnx")
    versions = {name: package(name).__version__ for name in ("onnx", "onnxruntime", "onnxscript")}
    net = FrameNet(nets).eval()
    about = describe(nets, net)
    made_by = {"model": about, "opset": OPSET, "torch": torch.__version__, **versions}
    if (known := _found(path, made_by)) is not None and path.is_file() and known.get("sha256") == sha256_file(path):
        return Exported(path, known, unchanged=True)
    foreign = path if path.exists() else result_path(path) if result_path(path).exists() and known is None else None
    if foreign is not None and not replace:
        raise UserError(
            f"{foreign}: exists and is not this model, made by these versions; choose another --out, or add --force to "
            "replace it"
        )
    say("converting to ONNX")
    stop.raise_if_set()
    content = convert(net, about)
    agreement = compare(nets, net, OnnxSession(content, torch.get_num_threads()), stop)
    _require_agreement(agreement)
    if (worst := max(agreement.end_to_end.values())) > TOLERANCE:
        say(
            f"note: from frame to class, probabilities differ by up to {worst:.1e}: embeddings are rounded to "
            "float16, and this net magnifies the rounding"
        )
    digest = sha256(content).hexdigest()
    result = {"sha256": digest, "bytes": len(content), "check": agreement.to_json(), "made_by": made_by}
    make_folder(path.parent)
    # the result first: if this process ends in between, the next one knows that the name is this model's
    write_json(result_path(path), result)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return Exported(path, result)


def _found(path: Path, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """The result that is there already, if it is of a model of the same nets, made by the same versions."""
    try:
        found = read_json_object(result_path(path))
    except UserError:  # missing, damaged, or of another program
        return None
    return found if found.get("made_by") == made_by else None


def _require_agreement(agreement: Agreement) -> None:
    if agreement.agrees:
        return
    name, value = max(agreement.largest.items(), key=lambda one: (one[1] != one[1], one[1]))
    raise UserError(
        f"export-model: the exported model gives other probabilities than torch (output {name}: {value:.2g} within "
        f"{CHECK_FRAMES} frames, more than {TOLERANCE:g}), so nothing was written; does the head start from a state "
        "of zeros?"
    )
