"""The labels that go with imported features: those in or beside the files, or text files in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec, class_ids, folded_name
from configs.errors import UserError, listed
from engine.files import sha256_file
from engine.progress import say
from evaluation.files.third_party import find_phase_files, read_external_phases
from features.dataset.index import AnnotationFile
from features.dataset.phase_order import describe_order, ids_of_order, parse_phase_order
from features.video_labels import NO_LABEL
from interop.feature_files import mstcn
from interop.feature_files.arrays import Content
from interop.feature_files.found import FeatureFile, Found

SOURCES = ("files", "index", "none")
IGNORED = (-1, -100)  # numbers that programs use for frames without a label
# The order of TeCNO's numbers (its cholec80.py), which is that of MTRCNet as well.
TECNO_ORDER = (
    "Preparation",
    "CalotTriangleDissection",
    "ClippingCutting",
    "GallbladderDissection",
    "GallbladderPackaging",
    "CleaningCoagulation",
    "GallbladderRetraction",
)


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of all rows of a file of features: `phase` (L,) int8 and `tools` (L, K) int8, each None if absent.

    `file` is what the index records about the file that holds them.
    """

    phase: NDArray[np.int8] | None = None
    tools: NDArray[np.int8] | None = None
    file: AnnotationFile | None = None

    @property
    def rows(self) -> int | None:
        """L, or None without labels."""
        known = self.tools if self.phase is None else self.phase
        return None if known is None else len(known)


class LabelReader:
    """Reads the labels of one video after the other from `source`: `files`, `index`, `none`, or a folder of text files.

    Raises UserError if there is no such folder, or if it holds no file of labels.
    """

    def __init__(self, found: Found, spec: DataSetSpec, source: str, phase_order: str | None) -> None:
        self.found, self.spec, self.source, self.phase_order = found, spec, source, phase_order
        if phase_order is not None and (source in ("index", "none") or (source, found.layout) == ("files", "mstcn")):
            raise UserError("--phase-order: these labels are not numbers of phases; leave it out")
        self.folder = {} if source in SOURCES else find_phase_files(Path(source), spec)[0]
        self.order: tuple[str, ...] | None = None  # of numbers, once a file has needed it

    def read(self, video_id: str, file: FeatureFile, content: Content) -> Labels:
        """Return a video's labels. Raises UserError naming the file, and the row that is wrong."""
        if self.folder:
            return self._from_folder(self.folder[video_id]) if video_id in self.folder else Labels()
        if self.source != "files":
            return Labels()
        if self.found.layout == "mstcn":
            path = self.found.truth_of(file)
            if path is None:
                return Labels()
            phase, record = mstcn.read_truth(path, path.relative_to(self.found.root).as_posix(), self.spec)
            return Labels(phase, file=record)
        if file.pickled is not None:
            content = replace(content, labels=file.pickled.phase, tools=file.pickled.tools)
        return self._from_arrays(file, content)

    def _from_folder(self, path: Path) -> Labels:
        order = parse_phase_order(self.phase_order, self.spec, str(path)) if self.phase_order else None
        phase = read_external_phases(path, self.spec, order).phase.astype(np.int8)
        return Labels(phase, file=AnnotationFile(path=path.name, sha256=sha256_file(path), rows=len(phase)))

    def _from_arrays(self, file: FeatureFile, content: Content) -> Labels:
        phase = None if content.labels is None else self._phases(content.labels, content)
        tools = content.tools
        odd = tools is not None and (tools.shape[1:] != (len(self.spec.tools),) or not np.isin(tools, (-1, 0, 1)).all())
        if tools is None or odd or (phase is not None and len(phase) != len(tools)):
            tools = None
        if phase is None and tools is None:
            return Labels()
        record = None
        if phase is not None:
            digest = sha256(phase.tobytes()).hexdigest()
            relative = file.path.relative_to(self.found.root).as_posix()
            record = AnnotationFile(path=relative, sha256=digest, rows=max(1, len(phase)))
        return Labels(phase, None if tools is None else tools.astype(np.int8), record)

    def _phases(self, numbers: NDArray[Any], content: Content) -> NDArray[np.int8]:
        """Phases (L,) in the data set's order, from numbers in the order of the file's program."""
        order, path = self._order_of(content), content.path
        ids = np.append(ids_of_order(order, self.spec.phases), NO_LABEL)  # the last one for numbers that are ignored
        ignored = np.isin(numbers, IGNORED)
        known = ignored | np.isin(numbers, np.arange(len(order)))
        if not known.all():
            row = int(np.flatnonzero(~known)[0])
            raise UserError(f"{path}: label {numbers[row]} of row {row} is not one of the {len(order)} phases' numbers")
        found: NDArray[np.int8] = ids[np.where(ignored, len(order), numbers).astype(np.int64)].astype(np.int8)
        return found

    def _order_of(self, content: Content) -> Sequence[str]:
        if content.names and self.phase_order is None:
            known = class_ids(self.spec.phases, self.spec.phase_aliases)
            odd = [name for name in content.names if folded_name(name) not in known]
            if odd or len({known[folded_name(name)] for name in content.names}) != len(content.names):
                raise UserError(f"{content.path}: its phase names are not those of {self.spec.name}: {listed(odd)}")
            return [self.spec.phases[known[folded_name(name)]] for name in content.names]
        if self.order is None:
            asked = self.phase_order
            if asked is None and self.found.format == "tecno" and sorted(self.spec.phases) == sorted(TECNO_ORDER):
                asked = ",".join(TECNO_ORDER)
            self.order = parse_phase_order(asked, self.spec, str(content.path))
            say(f"phase numbers in {self.found.root}: {describe_order(self.order)}")
        return self.order

    def say_found(self, videos: Sequence[str], count: int) -> None:
        """Say where labels come from, and how many of `count` videos have some."""
        if self.source in ("index", "none"):
            return
        where = "in the files" if self.source == "files" else f"in {self.source}"
        if not videos:
            say(
                f"note: no labels {where}; name a folder of text files with --labels DIR, or an index with --index FILE"
            )
        elif len(videos) < count:
            say(f"labels {where}: of {len(videos)} of {count} videos")
