"""The backbone in OpenVINO, on a CPU: fp32, bf16, or int8 calibrated on training frames.

int8 means post-training quantisation by NNCF. Weights are quantised per channel, activations per tensor, with ranges
measured on frames of training videos. Weights use half of the 8-bit range (NNCF's overflow fix), because CPUs without
VNNI add pairs of products in 16 bits, which saturate with larger weights. The first convolution stays in fp32: this
costs little time, while rounding its weights would cost more accuracy than rounding all other layers
(docs/performance.md).

OpenVINO's packages send usage data to Google Analytics unless the user has opted out. Here they never send any, because
the package that does so is hidden from them before they are imported.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import io
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from configs.errors import UserError, one_line, type_and_line
from configs.schema import PreprocessConfig, height_width

_TELEMETRY = "openvino_telemetry"
# One thread, since extraction runs one process per core. Not pinned to a core, since OpenVINO does not know about the
# other processes.
_COMPILE = {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False, "PERFORMANCE_HINT": "LATENCY"}
# Parts of an int8 graph that stay in floating point (first layer, mean over the last map) use fp32 on every CPU.
_CONVOLUTIONS = {"Convolution", "GroupConvolution"}
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """This thread's alternate signal stack (sigaltstack(2)) is afterwards what it was before.

    A CPU plugin of OpenVINO installs a stack of its own when it is loaded, and when it is freed it unmaps that stack
    and puts its predecessor back. Plugins that are not freed in the reverse order leave a stack that is unmapped, and
    the next signal that Python handles, such as SIGCHLD once a DataLoader has run, ends the process with SIGSEGV.
    A plugin whose stack is no longer in use leaves the current one alone.
    """
    if not sys.platform.startswith("linux"):  # elsewhere OpenVINO installs no stack
        yield
        return
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # a stack_t is smaller
    libc.sigaltstack(None, before)
    try:
        yield
    finally:
        libc.sigaltstack(before, None)


class OpenVinoNet:
    """A net in OpenVINO: crops (N, S, S, 3) uint8 -> embeddings (N, D) float32, computed by one CPU thread.

    Normalisation is part of the graph. `graph` and `weights` are the contents of OpenVINO's two files, so that the net
    can be sent to another process.
    """

    def __init__(self, graph: bytes, weights: bytes, precision: str) -> None:
        self.graph, self.weights, self.precision = graph, weights, precision

    @functools.cached_property
    @_signal_stack_kept()
    def _compiled(self) -> Any:
        core = openvino().Core()
        model = core.read_model(self.graph, self.weights)
        return core.compile_model(model, "CPU", {**_COMPILE, "INFERENCE_PRECISION_HINT": _HINTS[self.precision]})

    def __call__(self, crops: Tensor) -> Tensor:
        return torch.from_numpy(self._compiled(crops.numpy())[0])  # (N, D), a copy of the output

    def __getstate__(self) -> dict[str, Any]:
        return {"graph": self.graph, "weights": self.weights, "precision": self.precision}


@functools.cache
def openvino(module: str = "openvino") -> Any:
    """Import a module of OpenVINO so that it sends no usage data. Raises UserError if it cannot be imported."""
    sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type] # importing it raises ImportError from now on
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # NNCF imports it; it warns without a GPU
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise UserError(
            f"extract.engine=openvino: {module} cannot be imported ({one_line(error)}); run `pip install -e "
            "'.[openvino]'`, or set extract.engine=torch"
        ) from error


def convert(backbone: nn.Module, preprocess: PreprocessConfig, precision: str) -> OpenVinoNet:
    """The backbone as an OpenVINO net in fp32 or bf16, with normalisation in front of it.

    Raises UserError if OpenVINO is missing or cannot convert the network.
    """
    return _packed(_model(backbone, preprocess), precision)


def calibrate(backbone: nn.Module, preprocess: PreprocessConfig, crops: Sequence[NDArray[np.uint8]]) -> OpenVinoNet:
    """The backbone as an OpenVINO net in int8, with ranges measured on crops (S, S, 3) uint8 of training frames.

    Raises UserError if OpenVINO or NNCF is missing or cannot quantise the network.
    """
    model, nncf = _model(backbone, preprocess), openvino("nncf")
    nncf.set_log_level(logging.ERROR)
    fix = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    frames = nncf.Dataset([crop[None] for crop in crops])
    convolutions = (layer for layer in model.get_ordered_ops() if layer.get_type_name() in _CONVOLUTIONS)
    first = [layer.get_friendly_name() for layer in itertools.islice(convolutions, 1)]
    with _refusals("quantise"), _signal_stack_kept():
        quantised = nncf.quantize(
            model,
            frames,
            subset_size=len(crops),
            preset=nncf.QuantizationPreset.MIXED,
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(names=first),
            advanced_parameters=fix,
        )
    return _packed(quantised, "int8")


def _model(backbone: nn.Module, preprocess: PreprocessConfig) -> Any:
    """An OpenVINO model (N, S, S, 3) uint8 -> (N, D) float32 for any N."""
    ov, size = openvino(), height_width(preprocess.crop_px)
    steps = openvino("openvino.preprocess").PrePostProcessor
    with _refusals("convert"), torch.inference_mode():
        image = torch.zeros(1, 3, *size)
        model = ov.convert_model(backbone.eval(), example_input=image, input=[-1, 3, *size])
        graph = steps(model)
        crops = graph.input()
        crops.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
        crops.model().set_layout(ov.Layout("NCHW"))
        mean, std = ([255 * value for value in values] for values in (preprocess.mean, preprocess.std))
        crops.preprocess().convert_element_type(ov.Type.f32).mean(mean).scale(std)
        return graph.build()


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Discard the libraries' progress output, and turn an error that a network causes into a UserError."""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # torch's tracer warns that it treats shapes as constants
            yield
    except UserError:
        raise
    except Exception as error:  # converters raise all kinds of exceptions for networks that they do not support
        raise UserError(
            f"extract.engine=openvino: cannot {what} this network ({type_and_line(error)}); set extract.engine=torch"
        ) from error


def _packed(model: Any, precision: str) -> OpenVinoNet:
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "net.xml"
        openvino().save_model(model, graph, compress_to_fp16=False)
        return OpenVinoNet(graph.read_bytes(), graph.with_suffix(".bin").read_bytes(), precision)
