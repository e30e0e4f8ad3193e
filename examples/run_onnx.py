"""Recognise phases with a model of `export-model`. Needs ONNX Runtime and NumPy, and nothing else of this project.

    python run_onnx.py MODEL.onnx FRAMES.npy
    program-that-writes-frames | python run_onnx.py MODEL.onnx

FRAMES are float32 (N, 3, S, S), prepared as the model's metadata says, at its rate `fps`; on stdin .npy or bare
numbers. Prints number, time, phase and probability of each frame; with a decoding, filtered (or calibrated only).
Left out: tools and further tracks, which are outputs of the model too, and the Viterbi path of the mode `causal`."""

import json
import sys

import numpy as np
import onnxruntime

TINY = np.finfo(np.float32).tiny


def frames_of(stream, shape):
    """Frames (1, 3, S, S), one at a time, of a .npy file or of bare float32 values."""
    size, head = int(np.prod(shape)) * 4, stream.read(6)
    if head == b"\x93NUMPY":
        formats = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        found, fortran, kind = formats[stream.read(2)[0]](stream)
        if kind != np.float32 or fortran or list(found[1:]) != shape[1:]:
            raise ValueError(f"expected float32 frames (N, {shape[1:]}), got {kind} {found}")
        head = b""
    while data := head + stream.read(size - len(head)):
        if len(data) < size:
            raise ValueError(f"the last frame has {len(data)} of {size} bytes")
        yield np.frombuffer(data, np.float32).reshape(shape)
        head = b""


def scaled(p, temperature):
    log_p = np.log(np.maximum(p, TINY, dtype=np.float64)) / temperature
    powers = np.exp(log_p - log_p.max())
    return powers / powers.sum()


class Decoder:
    """Temperature and forward filter (docs/decoding.md); without a decoding, probabilities stay as they are."""

    def __init__(self, decoding):
        self.track = decoding and decoding["tracks"]["phases"]
        self.filter = self.track["filter"] if decoding and decoding["mode"] != "calibrated" else None
        self.predicted = np.array(self.track["graph"]["initial"]) if self.filter else None

    def step(self, p):
        p = scaled(p, self.track["temperature"]) if self.track else p
        if not self.filter:
            return p
        posterior = self.predicted * np.maximum(p, TINY) ** self.filter["weight"]
        posterior /= posterior.sum()
        self.predicted = posterior @ np.array(self.filter["matrix"])
        return scaled(posterior, self.filter["temperature"])


def main(model, frames=None):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["surgstage"])
    state = {one["input"]: np.zeros(one["shape"], one["type"]) for one in about["state"]}
    names, decoder = [one.name for one in session.get_outputs()], Decoder(about["decoding"])
    stream = open(frames, "rb") if frames else sys.stdin.buffer  # noqa: SIM115
    for number, image in enumerate(frames_of(stream, about["image"]["shape"])):
        found = dict(zip(names, session.run(None, {about["image"]["input"]: image, **state}), strict=True))
        state = {one["input"]: found[one["output"]] for one in about["state"]}
        p = decoder.step(found["phases"][0])
        if not np.isfinite(p).all():
            raise ValueError(f"frame {number}: its values, or those of a frame before, are not finite")
        phase = about["tracks"][0]["classes"][p.argmax()]
        print(number, f"{number / about['fps']:.3f}", phase, f"{p.max():.6f}", sep="\t", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"error: {error}")
