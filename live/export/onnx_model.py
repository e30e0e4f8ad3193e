"""From a torch module to the bytes of an ONNX file, and ONNX Runtime to run them."""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError, one_line, type_and_line
from live.export.description import outputs_of
from live.export.frame_net import FrameNet

OPSET = 20
KEY = "surgstage"  # of the metadata: one JSON document
MOST_BYTES = 2**31 - 1  # of a file of protobuf
_LOUD = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")


def package(name: str) -> Any:
    """Import a package of the extra `onnx`. Raises UserError if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(
            f"export-model: {name} cannot be imported ({one_line(error)}); run `pip install -e '.[onnx]'`"
        ) from error


def convert(net: FrameNet, about: Mapping[str, Any]) -> bytes:
    """The module as an ONNX file with `about` in its metadata; the same module gives the same bytes.

    Raises UserError if the exporter knows no ONNX operation for one of torch's.
    """
    onnx = package("onnx")
    package("onnxscript")
    states = about["state"]
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                net.eval(),
                (torch.zeros(about["image"]["shape"]), *net.zero_state),
                input_names=[about["image"]["input"], *(one["input"] for one in states)],
                output_names=[*outputs_of(about), *(one["output"] for one in states)],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
        except Exception as error:  # exporters raise all kinds of exceptions for nets that they do not support
            reason = error.__cause__ or error
            raise UserError(f"export-model: torch cannot convert this net to ONNX ({type_and_line(reason)})") from error
    _strip(model)
    onnx.helper.set_model_props(model, {KEY: json.dumps(about, ensure_ascii=False, sort_keys=True)})
    if model.ByteSize() > MOST_BYTES:
        raise UserError("export-model: the nets exceed 2 GB, the most that one ONNX file can hold")
    onnx.checker.check_model(model, full_check=True)
    found: bytes = model.SerializeToString(deterministic=True)
    return found


def _strip(model: Any) -> None:
    """Remove where in the source each operation comes from, which holds the paths of this machine."""
    graph = model.graph
    for one in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        one.doc_string = ""
        del one.metadata_props[:]
    del graph.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for one in function.node:
            one.doc_string = ""
            del one.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard the warnings and log messages of the exporter, which are about its own code."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class OnnxSession:
    """An exported model in ONNX Runtime on the CPU, which carries the state from frame to frame of one video.

    Raises UserError if ONNX Runtime is missing or cannot run it.
    """

    def __init__(self, content: bytes, threads: int) -> None:
        runtime = package("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        try:
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # it has a type of its own for each reason
            raise UserError(f"export-model: ONNX Runtime cannot run this net ({type_and_line(error)})") from error
        self.about: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map[KEY])
        self._outputs = [one.name for one in self._session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Start a new video."""
        self._state = {one["input"]: np.zeros(one["shape"], one["type"]) for one in self.about["state"]}

    def step(self, image: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The probabilities (C,) of each output for the next frame, image (1, 3, S, S)."""
        values = self._session.run(None, {self.about["image"]["input"]: image, **self._state})
        found = dict(zip(self._outputs, values, strict=True))
        self._state = {one["input"]: found.pop(one["output"]) for one in self.about["state"]}
        return {name: value[0] for name, value in found.items()}
