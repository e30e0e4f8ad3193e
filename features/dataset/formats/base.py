"""The interface of a format of annotation files, and the registry of formats.

A new format is one file that registers an `AnnotationFormat` (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.dataset_spec import DataSetSpec
from configs.registry import Registry
from features.dataset.annotations import LabelTrack

Parse = Callable[[bytes, Path, DataSetSpec], LabelTrack]
DEFAULT_FORMAT = "cholec80"


@dataclass(frozen=True)
class AnnotationFormat:
    """Functions that parse a file's bytes.

    `recognises` returns whether a file is of this format, from its content, or its name. `phases` and `tools` return
    the labels, (R,) and (R, K), or raise UserError; the path is for messages.
    """

    recognises: Callable[[bytes, Path], bool]
    phases: Parse
    tools: Parse


FORMATS: Registry[AnnotationFormat] = Registry("annotation format", "surgstage.annotations")


def find_format(content: bytes, path: Path) -> AnnotationFormat:
    """Return the format that recognises a file: this project's own first, and Cholec80's if none does.

    Plug-ins are imported only for files that no format of this project recognises. Raises UserError if an import fails.
    """
    for plugins in (False, True):
        for name in FORMATS.names(plugins):
            if FORMATS.find(name).recognises(content, path):
                return FORMATS.find(name)
    return FORMATS.find(DEFAULT_FORMAT)  # whose errors say what is wrong with the file
